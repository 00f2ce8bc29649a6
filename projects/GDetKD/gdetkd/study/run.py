"""Describe a training run of a comparison: the command line, the config and the results."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import List

from detectron2.config import CfgNode

from ..config_file import load_config
from ..metrics_file import MetricsFile, iterations_run

# KEY VALUE changes that turn a distillation config into the config of the student alone.
PLAIN = ["DISTILL.LOSSES", "()", "DISTILL.HEAD_TRANSFER", "False"]


@dataclass
class Run:
    """Describe a training run.

    Attributes:
        folder: the run's OUTPUT_DIR.
        config_file: config of the full distillation.
        opts: KEY VALUE changes to the config.
        max_iter: iterations of the run, unless it ends early (TEST.PATIENCE); see `iterations`.
    """

    folder: Path
    config_file: str
    opts: List[str]
    max_iter: int

    def command(self, train_net: Path) -> List[str]:
        """Return the command line that trains this run, and resumes it if it was interrupted."""
        keys = ["SOLVER.MAX_ITER", str(self.max_iter), "OUTPUT_DIR", str(self.folder)]
        return [sys.executable, str(train_net), "--config-file", self.config_file, "--resume", *self.opts, *keys]

    def config(self) -> CfgNode:
        """Return the run's whole config, defaults included."""
        return load_config(self.config_file, [*self.opts, "SOLVER.MAX_ITER", self.max_iter, "OUTPUT_DIR", ""])

    @property
    def metrics_file(self) -> MetricsFile:
        return MetricsFile(self.folder, self.max_iter)

    @property
    def iterations(self) -> int:
        """Return the number of iterations that a complete run was trained for."""
        return iterations_run(self.folder, self.max_iter)

    def last_checkpoint(self) -> str:
        """Return the name of the checkpoint that the run would resume from. It is empty if there is none."""
        path = self.folder / "last_checkpoint"
        return path.read_text() if path.exists() else ""

    def is_complete(self) -> bool:
        """Return whether the run has its last evaluation and its final weights."""
        last = self.metrics_file.curve()[-1:]
        return bool(last) and last[0].iteration == self.iterations and (self.folder / "model_final.pth").exists()


def stretched(folder: Path, run: Run, ratio: float) -> Run:
    """Return a run with `ratio` times as many iterations, and the learning rate schedule stretched alike.

    The run has as many evaluations. Their period is a multiple of 20 iterations, after which Detectron2 writes. A run
    with TEST.PATIENCE keeps a period.
    """
    cfg = run.config()
    period = round(cfg.TEST.EVAL_PERIOD * ratio / 20) * 20
    opts = ["TEST.EVAL_PERIOD", str(max(20, period) if cfg.TEST.PATIENCE else period)]
    if "Cosine" not in cfg.SOLVER.LR_SCHEDULER_NAME:  # a cosine schedule has no steps
        opts += ["SOLVER.STEPS", str(tuple(round(step * ratio) for step in cfg.SOLVER.STEPS))]
    return Run(folder, run.config_file, run.opts + opts, round(run.max_iter * ratio))
