"""Show the probe to the detectors that a student is compared with: the teacher, and the student trained alone.

Neither changes during a training run, so this is done once.
"""

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch

from ..teacher import FrozenTeacher
from .detections import MatchedDetections
from .probe import Probe, embed_objects, match_student, match_teacher
from .run import FinishedRun


@dataclass
class Baseline:
    """Hold what the probe shows of the student trained alone.

    Attributes:
        detections: the baseline's detections, by image of the probe.
        correlation: (C, C) `class_correlation` of the baseline's embeddings, for the C classes that have objects.
        curve: iterations and AP (percent) of the baseline's evaluations.
    """

    detections: List[MatchedDetections]
    correlation: torch.Tensor
    curve: Tuple[Sequence[int], Sequence[float]]


@dataclass
class References:
    """Hold what the probe shows of the teacher and the baseline.

    Attributes:
        teacher: the teacher's detections, by image of the probe. None if it has no class of the dataset.
        baseline: None if there is no baseline.
    """

    teacher: Optional[List[MatchedDetections]]
    baseline: Optional[Baseline]


def look_at_references(teacher: FrozenTeacher, probe: Probe, baseline: Optional[FinishedRun]) -> References:
    """Show the probe to the teacher, and to the baseline if there is one."""
    return References(
        match_teacher(teacher, probe) if probe.has_teachers_classes else None,
        None if baseline is None else _look_at_baseline(baseline, probe),
    )


def _look_at_baseline(run: FinishedRun, probe: Probe) -> Baseline:
    student = run.student()
    embeddings = embed_objects(run.adapter(student), probe)
    return Baseline(match_student(student, probe), probe.correlate(embeddings), run.curve())
