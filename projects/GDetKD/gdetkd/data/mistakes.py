"""Find likely mistakes in annotations: boxes in other units, classes without objects, duplicates.

The checks read Detectron2's dicts, so they work for every kind of dataset.
"""

import math
from collections import Counter
from typing import Any, Dict, List, Sequence

from detectron2.structures import BoxMode

from ..errors import GDetKDError
from .clean import FARTHEST

Sample = Dict[str, Any]

# If all coordinates are at most this many pixels, boxes are in units of the image.
UNIT = 1.5
LEAST_SIDE = 8  # the shortest side of an image, in pixels, that allows this conclusion
# If more boxes than this share would fit the image only as two corners, boxes probably are two corners.
MOSTLY = 0.5
MOST_NAMED = 5  # classes that a message names


def find_mistakes(dicts: Sequence[Sample], classes: Sequence[str], name: str) -> List[str]:
    """Return warnings about a dataset, each with a count and what to do.

    Args:
        dicts: images in Detectron2's format, before annotations are left out.
        classes: class names in order; empty if they are not known.
        name: the dataset's name, for messages.

    Raises:
        GDetKDError: all boxes are in units of the image (0 to 1). Nothing could be learned from them.
    """
    annotations = [(image, annotation) for image in dicts for annotation in image.get("annotations", ())]
    if not annotations:
        return []
    boxes = [(image, item["bbox"], item["bbox_mode"]) for image, item in annotations if _is_near(item["bbox"])]
    if boxes and all(_is_relative(image, box) for image, box, _ in boxes):
        raise GDetKDError(
            f"The dataset {name!r} has its {len(boxes)} boxes in units of the image: no coordinate is above {UNIT:g}. "
            "Detectron2 reads pixels. Multiply x and width by the image's width, and y and height by its height."
        )
    warnings = []
    corners = sum(_looks_like_corners(image, box, mode) for image, box, mode in boxes)
    if corners > MOSTLY * len(boxes):
        warnings.append(
            f"{corners} of {len(boxes)} boxes reach over the edge of their image, and would lie within it as two "
            "corners (x1, y1, x2, y2). COCO's boxes are (x, y, width, height): convert them if they are corners"
        )
    counts = Counter(_identity(image, annotation) for image, annotation in annotations)
    repeated = sum(count - 1 for count in counts.values())
    if repeated:
        warnings.append(f"{repeated} annotations repeat another with the same image, class and box: remove them")
    again = len(dicts) - len({image["file_name"] for image in dicts})
    if again:
        warnings.append(
            f"{again} images have the file of another image, so the objects of each are background in the other: merge "
            "their annotations"
        )
    return warnings + _class_warnings(annotations, classes)


def _class_warnings(annotations: Sequence[Any], classes: Sequence[str]) -> List[str]:
    warnings = []
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        warnings.append(
            f"{len(repeated)} class names stand for several classes ({', '.join(repeated[:MOST_NAMED])}): merge these "
            "classes, or give them different names"
        )
    used = {annotation["category_id"] for _, annotation in annotations}
    unused = [name for index, name in enumerate(classes) if index not in used]
    if unused:
        warnings.append(
            f"{len(unused)} of {len(classes)} classes have no object ({', '.join(unused[:MOST_NAMED])}"
            f"{', ...' if len(unused) > MOST_NAMED else ''}): remove a class that only groups other classes, such as "
            "Roboflow's first category"
        )
    return warnings


def _is_near(box: Sequence[float]) -> bool:
    """Return whether a box has usable numbers. `clean_annotations` leaves out boxes that do not."""
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
