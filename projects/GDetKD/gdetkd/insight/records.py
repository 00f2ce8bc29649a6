"""Record what the probe shows at one iteration as a dictionary of numbers, and keep the records in a file."""

import json
import math
import os
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

from ..distiller import GDetKD
from ..files import mend_last_line, read_json_lines, written_whole
from .measures import correlation_gap, level_matching
from .probe import Look, Probe, look_at_objects

FOLDER = "insight"  # in a run's OUTPUT_DIR
FILE = "records.jsonl"


def make_record(distiller: GDetKD, probe: Probe, iterations: int) -> Dict[str, Any]:
    """Show the probe to the teacher and the student, and return the numbers that describe what they see.

    Args:
        iterations: iterations done so far.

    Returns:
        a dictionary with these keys:

        - "iterations", and "objects", the number of objects.
        - "classes": the names of the C classes that have objects.
        - "correlation": by "teacher" and "student", C lists of C numbers; None if a correlation is not known.
        - "correlation_gap": the distance between the two matrices.
        - "tau", "student_levels" and "teacher_levels" (names) and "levels" (see `level_matching`), if a loss chooses
          among the student's levels.
    """
    look = look_at_objects(distiller, probe)
    correlation = {
        name: probe.correlate(embeddings) for name, embeddings in (("teacher", look.teacher), ("student", look.student))
    }
    record: Dict[str, Any] = {
        "iterations": iterations,
        "objects": len(probe.classes),
        "classes": [probe.class_names[index] for index in probe.shown_classes.tolist()],
        "correlation": {name: as_lists(matrix) for name, matrix in correlation.items()},
        "correlation_gap": correlation_gap(correlation["teacher"], correlation["student"]),
    }
    if look.alpha is not None:
        record.update(_level_record(distiller, look, probe))
    return record


def _level_record(distiller: GDetKD, look: Look, probe: Probe) -> Dict[str, Any]:
    teacher_levels = list(distiller.teacher.spec.strides)
    return {
        "tau": float(distiller.level_chooser.tau),
        "student_levels": list(distiller.adapter.spec.strides),
        "teacher_levels": teacher_levels,
        "levels": level_matching(look.alpha, look.levels, probe.areas, len(teacher_levels)),
    }


def as_lists(matrix: torch.Tensor) -> List[List[Optional[float]]]:
    """Return a matrix as lists. NaN becomes None, because JSON has no NaN."""
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]


class RecordFile:
    """Read and write the records of a run, in the order of iterations.

    Args:
        output_dir: the run's OUTPUT_DIR.
    """

    def __init__(self, output_dir: str) -> None:
        self.folder = Path(output_dir) / FOLDER
        self._path = self.folder / FILE

    def read(self) -> List[Dict[str, Any]]:
        """Return all records. Lines that a kill or a full disk cut are left out."""
        return sorted(read_json_lines(self._path), key=lambda record: record["iterations"])

    def start_at(self, iterations: int) -> None:
        """Remove the records that a run which goes on after `iterations` makes again. At 0 all are removed."""
        before = self.read()
        kept = [record for record in before if 0 < iterations >= record["iterations"]]
        if len(kept) < len(before):
            with written_whole(str(self._path)) as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)

    def add(self, record: Dict[str, Any]) -> None:
        """Append a record.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        os.makedirs(self.folder, exist_ok=True)
        mend_last_line(self._path)
        with open(self._path, "a") as file:
            file.write(json.dumps(record) + "\n")
