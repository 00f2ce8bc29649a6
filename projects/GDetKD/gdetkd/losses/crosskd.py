"""CrossKD: Wang, Chen, Zheng, Li, Cheng and Hou, "CrossKD: Cross-Head Knowledge Distillation for Object Detection",
CVPR 2024.

Shapes: B images, R anchors of all levels, n of the teacher's classes, D the width of its towers.
"""

from typing import List, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from fvcore.nn import giou_loss

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec, full_precision
from .build import DISTILL_LOSS_REGISTRY, DistillLoss
from .pkd import standardize

# Of the classification and the box tower, by level.
Towers = Sequence[List[torch.Tensor]]
# Pixels. Of a box that is narrower the GIoU is rounding error.
MIN_SIDE = 0.1


def cross_classification(
    cross_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, beta: float = 1.0
) -> torch.Tensor:
    """Binary cross-entropy with the teacher's scores, each times |difference of scores|^beta: the quality focal loss
    that the authors take between cross-head and teacher (section 3).

    Args:
        cross_logits, teacher_logits: (B, R, n)
        labels: (B, R) 1 of positive anchors, 0 of negative ones, -1 of those that take no part.

    Returns:
        sum over B, R, n over the number of positive anchors, or over 1 where there is none.
    """
    scores = teacher_logits.sigmoid()
    focus = (cross_logits.sigmoid() - scores).abs() ** beta
    loss = F.binary_cross_entropy_with_logits(cross_logits, scores, reduction="none") * focus
    return (loss * (labels >= 0)[..., None]).sum() / _positives(labels)


def cross_localization(
    cross_boxes: torch.Tensor, teacher_boxes: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """GIoU loss with the teacher's boxes, each times the teacher's class-maximum score (section 3).

    A teacher's box that has next to no width or height takes no part: the GIoU of two such says nothing.

    Args:
        cross_boxes, teacher_boxes: (B, R, 4) xyxy in pixels.
        teacher_logits: (B, R, n)
        labels: as in `cross_classification`.

    Returns:
        sum over B, R over the number of positive anchors, or over 1 where there is none.
    """
    sized = (teacher_boxes[..., 2:] - teacher_boxes[..., :2]).amin(dim=-1) > MIN_SIDE
    confidence = teacher_logits.sigmoid().amax(dim=-1) * (labels >= 0) * sized
    loss = giou_loss(cross_boxes.flatten(0, -2), teacher_boxes.flatten(0, -2), reduction="none")
    return (loss * confidence.flatten()).sum() / _positives(labels)


def _positives(labels: torch.Tensor) -> torch.Tensor:
    return (labels == 1).sum().clamp(min=1)


def align_scale(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The student's features with mean and deviation, over images and locations, of each of the teacher's channels;
    (B, D, H, W) each. The teacher's head knows features of that scale alone."""
    deviation = teacher.std(dim=(0, 2, 3), keepdim=True, unbiased=False)
    return standardize(student) * deviation + teacher.mean(dim=(0, 2, 3), keepdim=True)


@DISTILL_LOSS_REGISTRY.register()
class CROSSKD(DistillLoss):
    """The student's tower features go through the rest of the teacher's frozen head; what comes out is to be what the
    teacher itself predicts. Owns nothing: gradients pass through the teacher's weights to the student.

    Both predictions are the teacher's head's, so that anchors and classes of the student may be others.

    Raises:
        GDetKDError: one of the two is not dense, has other levels, too few convolutions in its towers, or others in
            width than the teacher's where the student's features enter.
    """

    needs = frozenset({"towers", "head"})

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # The exponent of the difference of scores. Source: the authors.
        node.BETA = 1.0
        # By the teacher's family, from the authors: factors on classes and boxes, and convolutions of the student's
        # towers before the teacher's take over.
        node.ANCHOR_BASED = CfgNode(dict(CLS_WEIGHT=1.0, REG_WEIGHT=1.0, SHARED_CONVS=3))
        node.ANCHOR_FREE = CfgNode(dict(CLS_WEIGHT=0.4, REG_WEIGHT=0.75, SHARED_CONVS=2))

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__()
        remedy = "Take CROSSKD out of DISTILL.LOSSES"
        for role, spec in (("student", student_spec), ("teacher", teacher_spec)):
            if spec.dense is None:
                raise GDetKDError(f"CROSSKD runs a dense detector's head, and the {role} is not dense. {remedy}.")
        node = f"DISTILL.CROSSKD.{teacher_spec.family}.SHARED_CONVS"
        self.config = cfg.DISTILL.CROSSKD[teacher_spec.family]
        self.beta, self.cut = cfg.DISTILL.CROSSKD.BETA, self.config.SHARED_CONVS
        if list(student_spec.strides.values()) != list(teacher_spec.strides.values()):
            raise GDetKDError(
                "CROSSKD runs the teacher's head on the student's levels, which have other strides: "
                f"{list(student_spec.strides.values())}, the teacher's {list(teacher_spec.strides.values())}. {remedy}."
            )
        shortest = min(len(spec.dense.tower_channels) for spec in (student_spec, teacher_spec))
        if not 0 <= self.cut <= shortest:
            raise GDetKDError(
                f"{node} is {self.cut}: the convolutions of the student's own towers before the teacher's take over. "
                f"The shorter towers have {shortest}. Set it to 0 to {shortest}."
            )
        student_width, teacher_width = (
            [spec.channels, *spec.dense.tower_channels][self.cut] for spec in (student_spec, teacher_spec)
        )
        if student_width != teacher_width:
            raise GDetKDError(
                f"CROSSKD hands features of the student to the teacher's head, after {node} = {self.cut} convolutions: "
                f"they have {student_width} channels, and the teacher's {teacher_width}. Give both the same widths "
                f"(MODEL.FPN.OUT_CHANNELS sets them). {remedy} otherwise."
            )

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        head = teacher.head
        its_maps = [full_precision(each) for each in teacher.pyramid.values()]
        ours = [[full_precision(each) for each in tower[self.cut]] for tower in student.towers]
        with torch.no_grad():
            its = head.start(its_maps, self.cut)
        # As in `MapLoss.maps`: of other paddings the smaller. The target is what the teacher says on that part.
        its, ours, its_maps = _crop(its, ours, its_maps)
        with torch.no_grad():
            logits, deltas = head.finish(its, self.cut)
            boxes = head.decode(deltas, its_maps)
            labels = head.label(student.gt_boxes, its_maps)
        aligned = [[align_scale(*pair) for pair in zip(*towers)] for towers in zip(ours, its)]
        cross_logits, cross_deltas = head.finish(aligned, self.cut)
        classification = cross_classification(cross_logits, logits, labels, self.beta)
        localization = cross_localization(head.decode(cross_deltas, its_maps), boxes, logits, labels)
        return self.config.CLS_WEIGHT * classification + self.config.REG_WEIGHT * localization


def _crop(its: Towers, ours: Towers, maps: List[torch.Tensor]) -> Tuple[Towers, Towers, List[torch.Tensor]]:
    sizes = [[min(pair) for pair in zip(a.shape[-2:], b.shape[-2:])] for a, b in zip(its[0], ours[0])]

    def cut(levels: List[torch.Tensor]) -> List[torch.Tensor]:
        return [each[..., :height, :width] for each, (height, width) in zip(levels, sizes)]

    return [cut(tower) for tower in its], [cut(tower) for tower in ours], cut(maps)
