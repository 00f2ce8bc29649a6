"""Annotations that can be read but cannot be meant: boxes in other units, classes without objects, doubles.

This looks at Detectron2's dicts, so it holds for datasets of every kind.
"""

import math
from collections import Counter
from typing import Any, Dict, List, Sequence

from detectron2.structures import BoxMode

from ..errors import GDetKDError
from .clean import FARTHEST

Sample = Dict[str, Any]

# Boxes all of whose coordinates are at most this many pixels are in units of the image.
UNIT = 1.5
# Shortest side of an image, in pixels, for which that can be told.
LEAST_SIDE = 8
# Share of boxes that reach over the edge, and would be within the image as two corners, from which on they are corners.
MOSTLY = 0.5
# Named in a message.
NAMED = 5


def find_mistakes(dicts: Sequence[Sample], classes: Sequence[str], name: str) -> List[str]:
    """Return warnings about a dataset, each with a count and what to do.

    Args:
        dicts: images in Detectron2's format, before annotations are left out.
        classes: names of the dataset's classes, in order; empty if they are not known.
        name: the dataset, for messages.

    Raises:
        GDetKDError: all boxes are in units of the image (0 to 1), where nothing could be learned.
    """
    annotations = [(image, each) for image in dicts for each in image.get("annotations", ())]
    if not annotations:
        return []
    boxes = [(image, each["bbox"], each["bbox_mode"]) for image, each in annotations if _is_near(each["bbox"])]
    if boxes and all(_is_relative(image, box) for image, box, _ in boxes):
        raise GDetKDError(
            f"The data set {name!r} has its {len(boxes)} boxes in units of the image: no coordinate is above {UNIT:g}. "
            "Detectron2 reads pixels. Multiply x and width by the image's width, and y and height by its height."
        )
    warnings = []
    corners = sum(_looks_like_corners(*each) for each in boxes)
    if corners > MOSTLY * len(boxes):
        warnings.append(
            f"{corners} of {len(boxes)} boxes reach over the edge of their image, and would lie within it as two "
            "corners (x1, y1, x2, y2). COCO's boxes are (x, y, width, height): convert them if they are corners"
        )
    twice = sum(count - 1 for count in Counter(_identity(*pair) for pair in annotations).values())
    if twice:
        warnings.append(f"{twice} annotations are there twice, with the same image, class and box: remove one of each")
    return warnings + _class_warnings(annotations, classes)


def _class_warnings(annotations: Sequence[Any], classes: Sequence[str]) -> List[str]:
    warnings = []
    doubled = [name for name, count in Counter(classes).items() if count > 1]
    if doubled:
        warnings.append(
            f"{len(doubled)} class names stand for several classes ({', '.join(doubled[:NAMED])}): merge these "
            "classes, or give them different names"
        )
    used = {each["category_id"] for _, each in annotations}
    unused = [name for index, name in enumerate(classes) if index not in used]
    if unused:
        warnings.append(
            f"{len(unused)} of {len(classes)} classes have no object ({', '.join(unused[:NAMED])}"
            f"{', ...' if len(unused) > NAMED else ''}): remove a class that is only the group of the others, as "
            "Roboflow's first category is"
        )
    return warnings


def _is_near(box: Sequence[float]) -> bool:
    """Return whether a box has numbers to reckon with. `clean_annotations` leaves the others out."""
    return all(isinstance(value, int) or math.isfinite(value) for value in box) and max(map(abs, box)) <= FARTHEST


def _is_relative(image: Sample, box: Sequence[float]) -> bool:
    is_large = min(image.get("width", LEAST_SIDE), image.get("height", LEAST_SIDE)) >= LEAST_SIDE
    return is_large and all(abs(value) <= UNIT for value in box)


def _looks_like_corners(image: Sample, box: Sequence[float], mode: BoxMode) -> bool:
    width, height = image.get("width"), image.get("height")
    if mode != BoxMode.XYWH_ABS or width is None or height is None:
        return False
    x1, y1, x2, y2 = box
    reaches_over = x1 + x2 > width + 1 or y1 + y2 > height + 1
    return reaches_over and 0 <= x1 < x2 <= width + 1 and 0 <= y1 < y2 <= height + 1


def _identity(image: Sample, annotation: Sample) -> Any:
    return image["file_name"], annotation["category_id"], tuple(annotation["bbox"])
