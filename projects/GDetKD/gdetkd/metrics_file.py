"""Read the metrics.json that Detectron2 writes in the folder of a training."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass
class Point:
    """An evaluation during training: AP, AP50, AP75 in percent."""

    iteration: int
    metrics: Dict[str, float]


class MetricsFile:
    """What a training has logged so far.

    Args:
        folder: the OUTPUT_DIR of the training.
        max_iter: the iterations of the training.
        prefix: what the names of its metrics begin with; see `config.score_prefix`.
    """

    def __init__(self, folder: Path, max_iter: int = 0, prefix: str = "") -> None:
        self._path = folder / "metrics.json"
        self._max_iter = max_iter
        self._prefix = prefix

    def lines(self) -> List[Dict[str, Any]]:
        """Return the lines of the file. A last line that is half written is left out."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text().splitlines() if line.endswith("}")]

    def iterations_done(self) -> int:
        return max((line["iteration"] + 1 for line in self.lines() if "iteration" in line), default=0)

    def evaluations(self) -> List[Dict[str, Any]]:
        """Return the lines that hold the AP of an evaluation."""
        return [line for line in self.lines() if f"{self._prefix}bbox/AP" in line]

    def curve(self) -> List[Point]:
        """Return the evaluations in order."""
        points = []
        for line in self.evaluations():
            # Detectron2 writes the last evaluation one iteration after the last, on a line of its own.
            iteration = min(line["iteration"] + 1, self._max_iter)
            # Detectron2 gives NaN to a detector that finds nothing at all. There are objects, so its AP is 0.
            values = {name: line[f"{self._prefix}bbox/{name}"] for name in METRICS[:3]}
            metrics = {name: 0.0 if math.isnan(value) else value for name, value in values.items()}
            points.append(Point(iteration, metrics))
        return points

    def last(self) -> Dict[str, Optional[float]]:
        """Return AP, AP50, AP75, APs, APm and APl of the last evaluation, in percent.

        The AP of a size that no object has is None.
        """
        line = self.evaluations()[-1]
        values = {name: line.get(f"{self._prefix}bbox/{name}", math.nan) for name in METRICS}
        known = {name: None if math.isnan(value) else value for name, value in values.items()}
        return {**known, **self.curve()[-1].metrics}

    def peak_megabytes(self) -> Optional[float]:
        """Return the peak of GPU memory. Detectron2 records none on a CPU: None."""
        return max((line["max_mem"] for line in self.lines() if "max_mem" in line), default=None)
