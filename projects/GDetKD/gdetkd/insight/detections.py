"""Match detections with objects, choose a score threshold, and compare what several detectors find."""

from dataclasses import dataclass
from typing import Collection, Optional, Sequence

import torch
from torchvision.ops import box_iou

from ..matching import IOU_THRESHOLD, best_f1, in_crowds, match_in_order


@dataclass
class MatchedDetections:
    """Hold a detector's detections on one image, the best first, and the objects that they match.

    Attributes:
        boxes: (K, 4) xyxy in pixels.
        scores: (K,) descending.
        classes: (K,)
        objects: (K,) index of the object that the detection matches; -1 if the detection is a mistake.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor
    objects: torch.Tensor

    def above(self, score: float) -> "MatchedDetections":
        """Return the detections with at least this score."""
        kept = self.scores >= score
        return MatchedDetections(self.boxes[kept], self.scores[kept], self.classes[kept], self.objects[kept])

    def finds(self, count: int) -> torch.Tensor:
        """Return (count,): which of the image's `count` objects are found."""
        found = torch.zeros(count, dtype=torch.bool)
        found[self.objects[self.objects >= 0]] = True
        return found


def match_objects(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    gt_boxes: torch.Tensor,
    gt_classes: torch.Tensor,
    crowd_boxes: torch.Tensor,
    crowd_classes: torch.Tensor,
) -> MatchedDetections:
    """Match the detections on one image with its objects, as COCO does at one IoU: see `match_in_order`.

    Detections in crowds that match no object are left out, because they are neither right nor wrong.

    Args:
        boxes, scores, classes: (K, 4), (K,), (K,) detections in any order.
        gt_boxes, gt_classes: (G, 4), (G,) objects.
        crowd_boxes, crowd_classes: (C, 4), (C,) crowds.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, scores, classes = boxes[order], scores[order], classes[order]
    objects = match_in_order(boxes, classes, gt_boxes, gt_classes)
    counts = (objects >= 0) | ~in_crowds(boxes, classes, crowd_boxes, crowd_classes)
    return MatchedDetections(boxes[counts], scores[counts], classes[counts], objects[counts])


def best_threshold(detections: Sequence[MatchedDetections], objects: int) -> float:
    """Return the score threshold that gives a detector its highest F1 over all images.

    Detectors score differently: a dense detector scores lower than a two-stage detector. So each detector needs its
    own threshold.

    Args:
        detections: all detections of the detector, by image.
        objects: number of objects on all images together.
    """
    scores = torch.cat([image.scores for image in detections])
    best = best_f1(scores, torch.cat([image.objects >= 0 for image in detections]), objects)
    return 0.0 if best is None else best.min_score


@dataclass
class DetectorComparison:
    """Hold what distillation changed on one image with G objects and K detections of the student.

    Attributes:
        gained: (G,) objects that the student finds and the reference does not.
        lost: (G,) objects that the reference finds and the student does not.
        copied: (K,) the student's mistakes that the teacher makes too and the baseline does not.
    """

    gained: torch.Tensor
    lost: torch.Tensor
    copied: torch.Tensor

    def __len__(self) -> int:
        """Return the number of changes."""
        return int(self.gained.sum() + self.lost.sum() + self.copied.sum())


def reference_among(detectors: Collection[str]) -> Optional[str]:
    """Return the detector that the student is compared with: the baseline, or the teacher if there is no baseline."""
    return next((name for name in ("baseline", "teacher") if name in detectors), None)


def compare_detectors(
    objects: int,
    student: MatchedDetections,
    teacher: Optional[MatchedDetections],
    baseline: Optional[MatchedDetections],
) -> DetectorComparison:
    """Compare the student with the reference: the baseline, or the teacher if there is no baseline.

    Without both, nothing is gained, lost or copied.

    Args:
        objects: number of objects on the image.
        student, teacher, baseline: the detections of each detector on the image. None: there is no such detector, or it
            has no class of the objects.
    """
    reference = baseline or teacher or student
    student_finds, reference_finds = student.finds(objects), reference.finds(objects)
    copied = torch.zeros(len(student.boxes), dtype=torch.bool)
    if teacher is not None:
        copied = _shared_mistakes(student, teacher)
    if baseline is not None:
        copied &= ~_shared_mistakes(student, baseline)
    return DetectorComparison(student_finds & ~reference_finds, reference_finds & ~student_finds, copied)


def _shared_mistakes(student: MatchedDetections, reference: MatchedDetections) -> torch.Tensor:
    """Return (K,): which of the student's detections are mistakes that the reference makes too.

    Two mistakes are the same if they overlap and have the same class.
    """
    wrong = reference.objects < 0
    overlaps = box_iou(student.boxes, reference.boxes[wrong]) >= IOU_THRESHOLD
    same_class = student.classes[:, None] == reference.classes[wrong]
    return (student.objects < 0) & (overlaps & same_class).any(dim=1)
