"""Correct the quirks of VOC files that have only one possible meaning. docs/own-data.md lists them.

Functions that take `counts` count there how often they corrected a quirk.
"""

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import Callable, List, Optional, Sequence, Tuple

Corners = Tuple[float, float, float, float]  # x1, y1, x2, y2
Size = Optional[Tuple[int, int]]  # width, height in pixels

# Tags of a rotated box: the values that roLabelImg writes, and the corners that DIOR-R writes.
ROTATED = ("cx", "cy", "w", "h", "angle")
SIDES = ("left_top", "right_top", "right_bottom", "left_bottom")
FOUR_POINTS = tuple(f"{axis}_{side}" for side in SIDES for axis in "xy")
# If more boxes than this share have corners in another order, the corners may be widths and heights.
OFTEN = 0.1


def read_rotated_box(shape: ElementTree.Element) -> List[float]:
    """Return the corners of a rotated box: x1, y1, x2, y2, x3, y3, x4, y4."""
    if shape.find("cx") is None:
        return numbers(shape, FOUR_POINTS)
    x, y, width, height, angle = numbers(shape, ROTATED)
    if not abs(angle) <= 2 * math.pi:
        raise ValueError(f"the angle of a rotated box is {angle:g}, not in radians")
    cosine, sine = math.cos(angle), math.sin(angle)
    halves = [(width * a / 2, height * b / 2) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    return [value for u, v in halves for value in (x + u * cosine - v * sine, y + u * sine + v * cosine)]


def read_polygon(shape: ElementTree.Element) -> List[float]:
    """Return the points of a polygon in Roboflow's format: x1, y1, x2, y2 and so on."""
    count = 0
    while shape.find(f"x{count + 1}") is not None:
        count += 1
    if not count:
        raise ValueError("a polygon has no x1. Only Roboflow's polygons can be read: export boxes")
    return numbers(shape, [f"{axis}{index + 1}" for index in range(count) for axis in "xy"])


# Shapes that can replace a box: the tag, the function that reads the points, and the name of the quirk.
OTHER_SHAPES: Tuple[Tuple[str, Callable[[ElementTree.Element], List[float]], str], ...] = (
    ("robndbox", read_rotated_box, "rotated boxes are read as the upright boxes around them"),
    ("polygon", read_polygon, "polygons are read as the boxes around them"),
)


def numbers(element: ElementTree.Element, tags: Sequence[str]) -> List[float]:
    """Return the numbers in the children of an element.

    Raises:
        ValueError: a child is missing, is empty or does not hold a number.
    """
    values = []
    for tag in tags:
        text = element.findtext(tag)
        if not text or not text.strip():
            raise ValueError(f"a {element.tag} has no {tag}")
        values.append(float(text))
    return values


def count_sizes_as_corners(boxes: Sequence[Tuple[Corners, Size]], counts: Counter) -> None:
    """Count the boxes if they look like (x, y, width, height): many are out of order, and all would fit the image."""
    out_of_order = sum(x2 < x1 or y2 < y1 for (x1, y1, x2, y2), _ in boxes)
    fit = all(
        size is not None and x1 + x2 <= size[0] + 1 and y1 + y2 <= size[1] + 1 for (x1, y1, x2, y2), size in boxes
    )
    if out_of_order > OFTEN * len(boxes) and fit:
        counts["boxes look like x, y, width and height in place of two corners: convert them if they are"] += len(boxes)


def in_order(corners: Corners, counts: Counter) -> Corners:
    """Return the corners with the left upper corner first."""
    x1, y1, x2, y2 = corners
    if not (x2 < x1 or y2 < y1):
        return corners
    counts["boxes have their corners in another order"] += 1
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def find_first_pixel(boxes: Sequence[Corners], counts: Counter) -> int:
    """Return 0 if a box begins in pixel 0, else 1 as in VOC. CVAT, Roboflow and VoTT count from 0."""
    at_zero = sum(0 <= min(x1, x2) < 1 or 0 <= min(y1, y2) < 1 for x1, y1, x2, y2 in boxes)
    counts[
        "boxes begin in pixel 0, so that all corners of this split count from 0, not from 1 (set `first_pixel` to 0 or "
        "1 in DATASETS.REGISTER to read all splits alike)"
    ] += at_zero
    return 0 if at_zero else 1


def cut_a_pixel(corners: Corners, size: Size, counts: Counter) -> Corners:
    """Cut a box that reaches over the edge by up to one pixel, because tools count pixels differently.

    `clean_annotations` counts boxes that reach farther.
    """
    if size is None:
        return corners
    x1, y1, x2, y2 = (_cut(value, side) for value, side in zip(corners, size * 2))
    counts["boxes reach over the edge by a pixel and are cut there"] += (x1, y1, x2, y2) != corners
    return x1, y1, x2, y2


def _cut(value: float, side: int) -> float:
    if -1 <= value < 0:
        return 0.0
    return float(side) if side < value <= side + 1 else value
