"""Pool regions by a detector's own RoIAlign, and choose a dense detector's boxes that become regions.

Shapes: N regions, C channels, (h, w) the pooled size, K boxes, G objects of an image.
"""

from typing import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.sampling import subsample_labels
from torchvision.ops import box_iou, nms

from .structures import Regions, full_precision


def pool_in_full_precision(pooler: ROIPooler, maps: Sequence[torch.Tensor], regions: Regions) -> torch.Tensor:
    """Pool regions by a detector's own RoIAlign in float32: (N, C, h, w).

    Detectron2 gives the boxes the precision of the maps. In bfloat16, a coordinate beyond pixel 256 is only exact to 2
    pixels, and beyond pixel 1,024 to 8 pixels.
    """
    return pooler([full_precision(feature_map) for feature_map in maps], regions.boxes)


def suppress(boxes: torch.Tensor, scores: torch.Tensor, config: CfgNode) -> torch.Tensor:
    """Return the indices of the boxes that NMS keeps, best first.

    Args:
        boxes: (K, 4) xyxy in pixels, finite, with an area.
        scores: (K,) highest class score of each box.
        config: the node DISTILL.REGIONS.
    """
    return nms(boxes, scores, config.NMS_THRESH)[: config.POST_NMS_TOPK]


def match_and_sample(boxes: torch.Tensor, gt_boxes: torch.Tensor, config: CfgNode) -> torch.Tensor:
    """Sample the boxes of an image that become regions: positives, which overlap an object, and negatives.

    Args:
        boxes: (K, 4) xyxy in pixels.
        gt_boxes: (G, 4) xyxy in pixels, G may be 0.
        config: the node DISTILL.REGIONS.

    Returns:
        indices of at most BATCH_SIZE_PER_IMAGE boxes. If there are few positives, negatives fill the rest.
    """
    overlap = box_iou(gt_boxes, boxes).amax(dim=0) if len(gt_boxes) else boxes.new_zeros(len(boxes))
    labels = (overlap >= config.IOU_THRESHOLD).long()
    sampled = subsample_labels(labels, config.BATCH_SIZE_PER_IMAGE, config.POSITIVE_FRACTION, bg_label=0)
    return torch.cat(sampled)
