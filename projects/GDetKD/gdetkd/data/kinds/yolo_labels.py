"""Read a label file in YOLO's format, and correct the quirks of the tools that write it.

A line is `class x y width height`, in shares of the image's width and height. Functions that take `counts` count there
how often they corrected a quirk.
"""

import math
from collections import Counter
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from ...errors import GDetKDError
from ..folders import read_text

# A larger number is not a share. A box that an augmentation moved over the edge can reach a little beyond 1.
MOST = 2.0
BOX_COLUMNS = 5
LEAST_POLYGON_COLUMNS = 7  # the class and three corners
ROUNDING = 0.5  # pixels by which a box may reach over the edge because it was rounded


class Label(NamedTuple):
    """Hold a label.

    Attributes:
        category: the index of the class.
        box: x1, y1, x2, y2 in shares of the image.
        polygon: x1, y1, x2, y2 and so on in shares of the image; None for a box.
    """

    category: int
    box: Tuple[float, float, float, float]
    polygon: Optional[List[float]] = None


class Problem(Exception):
    """Say what is wrong with a line."""


def read_labels(path: str, classes: Sequence[str], keypoints: int, counts: Counter) -> List[Label]:
    """Read a label file. Empty lines are skipped.

    Args:
        classes: class names in order.
        keypoints: how many columns of keypoints a line may have.

    Raises:
        GDetKDError: a line is not a label. The message names the line.
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
    """Convert x1, y1, x2, y2 and so on from shares to pixels."""
    return [value * side for value, side in zip(shares, (width, height) * (len(shares) // 2))]


def cut_at_edge(points: Sequence[float], width: int, height: int) -> List[float]:
    """Move points x1, y1, x2, y2 and so on, in pixels, into the image."""
    return [min(max(value, 0.0), float(side)) for value, side in zip(points, (width, height) * (len(points) // 2))]


def reaches_over(box: Sequence[float], width: int, height: int) -> bool:
    """Return whether only a part of a box lies in the image. Differences by rounding do not count."""
    x1, y1, x2, y2 = box
    overlaps = x1 < width and y1 < height and x2 > 0 and y2 > 0
    return overlaps and (min(x1, y1) < -ROUNDING or x2 > width + ROUNDING or y2 > height + ROUNDING)


def _label(
    words: Sequence[str], values: Sequence[float], classes: Sequence[str], keypoints: int, counts: Counter
) -> Label:
    category = _category(words[0], values[0], classes, counts)
    if keypoints and len(values) == BOX_COLUMNS + keypoints:
        counts["objects have keypoints, which are skipped"] += 1
        values = values[:BOX_COLUMNS]
    shares = values[1:]
    _check_columns(len(values), keypoints)
    _check_shares(shares)
    if len(values) == BOX_COLUMNS:
        return Label(category, _corners(shares, counts))
    xs, ys = shares[::2], shares[1::2]
    if not all(map(math.isfinite, shares)):
        return Label(category, (math.nan,) * 4)  # `clean_annotations` counts and leaves out this box
    return Label(category, (min(xs), min(ys), max(xs), max(ys)), list(shares))


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise Problem(
            f"{word!r} is not a number. Write `class x y width height`, or `class x1 y1 x2 y2 x3 y3 ...`."
        ) from None


def _count_repeated(is_repeated: bool, counts: Counter) -> None:
    """Count a label that occurs twice in its file. Ultralytics drops the second label, too."""
    counts["labels occur twice in their file and are read once"] += is_repeated


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
            f"{BOX_COLUMNS} without keypoints. Correct the line or kpt_shape."
        )
    raise Problem(
        f"it has {columns} columns. A box has 5, and a polygon an odd number from 7 on. If the sixth column can be a "
        "score, remove it. If the columns are keypoints, give kpt_shape in data.yaml."
    )


def _check_shares(shares: Sequence[float]) -> None:
    far = [value for value in shares if abs(value) > MOST]  # False for nan
    if far:
        raise Problem(
            f"it has {far[0]:g}, which is not a share of the image from 0 to 1. Divide pixels by the image's width or "
            "height."
        )


def _corners(shares: Sequence[float], counts: Counter) -> Tuple[float, float, float, float]:
    x, y, width, height = shares
    counts["boxes have a negative width or height"] += width < 0 or height < 0
    width, height = abs(width), abs(height)
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
