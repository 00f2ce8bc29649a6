"""Read one XML file of VOC's layout."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import List, NamedTuple, Optional, Tuple

from ..errors import GDetKDError
from .voc_quirks import OTHER_SHAPES, Corners, numbers

CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocObject(NamedTuple):
    """
    Attributes:
        name: its class.
        corners: x1, y1, x2, y2 as the file has them.
        is_of_pixels: the corners are pixels that belong to the box, as in VOC. Else they are points of the image.
    """

    name: str
    corners: Corners
    is_of_pixels: bool


class VocFile(NamedTuple):
    """
    Attributes:
        filename: what the file calls its image, with forward slashes; empty if it does not say.
        size: (width, height) in pixels; None if the file does not say.
        objects: in the file's order.
    """

    filename: str
    size: Optional[Tuple[int, int]]
    objects: List[VocObject]


def read_file(path: str, counts: Counter) -> VocFile:
    """Read an annotation file.

    Args:
        counts: how often a quirk was put right, by what a message calls it; this adds to it.

    Raises:
        GDetKDError: the file is no annotation of VOC's.
    """
    with open(path, "rb") as file:
        text = file.read().strip()
    try:
        if b"\0" in text:  # of UTF-16, in which what is looked for next would not be found
            raise ValueError("it has zero bytes: write it in UTF-8")
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise ValueError("it declares a document type, whose entities can grow without bound")
        tree = ElementTree.fromstring(text)
        if tree.tag != "annotation":
            raise ValueError(f"its first element is <{tree.tag}>, not <annotation>: export PASCAL VOC")
        size = _size(tree)
        objects = [_object(element, counts) for element in tree.findall("object")]
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as e:
        raise GDetKDError(
            f"{path!r} is not an annotation of VOC's ({type(e).__name__}: {e}). Correct it, or take it out of the "
            "dataset."
        ) from e
    return VocFile((tree.findtext("filename") or "").strip().replace("\\", "/"), size, objects)


def _size(tree: ElementTree.Element) -> Optional[Tuple[int, int]]:
    """Return the image's (width, height). Tools that do not know the size leave it out, or write 0."""
    sides = []
    for side in ("width", "height"):
        text = (tree.findtext(f"size/{side}") or "").strip() or "0"
        value = float(text)  # some tools write 640.0
        if value < 0 or not value.is_integer():
            raise ValueError(f"the image's {side} is {text}")
        sides.append(int(value))
    return (sides[0], sides[1]) if all(sides) else None


def _object(element: ElementTree.Element, counts: Counter) -> VocObject:
    written = element.findtext("name") or ""
    name = written.strip()
    if not name:
        raise ValueError("an object has no name")
    counts["class names have spaces around them"] += name != written
    counts["parts of objects are passed over"] += len(element.findall("part"))
    box = element.find("bndbox")
    if box is not None:
        counts["polygons are passed over, because their objects have a box"] += element.find("polygon") is not None
        x1, y1, x2, y2 = numbers(box, CORNERS)
        return VocObject(name, (x1, y1, x2, y2), True)
    for tag, read_points, quirk in OTHER_SHAPES:
        shape = element.find(tag)
        if shape is not None:
            points = read_points(shape)
            xs, ys = points[::2], points[1::2]
            counts[quirk] += 1
            return VocObject(name, (min(xs), min(ys), max(xs), max(ys)), False)
    raise ValueError(f"the object {name!r} has no bndbox")
