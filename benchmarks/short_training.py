"""Train the quickstart's student for a short time, to show that its losses fall."""

import tempfile
import time
from statistics import fmean
from typing import Any, Dict, List

from gdetkd.config_file import load_config
from gdetkd.data.folders import resolve
from gdetkd.data.shapes import CLASSES, FOLDER, make_shapes
from gdetkd.engine import DistillTrainer

from budget import Budget, OutOfTime  # isort: skip
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

SPLIT = "student"  # of the generated dataset


class _Curve(HookBase):
    """Keep the losses of each iteration. End the training when the item's share of the time is over."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._start = 0.0
        self.losses: List[Dict[str, float]] = []
        self.seconds: List[float] = []  # since the start, after each iteration

    def before_train(self) -> None:
        self._start = time.perf_counter()

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        self.losses.append({name: value for name, (value, _) in latest.items() if name.split("_")[-1] != "time"})
        self.seconds.append(time.perf_counter() - self._start)
        if self._budget.left_for_item() <= 0:
            self.trainer.max_iter = self.trainer.iter + 1


def measure_training(config_file: str, opts: List[Any], iterations: int, window: int, budget: Budget) -> Dict[str, Any]:
    """Train a pair and return its losses at the start and at the end.

    Args:
        config_file: a pair of the quickstart.
        opts: KEY VALUE changes to the config.
        iterations: length of the schedule. The training ends earlier if the time is over.
        window: iterations at the start and at the end over which losses are averaged.

    Raises:
        OutOfTime: the training ended before two windows were over.
    """
    make_shapes(resolve(FOLDER), (SPLIT,))
    cfg = load_config(config_file, opts)
    cfg.DATASETS.REGISTER = [entry for entry in cfg.DATASETS.REGISTER if entry["name"] in cfg.DATASETS.TRAIN]
    cfg.DATASETS.TEST = ()
    cfg.DISTILL.TEACHER.CLASSES = CLASSES  # the teacher's own dataset is not registered
    cfg.SOLVER.MAX_ITER = iterations
    curve = _Curve(budget)
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = folder
        seed_all_rng(cfg.SEED)
        trainer = DistillTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.register_hooks([curve])
        trainer.train()
    if len(curve.losses) < 2 * window:
        raise OutOfTime
    names = [name for name in curve.losses[0] if name == "total_loss" or name.startswith("loss_")]
    return {
        "config_file": config_file,
        "iterations": len(curve.losses),
        "seconds": curve.seconds[-1],
        "window": window,
        "first": {name: fmean(losses[name] for losses in curve.losses[:window]) for name in names},
        "last": {name: fmean(losses[name] for losses in curve.losses[-window:]) for name in names},
        "total_loss": [losses["total_loss"] for losses in curve.losses],
    }
