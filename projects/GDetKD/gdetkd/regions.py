"""Pool regions by a detector's own RoIAlign, and choose which of a dense detector's boxes are regions."""

from typing import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.sampling import subsample_labels
from torchvision.ops import box_iou, nms

from .structures import Regions, full_precision


def pool_in_full_precision(pooler: ROIPooler, maps: Sequence[torch.Tensor], regions: Regions) -> torch.Tensor:
    """(N, C, h, w): a detector's own RoIAlign, of float32 boxes: Detectron2 gives boxes the precision of the maps, and
    bfloat16 knows a place beyond pixel 256 to 2 pixels, beyond 1,024 to 8."""
    return pooler([full_precision(each) for each in maps], regions.boxes)


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
