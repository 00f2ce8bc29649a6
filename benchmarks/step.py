#!/usr/bin/env python
"""Time a training step with and without distillation, and the parts of a step, in turn in one process.

python benchmarks/step.py --config-file FILE [--device cuda] [--image-size H W] [--json FILE] [KEY VALUE ...]

The floor is the student's own step plus the teacher's forward pass on the student's regions. Images and boxes are
random. If you do not have the teacher's weights, use --random-weights.
"""

import argparse
import functools
import json
import statistics
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Tuple
from unittest import mock

from gdetkd.config_file import load_config
from gdetkd.distiller import GDetKD
from gdetkd.engine.step_costs import LATE, now, peak_memory, time_in_rounds
from gdetkd.program import explained_errors
from gdetkd.teacher import read_teacher_file

import torch  # isort: skip
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from inputs import make_batch
from tabulate import tabulate
from timing import WARM_UP, machine, quartiles


def parse_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("H", "W"), help="default: the config's short side, 4:3"
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="give the teacher random weights; they do not change the time"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE changes to the config")
    return parser.parse_args()


def make_config(args: argparse.Namespace, folder: str) -> CfgNode:
    cfg = load_config(args.config_file, ["MODEL.DEVICE", args.device, *args.opts])
    if args.random_weights:
        give_weights(cfg, read_teacher_file(cfg).build(), folder)
    return cfg


def give_weights(cfg: CfgNode, teacher: torch.nn.Module, folder: str) -> None:
    """Write the weights of a teacher that was built, and name the file in the config."""
    weights = Path(folder) / "random.pth"
    torch.save({"model": teacher.state_dict()}, weights)
    cfg.DISTILL.TEACHER.WEIGHTS = str(weights)


def build(cfg: CfgNode, losses: Tuple[str, ...], like: Any = None) -> GDetKD:
    """Build a distiller with some of the losses. It shares the teacher of the distiller `like`, if there is one."""
    cfg = cfg.clone()
    cfg.DISTILL.LOSSES = losses
    # The detectors are on the device already. The losses are where Python made them.
    return GDetKD(cfg, like.teacher if like else None).to(cfg.MODEL.DEVICE).train()


def step(
    model: torch.nn.Module, batch: List[Dict[str, Any]], autocast: Callable[[], ContextManager] = nullcontext
) -> None:
    """Take a step without the optimizer. The forward pass runs within `autocast()`."""
    with EventStorage(LATE), autocast():
        total = sum(model(batch).values())
    total.backward()
    model.zero_grad(set_to_none=True)


