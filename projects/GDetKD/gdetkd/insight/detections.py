"""Which objects a detector finds, which of its detections are mistakes, and how that differs between detectors."""

from dataclasses import dataclass
from typing import Optional, Sequence

import torch
from torchvision.ops import box_iou

# Overlap from which on a detection is of an object, or two detections are of the same thing.
IOU_THRESHOLD = 0.5


@dataclass
class Found:
    """One detector's detections on one image, best first.

    Attributes:
        boxes: (K, 4) xyxy in pixels.
        scores: (K,) descending.
        classes: (K,)
        objects: (K,) index of the object that each is of, -1 of a mistake.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor
    objects: torch.Tensor

    def above(self, score: float) -> "Found":
        """Those of at least this score."""
        kept = self.scores >= score
        return Found(self.boxes[kept], self.scores[kept], self.classes[kept], self.objects[kept])

    def finds(self, count: int) -> torch.Tensor:
        """(count,) which of that many objects are found."""
        found = torch.zeros(count, dtype=torch.bool)
        found[self.objects[self.objects >= 0]] = True
        return found


def match_objects(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    gt_boxes: torch.Tensor,
    gt_classes: torch.Tensor,
) -> Found:
    """As COCO matches at one IoU: the best detection first takes the free object of its class that it overlaps most.

    Args:
        boxes, scores, classes: (K, 4), (K,), (K,) of one image, in any order.
        gt_boxes, gt_classes: (G, 4), (G,)
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, scores, classes = boxes[order], scores[order], classes[order]
    overlap = box_iou(boxes, gt_boxes)
    overlap = torch.where(classes[:, None] == gt_classes, overlap, torch.zeros_like(overlap))
    objects = torch.full((len(boxes),), -1)
    if len(gt_boxes):
        for index in range(len(boxes)):
            best, place = overlap[index].max(dim=0)
            if best >= IOU_THRESHOLD:
                objects[index] = place
                overlap[:, place] = 0
    return Found(boxes, scores, classes, objects)


def best_threshold(found: Sequence[Found], objects: int) -> float:
    """The score from which on a detector's detections are taken: that of its highest F1 over all images.

    Detectors score differently, dense ones lower; each is shown at its best.

    Args:
        found: all detections, by image.
        objects: on all images together.
    """
    scores = torch.cat([each.scores for each in found])
    if not len(scores):
        return 0.0
    right = torch.cat([each.objects >= 0 for each in found])
    order = scores.argsort(descending=True, stable=True)
    f1 = 2 * right[order].cumsum(0) / (torch.arange(1, len(order) + 1) + objects)
    # Of equal scores all are taken or none.
    last_of_equals = torch.cat([scores[order][1:] != scores[order][:-1], torch.tensor([True])])
    return float(scores[order][torch.where(last_of_equals, f1, torch.full_like(f1, -1.0)).argmax()])


@dataclass
class DetectorComparison:
    """What distillation changed on one image.

    Attributes:
        gained: (G,) objects that the student finds and the reference does not.
        lost: (G,) objects that the reference finds and the student does not.
        copied: (K,) of the student's detections, mistakes that the teacher makes, too, and the baseline does not.
    """

    gained: torch.Tensor
    lost: torch.Tensor
    copied: torch.Tensor

    def __len__(self) -> int:
        """How much there is to see."""
        return int(self.gained.sum() + self.lost.sum() + self.copied.sum())


def compare_detectors(objects: int, student: Found, teacher: Found, baseline: Optional[Found]) -> DetectorComparison:
    """
    Args:
        objects: G, of the image.
        student, teacher, baseline: what each takes for objects there. The reference is the baseline, or the teacher
            where there is none.
    """
    ours, theirs = student.finds(objects), (teacher if baseline is None else baseline).finds(objects)
    copied = _same_mistakes(student, teacher)
    if baseline is not None:
        copied &= ~_same_mistakes(student, baseline)
    return DetectorComparison(ours & ~theirs, theirs & ~ours, copied)


def _same_mistakes(ours: Found, theirs: Found) -> torch.Tensor:
    """(K,) which of our detections are mistakes that overlap one of theirs of the same class."""
    wrong = theirs.objects < 0
    is_there = box_iou(ours.boxes, theirs.boxes[wrong]) >= IOU_THRESHOLD
    is_of_its_class = ours.classes[:, None] == theirs.classes[wrong]
    return (ours.objects < 0) & (is_there & is_of_its_class).any(dim=1)
