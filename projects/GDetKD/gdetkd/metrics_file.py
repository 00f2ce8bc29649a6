"""Read the metrics.json that Detectron2 writes in a run's OUTPUT_DIR."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from detectron2.config import CfgNode

from .files import read_json_lines

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# File in the OUTPUT_DIR of a run that ended early. It holds the number of iterations that were run.
EARLY_END = "ended_early.json"


@dataclass
class Point:
    """Hold AP, AP50 and AP75 (percent) of an evaluation during training."""

    iteration: int
    metrics: Dict[str, float]


def score_prefix(cfg: CfgNode) -> str:
    """Return Detectron2's prefix of "bbox/AP" for DATASETS.TEST[0]. It is empty if there is only one dataset."""
    return f"{cfg.DATASETS.TEST[0]}/" if len(cfg.DATASETS.TEST) > 1 else ""


def iterations_run(folder: Path, max_iter: int) -> int:
    """Return the number of iterations of a complete run.

    Args:
        folder: the run's OUTPUT_DIR.
        max_iter: the number of iterations if the run did not end early.
    """
    note = folder / EARLY_END
    return json.loads(note.read_text())["iterations"] if note.exists() else max_iter


class MetricsFile:
    """Read what a run has logged so far.

    Args:
        folder: the run's OUTPUT_DIR.
        max_iter: the number of iterations of the run, unless it ended early.
        prefix: the beginning of the names of the run's metrics; see `score_prefix`.
    """

    def __init__(self, folder: Path, max_iter: int = 0, prefix: str = "") -> None:
        self._folder = folder
        self._path = folder / "metrics.json"
        self._max_iter = max_iter
        self._prefix = prefix

    def lines(self) -> List[Dict[str, Any]]:
        """Return the lines of the file, without those that a kill or a full disk cut."""
        return read_json_lines(self._path)

    def iterations_done(self) -> int:
        """Return the number of iterations that the file records."""
        return max((line["iteration"] + 1 for line in self.lines() if "iteration" in line), default=0)

    def evaluations(self) -> List[Dict[str, Any]]:
        """Return the lines that hold the AP of an evaluation."""
        return [line for line in self.lines() if f"{self._prefix}bbox/AP" in line]

    def curve(self) -> List[Point]:
        """Return one point for each evaluated iteration, in order. A repeated evaluation replaces the earlier one."""
        points: Dict[int, Point] = {}
        end = iterations_run(self._folder, self._max_iter)
        for line in self.evaluations():
            # Detectron2 writes the last evaluation on a separate line, one iteration after the last.
            iteration = min(line["iteration"] + 1, end)
            # Detectron2 gives NaN to a detector that finds nothing. There are objects, so the AP is 0.
            values = {name: line[f"{self._prefix}bbox/{name}"] for name in METRICS[:3]}
            metrics = {name: 0.0 if math.isnan(value) else value for name, value in values.items()}
            points[iteration] = Point(iteration, metrics)
        return [points[iteration] for iteration in sorted(points)]

    def last(self) -> Dict[str, Optional[float]]:
        """Return AP, AP50, AP75, APs, APm and APl of the last evaluation, in percent.

        The AP of an object size is None if no object has that size.
        """
        line = self.evaluations()[-1]
        values = {name: line.get(f"{self._prefix}bbox/{name}", math.nan) for name in METRICS}
        known = {name: None if math.isnan(value) else value for name, value in values.items()}
        return {**known, **self.curve()[-1].metrics}

    def peak_megabytes(self) -> Optional[float]:
        """Return the peak GPU memory in MB, or None on a CPU."""
        return max((line["max_mem"] for line in self.lines() if "max_mem" in line), default=None)
