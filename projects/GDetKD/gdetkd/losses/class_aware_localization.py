"""Prediction distillation, boxes (Yao et al., "G-DetKD", ICCV 2021, https://arxiv.org/abs/2108.07482)."""

import torch
from detectron2.config import CfgNode

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec, full_precision
from .build import DISTILL_LOSS_REGISTRY, DistillLoss, sum_of_zeros
from .classes import class_probabilities, match_classes, select_deltas, select_logits
from .soft_classification import check_comparable


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
    return probability_weighted_localization(student_deltas, teacher_deltas, teacher_logits.softmax(dim=1)[:, :-1])


def probability_weighted_localization(
    student_deltas: torch.Tensor, teacher_deltas: torch.Tensor, probabilities: torch.Tensor
) -> torch.Tensor:
    """Compare deltas as `class_aware_localization` does, with given probabilities (softmax or sigmoid).

    Args:
        student_deltas, teacher_deltas: as in `class_aware_localization`.
        probabilities: (N, n) the teacher's, of the foreground classes. Sigmoid probabilities may sum to more than 1.

    Returns:
        mean over N; 0 for N = 0.
    """
    count = len(student_deltas)
    if count == 0:
        return sum_of_zeros([student_deltas, teacher_deltas, probabilities])
    difference = teacher_deltas.view(count, -1, 4) - student_deltas.view(count, -1, 4)  # (N, n or 1, 4)
    return (probabilities[..., None] * difference).sum(dim=1).abs().sum(dim=1).mean()


def confidence_weighted_localization(
    student_deltas: torch.Tensor, teacher_deltas: torch.Tensor, confidence: torch.Tensor
) -> torch.Tensor:
    """The same of dense detectors, whose deltas are class-agnostic: p_T | reg_T - reg_S |, summed over the four deltas.

    Args:
        student_deltas, teacher_deltas: (N, 4) from the same anchors, in the same units.
        confidence: (N,) the teacher's class-maximum probability. Ours: we know of none in the paper.

    Returns:
        mean over N; 0 for N = 0.
    """
    if len(student_deltas) == 0:
        return sum_of_zeros([student_deltas, teacher_deltas, confidence])
    return (confidence * (teacher_deltas - student_deltas).abs().sum(dim=1)).mean()


@DISTILL_LOSS_REGISTRY.register()
class REG(DistillLoss):
    """Compare the box deltas of the two detectors on the classes that both have.

    Box heads are compared by `class_aware_localization`, with the teacher's own probabilities (softmax or sigmoid), and
    stages that both detectors have are summed. Dense detectors are compared by `confidence_weighted_localization`.

    Raises:
        GDetKDError: the detectors cannot be compared, have no class in common, or have deltas in different units.
    """

    default_weight = 1.0  # source: ours
    needs = frozenset({"logits", "deltas"})

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__()
        check_comparable("REG", student_spec, teacher_spec)
        self.classes = match_classes("REG", cfg, student_spec, teacher_spec)
        self.num_classes = student_spec.num_classes, teacher_spec.num_classes
        self.is_dense = student_spec.dense is not None
        self.independent = teacher_spec.independent_classes
        ours = [student_spec.regression_weights, *student_spec.later_regression_weights]
        its = [teacher_spec.regression_weights, *teacher_spec.later_regression_weights]
        for stage, (of_student, of_teacher) in enumerate(zip(ours, its)):
            if of_student != of_teacher:
                raise GDetKDError(
                    f"REG compares box deltas in the same units, but BBOX_REG_WEIGHTS is {of_student} for the student "
                    f"and {of_teacher} for the teacher{f', at stage {stage + 1}' if stage else ''}. Give the student "
                    "the teacher's, or take REG out of DISTILL.LOSSES."
                )

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        stages = [(student, teacher), *zip(student.later_stages, teacher.later_stages)]
        return sum(self._compare(ours, its) for ours, its in stages)

    def _compare(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        ours, its = full_precision(student.deltas), full_precision(teacher.deltas)
        logits = full_precision(teacher.logits)
        if self.is_dense:
            confidence = select_logits(logits, self.classes.teacher).sigmoid().amax(dim=1)
            return confidence_weighted_localization(ours, its, confidence)
        return probability_weighted_localization(
            select_deltas(ours, self.num_classes[0], self.classes.student),
            select_deltas(its, self.num_classes[1], self.classes.teacher),
            class_probabilities(logits, self.classes.teacher, self.independent),
        )
