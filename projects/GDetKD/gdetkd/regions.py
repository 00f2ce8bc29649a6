"""RoIAlign of the same regions on every level of a pyramid, and which of a dense detector's boxes are regions.

Shapes: B images, N regions in all of them, L levels, C channels, (h, w) the pooled size.
"""

from typing import Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.sampling import subsample_labels
from torchvision.ops import box_iou, nms, roi_align

from .roi_align_cpu import roi_align_cpu
from .structures import Regions, full_precision


def pool_all_levels(
    maps: Sequence[torch.Tensor],
    strides: Sequence[int],
    regions: Regions,
    size: Tuple[int, int],
    sampling_ratio: int,
) -> torch.Tensor:
    """RoIAlign (aligned, i.e. half a pixel shifted) of each region on each level.

    Args:
        maps: L maps, each (B, C, H_l, W_l).
        strides: pixels of the input image per cell of each map.
        regions: N boxes over B images.
        size: (h, w).
        sampling_ratio: samples per bin and axis, at least 1.

    Returns:
        (N, L, C, h, w), channels last in memory, in which SGFI convolves them faster (docs/performance.md).
    """
    maps = [full_precision(each) for each in maps]  # as in `pool_in_full_precision`
    pool = roi_align_cpu if maps[0].device.type == "cpu" else _pool_with_torchvision
    return pool(maps, strides, regions, size, sampling_ratio)


def _pool_with_torchvision(
    maps: Sequence[torch.Tensor], strides: Sequence[int], regions: Regions, size: Tuple[int, int], sampling_ratio: int
) -> torch.Tensor:
    parts = [roi_align_torchvision(*level, regions, size, sampling_ratio) for level in zip(maps, strides)]
    return torch.stack([each.permute(0, 2, 3, 1) for each in parts], dim=1).permute(0, 1, 4, 2, 3)


def pool_in_full_precision(pooler: ROIPooler, maps: Sequence[torch.Tensor], regions: Regions) -> torch.Tensor:
    """(N, C, h, w): a detector's own RoIAlign, of float32 boxes: Detectron2 gives boxes the precision of the maps, and
    bfloat16 knows a place beyond pixel 256 to 2 pixels, beyond 1,024 to 8."""
    return pooler([full_precision(each) for each in maps], regions.boxes)


def roi_align_torchvision(
    feature_map: torch.Tensor, stride: int, regions: Regions, size: Tuple[int, int], sampling_ratio: int
) -> torch.Tensor:
    """(N, C, h, w): torchvision's RoIAlign, arguments as in `pool_all_levels`."""
    boxes = [boxes.tensor.to(feature_map.dtype) for boxes in regions.boxes]
    return roi_align(feature_map, boxes, size, 1.0 / stride, sampling_ratio, aligned=True)


def suppress(boxes: torch.Tensor, scores: torch.Tensor, config: CfgNode) -> torch.Tensor:
    """Indices of the boxes that stand for the others, best first.

    Args:
        boxes: (K, 4) xyxy in pixels, finite, with area.
        scores: (K,) the class-maximum score.
        config: the node DISTILL.REGIONS.
    """
    return nms(boxes, scores, config.NMS_THRESH)[: config.POST_NMS_TOPK]


def match_and_sample(boxes: torch.Tensor, gt_boxes: torch.Tensor, config: CfgNode) -> torch.Tensor:
    """Indices of the boxes that become regions: positives, those that overlap an object, and negatives.

    Args:
        boxes: (K, 4) xyxy in pixels.
        gt_boxes: (G, 4), G may be 0.
        config: the node DISTILL.REGIONS.

    Returns:
        at most BATCH_SIZE_PER_IMAGE indices; fewer positives than POSITIVE_FRACTION are made up for by negatives.
    """
    overlap = box_iou(gt_boxes, boxes).amax(dim=0) if len(gt_boxes) else boxes.new_zeros(len(boxes))
    labels = (overlap >= config.IOU_THRESHOLD).long()
    sampled = subsample_labels(labels, config.BATCH_SIZE_PER_IMAGE, config.POSITIVE_FRACTION, bg_label=0)
    return torch.cat(sampled)
