"""Match detections with objects as COCO does at one IoU, and find the score threshold of the best F1.

Shapes: K detections, G objects, C crowds.
"""

from typing import NamedTuple, Optional

import torch
from detectron2.structures import Boxes, pairwise_ioa
from torchvision.ops import box_iou

# Two boxes with at least this IoU show the same thing.
IOU_THRESHOLD = 0.5


class OperatingPoint(NamedTuple):
    """Hold a score threshold and what it gives. All values are fractions from 0 to 1.

    Attributes:
        min_score: the lowest score that is kept.
        precision: share of the kept detections that are right.
        recall: share of the objects that are found.
        f1: harmonic mean of precision and recall.
    """

    min_score: float
    precision: float
    recall: float
    f1: float


def match_in_order(
    boxes: torch.Tensor, classes: torch.Tensor, gt_boxes: torch.Tensor, gt_classes: torch.Tensor
) -> torch.Tensor:
    """Return (K,): the index of the object that each detection on an image matches, or -1 if it is a mistake.

    The first detection chooses first. It takes the object that it overlaps most, among the objects of its class that
    are not taken yet.

    Args:
        boxes, classes: (K, 4) xyxy in pixels and (K,), with descending scores.
        gt_boxes, gt_classes: (G, 4) xyxy in pixels and (G,).
    """
    overlap = box_iou(boxes, gt_boxes)
    overlap = torch.where(classes[:, None] == gt_classes, overlap, torch.zeros_like(overlap))
    objects = torch.full((len(boxes),), -1)
    if len(gt_boxes):
        for index in range(len(boxes)):
            best_overlap, best_object = overlap[index].max(dim=0)
            if best_overlap >= IOU_THRESHOLD:
                objects[index] = best_object
                overlap[:, best_object] = 0
    return objects


def in_crowds(
    boxes: torch.Tensor, classes: torch.Tensor, crowd_boxes: torch.Tensor, crowd_classes: torch.Tensor
) -> torch.Tensor:
    """Return (K,): whether a detection lies in a crowd of its class, by at least half of the detection's area.

    Args:
        boxes, classes: (K, 4) xyxy in pixels and (K,).
        crowd_boxes, crowd_classes: (C, 4) xyxy in pixels and (C,).
    """
    covered = pairwise_ioa(Boxes(crowd_boxes), Boxes(boxes)).T >= IOU_THRESHOLD
    return (covered & (classes[:, None] == crowd_classes)).any(dim=1)


def best_f1(scores: torch.Tensor, correct: torch.Tensor, objects: int) -> Optional[OperatingPoint]:
    """Return the score threshold with the highest F1, or None if there is no detection.

    Of several thresholds with that F1, the highest is taken. A threshold cannot separate detections with equal scores.
    Example: scores 0.9, 0.8 and 0.7, of which the second is wrong, with 2 objects. F1 is 2/3 from 0.9 on, 2/4 from 0.8
    on and 4/5 from 0.7 on, so the threshold is 0.7.

    Args:
        scores: (K,) in any order.
        correct: (K,) booleans, whether each detection matches an object.
        objects: number of objects.
    """
    if not len(scores):
        return None
    order = scores.argsort(descending=True, stable=True)
    scores, found = scores[order], correct[order].cumsum(0)
    kept = torch.arange(1, len(order) + 1)
    f1 = 2 * found.double() / (kept + objects)
    last_of_equals = torch.cat([scores[1:] != scores[:-1], torch.tensor([True])])
    best = int(torch.where(last_of_equals, f1, torch.full_like(f1, -1.0)).argmax())
    right = int(found[best])
    return OperatingPoint(float(scores[best]), right / (best + 1), right / max(1, objects), float(f1[best]))
