"""Fine-grained feature imitation: Wang, Yuan, Zhang and Feng, "Distilling Object Detectors with Fine-grained Feature
Imitation", CVPR 2019.

Shapes: B images, C channels, (H, W) the cells of a level, A anchors a location, G objects of an image.
"""

from typing import List, Sequence

import torch
from detectron2.config import CfgNode
from torchvision.ops import box_iou

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec
from .build import DISTILL_LOSS_REGISTRY
from .maps import MapLoss, adapters, masked_squared_error


def near_object_cells(anchors: Sequence[torch.Tensor], gt_boxes: torch.Tensor, factor: float) -> List[torch.Tensor]:
    """The imitation region of an image ("Imitation region estimation"): cells with an anchor whose IoU with an object
    exceeds `factor` times the largest that any anchor has with that object.

    Args:
        anchors: by level, (H, W, A, 4) xyxy in pixels.
        gt_boxes: (G, 4), G may be 0.
        factor: psi of the paper.

    Returns:
        by level, (H, W), bool.
    """
    if len(gt_boxes) == 0:
        return [each.new_zeros(each.shape[:2], dtype=torch.bool) for each in anchors]
    overlaps = [box_iou(each.reshape(-1, 4), gt_boxes) for each in anchors]  # (H W A, G)
    largest = torch.cat(overlaps).amax(dim=0)  # (G,)
    near = [(overlap > factor * largest).any(dim=1) for overlap in overlaps]
    return [cells.view(each.shape[:3]).any(dim=2) for cells, each in zip(near, anchors)]


def fine_grained_imitation(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The imitation loss ("Fine-grained feature imitation"): squared errors in the mask, summed over channels.

    Args:
        student, teacher: by level, (B, C, H, W), the student adapted to the teacher's channels.
        masks: by level, (B, H, W), bool; N_p cells in all.

    Returns:
        the sum over 2 N_p; 0 for N_p = 0.
    """
    total, cells = masked_squared_error(student, teacher, masks)
    return total / (2 * cells.clamp(min=1))


def place_anchors(cell: torch.Tensor, stride: int, offset: float, size: Sequence[int]) -> torch.Tensor:
    """(H, W, A, 4): the anchors (A, 4) of a location, in pixels about it, at every location of a map."""
    rows, columns = ((torch.arange(count, device=cell.device) + offset) * stride for count in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y, x, y], dim=-1)[:, :, None] + cell


@DISTILL_LOSS_REGISTRY.register()
class FGFI(MapLoss):
    """`fine_grained_imitation` around the student's anchors. Owns a 3x3 adapter, the authors', for each level.

    Raises:
        GDetKDError: the student has no anchors, or the pyramids no stride in common.
    """

    default_weight = 0.01  # source: the authors, for one map of 512 channels of a VGG

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # psi: an anchor is near an object if its IoU exceeds this share of the largest that an anchor has with the
        # object. Source: the authors.
        node.IOU_FACTOR = 0.5

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        self.factor = cfg.DISTILL.FGFI.IOU_FACTOR
        if not 0 <= self.factor < 1:
            raise GDetKDError(f"DISTILL.FGFI.IOU_FACTOR is a share of the largest IoU, in [0, 1), not {self.factor}.")
        anchors = student_spec.location_anchors or {}
        lacking = [level.student for level in self.levels if level.student not in anchors]
        if lacking:
            raise GDetKDError(
                "FGFI imitates where the student's anchors are near objects, but the student has no anchors on "
                f"{', '.join(lacking)}. Take FGFI out of DISTILL.LOSSES: GTMASK needs no anchors."
            )
        self.anchors = [anchors[level.student] for level in self.levels]
        self.offset = student_spec.anchor_offset
        self.adapters = adapters(self.levels, student_spec, teacher_spec, kernel_size=3)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        ours, its = zip(*self.maps(student, teacher))
        anchors = [
            place_anchors(each.new_tensor(cell), level.stride, self.offset, each.shape[-2:])
            for cell, level, each in zip(self.anchors, self.levels, its)
        ]
        by_image = [near_object_cells(anchors, boxes.tensor, self.factor) for boxes in student.gt_boxes]
        adapted = [adapter(each) for adapter, each in zip(self.adapters, ours)]
        return fine_grained_imitation(adapted, its, [torch.stack(masks) for masks in zip(*by_image)])
