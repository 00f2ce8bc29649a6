"""Fine-grained feature imitation, FGFI: Wang, Yuan, Zhang and Feng, "Distilling Object Detectors with Fine-grained
Feature Imitation", CVPR 2019, https://arxiv.org/abs/1906.03609.

Shapes: B images, C channels, (H, W) the cells of a level, A anchors of a location, G objects of an image.
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
    """Find the cells of an image that have an anchor near an object ("Imitation region estimation" in the paper).

    An anchor is near an object if their IoU exceeds `factor` times the largest IoU of any anchor with that object. For
    example, if the best anchor has an IoU of 0.6 and `factor` is 0.5, the threshold of this object is 0.3.

    Args:
        anchors: by level, (H, W, A, 4) xyxy in pixels.
        gt_boxes: (G, 4), G may be 0.
        factor: psi in the paper.

    Returns:
        by level, (H, W), bool.
    """
    if len(gt_boxes) == 0:
        return [level_anchors.new_zeros(level_anchors.shape[:2], dtype=torch.bool) for level_anchors in anchors]
    overlaps = [box_iou(level_anchors.reshape(-1, 4), gt_boxes) for level_anchors in anchors]  # (H W A, G)
    largest = torch.cat(overlaps).amax(dim=0)  # (G,)
    near = [(overlap > factor * largest).any(dim=1) for overlap in overlaps]
    return [cells.view(level_anchors.shape[:3]).any(dim=2) for cells, level_anchors in zip(near, anchors)]


def fine_grained_imitation(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Compare maps within masks by squared errors, summed over channels ("Fine-grained feature imitation").

    Args:
        student, teacher: by level, (B, C, H, W), the student adapted to the teacher's channels.
        masks: by level, (B, H, W), bool; N_p cells in all.

    Returns:
        the sum divided by 2 N_p; 0 for N_p = 0.
    """
    total, cells = masked_squared_error(student, teacher, masks)
    return total / (2 * cells.clamp(min=1))


def place_anchors(cell: torch.Tensor, stride: int, offset: float, size: Sequence[int]) -> torch.Tensor:
    """Place the anchors of a location at every location of a map.

    Args:
        cell: (A, 4) anchors, xyxy in pixels about the location.
        stride: pixels per cell.
        offset: position of the location in a cell, in strides from the left upper corner.
        size: (H, W).

    Returns:
        (H, W, A, 4) xyxy in pixels.
    """
    rows, columns = ((torch.arange(count, device=cell.device) + offset) * stride for count in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y, x, y], dim=-1)[:, :, None] + cell


@DISTILL_LOSS_REGISTRY.register()
class FGFI(MapLoss):
    """Compare maps by `fine_grained_imitation` in cells whose anchors, the student's, are near objects.

    The module has a 3x3 adapter for each level, as in the authors' code.

    Raises:
        GDetKDError: the student has no anchors, or the pyramids have no stride in common.
    """

    default_weight = 0.01  # source: the authors, for one map of a VGG with 512 channels

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # An anchor is near an object if their IoU exceeds this share of the largest IoU of any anchor with the object
        # (psi in the paper). Source: the authors.
        node.IOU_FACTOR = 0.5

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        self.factor = cfg.DISTILL.FGFI.IOU_FACTOR
        if not 0 <= self.factor < 1:
            raise GDetKDError(
                f"DISTILL.FGFI.IOU_FACTOR is {self.factor}. It is a share of the largest IoU: set it to at least 0 and "
                "less than 1."
            )
        anchors = student_spec.location_anchors or {}
        lacking = [level.student for level in self.levels if level.student not in anchors]
        if lacking:
            raise GDetKDError(
                "FGFI compares cells whose anchors are near objects, but the student has no anchors on "
                f"{', '.join(lacking)}. Replace FGFI in DISTILL.LOSSES, for example by GTMASK, which needs no anchors."
            )
        for index, level in enumerate(self.levels):  # a buffer moves to the GPU once
            self.register_buffer(f"anchors{index}", torch.tensor(anchors[level.student]), persistent=False)
        self.offset = student_spec.anchor_offset
        self.adapters = adapters(self.levels, student_spec, teacher_spec, kernel_size=3)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        student_maps, teacher_maps = zip(*self.maps(student, teacher))
        cells = [self.get_buffer(f"anchors{index}") for index in range(len(self.levels))]
        anchors = [
            place_anchors(cell.to(teacher_map.dtype), level.stride, self.offset, teacher_map.shape[-2:])
            for cell, level, teacher_map in zip(cells, self.levels, teacher_maps)
        ]
        by_image = [near_object_cells(anchors, boxes.tensor, self.factor) for boxes in student.gt_boxes]
        masks = [torch.stack(level_masks) for level_masks in zip(*by_image)]
        return fine_grained_imitation(student_maps, teacher_maps, masks)
