"""Choose the score threshold of each class on labelled images: the threshold with the highest F1."""

import logging
import os
import statistics
from dataclasses import dataclass, replace
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from torchvision.ops import clip_boxes_to_image

from ..data.catalog import load_dataset
from ..data.class_names import as_student_names
from ..data.headers import has_size
from ..errors import GDetKDError, some
from ..matching import best_f1, in_crowds, match_in_order
from .detect import SCORE_DIGITS
from .images import Candidates, ImageFile, name_faults, read_images
from .part import Found

logger = logging.getLogger(__name__)

# Threshold of a class of which no box is to be trusted.
NONE_TRUSTED = 1.0


class Objects(NamedTuple):
    """Hold the objects of a labelled image.

    Attributes:
        boxes: (G, 4) xyxy in pixels of the file.
        classes: (G,) index among the student's classes.
        crowds: (G,) booleans.
    """

    boxes: torch.Tensor
    classes: torch.Tensor
    crowds: torch.Tensor


class Validation(NamedTuple):
    """Hold the labelled images on which thresholds are chosen.

    Attributes:
        dataset: name of the dataset.
        images: the readable images.
        objects: the objects of each image, by name of the image.
    """

    dataset: str
    images: List[ImageFile]
    objects: Dict[str, Objects]


@dataclass(frozen=True)
class ClassThreshold:
    """Hold the threshold of a class. Precision, recall and F1 are fractions, or None if they are not known."""

    min_score: float
    precision: Optional[float] = None
    recall: Optional[float] = None
    f1: Optional[float] = None


def load_validation(dataset: str, student: Sequence[str]) -> Validation:
    """Load a registered dataset with labels.

    Args:
        student: the student's class names.

    Raises:
        GDetKDError: the dataset is not registered, has no object of the student's classes, or has an
            image that cannot be read.
    """
    dicts = [{**sample, "file_name": os.path.abspath(sample["file_name"])} for sample in load_dataset(dataset)]
    names = MetadataCatalog.get(dataset).get("thing_classes") or student
    position = {name: index for index, name in enumerate(student)}
    classes = [position.get(name) for name in as_student_names(names, student)]
    objects: Dict[str, Objects] = {}
    for sample in dicts:  # a file can have several entries
        parts = zip(objects.get(sample["file_name"], _objects({}, classes)), _objects(sample, classes))
        objects[sample["file_name"]] = Objects(*map(torch.cat, parts))
    if not any(len(item.classes) for item in objects.values()):
        raise GDetKDError(
            f"The thresholds cannot be chosen on {dataset!r}: it has no object of the student's classes "
            f"({some(student)}). Name a labelled dataset with --validation, or give --min-score."
        )
    images, faults = read_images(Candidates(os.sep, dicts))
    if faults:
        raise GDetKDError(
            f"The thresholds cannot be chosen on {dataset!r}: {len(faults)} of its {len(dicts)} images cannot be used "
            f"({name_faults(faults)}). Correct the files or the annotations."
        )
    # The folders of two datasets may have files of the same name.
    return Validation(dataset, [replace(image, name=image.path) for image in images], objects)


def _objects(sample: Dict, classes: Sequence[Optional[int]]) -> Objects:
    known = [item for item in sample.get("annotations", ()) if classes[item["category_id"]] is not None]
    boxes = [BoxMode.convert(list(item["bbox"]), item["bbox_mode"], BoxMode.XYXY_ABS) for item in known]
    corners = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    if has_size(sample):
        corners = clip_boxes_to_image(corners, (sample["height"], sample["width"]))  # as the detections
    return Objects(
        corners,
        torch.tensor([classes[item["category_id"]] for item in known], dtype=torch.long),
        torch.tensor([bool(item.get("iscrowd", 0)) for item in known], dtype=torch.bool),
    )


