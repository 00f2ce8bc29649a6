"""Prediction distillation of classes, CLS (Yao et al., "G-DetKD", ICCV 2021, https://arxiv.org/abs/2108.07482)."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec, full_precision
from .build import DISTILL_LOSS_REGISTRY, DistillLoss, sum_of_zeros
from .classes import match_classes, merge_logits, select_logits


def soft_classification(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy between the teacher's class probabilities and the student's.

    Args:
        student_logits, teacher_logits: (N, n + 1) of a softmax, background last.

    Returns:
        mean over N; 0 for N = 0.
    """
    if len(student_logits) == 0:
        return sum_of_zeros([student_logits, teacher_logits])
    probabilities = torch.softmax(teacher_logits, dim=1)
    return -(probabilities * torch.log_softmax(student_logits, dim=1)).sum(dim=1).mean()


def soft_binary_classification(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Sum the binary cross-entropies of the classes, for detectors that score classes independently.

    This form is our choice: we know of no such term in the paper.

    Args:
        student_logits, teacher_logits: (N, n) of sigmoids.

    Returns:
        mean over N; 0 for N = 0.
    """
    if len(student_logits) == 0:
        return sum_of_zeros([student_logits, teacher_logits])
    loss = F.binary_cross_entropy_with_logits(student_logits, teacher_logits.sigmoid(), reduction="none")
    return loss.sum(dim=1).mean()


def check_comparable(name: str, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
    """Check that a loss can compare the predictions of two detectors.

    Args:
        name: name of the loss, for messages.

    Raises:
        GDetKDError: only one of the detectors is dense, or two dense detectors have different anchors.
    """
    if (student_spec.dense is None) != (teacher_spec.dense is None):
        raise GDetKDError(
            f"{name} cannot compare a dense detector with a two-stage detector. Take {name} out of DISTILL.LOSSES. "
            "SGFI and CKD work for such pairs."
        )
    if student_spec.dense and student_spec.dense.anchors != teacher_spec.dense.anchors:
        raise GDetKDError(
            f"{name} compares dense predictions anchor by anchor, but the anchors differ in number, stride or size. "
            f"The student has {_anchors(student_spec)}, the teacher {_anchors(teacher_spec)}. Give both the same "
            f"MODEL.ANCHOR_GENERATOR and head features, or take {name} out of DISTILL.LOSSES."
        )
    if student_spec.dense and student_spec.anchor_offset != teacher_spec.anchor_offset:
        raise GDetKDError(
            f"{name} compares dense predictions location by location, but MODEL.ANCHOR_GENERATOR.OFFSET is "
            f"{student_spec.anchor_offset} for the student and {teacher_spec.anchor_offset} for the teacher. Give the "
            f"student the teacher's value, or take {name} out of DISTILL.LOSSES."
        )


def _check_same_scoring(student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
    if student_spec.independent_classes != teacher_spec.independent_classes:
        scores = {True: "a sigmoid for each class", False: "a softmax over classes and background"}
        raise GDetKDError(
            "CLS needs class scores of one kind, but the student has "
            f"{scores[student_spec.independent_classes]} and the teacher {scores[teacher_spec.independent_classes]}. "
            "Give the student the teacher's MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE, or take CLS out of DISTILL.LOSSES. REG "
            "works with both kinds."
        )


def _anchors(spec: DetectorSpec) -> str:
    return ", ".join(f"{len(cells)} at stride {stride}" for stride, cells in spec.dense.anchors)


@DISTILL_LOSS_REGISTRY.register()
class CLS(DistillLoss):
    """Compare the class scores of the two detectors on the classes that both have.

    Box heads with a softmax are compared by `soft_classification`. Dense detectors and box heads with sigmoids are
    compared by `soft_binary_classification`. The stages that both detectors have are summed.

    Raises:
        GDetKDError: the detectors cannot be compared, have no class in common, or only one has sigmoid classes.
    """

    default_weight = 1.0  # source: our choice
    default_share = 2.0  # source: our choice (docs/weights.md)
    needs = frozenset({"logits"})
    reads_regions_alone = True

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__()
        check_comparable("CLS", student_spec, teacher_spec)
        _check_same_scoring(student_spec, teacher_spec)
        self.classes = match_classes("CLS", cfg, student_spec, teacher_spec)
        self.independent = student_spec.independent_classes

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        stages = [(student, teacher), *zip(student.later_stages, teacher.later_stages)]
        return sum(self._compare(student_stage.logits, teacher_stage.logits) for student_stage, teacher_stage in stages)

    def _compare(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        restrict, loss = (
            (select_logits, soft_binary_classification) if self.independent else (merge_logits, soft_classification)
        )
        student_logits = restrict(full_precision(student_logits), self.classes.student)
        return loss(student_logits, restrict(full_precision(teacher_logits), self.classes.teacher))
