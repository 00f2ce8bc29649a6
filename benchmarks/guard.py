#!/usr/bin/env python
"""Times what the guard before each optimizer's step costs: looking at the losses, keeping what a bad step would change.

python benchmarks/guard.py --config-file FILE [--steps 40] [--json FILE] [KEY VALUE ...]

On a GPU the guard also waits there for the step, which Detectron2 does a moment later anyway.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List
from unittest import mock

from gdetkd import DistillTrainer
from gdetkd.config_file import load_config
from gdetkd.data.shapes import make_shapes_for
from gdetkd.engine.guard import StepGuard
from gdetkd.engine.optimizer_step import StepAgreement
from gdetkd.engine.step_costs import now
from gdetkd.errors import GDetKDError

from detectron2.engine import HookBase  # isort: skip
from timing import WARM_UP, machine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE changes to the config")
    return parser.parse_args()


class StepTime(HookBase):
    """From the end of the other hooks before a step to the end of all after it."""

    def __init__(self) -> None:
        self.seconds: List[float] = []

    def before_step(self) -> None:
        self._start = now()

    def after_step(self) -> None:
        self.seconds.append(now() - self._start)


def timed(function: Callable[..., Any], seconds: List[float]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        start = now()
        result = function(*args)
        seconds.append(now() - start)
        return result

    return run


def run(args: argparse.Namespace, folder: str) -> Dict[str, float]:
    steps = WARM_UP + args.steps
    keys = ["MODEL.DEVICE", args.device, "OUTPUT_DIR", folder, "SOLVER.MAX_ITER", steps, "DATASETS.TEST", "()"]
    cfg = load_config(args.config_file, [*keys, "SOLVER.CHECKPOINT_PERIOD", 10 * steps, *args.opts])
    make_shapes_for(cfg)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    whole = StepTime()
    trainer.register_hooks([whole])
    parts: Dict[str, List[float]] = {"before_step": [], "check": []}
    before_step, check = StepGuard.before_step, StepAgreement.after_backward
    with mock.patch.object(StepGuard, "before_step", timed(before_step, parts["before_step"])):
        with mock.patch.object(StepAgreement, "after_backward", timed(check, parts["check"])):
            trainer.train()
    result = {name: statistics.median(seconds[WARM_UP:]) for name, seconds in parts.items()}
    return {**result, "step": statistics.median(whole.seconds[WARM_UP:])}


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, folder)
    share = (result["before_step"] + result["check"]) / result["step"]
    if args.json:
        args.json.write_text(json.dumps({**result, "share": share, "machine": machine(args.device)}, indent=2) + "\n")
    print(machine(args.device))
    print(f"before the step {1e3 * result['before_step']:.2f} ms, before the optimizer {1e3 * result['check']:.2f} ms")
    print(f"of a step of {1e3 * result['step']:.0f} ms: {100 * share:.2f} %")


if __name__ == "__main__":
    try:
        main()
    except GDetKDError as error:
        sys.exit(str(error))