def choose_thresholds(pairs: Sequence[Tuple[Found, Objects]], count: int) -> List[Optional[ClassThreshold]]:
    """Return the threshold with the highest F1 for each class, at IoU 0.5 with greedy matching by score.

    Detections in crowds count neither as right nor as wrong.

    Args:
        pairs: the boxes and the objects of each labelled image.
        count: number of the student's classes.

    Returns:
        None for a class without objects. A class without a right detection has an F1 of 0.
    """
    judged = [_judge(found, objects) for found, objects in pairs]
    scores, classes, correct = (torch.cat(parts) for parts in zip(*judged))
    labels = torch.cat([objects.classes[~objects.crowds] for _, objects in pairs])
    thresholds: List[Optional[ClassThreshold]] = []
    for index in range(count):
        own, objects = classes == index, int((labels == index).sum())
        if not objects:
            thresholds.append(None)
            continue
        best = best_f1(scores[own], correct[own], objects)
        is_useful = best is not None and best.f1 > 0
        thresholds.append(ClassThreshold(*best) if is_useful else ClassThreshold(NONE_TRUSTED, 0.0, 0.0, 0.0))
    return thresholds


def _judge(found: Found, objects: Objects) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scores, classes and whether they are right, for each detection that counts: (K,), (K,), (K,)."""
    boxes = torch.tensor(found.boxes, dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    classes, scores = torch.tensor(found.classes, dtype=torch.long), torch.tensor(found.scores, dtype=torch.float64)
    crowds = objects.crowds
    correct = match_in_order(boxes, classes, objects.boxes[~crowds], objects.classes[~crowds]) >= 0
    counts = correct | ~in_crowds(boxes, classes, objects.boxes[crowds], objects.classes[crowds])
    return scores[counts], classes[counts], correct[counts]


def fill_gaps(
    thresholds: Sequence[Optional[ClassThreshold]], names: Sequence[str], lacking: Sequence[str], dataset: str
) -> Dict[str, ClassThreshold]:
    """Give every class a threshold, by name. A class without objects gets the median of the other classes' thresholds.

    Args:
        thresholds: what `choose_thresholds` returned.
        names: the student's class names.
        lacking: the classes that the source of boxes lacks.
        dataset: the dataset on which the thresholds were chosen, for messages.

    Raises:
        GDetKDError: no class has a right detection.
    """
    known = dict(zip(names, thresholds))
    useful = [item.min_score for item in thresholds if item is not None and item.f1]
    if not useful:
        raise GDetKDError(
            f"No box on {dataset!r} is right, so no threshold can be chosen. The boxes may be in other pixels, or the "
            "classes in another order. Correct this, or give --min-score if the dataset is wrong."
        )
    median = round(statistics.median(useful), SCORE_DIGITS)
    unseen = [name for name, item in known.items() if item is None and name not in lacking]
    wrong = [name for name, item in known.items() if item is not None and not item.f1 and name not in lacking]
    if unseen:
        logger.warning(
            "%r has no object of %s. These classes get the median of the other thresholds, %g.",
            dataset,
            some(unseen),
            median,
        )
    if wrong:
        logger.warning(
            "No box of %s is right on %r. These classes get the threshold %g, which leaves out their boxes.",
            some(wrong),
            dataset,
            NONE_TRUSTED,
        )
    doubtful = [name for name, item in known.items() if item is not None and item.f1 and item.precision < 0.5]
    if doubtful:
        logger.warning(
            "Even from their best thresholds on, more than half of the boxes of %s are wrong on %r. Look at the page "
            "before a student trains on them.",
            some(doubtful),
            dataset,
        )
    return {
        name: ClassThreshold(NONE_TRUSTED) if name in lacking else item or ClassThreshold(median)
        for name, item in known.items()
    }


def validation_name(cfg: CfgNode, given: str) -> str:
    """Return the dataset on which thresholds are chosen: the given one, or the first of DATASETS.TEST.

    Raises:
        GDetKDError: there is none.
    """
    name = given or next(iter(cfg.DATASETS.TEST), "")
    if not name:
        raise GDetKDError(
            "The thresholds are chosen on labelled images, but DATASETS.TEST is empty. Name a dataset with "
            "--validation, or give --min-score."
        )
    return name
