"""Prediction distillation, boxes (paper section 3.3; method section 3)."""

from typing import Any

import torch
from detectron2.config import CfgNode

from ..errors import GDetKDError
from .build import DISTILL_LOSS_REGISTRY, DistillLoss, full_precision, sum_of_zeros
from .soft_classification import check_same_classes


def class_aware_localization(
    student_deltas: torch.Tensor, teacher_deltas: torch.Tensor, teacher_logits: torch.Tensor
) -> torch.Tensor:
    """| sum over classes of p_T^c (reg_T^c - reg_S^c) |, summed over the four deltas.

    p_T is the teacher's softmax; background has no deltas and takes no part. A class-agnostic head has the same
    deltas for every class, so that between two such heads the sum is p_T(foreground) times the difference.

    Args:
        student_deltas, teacher_deltas: (N, 4 n) or, class-agnostic, (N, 4); in units of the same BBOX_REG_WEIGHTS.
        teacher_logits: (N, n + 1), background last.

    Returns:
        mean over N; 0 for N = 0.
    """
    count = len(student_deltas)
    if count == 0:
        return sum_of_zeros([student_deltas, teacher_deltas, teacher_logits])
    foreground = torch.softmax(teacher_logits, dim=1)[:, :-1]  # (N, n)
    difference = teacher_deltas.view(count, -1, 4) - student_deltas.view(count, -1, 4)  # (N, n or 1, 4)
    return (foreground[..., None] * difference).sum(dim=1).abs().sum(dim=1).mean()


@DISTILL_LOSS_REGISTRY.register()
class REG(DistillLoss):
    """`class_aware_localization` of the two box heads.

    Raises:
        GDetKDError: student and teacher have different numbers of classes, or deltas in different units.
    """

    needs = frozenset({"logits", "deltas"})

    def __init__(self, cfg: CfgNode, student_spec: Any, teacher_spec: Any) -> None:
        super().__init__()
        check_same_classes("REG", student_spec, teacher_spec)
        if student_spec.regression_weights != teacher_spec.regression_weights:
            raise GDetKDError(
                "REG compares box deltas in the same units, but MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS is "
                f"{student_spec.regression_weights} for the student and {teacher_spec.regression_weights} for the "
                "teacher. Give the student the teacher's, or take REG out of DISTILL.LOSSES."
            )

    def compute(self, student: Any, teacher: Any) -> torch.Tensor:
        return class_aware_localization(
            full_precision(student.deltas), full_precision(teacher.deltas), full_precision(teacher.logits)
        )
