"""Runs of train_net.py and their results, which comparisons are made of."""

import functools
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml
from detectron2.config import CfgNode, get_cfg

from .config import add_gdetkd_config, changed_keys, flat_config
from .config_file import merge_config_file, merge_words
from .errors import GDetKDError
from .losses import DISTILL_LOSS_REGISTRY
from .safe_load import sha256_of_file
from .teacher_file import read_teacher_file

# What makes a config of distillation that of the student alone.
PLAIN = ["DISTILL.LOSSES", "()", "DISTILL.HEAD_TRANSFER", "False"]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# Keys, or their beginnings, that change no figure of a run; device and folder are set when it starts.
WITHOUT_EFFECT = (
    "DISTILL.EVAL_TEACHER",
    "DISTILL.VIS_",
    "MODEL.DEVICE",
    "OUTPUT_DIR",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.KEEP_BEST",
)


def load_config(config_file: str, opts: Sequence[Any]) -> CfgNode:
    """A file's config with KEY VALUE changes.

    Raises:
        GDetKDError: the file is not there.
    """
    if not os.path.isfile(config_file):
        raise GDetKDError(f"There is no config {config_file!r}, seen from {os.getcwd()}.")
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    merge_config_file(cfg, config_file)
    merge_words(cfg, list(opts))
    return cfg


def deciding_keys(dump: str) -> Dict[str, Any]:
    """Of a config, by flat key, what decides over a run's figures: a weight that is changed leaves the runs as they are
    that do not use it.

    Args:
        dump: the config as yaml, before a run's start or as written then.
    """
    flat = flat_config(dump)
    losses = flat["DISTILL.LOSSES"]
    unused = tuple(f"DISTILL.{name}." for name, _ in DISTILL_LOSS_REGISTRY if name not in losses)
    if not losses:
        unused += ("DISTILL.REGIONS.", "DISTILL.WARMUP_ITERS")
        if not flat["DISTILL.HEAD_TRANSFER"]:
            unused += ("DISTILL.TEACHER.", "DISTILL.CLASS_MAP")
    return {key: value for key, value in flat.items() if not key.startswith((*WITHOUT_EFFECT, *unused))}


@functools.lru_cache(maxsize=None)
def _digest(path: str, modified: int) -> str:
    """Of a file as it is since `modified`: each run of a comparison asks for that of the same teacher."""
    return sha256_of_file(path)


@dataclass
class Point:
    """An evaluation during training: AP, AP50, AP75 in percent."""

    iteration: int
    metrics: Dict[str, float]


