"""CrossKD: Wang, Chen, Zheng, Li, Cheng and Hou, "CrossKD: Cross-Head Knowledge Distillation for Object Detection",
CVPR 2024, https://arxiv.org/abs/2306.11369.

Shapes: B images, R anchors of all levels, n classes of the teacher, D the width of a tower.
"""

from typing import List, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec, full_precision
from .build import DISTILL_LOSS_REGISTRY, DistillLoss
from .pkd import standardize

# Features of the classification tower and of the box tower, by level.
Towers = Sequence[List[torch.Tensor]]
# Shortest side of a box, in pixels. The GIoU of a narrower box is mostly rounding error.
MIN_SIDE = 0.1


def cross_classification(
    cross_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, beta: float = 1.0
) -> torch.Tensor:
    """Compare the class scores of the cross-head and the teacher by the quality focal loss (section 3 of the paper).

    It is the binary cross-entropy with the teacher's scores as targets, times |difference of scores|^beta.

    Args:
        cross_logits, teacher_logits: (B, R, n)
        labels: (B, R) 1 for a positive anchor, 0 for a negative anchor, -1 for an anchor that is left out.

    Returns:
        sum over B, R and n, divided by the number of positive anchors (at least 1).
    """
    scores = teacher_logits.sigmoid()
    focus = (cross_logits.sigmoid() - scores).abs() ** beta
    loss = F.binary_cross_entropy_with_logits(cross_logits, scores, reduction="none") * focus
    return (loss * (labels >= 0)[..., None]).sum() / _positives(labels)


def cross_localization(
    cross_boxes: torch.Tensor, teacher_boxes: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Compare the boxes of the cross-head and the teacher by the GIoU loss (section 3 of the paper).

    A box is weighted by the teacher's highest class score. Teacher boxes narrower than `MIN_SIDE` are left out.

    Args:
        cross_boxes, teacher_boxes: (B, R, 4) xyxy in pixels.
        teacher_logits: (B, R, n)
        labels: as in `cross_classification`.

    Returns:
        sum over B and R, divided by the number of positive anchors (at least 1).
    """
    is_wide = (teacher_boxes[..., 2:] - teacher_boxes[..., :2]).amin(dim=-1) > MIN_SIDE
    confidence = teacher_logits.sigmoid().amax(dim=-1) * (labels >= 0) * is_wide
    return (_giou_loss(cross_boxes, teacher_boxes) * confidence).sum() / _positives(labels)


def _giou_loss(first: torch.Tensor, second: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Return the GIoU loss (...,) of boxes (..., 4), xyxy (https://arxiv.org/abs/1902.09630).

    The losses of fvcore and torchvision use boolean indices, which make the CPU wait for the GPU several times.
    """

    def area(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        sides = (end - start).clamp(min=0)
        return sides[..., 0] * sides[..., 1]  # the backward pass of `prod` waits for the GPU

    intersection = area(torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:]))
    hull = area(torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:]))
    union = area(first[..., :2], first[..., 2:]) + area(second[..., :2], second[..., 2:]) - intersection
    return 1 - intersection / (union + eps) + (hull - union) / (hull + eps)


def _positives(labels: torch.Tensor) -> torch.Tensor:
    return (labels == 1).sum().clamp(min=1)


