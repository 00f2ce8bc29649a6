"""Read a label file of YOLO's. What tools write in other ways than `class x y width height` has a function each.

The numbers are shares of the image's width and height. Functions that take `counts` add to it how often a quirk was put
right, by what a message calls it.
"""

import math
from collections import Counter
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from ...errors import GDetKDError
from ..folders import read_text

# No share of an image is larger. A box that an augmentation moved over the edge can reach a little beyond 1.
MOST = 2.0
BOX_COLUMNS = 5
# Columns of the class and of a polygon's three corners.
LEAST_POLYGON_COLUMNS = 7
# Pixels by which a rounded box may reach over the edge without being counted.
ROUNDING = 0.5


class Label(NamedTuple):
    """
    Attributes:
        category: index of the class.
        box: x1, y1, x2, y2 in shares of the image.
        polygon: x1, y1, x2, y2 and so on in shares of the image; None for a box.
    """

    category: int
    box: Tuple[float, float, float, float]
    polygon: Optional[List[float]] = None


class Problem(Exception):
    """Says what is wrong with a line."""


def read_labels(path: str, classes: Sequence[str], keypoints: int, counts: Counter) -> List[Label]:
    """Read a label file. An empty file and empty lines are of no object.

    Args:
        classes: in the order of their indices.
        keypoints: columns of keypoints that a line may have.

    Raises:
        GDetKDError: a line is no label. It is named.
    """
    labels: Dict[Tuple[float, ...], Label] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            values = tuple(map(_number, words))
            _count_repeated(values in labels, counts)
            labels[values] = _label(words, values, classes, keypoints, counts)
        except Problem as e:
            raise GDetKDError(f"{path!r}, line {number}: {e}") from e
    return list(labels.values())


def to_pixels(shares: Sequence[float], width: int, height: int) -> List[float]:
    """Return coordinates x1, y1, x2, y2 and so on in pixels."""
    return [value * side for value, side in zip(shares, (width, height) * (len(shares) // 2))]


def cut_at_edge(points: Sequence[float], width: int, height: int) -> List[float]:
    """Return coordinates x1, y1, x2, y2 and so on, in pixels, moved into the image."""
    return [min(max(value, 0.0), float(side)) for value, side in zip(points, (width, height) * (len(points) // 2))]


def reaches_over(box: Sequence[float], width: int, height: int) -> bool:
    """Return whether a part of a box lies in the image and another part, beyond rounding, does not."""
    x1, y1, x2, y2 = box
    overlaps = x1 < width and y1 < height and x2 > 0 and y2 > 0
    return overlaps and (min(x1, y1) < -ROUNDING or x2 > width + ROUNDING or y2 > height + ROUNDING)


def _label(
    words: Sequence[str], values: Sequence[float], classes: Sequence[str], keypoints: int, counts: Counter
) -> Label:
    category = _category(words[0], values[0], classes, counts)
    if keypoints and len(values) == BOX_COLUMNS + keypoints:
        counts["objects have keypoints, which are passed over"] += 1
        values = values[:BOX_COLUMNS]
    shares = values[1:]
    _check_columns(len(values), keypoints)
    _check_shares(shares)
    if len(values) == BOX_COLUMNS:
        return Label(category, _corners(shares, counts))
    xs, ys = shares[::2], shares[1::2]
    if not all(map(math.isfinite, shares)):
        return Label(category, (math.nan,) * 4)  # `clean_annotations` counts and leaves out such a box
    return Label(category, (min(xs), min(ys), max(xs), max(ys)), list(shares))


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise Problem(
            f"{word!r} is no number. A label is `class x y width height`, or `class x1 y1 x2 y2 x3 y3 ...`."
        ) from None


def _count_repeated(is_repeated: bool, counts: Counter) -> None:
    """Count a label that stands in its file twice, of which Ultralytics drops one, too."""
    counts["labels stand in their file twice; one of each is read"] += is_repeated


def _category(word: str, value: float, classes: Sequence[str], counts: Counter) -> int:
    if not (math.isfinite(value) and value.is_integer() and 0 <= value < len(classes)):
        raise Problem(
            f"the class is {word}, but there are {len(classes)} classes, counted from 0. Correct the file, or the "
            "class names of the dataset."
        )
    counts["classes are written with decimals"] += not word.lstrip("+-").isdigit()
    return int(value)


def _check_columns(columns: int, keypoints: int) -> None:
    if columns == BOX_COLUMNS or (not keypoints and columns >= LEAST_POLYGON_COLUMNS and columns % 2 == 1):
        return
    if keypoints:
        raise Problem(
            f"it has {columns} columns. By kpt_shape of data.yaml a label has {BOX_COLUMNS + keypoints}, or "
            f"{BOX_COLUMNS} without keypoints. Correct one of them."
        )
    raise Problem(
        f"it has {columns} columns: a box has 5, a polygon an odd number from 7 on. A sixth column can be a score: "
        "labels have none. For keypoints, data.yaml has to give kpt_shape."
    )


def _check_shares(shares: Sequence[float]) -> None:
    far = [value for value in shares if abs(value) > MOST]  # not of nan
    if far:
        raise Problem(
            f"it has {far[0]:g}, where shares of the image are meant, from 0 to 1. Divide pixels by the image's width "
            "or height."
        )


def _corners(shares: Sequence[float], counts: Counter) -> Tuple[float, float, float, float]:
    x, y, width, height = shares
    counts["boxes have a negative width or height"] += width < 0 or height < 0
    width, height = abs(width), abs(height)
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
