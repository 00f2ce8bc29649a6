"""Pool regions, and choose a dense detector's boxes that become regions.

Shapes: N regions, C channels, (h, w) the pooled size, K boxes, G objects of an image.
"""

from functools import partial
from typing import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from torch import nn
from torchvision.ops import box_iou, nms

from .structures import Regions, full_precision

# Samples per bin and axis for a teacher whose own pooling is not aligned, or that has none. On the student's side,
# DISTILL.SGFI.SAMPLING_RATIO and DISTILL.ROIFI.SAMPLING_RATIO have the same default.
SAMPLING_RATIO = 2


def pool_in_full_precision(pooler: ROIPooler, maps: Sequence[torch.Tensor], regions: Regions) -> torch.Tensor:
    """Pool regions by a detector's own RoIAlign in float32: (N, C, h, w).

    Detectron2 gives the boxes the precision of the maps. In bfloat16, a coordinate beyond pixel 256 is only exact to 2
    pixels, and beyond pixel 1,024 to 8 pixels.
    """
    maps = [full_precision(feature_map) for feature_map in maps]
    if type(pooler) is not ROIPooler or len(maps) == 1:
        return pooler(maps, regions.boxes)

    def pool(layer: nn.Module, feature_map: torch.Tensor, part: Regions) -> torch.Tensor:
        return layer(feature_map, part.rois())

    # `ROIPooler` does the same, but waits for the device at each level.
    pools = [partial(pool, *level) for level in zip(pooler.level_poolers, maps)]
    return regions.on_levels(levels_by_box_size(pooler, regions), pools)


def is_aligned(pooler: ROIPooler) -> bool:
    """Return whether a detector's pooler samples where SGFI and ROIFI sample the student's maps.

    RoIPool, and RoIAlign as it was first published, lie half a cell beside it
    (https://github.com/facebookresearch/detectron2/blob/main/detectron2/layers/roi_align.py). A pooler without levels
    is one of the user's own, and counts as aligned.
    """
    return all(getattr(layer, "aligned", False) for layer in getattr(pooler, "level_poolers", ()))


def levels_by_box_size(pooler: ROIPooler, regions: Regions) -> torch.Tensor:
    """Return the index (N,) of the level that a pooler's box-size rule assigns to each region."""
    rule = pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
    return assign_boxes_to_levels(regions.boxes, *rule)


def suppress(boxes: torch.Tensor, scores: torch.Tensor, config: CfgNode) -> torch.Tensor:
    """Return the indices of the boxes that NMS keeps, best first.

    Args:
        boxes: (K, 4) xyxy in pixels, finite, with an area.
        scores: (K,) highest class score of each box.
        config: the node DISTILL.REGIONS.
    """
    return nms(boxes, scores, config.NMS_THRESH)[: config.POST_NMS_TOPK]


def match_and_sample(
    boxes: torch.Tensor, is_candidate: torch.Tensor, gt_boxes: torch.Tensor, config: CfgNode
) -> torch.Tensor:
    """Sample the boxes of an image that become regions: positives, which overlap an object, and negatives.

    This is Detectron2's `subsample_labels` without its waits for the device.

    Args:
        boxes: (K, 4) xyxy in pixels.
        is_candidate: (K,) false for boxes that are left out.
        gt_boxes: (G, 4) xyxy in pixels, G may be 0.
        config: the node DISTILL.REGIONS.

    Returns:
        (K,) true for the sampled boxes, at most BATCH_SIZE_PER_IMAGE. If there are few positives, negatives fill the
        rest.
    """
    overlap = box_iou(gt_boxes, boxes).amax(dim=0) if len(gt_boxes) else boxes.new_zeros(len(boxes))
    positive = is_candidate & (overlap >= config.IOU_THRESHOLD)
    negative = is_candidate & ~positive
    size = config.BATCH_SIZE_PER_IMAGE
    positive = positive & (_random_rank(positive) < int(size * config.POSITIVE_FRACTION))
    return positive | (negative & (_random_rank(negative) < size - positive.sum()))


def _random_rank(mask: torch.Tensor) -> torch.Tensor:
    """Return ranks (K,) in a random order in which the elements of the mask come first."""
    keys = torch.rand(len(mask), device=mask.device)
    return (keys + (~mask).float()).argsort().argsort()
