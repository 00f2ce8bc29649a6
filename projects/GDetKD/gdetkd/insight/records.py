"""What is seen of a run at one iteration, as a dictionary of numbers, and the file that holds one on each line."""

import json
import math
import os
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

from ..distiller import GDetKD
from ..files import written_whole
from .measures import class_correlation, correlation_gap, level_matching
from .probe import Look, Probe, look_at_objects

FOLDER = "visualization"  # in a run's OUTPUT_DIR
FILE = "records.jsonl"


def make_record(distiller: GDetKD, probe: Probe, iterations: int) -> Dict[str, Any]:
    """Shows the probe to both.

    Args:
        iterations: done so far.

    Returns:
        "iterations", "objects" (their number), "classes" (names), "correlation" of "teacher" and "student" (C lists of
        C numbers, None where unknown), "correlation_gap"; where a loss chooses among levels also "tau",
        "student_levels", "teacher_levels" (names) and "levels", of `level_matching`.
    """
    look = look_at_objects(distiller, probe)
    correlation = {
        name: class_correlation(each, probe.classes, len(probe.class_names))
        for name, each in (("teacher", look.teacher), ("student", look.student))
    }
    record: Dict[str, Any] = {
        "iterations": iterations,
        "objects": len(probe.classes),
        "classes": list(probe.class_names),
        "correlation": {name: as_lists(each) for name, each in correlation.items()},
        "correlation_gap": correlation_gap(correlation["teacher"], correlation["student"]),
    }
    if look.alpha is not None:
        record.update(_of_levels(distiller, look, probe))
    return record


def _of_levels(distiller: GDetKD, look: Look, probe: Probe) -> Dict[str, Any]:
    teacher_levels = list(distiller.teacher.spec.strides)
    return {
        "tau": float(distiller.level_chooser.tau),
        "student_levels": list(distiller.adapter.spec.strides),
        "teacher_levels": teacher_levels,
        "levels": level_matching(look.alpha, look.levels, probe.areas, len(teacher_levels)),
    }


def as_lists(matrix: torch.Tensor) -> List[List[Optional[float]]]:
    """JSON knows no NaN."""
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]


class RecordFile:
    """The records of a run, in the order of iterations.

    Args:
        output_dir: the run's.
    """

    def __init__(self, output_dir: str) -> None:
        self.folder = Path(output_dir) / FOLDER
        self._path = self.folder / FILE

    def read(self) -> List[Dict[str, Any]]:
        if not self._path.exists():
            return []
        # The last line may be half written.
        return [json.loads(line) for line in self._path.read_text().splitlines() if line.endswith("}")]

    def start_at(self, iterations: int) -> None:
        """Leaves out what a run that goes on after `iterations` will see again; all, of one that starts anew."""
        before = self.read()
        kept = [record for record in before if 0 < iterations >= record["iterations"]]
        if len(kept) < len(before):
            with written_whole(str(self._path)) as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)

    def add(self, record: Dict[str, Any]) -> None:
        """Raises:
        OSError: the disk does not take it.
        """
        os.makedirs(self.folder, exist_ok=True)
        with open(self._path, "a") as file:
            file.write(json.dumps(record) + "\n")
