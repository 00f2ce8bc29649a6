"""Read one XML file of VOC's layout."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import List, NamedTuple, Optional, Tuple

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

from ...errors import GDetKDError
from .voc_quirks import OTHER_SHAPES, Corners, numbers

CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocObject(NamedTuple):
    """Hold an object of an annotation file.

    Attributes:
        name: the name of its class.
        corners: x1, y1, x2, y2 as in the file.
        has_pixels: True if the corners are pixels that belong to the box, as in VOC. False if they are points.
    """

    name: str
    corners: Corners
    has_pixels: bool


class VocFile(NamedTuple):
    """Hold the content of an annotation file.

    Attributes:
        filename: the name of the image with forward slashes; empty if the file does not give it.
        size: (width, height) in pixels; None if the file does not give it.
        objects: in the order of the file.
    """

    filename: str
    size: Optional[Tuple[int, int]]
    objects: List[VocObject]


def read_file(path: str, counts: Counter) -> VocFile:
    """Read an annotation file.

    Args:
        counts: how often each quirk was corrected; this function adds to it.

    Raises:
        GDetKDError: the file is not a VOC annotation.
    """
    with open(path, "rb") as file:
        text = file.read().lstrip()
    try:
        tree = _parse(text)
        if tree.tag != "annotation":
            raise ValueError(f"its first element is <{tree.tag}>, not <annotation>: export PASCAL VOC")
        size = _size(tree)
        objects = [_object(element, counts) for element in tree.findall("object")]
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as e:
        raise GDetKDError(
            f"{path!r} is not a VOC annotation ({type(e).__name__}: {e}). Correct it, or take it out of the dataset."
        ) from e
    return VocFile((tree.findtext("filename") or "").strip().replace("\\", "/"), size, objects)


def _parse(text: bytes) -> ElementTree.Element:
    try:
        return defusedxml.ElementTree.fromstring(text, forbid_dtd=True)
    except DefusedXmlException as e:
        raise ValueError("it declares a document type, whose entities can grow without bound: remove <!DOCTYPE") from e


def _size(tree: ElementTree.Element) -> Optional[Tuple[int, int]]:
    """Return the image's (width, height), or None if the file leaves it out or has 0."""
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
    counts["parts of objects are skipped"] += len(element.findall("part"))
    box = element.find("bndbox")
    if box is not None:
        counts["polygons are skipped, because their objects have a box"] += element.find("polygon") is not None
        x1, y1, x2, y2 = numbers(box, CORNERS)
        return VocObject(name, (x1, y1, x2, y2), has_pixels=True)
    for tag, read_points, quirk in OTHER_SHAPES:
        shape = element.find(tag)
        if shape is not None:
            points = read_points(shape)
            xs, ys = points[::2], points[1::2]
            counts[quirk] += 1
            return VocObject(name, (min(xs), min(ys), max(xs), max(ys)), has_pixels=False)
    raise ValueError(f"the object {name!r} has no bndbox")
