"""Prediction distillation of boxes, REG (Yao et al., "G-DetKD", ICCV 2021, https://arxiv.org/abs/2108.07482)."""

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
    """Compare box deltas, weighted by the teacher's class probabilities.

    The loss is | sum over classes c of p_T^c (reg_T^c - reg_S^c) |, summed over the four deltas. p_T is the teacher's
    softmax. Background has no deltas and is left out. A class-agnostic head has the same deltas for every class. For
    example, two classes at 1/4 whose deltas all differ by 1 and by 3 give (1/4 + 3/4) * 4:

        >>> teacher_logits = torch.tensor([[0.25, 0.25, 0.5]]).log()
        >>> teacher_deltas = torch.tensor([[1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0]])
        >>> class_aware_localization(torch.zeros(1, 8), teacher_deltas, teacher_logits)
        tensor(4.)

    Args:
        student_deltas, teacher_deltas: (N, 4 n), or (N, 4) of a class-agnostic head, in units of the same
            BBOX_REG_WEIGHTS.
        teacher_logits: (N, n + 1), background last.

    Returns:
        mean over N; 0 for N = 0.
    """
    return probability_weighted_localization(student_deltas, teacher_deltas, teacher_logits.softmax(dim=1)[:, :-1])


def probability_weighted_localization(
    student_deltas: torch.Tensor, teacher_deltas: torch.Tensor, probabilities: torch.Tensor
) -> torch.Tensor:
    """Compare box deltas as `class_aware_localization` does, with given class probabilities.

    Args:
        student_deltas, teacher_deltas: as in `class_aware_localization`.
        probabilities: (N, n) the teacher's probabilities of the foreground classes, from a softmax or a sigmoid.
            Sigmoid probabilities may sum to more than 1.

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
    """Compare the box deltas of dense detectors, weighted by the teacher's confidence: p_T | reg_T - reg_S |.

    The differences are summed over the four deltas. The deltas of dense detectors are class-agnostic. This form is our
    choice: we know of no such term in the paper.

    Args:
        student_deltas, teacher_deltas: (N, 4) from the same anchors, in the same units.
        confidence: (N,) the teacher's highest class probability.

    Returns:
        mean over N; 0 for N = 0.
    """
    if len(student_deltas) == 0:
        return sum_of_zeros([student_deltas, teacher_deltas, confidence])
    return (confidence * (teacher_deltas - student_deltas).abs().sum(dim=1)).mean()


@DISTILL_LOSS_REGISTRY.register()
class REG(DistillLoss):
    """Compare the box deltas of the two detectors on the classes that both have.

    Box heads are compared by `probability_weighted_localization`, with the teacher's softmax or sigmoid probabilities.
    The stages that both detectors have are summed. Dense detectors are compared by `confidence_weighted_localization`.

    Raises:
        GDetKDError: the detectors cannot be compared, have no class in common, or have deltas in different units.
    """

    default_weight = 1.0  # source: our choice
    default_share = 0.4  # source: our choice (docs/weights.md)
    needs = frozenset({"logits", "deltas"})
    reads_regions_alone = True

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__()
        check_comparable("REG", student_spec, teacher_spec)
        self.classes = match_classes("REG", cfg, student_spec, teacher_spec)
        self.num_classes = student_spec.num_classes, teacher_spec.num_classes
        self.is_dense = student_spec.dense is not None
        self.independent = teacher_spec.independent_classes
        student_units = [student_spec.regression_weights, *student_spec.later_regression_weights]
        teacher_units = [teacher_spec.regression_weights, *teacher_spec.later_regression_weights]
        for stage, (student_unit, teacher_unit) in enumerate(zip(student_units, teacher_units)):
            if student_unit != teacher_unit:
                raise GDetKDError(
                    f"REG needs box deltas in the same units, but BBOX_REG_WEIGHTS is {student_unit} for the student "
                    f"and {teacher_unit} for the teacher{f', at stage {stage + 1}' if stage else ''}. Give the student "
                    "the teacher's value, or take REG out of DISTILL.LOSSES."
                )

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        stages = [(student, teacher), *zip(student.later_stages, teacher.later_stages)]
        return sum(self._compare(student_stage, teacher_stage) for student_stage, teacher_stage in stages)

    def _compare(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        student_deltas, teacher_deltas = full_precision(student.deltas), full_precision(teacher.deltas)
        teacher_logits = full_precision(teacher.logits)
        if self.is_dense:
            confidence = select_logits(teacher_logits, self.classes.teacher).sigmoid().amax(dim=1)
            return confidence_weighted_localization(student_deltas, teacher_deltas, confidence)
        return probability_weighted_localization(
            select_deltas(student_deltas, self.num_classes[0], self.classes.student),
            select_deltas(teacher_deltas, self.num_classes[1], self.classes.teacher),
            class_probabilities(teacher_logits, self.classes.teacher, self.independent),
        )