@contextmanager
def timed_parts(model: GDetKD, seconds: Dict[str, List[float]]) -> Iterator[None]:
    """Record inside how long each part of the model's forward pass takes.

    Args:
        seconds: maps a part to the seconds of its calls; this function adds to it.
    """

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = function(*args, **kwargs)
            seconds.setdefault(name, []).append(now() - start)
            return result

        return run

    parts = [(model.student, "forward", "student's forward"), (model.adapter, "observe", "regions")]
    parts += [(model.teacher, "extract", "teacher's backbone"), (model.teacher, "look_at", "teacher on the regions")]
    if model.level_chooser is not None:
        parts += [(model.level_chooser, "pool", "RoIAlign, all levels (part of SGFI)")]
    parts += [(loss, "forward", f"{name}, forward") for name, loss in model.losses.items()]
    with ExitStack() as stack:
        for owner, attribute, name in parts:
            stack.enter_context(mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield


def breakdown(model: GDetKD, batch: List[Dict[str, Any]], steps: int) -> Dict[str, float]:
    """Return the median seconds of each part of a step with all losses."""
    seconds: Dict[str, List[float]] = {}
    with timed_parts(model, seconds):
        for _ in range(WARM_UP + steps):
            with EventStorage(LATE):
                total = sum(model(batch).values())
            start = now()
            total.backward()
            seconds.setdefault("backward", []).append(now() - start)
            model.zero_grad(set_to_none=True)
    return {name: statistics.median(values[WARM_UP:]) for name, values in seconds.items()}


def teachers_look(
    model: GDetKD, batch: List[Dict[str, Any]], autocast: Callable[[], ContextManager] = nullcontext
) -> "functools.partial[Any]":
    """Return the teacher's forward pass on the regions of one step. Its second argument is the regions."""
    calls = []
    look_at = model.teacher.look_at

    def record(features: Any, *args: Any) -> Any:
        calls.append(functools.partial(model.teacher.look, batch, *args))
        return look_at(features, *args)

    with mock.patch.object(model.teacher, "look_at", record), EventStorage(LATE), autocast():
        model(batch)
    return calls[0]


def run(cfg: CfgNode, args: argparse.Namespace) -> Dict[str, Any]:
    short_side = cfg.INPUT.MIN_SIZE_TRAIN[-1]
    batch = make_batch(cfg.SOLVER.IMS_PER_BATCH, *(args.image_size or (short_side, short_side * 4 // 3)))
    everything = tuple(cfg.DISTILL.LOSSES)
    full = build(cfg, everything)
    full.teacher.cache = None  # one batch comes again and again, so a cache would spare the teacher all work
    distillers = {name: build(cfg, (name,), full) for name in everything} if len(everything) > 1 else {}
    distillers["all"] = full
    look = teachers_look(full, batch)
    images = full.teacher.preprocess(batch).tensor

    def backbone() -> None:
        with torch.no_grad():
            full.teacher.model.backbone(images)

    works: Dict[str, Callable[[], Any]] = {
        "plain student": lambda: step(full.student, batch),
        "teacher, backbone": backbone,
        "teacher, on the regions": look,
        "teacher, whole inference": lambda: inference(full.teacher.model, batch),
    }
    works.update({f"distilled, {name}": lambda model=model: step(model, batch) for name, model in distillers.items()})
    seconds = time_in_rounds(works, args.steps, WARM_UP)
    megabytes = {name: peak_memory(work) for name, work in works.items()}
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    floor = middle["plain student"] + middle["teacher, on the regions"]
    backbone_floor = middle["plain student"] + middle["teacher, backbone"]
    return {
        "machine": machine(args.device),
        "images": [list(sample["image"].shape[1:]) for sample in batch],
        "regions": len(look.args[1]),
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "megabytes": megabytes,
        "ratio_to_plain": middle["distilled, all"] / middle["plain student"],
        "ratio_to_floor": middle["distilled, all"] / floor,
        "ratio_to_backbone_floor": middle["distilled, all"] / backbone_floor,
        "breakdown": breakdown(full, batch, args.steps),
    }


@torch.no_grad()
def inference(teacher: torch.nn.Module, batch: List[Dict[str, Any]]) -> None:
    teacher([{"image": sample["image"]} for sample in batch])


def as_text(result: Dict[str, Any]) -> str:
    rows = [
        [name, f"{middle:.4f}", f"{low:.4f} to {high:.4f}", f"{result['megabytes'][name]:.0f}"]
        for name, (low, middle, high) in result["seconds"].items()
    ]
    parts = [[name, f"{seconds:.4f}"] for name, seconds in result["breakdown"].items()]
    images = result["images"]
    return "\n\n".join(
        [
            f"{result['machine']}; {len(images)} images of {images[0][0]}x{images[0][1]}, {result['regions']} regions",
            f"distilled, all: {result['ratio_to_plain']:.3f} times the plain student, "
            f"{result['ratio_to_floor']:.3f} times the floor (plain student + teacher on the regions), "
            f"{result['ratio_to_backbone_floor']:.3f} times plain student + teacher's backbone",
            tabulate(rows, ["step", "median, s", "quartiles", "MB"], disable_numparse=True),
            tabulate(parts, ["part of a step with all", "median, s"], disable_numparse=True),
        ]
    )


def main() -> None:
    args = parse_arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        result = run(make_config(args, folder), args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(as_text(result))


if __name__ == "__main__":
    with explained_errors():
        main()