@dataclass
class Run:
    """One training.

    Attributes:
        folder: its OUTPUT_DIR.
        config_file: of the full distillation.
        opts: KEY VALUE changes to it.
        max_iter: iterations of this run.
        prefix: what its metrics' names begin with; see `score_prefix`.
    """

    folder: Path
    config_file: str
    opts: List[str]
    max_iter: int
    prefix: str = ""
    process: Optional[subprocess.Popen] = field(default=None, repr=False)

    def command(self, train_net: Path) -> List[str]:
        keys = ["SOLVER.MAX_ITER", str(self.max_iter), "OUTPUT_DIR", str(self.folder)]
        return [sys.executable, str(train_net), "--config-file", self.config_file, "--resume", *self.opts, *keys]

    def config(self) -> CfgNode:
        """Its whole config, defaults included."""
        return load_config(self.config_file, [*self.opts, "SOLVER.MAX_ITER", self.max_iter, "OUTPUT_DIR", ""])

    def fingerprint(self) -> str:
        """A digest of all that determines the run, but for the images: its config, and its teacher's file and weights.

        Raises:
            GDetKDError: the teacher's file is not there.
        """
        cfg = self.config()
        keys = deciding_keys(cfg.dump())
        if "DISTILL.TEACHER.CONFIG_FILE" in keys:
            file = read_teacher_file(cfg)
            keys["teacher"], keys["weights"] = file.content(), file.weights
            if os.path.isfile(file.weights):
                keys["weights"] = _digest(file.weights, os.stat(file.weights).st_mtime_ns)
        return hashlib.sha256(yaml.safe_dump(keys).encode()).hexdigest()

    def claim_folder(self) -> None:
        """Marks the folder as this run's.

        Raises:
            GDetKDError: it holds a run of another config, whose results would be taken for this one's.
        """
        mark, fingerprint = self.folder / "fingerprint.txt", self.fingerprint()
        self.folder.mkdir(parents=True, exist_ok=True)
        if (mark.exists() or self.lines()) and (not mark.exists() or mark.read_text() != fingerprint):
            raise GDetKDError(
                f"{self.folder} holds a run of another config{self._differences()}. Go on with that, remove that "
                "folder, or choose another --output."
            )
        mark.write_text(fingerprint)

    def _differences(self) -> str:
        """Of what is in the folder to this run, where its config has been written there: ": KEY 1 -> 2"."""
        path = self.folder / "config.yaml"
        if not path.exists():
            return ""
        changes = changed_keys(deciding_keys(path.read_text()), deciding_keys(self.config().dump()))
        same = "the weights of the teacher, or what its file says, are no longer the same"
        return f": {'; '.join(changes.values()) or same}"

    def lines(self) -> List[Dict[str, Any]]:
        """What the run has written to metrics.json so far."""
        path = self.folder / "metrics.json"
        if not path.exists():
            return []
        # The last line may be half written.
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def iterations_done(self) -> int:
        return max((line["iteration"] + 1 for line in self.lines() if "iteration" in line), default=0)

    def curve(self) -> List[Point]:
        points = []
        for line in self.lines():
            if f"{self.prefix}bbox/AP" in line:
                # Detectron2 writes the last evaluation one iteration after the last, on a line of its own.
                iteration = min(line["iteration"] + 1, self.max_iter)
                # Detectron2 gives NaN to a detector that finds nothing at all; there are objects, so its AP is 0.
                values = {k: line[f"{self.prefix}bbox/{k}"] for k in ("AP", "AP50", "AP75")}
                metrics = {k: 0.0 if math.isnan(value) else value for k, value in values.items()}
                points.append(Point(iteration, metrics))
        return points

    def is_complete(self) -> bool:
        last = self.curve()[-1:]
        return bool(last) and last[0].iteration == self.max_iter and (self.folder / "model_final.pth").exists()

    def metrics(self) -> Dict[str, Optional[float]]:
        """Of the last evaluation, in percent: AP, AP50, AP75, APs, APm, APl; None of a size that no object has."""
        last = [line for line in self.lines() if f"{self.prefix}bbox/AP" in line][-1]
        values = {name: last.get(f"{self.prefix}bbox/{name}", math.nan) for name in METRICS}
        known = {name: None if math.isnan(value) else value for name, value in values.items()}
        return {**known, **self.curve()[-1].metrics}

    def peak_megabytes(self) -> Optional[float]:
        """GPU memory; None on a CPU, where Detectron2 does not record it."""
        return max((line["max_mem"] for line in self.lines() if "max_mem" in line), default=None)


def stretched(folder: Path, run: Run, ratio: float) -> Run:
    """Return the same training over `ratio` times as many iterations, with its learning rate schedule.

    It is evaluated as often, at multiples of the 20 iterations after which Detectron2 writes.
    """
    cfg = run.config()
    opts = ["TEST.EVAL_PERIOD", str(round(cfg.TEST.EVAL_PERIOD * ratio / 20) * 20)]
    if "Cosine" not in cfg.SOLVER.LR_SCHEDULER_NAME:  # which has no steps
        opts += ["SOLVER.STEPS", str(tuple(round(step * ratio) for step in cfg.SOLVER.STEPS))]
    return Run(folder, run.config_file, run.opts + opts, round(run.max_iter * ratio))


def mean_and_error(values: Sequence[float]) -> Tuple[float, Optional[float]]:
    """Mean and its standard error, which a single value has not."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error
