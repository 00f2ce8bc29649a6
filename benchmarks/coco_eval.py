#!/usr/bin/env python
"""Times COCO's box metrics by pycocotools and by faster-coco-eval (TEST.COCO_EVAL), on made-up detections.

python benchmarks/coco_eval.py [--images 1000] [--classes 80] [--detections 100] [--rounds 3] [--json FILE]
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, Dict, List

from gdetkd import add_gdetkd_config
from gdetkd.data import register_datasets
from gdetkd.engine.evaluators import build_evaluator
from gdetkd.engine.step_costs import now

import torch  # isort: skip
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from timing import machine

OBJECTS, SIZE = 7, 640  # objects of an image, as COCO has, and its pixels
BY = ("pycocotools", "faster-coco-eval")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--detections", type=int, default=100, help="of an image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def make_boxes(count: int) -> torch.Tensor:
    """(count, 4) xyxy in pixels."""
    corners = torch.rand(count, 2) * SIZE * 0.7
    return torch.cat([corners, corners + 8 + torch.rand(count, 2) * SIZE * 0.29], dim=1)


def write_set(folder: str, args: argparse.Namespace) -> CfgNode:
    """A COCO file of made-up objects, registered."""
    annotations: List[Dict[str, Any]] = []
    for image in range(args.images):
        for x1, y1, x2, y2 in make_boxes(OBJECTS).tolist():
            box = [x1, y1, x2 - x1, y2 - y1]
            category = int(torch.randint(args.classes, ())) + 1
            annotation = {"id": len(annotations) + 1, "image_id": image + 1, "category_id": category, "bbox": box}
            annotations.append({**annotation, "area": box[2] * box[3], "iscrowd": 0})
    images = [{"id": i + 1, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(args.images)]
    categories = [{"id": i + 1, "name": str(i)} for i in range(args.classes)]
    path = Path(folder, "made_up.json")
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories}))
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    cfg.DATASETS.REGISTER = [{"name": "made_up", "kind": "coco", "json": str(path), "images": folder}]
    cfg.OUTPUT_DIR = folder
    register_datasets(cfg)
    return cfg


def evaluate(cfg: CfgNode, by: str, args: argparse.Namespace) -> Dict[str, Any]:
    """Seconds of the metrics alone, and AP."""
    cfg = cfg.clone()
    cfg.TEST.COCO_EVAL = by
    evaluator = build_evaluator(cfg, "made_up")
    evaluator.reset()
    torch.manual_seed(1)
    for image in range(args.images):
        found = Instances((SIZE, SIZE))
        found.pred_boxes = Boxes(make_boxes(args.detections))
        found.scores = torch.rand(args.detections)
        found.pred_classes = torch.randint(args.classes, (args.detections,))
        evaluator.process([{"image_id": image + 1, "file_name": f"{image}.png"}], [{"instances": found}])
    start = now()
    with contextlib.redirect_stdout(io.StringIO()):
        ap = evaluator.evaluate()["bbox"]["AP"]
    return {"seconds": now() - start, "AP": ap}


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        cfg = write_set(folder, args)
        rounds = [{by: evaluate(cfg, by, args) for by in BY} for _ in range(args.rounds)]
    seconds = {by: statistics.median(each[by]["seconds"] for each in rounds) for by in BY}
    if args.json:
        args.json.write_text(json.dumps(rounds, indent=2) + "\n")
    rows = [
        [by, f"{seconds[by]:.2f}", f"{seconds[by] / seconds[BY[0]]:.2f}", f"{rounds[0][by]['AP']:.6f}"] for by in BY
    ]
    print(f"{machine('cpu')}; {args.images} images, {args.classes} classes, {args.detections} detections an image\n")
    print(tabulate(rows, ["by", "median, s", "ratio", "AP"], "github", disable_numparse=True))


if __name__ == "__main__":
    main()
