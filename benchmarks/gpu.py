#!/usr/bin/env python
"""Measure on a GPU, within a given time, what distillation costs, and show that a short training works.

python benchmarks/gpu.py [--minutes 8] [--output output/gpu] [--device cuda] [--images 2] [--image-size 800 1333]

It writes gpu.json and gpu.md, a page with tables that docs/performance.md can take unchanged. Both are written after
each item, so nothing is lost if the benchmark is ended. --only TEXT measures only the items whose name has that text.
--tiny uses tiny images and detectors, to try the code on a CPU.

1. For each of four pairs, in float32 and with AMP: the student's step, the teacher's forward pass, a step with each
   loss and a step with all losses. Images and weights are made up.
2. The training loader, to compare with a step.
3. A short training of the quickstart's pair.
"""

import argparse
import functools
import json
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from gdetkd.files import written_whole

import torch  # isort: skip
import detectron2
from budget import Budget, run_items
from gpu_page import as_markdown
from inputs import make_batch
from loader_speed import measure_loader, workers_to_try
from pair_cost import measure_pair, precision_of
from short_training import measure_training
from timing import WARM_UP

ROOT = Path(__file__).resolve().parents[1]
COCO = "configs/COCO-Detection/"
PAIRS = {
    "Faster R-CNN R50 → R18": f"{COCO}faster_rcnn_R_50-faster_rcnn_R_18_1x.yaml",
    "Faster R-CNN X101 → R50": f"{COCO}faster_rcnn_X_101-faster_rcnn_R_50_2x_ms.yaml",
    "Faster R-CNN R50 → RetinaNet R18": f"{COCO}faster_rcnn_R_50-retinanet_R_18_1x.yaml",
    "Faster R-CNN R50 → FCOS R18": f"{COCO}faster_rcnn_R_50-fcos_R_18_1x.yaml",
}
QUICKSTART = "configs/quickstart/faster_rcnn-faster_rcnn.yaml"


@dataclass(frozen=True)
class Size:
    """Hold what makes the benchmark large or tiny.

    Attributes:
        opts, teacher_opts: KEY VALUE changes to the configs of the pairs.
        image_size: height and width of the made-up images, in pixels.
        warm_up: rounds of a pair that are not counted.
        rounds: most rounds of a pair.
        loader_seconds: time of the loader for each number of workers.
        iterations, window: of the short training.
        training_opts: KEY VALUE changes to the config of the short training.
    """

    opts: Tuple[Any, ...] = ()
    teacher_opts: Tuple[Any, ...] = ()
    image_size: Tuple[int, int] = (800, 1333)
    warm_up: int = WARM_UP
    rounds: int = 20
    loader_seconds: float = 5.0
    iterations: int = 300
    window: int = 20
    training_opts: Tuple[Any, ...] = ()


# The detectors of the tests: a ResNet-50 of 4 to 64 channels. Detectron2 builds no narrow ResNet-18.
_NARROW = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NUM_GROUPS", 1, "MODEL.RESNETS.WIDTH_PER_GROUP", 2)
_NARROW += ("MODEL.RESNETS.STEM_OUT_CHANNELS", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.FPN.OUT_CHANNELS", 32)
_NARROW += ("MODEL.ROI_BOX_HEAD.FC_DIM", 16)
_SHORT = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8, "DISTILL.REGIONS.BATCH_SIZE_PER_IMAGE", 8)
_SHORT += ("INPUT.MIN_SIZE_TRAIN", (96,), "DISTILL.SGFI.EMBED_CHANNELS", (8, 8), "DISTILL.CKD.QUEUE_SIZE", 32)
FULL = Size()
TINY = Size((*_NARROW, *_SHORT), _NARROW, (64, 96), 0, 2, 0.1, 4, 2, ("SOLVER.IMS_PER_BATCH", 2))


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time of the whole benchmark")
    parser.add_argument("--output", type=Path, default=Path("output/gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--images", type=int, default=2, help="images of a step; the recipes have 2 on each GPU")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="default: 800 1333")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure only the items whose name has this text")
    parser.add_argument("--tiny", action="store_true", help="tiny images and detectors, for a CPU")
    return parser.parse_args(words)


def describe(args: argparse.Namespace, words: Sequence[str], image_size: Tuple[int, int]) -> Dict[str, Any]:
    """Return what a reader has to know about the machine, the versions and the command.

    The command lacks --output, which is a folder of this machine.
    """
    command = re.sub(r" --output[ =]\S+", "", shlex.join(["python", "benchmarks/gpu.py", *words]))
    on_gpu = args.device == "cuda"
    return {
        "card": torch.cuda.get_device_name() if on_gpu else None,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "detectron2": detectron2.__version__,
        "tf32_convolutions": on_gpu and torch.backends.cudnn.allow_tf32,
        "command": command,
        "minutes": args.minutes,
        "images": args.images,
        "image_size": list(image_size),
        "tiny": args.tiny,
    }


def list_items(
    args: argparse.Namespace, size: Size, budget: Budget, result: Dict[str, Any]
) -> Dict[str, Callable[[], None]]:
    """Return the items of the benchmark by name. Each adds what it measures to `result`."""
    batch = make_batch(args.images, *(args.image_size or size.image_size))
    device = ["MODEL.DEVICE", args.device]
    opts, teacher_opts = [*device, *size.opts], list(size.teacher_opts)

    def pair(name: str, amp: bool) -> None:
        found = measure_pair(PAIRS[name], opts, teacher_opts, batch, amp, budget, size.warm_up)
        result["pairs"].append({"pair": name, **found})

    def loader() -> None:
        first = next(iter(PAIRS.values()))
        result["loader"] = measure_loader(first, opts, workers_to_try(), args.images, size.loader_seconds, budget)

    def training() -> None:
        opts = [*device, *size.training_opts]
        result["training"] = measure_training(QUICKSTART, opts, size.iterations, size.window, budget)

    items: Dict[str, Callable[[], None]] = {}
    for name in PAIRS:
        for amp in (False, True):
            items[f"{name} in {precision_of(args.device, amp)}"] = functools.partial(pair, name, amp)
    items.update({"the loader": loader, "the short training": training})
    return {name: item for name, item in items.items() if args.only in name}


def main(words: Optional[Sequence[str]] = None) -> int:
    """Run the benchmark with the command line's words, or with the given ones. Return 1 if an item failed."""
    words = sys.argv[1:] if words is None else words
    args = parse_arguments(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device. Use a machine with a GPU, or add --device cpu --tiny to try the code.")
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    size = TINY if args.tiny else FULL
    budget = Budget(60 * args.minutes, size.rounds)
    result: Dict[str, Any] = {**describe(args, words, args.image_size or size.image_size), "pairs": []}
    result.update({"loader": [], "training": None, "not_reached": [], "failed": {}})
    items = list_items(args, size, budget, result)

    def keep(missed: List[str], failed: Dict[str, Dict[str, str]]) -> None:
        result.update({"not_reached": missed, "failed": failed})
        for name, text in (("gpu.json", json.dumps(result, indent=2) + "\n"), ("gpu.md", as_markdown(result))):
            with written_whole(str(output / name)) as file:
                file.write(text)

    run_items(items, budget, keep)
    print((output / "gpu.md").read_text())
    for name, failure in result["failed"].items():
        print(f"{name} failed:\n{failure['traceback']}", file=sys.stderr)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