def align_scale(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Give the student's features the teacher's mean and deviation in each channel, over images and locations.

    The teacher's head was trained on features of this scale.

    Args:
        student, teacher: (B, D, H, W)
    """
    deviation = teacher.std(dim=(0, 2, 3), keepdim=True, unbiased=False)
    return standardize(student) * deviation + teacher.mean(dim=(0, 2, 3), keepdim=True)


@DISTILL_LOSS_REGISTRY.register()
class CROSSKD(DistillLoss):
    """Run the student's tower features through the rest of the teacher's frozen head, and compare the predictions.

    The target is the teacher's own prediction. Both predictions come from the teacher's head, so student and teacher
    may have different anchors and classes. The module has no parameters. Gradients pass through the teacher's weights
    to the student.

    Raises:
        GDetKDError: a detector is not dense, the strides differ, a tower has too few convolutions, or the widths differ
            where the student's features enter the teacher's head.
    """

    needs = frozenset({"towers", "head"})

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # Exponent of the difference of scores. Source: the authors.
        node.BETA = 1.0
        # Values by the teacher's family. Source: the authors. CLS_WEIGHT and REG_WEIGHT are the factors on classes and
        # boxes. After SHARED_CONVS convolutions of the student's towers, the teacher's towers take over.
        node.ANCHOR_BASED = CfgNode(dict(CLS_WEIGHT=1.0, REG_WEIGHT=1.0, SHARED_CONVS=3))
        node.ANCHOR_FREE = CfgNode(dict(CLS_WEIGHT=0.4, REG_WEIGHT=0.75, SHARED_CONVS=2))

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__()
        remedy = "take CROSSKD out of DISTILL.LOSSES"
        for role, spec in (("student", student_spec), ("teacher", teacher_spec)):
            if spec.dense is None:
                raise GDetKDError(
                    f"CROSSKD needs two dense detectors, but the {role} is not dense. Choose a dense {role}, or "
                    f"{remedy}."
                )
            if not spec.dense.tower_channels:
                raise GDetKDError(
                    f"CROSSKD runs the {role}'s head in two parts, and this {role}'s head cannot be cut. Choose a "
                    f"RetinaNet or FCOS of Detectron2, or {remedy}."
                )
        node = f"DISTILL.CROSSKD.{teacher_spec.family}.SHARED_CONVS"
        self.config = cfg.DISTILL.CROSSKD[teacher_spec.family]
        self.beta, self.cut = cfg.DISTILL.CROSSKD.BETA, self.config.SHARED_CONVS
        if list(student_spec.strides.values()) != list(teacher_spec.strides.values()):
            raise GDetKDError(
                "CROSSKD runs the teacher's head on the student's levels, so both need the same strides. The student "
                f"has {list(student_spec.strides.values())} and the teacher {list(teacher_spec.strides.values())}. "
                f"Choose detectors of the same strides, or {remedy}."
            )
        shortest = min(len(spec.dense.tower_channels) for spec in (student_spec, teacher_spec))
        if not 0 <= self.cut <= shortest:
            raise GDetKDError(
                f"{node} is {self.cut}, but a tower has only {shortest} convolutions. Set it to a value from 0 to "
                f"{shortest}."
            )
        student_width, teacher_width = (
            [spec.channels, *spec.dense.tower_channels][self.cut] for spec in (student_spec, teacher_spec)
        )
        if student_width != teacher_width:
            raise GDetKDError(
                f"CROSSKD hands the student's features to the teacher's head after {node} = {self.cut} convolutions. "
                f"The student has {student_width} channels there and the teacher {teacher_width}. Give both the same "
                f"MODEL.FPN.OUT_CHANNELS, or {remedy}."
            )

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        head = teacher.head
        teacher_maps = [full_precision(teacher_map) for teacher_map in teacher.pyramid.values()]
        student_towers = [[full_precision(features) for features in tower[self.cut]] for tower in student.towers]
        with torch.no_grad():
            teacher_towers = head.start(teacher_maps, self.cut)
        # The teacher predicts on the cropped features, so that the target and the cross-head see the same cells.
        teacher_towers, student_towers, teacher_maps = _crop(teacher_towers, student_towers, teacher_maps)
        with torch.no_grad():
            teacher_logits, teacher_deltas = head.finish(teacher_towers, self.cut)
            teacher_boxes = head.decode(teacher_deltas, teacher_maps)
            labels = head.label(student.gt_boxes, teacher_maps)
        aligned = [[align_scale(*pair) for pair in zip(*towers)] for towers in zip(student_towers, teacher_towers)]
        cross_logits, cross_deltas = head.finish(aligned, self.cut)
        cross_boxes = head.decode(cross_deltas, teacher_maps)
        classification = cross_classification(cross_logits, teacher_logits, labels, self.beta)
        localization = cross_localization(cross_boxes, teacher_boxes, teacher_logits, labels)
        return self.config.CLS_WEIGHT * classification + self.config.REG_WEIGHT * localization


def _crop(
    teacher_towers: Towers, student_towers: Towers, teacher_maps: List[torch.Tensor]
) -> Tuple[Towers, Towers, List[torch.Tensor]]:
    """Crop all features to the size that both detectors have, because they may pad images differently."""
    pairs = zip(teacher_towers[0], student_towers[0])
    sizes = [[min(sides) for sides in zip(a.shape[-2:], b.shape[-2:])] for a, b in pairs]

    def cut(levels: List[torch.Tensor]) -> List[torch.Tensor]:
        return [features[..., :height, :width] for features, (height, width) in zip(levels, sizes)]

    return [cut(tower) for tower in teacher_towers], [cut(tower) for tower in student_towers], cut(teacher_maps)
