#!/usr/bin/env python
"""Compare the memory of Detectron2's training loader and GDetKD's on a dataset of COCO's size.

python benchmarks/memory.py [--images 118000] [--boxes 860000] [--polygons] [--json FILE]

The dataset is generated: a JSON file, and links to one image. Each loader has a process of its own, which reads the
JSON, takes one batch and prints its resident memory. "nothing" is a process that only imports both packages.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterable

from gdetkd import add_gdetkd_config  # first: it prepares the import of Detectron2

import numpy as np  # isort: skip
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from tabulate import tabulate
from timing import machine

from gdetkd.data import build_train_loader, register_datasets

NAME = "memory"  # name of the registered dataset
CATEGORIES = 80
WIDTH, HEIGHT = 640, 480
POLYGON_POINTS = 22  # corners of a polygon, about COCO's mean
LOADERS = ("nothing", "Detectron2", "GDetKD")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, default=860_000)
    parser.add_argument("--polygons", action="store_true", help="give every object a polygon")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--hold", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_dataset(folder: Path, images: int, boxes: int, polygons: bool) -> None:
    """Write `memory.json` and its images. All images are links to one file."""
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "image.jpg")
    names = [f"{index:012d}.jpg" for index in range(images)]
    for name in names:
        (folder / name).symlink_to("image.jpg")
    content = {
        "info": {},
        "images": [
            {"id": index, "file_name": name, "width": WIDTH, "height": HEIGHT} for index, name in enumerate(names)
        ],
        "annotations": list(_annotations(images, boxes, polygons)),
        "categories": [{"id": number, "name": f"class{number}"} for number in range(1, CATEGORIES + 1)],
    }
    (folder / f"{NAME}.json").write_text(json.dumps(content))


def _annotations(images: int, boxes: int, polygons: bool) -> Iterable[Dict[str, Any]]:
    rng = np.random.default_rng(0)
    image_ids = np.sort(rng.integers(0, images, boxes)).tolist()
    categories = rng.integers(1, CATEGORIES + 1, boxes).tolist()
    corners = (rng.random((boxes, 2)) * 300).round(2)
    sizes = (1 + rng.random((boxes, 2)) * 170).round(2)
    for index, (image_id, category) in enumerate(zip(image_ids, categories)):
        annotation = {
            "id": index + 1,
            "image_id": image_id,
            "category_id": category,
            "bbox": [*corners[index].tolist(), *sizes[index].tolist()],
            "area": float(sizes[index].prod()),
            "iscrowd": 0,
        }
        if polygons:
            points = corners[index] + rng.random((POLYGON_POINTS, 2)) * sizes[index]
            annotation["segmentation"] = [points.round(2).flatten().tolist()]
        yield annotation


def make_config(folder: Path) -> CfgNode:
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    cfg.DATASETS.TRAIN = (NAME,)
    cfg.DATASETS.REGISTER = [
        {"name": NAME, "kind": "coco", "json": str(folder / f"{NAME}.json"), "images": str(folder)}
    ]
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 1
    return cfg


def hold(loader: str, folder: Path) -> None:
    """Build a loader, take a batch and print this process's memory in MB."""
    cfg, held, batch = make_config(folder), None, None
    if loader == "Detectron2":
        register_coco_instances(NAME, {}, str(folder / f"{NAME}.json"), str(folder))
        held = build_detection_train_loader(cfg)
    elif loader == "GDetKD":
        register_datasets(cfg)
        held = build_train_loader(cfg)
    if held is not None:
        batches = iter(held)
        batch = next(batches)
    gc.collect()
    print(json.dumps({"resident": memory("VmRSS"), "peak": memory("VmHWM"), "images": len(batch or ())}))


def memory(key: str) -> float:
    """Return the memory of this process in MB, by the name that Linux gives it (VmRSS, VmHWM)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def measure(loader: str, folder: Path) -> Dict[str, Any]:
    command = [sys.executable, __file__, "--hold", loader, "--folder", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"loader": loader, **json.loads(output.splitlines()[-1])}


def main() -> None:
    args = parse_arguments()
    if args.hold:
        hold(args.hold, args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_dataset(folder, args.images, args.boxes, args.polygons)
        results = [measure(loader, folder) for loader in LOADERS]
    if args.json:
        args.json.write_text(json.dumps({"machine": machine("cpu"), "runs": results}, indent=2) + "\n")
    base = results[0]["resident"]
    rows = [
        [run["loader"], f"{run['resident']:.0f}", f"{run['resident'] - base:.0f}", f"{run['peak']:.0f}"]
        for run in results
    ]
    print(f"{args.images} images, {args.boxes} boxes{', polygons' if args.polygons else ''}; {machine('cpu')}\n")
    headers = ["loader", "resident, MB", "more than nothing, MB", "peak, MB"]
    print(tabulate(rows, headers, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
