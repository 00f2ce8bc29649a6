"""Prediction distillation, classes (paper section 3.3; method section 3)."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode

from ..classes import match_classes, merge_logits
from ..errors import GDetKDError
from ..structures import full_precision
from .build import DISTILL_LOSS_REGISTRY, DistillLoss, sum_of_zeros


def soft_classification(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy between the teacher's class probabilities and the student's.

    Args:
        student_logits, teacher_logits: (N, n + 1), softmax classes, background last.

    Returns:
        mean over N; 0 for N = 0.
    """
    if len(student_logits) == 0:
        return sum_of_zeros([student_logits, teacher_logits])
    probabilities = torch.softmax(teacher_logits, dim=1)
    return -(probabilities * torch.log_softmax(student_logits, dim=1)).sum(dim=1).mean()


def soft_binary_classification(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """The same for classes that are scored independently: binary cross-entropies, summed over classes.

    Args:
        student_logits, teacher_logits: (N, n), sigmoid classes. Ours: the paper has none for dense detectors.

    Returns:
        mean over N; 0 for N = 0.
    """
    if len(student_logits) == 0:
        return sum_of_zeros([student_logits, teacher_logits])
    loss = F.binary_cross_entropy_with_logits(student_logits, teacher_logits.sigmoid(), reduction="none")
    return loss.sum(dim=1).mean()


def check_comparable(name: str, student_spec: Any, teacher_spec: Any) -> None:
    """
    Raises:
        GDetKDError: one is dense and the other is not, or they predict from other anchors.
    """
    if (student_spec.anchors is None) != (teacher_spec.anchors is None):
        raise GDetKDError(
            f"{name} compares predictions of detectors of one family, but one of teacher and student is dense and the "
            f"other is not. Take {name} out of DISTILL.LOSSES: SGFI and CKD are for such pairs (paper, section 3.4)."
        )
    if student_spec.anchors != teacher_spec.anchors:
        raise GDetKDError(
            f"{name} compares dense predictions anchor by anchor, but the teacher has {_anchors(teacher_spec)} and the "
            f"student {_anchors(student_spec)}, or other sizes. Take {name} out of DISTILL.LOSSES, or give both "
            "the same MODEL.ANCHOR_GENERATOR and head features."
        )


def _anchors(spec: Any) -> str:
    return ", ".join(f"{len(cells)} at stride {stride}" for stride, cells in spec.anchors)


@DISTILL_LOSS_REGISTRY.register()
class CLS(DistillLoss):
    """`soft_classification` of the two box heads, summed over the stages that both have; of two dense detectors
    `soft_binary_classification`. It is on the classes that both have.

    Raises:
        GDetKDError: the detectors cannot be compared, or have no class in common.
    """

    needs = frozenset({"logits"})

    def __init__(self, cfg: CfgNode, student_spec: Any, teacher_spec: Any) -> None:
        super().__init__()
        check_comparable("CLS", student_spec, teacher_spec)
        self.classes = match_classes("CLS", cfg, student_spec, teacher_spec)
        self.independent = student_spec.anchors is not None

    def compute(self, student: Any, teacher: Any) -> torch.Tensor:
        stages = [(student, teacher), *zip(student.later_stages, teacher.later_stages)]
        return sum(self._compare(full_precision(ours.logits), full_precision(its.logits)) for ours, its in stages)

    def _compare(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        ours, its = self.classes.student, self.classes.teacher
        if self.independent:
            common = slice(None) if ours is None else list(ours), slice(None) if its is None else list(its)
            return soft_binary_classification(student_logits[:, common[0]], teacher_logits[:, common[1]])
        return soft_classification(merge_logits(student_logits, ours), merge_logits(teacher_logits, its))
