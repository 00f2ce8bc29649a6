"""Prediction distillation, classes (paper section 3.3; method section 3)."""

from typing import Any

import torch
from detectron2.config import CfgNode

from ..errors import GDetKDError
from .build import DISTILL_LOSS_REGISTRY, DistillLoss, full_precision, sum_of_zeros


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


def check_same_classes(name: str, student_spec: Any, teacher_spec: Any) -> None:
    """
    Raises:
        GDetKDError: student and teacher have different numbers of classes.
    """
    if student_spec.num_classes != teacher_spec.num_classes:
        raise GDetKDError(
            f"{name} compares class by class, but the student has {student_spec.num_classes} classes and the teacher "
            f"{teacher_spec.num_classes}. Take {name} out of DISTILL.LOSSES (SGFI and CKD do not need equal classes), "
            "or use a teacher that was trained on the student's classes."
        )


@DISTILL_LOSS_REGISTRY.register()
class CLS(DistillLoss):
    """`soft_classification` of the two box heads.

    Raises:
        GDetKDError: student and teacher have different numbers of classes.
    """

    needs = frozenset({"logits"})

    def __init__(self, cfg: CfgNode, student_spec: Any, teacher_spec: Any) -> None:
        super().__init__()
        check_same_classes("CLS", student_spec, teacher_spec)

    def compute(self, student: Any, teacher: Any) -> torch.Tensor:
        return soft_classification(full_precision(student.logits), full_precision(teacher.logits))
