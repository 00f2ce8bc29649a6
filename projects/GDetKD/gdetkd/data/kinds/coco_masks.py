"""Check masks in COCO's format before pycocotools reads them. It trusts their size and writes to memory by it."""

import math
from typing import Any, List, Optional, Tuple

from ..clean import FARTHEST

MOST_PIXELS = 2**31  # limit of width times height
WRONG_LENGTH = "whose run lengths do not add up to its size"


def find_mask_fault(mask: Any) -> Optional[str]:
    """Return why a mask cannot be used, in words that follow "a segmentation". Return None if it can be used."""
    if isinstance(mask, list):
        if not all(map(_is_polygon, mask)):
            return "that is not a list of polygons"
        return None if all(map(_is_near, mask)) else f"that is longer than {FARTHEST:.0f} pixels"
    if not isinstance(mask, dict):
        return "that is neither polygons nor run lengths"
    size, counts = mask.get("size"), mask.get("counts")
    is_size = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    if not is_size or size[0] * size[1] >= MOST_PIXELS:
        return f"of the size {size!r}"
    if isinstance(counts, str):
        return None if _decoded_length(counts) == size[0] * size[1] else WRONG_LENGTH
    if not (isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts)):
        return "without run lengths"
    return None if sum(counts) == size[0] * size[1] else WRONG_LENGTH


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
        return False
    try:
        return all(map(math.isfinite, polygon))
    except OverflowError:  # an integer that is too large for a float
        return False


def _is_near(polygon: List[float]) -> bool:
    """Return whether pycocotools can draw a polygon. It stores every pixel of the outline, and overflows at 2**31."""
    if not polygon:
        return True
    least, most = min(polygon), max(polygon)
    if least < -FARTHEST or most > FARTHEST:
        return False
    return len(polygon) * (most - least) <= FARTHEST or _outline(polygon) <= FARTHEST


def _outline(polygon: List[float]) -> float:
    """Return how many pixels pycocotools stores of an outline. A side counts with its larger extent, in x or y."""
    xs, ys = polygon[::2], polygon[1::2]
    sides = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1])
    return sum(max(abs(x2 - x1), abs(y2 - y1)) for x1, y1, x2, y2 in sides)


def _decoded_length(text: str) -> int:
    """Return how many pixels COCO's compressed run lengths cover, or -1 if the text is invalid.

    A run length is written in groups of 5 bits. A group is a character from "0" on, and a sixth bit says that another
    group follows. From the third run length on, the difference to the run length two before is written.
    """
    lengths: List[int] = []
    position = 0
    while position < len(text):
        value, position = _decoded(text, position)
        if value is None:
            return -1
        value += lengths[-2] if len(lengths) > 2 else 0
        if value < 0:
            return -1
        lengths.append(value)
    return sum(lengths)


def _decoded(text: str, position: int) -> Tuple[Optional[int], int]:
    """Return the number that starts at a position, or None if it is invalid, and the position after it."""
    value, bits = 0, 0
    while position < len(text):
        code = ord(text[position]) - 48
        position += 1
        if not 0 <= code < 64 or bits > 30:
            return None, position
        value |= (code & 0x1F) << bits
        bits += 5
        if not code & 0x20:
            return (value - (1 << bits) if code & 0x10 else value), position
    return None, position
