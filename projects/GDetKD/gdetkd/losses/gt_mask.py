"""Ground-truth-mask imitation, GTMASK: compare feature maps inside objects only.

Yao et al. ("G-DetKD", ICCV 2021, https://arxiv.org/abs/2108.07482) use it as a baseline. For Faster R-CNN with a
ResNet-18 on COCO they report 35.5 AP with GTMASK and 36.7 AP with SGFI.

Shapes: B images, C channels, (H, W) the cells of a level, G objects of an image.
"""

from typing import Sequence

import torch
from detectron2.config import CfgNode

from ..structures import DetectorOutputs, DetectorSpec
from .build import DISTILL_LOSS_REGISTRY
from .maps import MapLoss, adapters, covered_cells, masked_squared_error


def object_mask(gt_boxes: Sequence[torch.Tensor], stride: int, size: Sequence[int]) -> torch.Tensor:
    """Return a mask of the cells that any object covers, also in part.

    Args:
        gt_boxes: by image, (G, 4) xyxy in pixels; G may be 0.
        stride: pixels per cell.
        size: (H, W).

    Returns:
        (B, H, W), bool.
    """
    masks = []
    for boxes in gt_boxes:
        rows, columns = covered_cells(boxes, stride, size)
        masks.append((rows[:, :, None] & columns[:, None, :]).any(dim=0))
    return torch.stack(masks)


def ground_truth_mask_imitation(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Compare maps within masks by the mean squared error.

    Args:
        student, teacher: by level, (B, C, H, W), the student adapted to the teacher's channels.
        masks: by level, (B, H, W), bool.

    Returns:
        mean over the cells in the masks of all levels and over C; 0 if the masks are empty.
    """
    total, cells = masked_squared_error(student, teacher, masks)
    return total / (cells.clamp(min=1) * student[0].shape[1])


@DISTILL_LOSS_REGISTRY.register()
class GTMASK(MapLoss):
    """Compare the common levels by `ground_truth_mask_imitation`. Every level is masked by all objects.

    The module has a 1x1 adapter for each level.

    Raises:
        GDetKDError: the pyramids have no stride in common.
    """

    default_weight = 1.0  # source: our choice

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        self.adapters = adapters(self.levels, student_spec, teacher_spec)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        student_maps, teacher_maps = zip(*self.maps(student, teacher))
        gt_boxes = [boxes.tensor for boxes in student.gt_boxes]
        masks = [object_mask(gt_boxes, level.stride, maps.shape[-2:]) for level, maps in zip(self.levels, teacher_maps)]
        return ground_truth_mask_imitation(student_maps, teacher_maps, masks)
