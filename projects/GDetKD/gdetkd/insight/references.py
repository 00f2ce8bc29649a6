"""What a student is compared with: the teacher, and the student trained alone. Neither changes during a training."""

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch

from ..teacher import FrozenTeacher
from .detections import Found
from .measures import class_correlation
from .probe import Probe, detect, detect_by_teacher, embed_objects
from .run import FinishedRun


@dataclass
class Baseline:
    """
    Attributes:
        found: what it takes for objects on each image of the probe.
        correlation: (C, C) of its classes.
        curve: iterations and AP (percent) of its evaluations.
    """

    found: List[Found]
    correlation: torch.Tensor
    curve: Tuple[Sequence[int], Sequence[float]]


@dataclass
class References:
    """
    Attributes:
        teacher: what it takes for objects on each image of the probe.
        baseline: None where there is none to compare with.
    """

    teacher: List[Found]
    baseline: Optional[Baseline]


def look_at_references(teacher: FrozenTeacher, probe: Probe, baseline: Optional[FinishedRun]) -> References:
    """Shows the probe to both."""
    return References(detect_by_teacher(teacher, probe), None if baseline is None else _look_at(baseline, probe))


def _look_at(run: FinishedRun, probe: Probe) -> Baseline:
    student = run.student()
    embeddings = embed_objects(run.adapter(student), probe)
    correlation = class_correlation(embeddings, probe.classes, len(probe.class_names))
    return Baseline(detect(student, probe), correlation, run.curve())
