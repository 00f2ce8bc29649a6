"""What a COCO JSON must be before Detectron2 and pycocotools read it, who trust it."""

import json
import math
from typing import Any, Dict, List, Optional, Set, Tuple

from ..errors import GDetKDError
from .clean import FARTHEST
from .coco_quirks import Counts, InvalidItem, is_box, is_number, keep_matched, put_right
from .folders import leaves

MOST_PIXELS = 2**31  # of an image's width times height, for a mask of it


def read_coco(
    path: str, name: str, folder: str, allow_outside: bool = False, most_unmatched: float = 0.01
) -> Tuple[Dict[str, Any], Counts]:
    """Read a COCO file, put its quirks right, and refuse what would make its readers fail or go wrong without a word.

    Args:
        path: the JSON file.
        name: the dataset, for messages.
        folder: the folder of the images, which their file names may not leave.
        allow_outside: file names may leave it.
        most_unmatched: the share of annotations that may be of no image.

    Returns:
        the content, and what was put right in it (`coco_quirks.put_right`).

    Raises:
        GDetKDError: the file is no JSON or no COCO file; an image id or a category id stands twice; an annotation has
            a category that the file does not name, or no box; a file name is absolute or leaves the folder; too many
            annotations are of no image.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read()
        content = json.loads(raw)
        encoding = json.detect_encoding(raw)
        counts = {f"file is written in {encoding}": 1} if encoding != "utf-8" else {}
        parts = _lists(content)
        counts.update(put_right(*(parts[key] for key in ("images", "categories", "annotations")), folder))
        _check_images(parts["images"], folder, allow_outside)
        categories = _unique_ids("category", parts["categories"], int)
        counts.update(keep_matched(parts["images"], parts["annotations"], most_unmatched))
        for category in parts["categories"]:
            _require(isinstance(category.get("name"), str), f"category {category['id']} has no name")
        for annotation in parts["annotations"]:
            _check_annotation(annotation, categories)
    except InvalidItem as e:
        reason = str(e)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as e:  # of JSON, or of text that is not UTF-8
        reason = f"{type(e).__name__}: {e}"
    else:
        return content, counts
    raise GDetKDError(
        f"The data set {name!r} cannot be read from {path!r} ({reason}). Correct that file or the entry in "
        "DATASETS.REGISTER."
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InvalidItem(otherwise)


def _lists(content: Any) -> Dict[str, List[Dict[str, Any]]]:
    _require(isinstance(content, dict), f"it holds a {type(content).__name__}, not a dictionary")
    parts = {}
    for key in ("images", "categories", "annotations"):
        # Sets to be tested on can come without annotations.
        part = content.get(key, [] if key == "annotations" else None)
        _require(isinstance(part, list), f"it has no list of {key}")
        _require(all(isinstance(item, dict) for item in part), f"an item of its {key} is no dictionary")
        parts[key] = part
    _require(bool(parts["categories"]), "it names no category")
    return parts


def _unique_ids(what: str, items: List[Dict[str, Any]], *kinds: type) -> Set[Any]:
    seen: Set[Any] = set()
    for item in items:
        identity = item.get("id")
        _require(isinstance(identity, kinds) and not isinstance(identity, bool), f"{what} id {identity!r} is no id")
        _require(identity not in seen, f"{what} id {identity!r} stands twice")
        seen.add(identity)
    return seen


def _check_images(images: List[Dict[str, Any]], folder: str, allow_outside: bool) -> None:
    # An image whose id stands twice would silently get the other's annotations, too, and the other be gone.
    _unique_ids("image", images, int, str)
    for image in images:
        file_name, identity = image.get("file_name"), image["id"]
        _require(isinstance(file_name, str) and bool(file_name.strip()), f"image {identity!r} has no file name")
        _require("\0" not in file_name, f"image {identity!r} has a file name with a zero byte")
        _require(
            allow_outside or not leaves(file_name),
            f"the file name {file_name!r} leads out of {folder!r}; DATASETS.ALLOW_OUTSIDE True would allow it",
        )
        for side in ("width", "height"):
            value = image.get(side)
            _require(is_number(value) and 0 < value < MOST_PIXELS, f"image {identity!r} has the {side} {value!r}")


def _check_annotation(annotation: Dict[str, Any], categories: Set[Any]) -> None:
    which = f"annotation {annotation.get('id')!r}"
    category = annotation.get("category_id")
    known = isinstance(category, int) and category in categories
    _require(known, f"{which} has category_id={category!r}, which is none of its categories")
    _require(isinstance(annotation.get("image_id"), (int, str)), f"{which} is of no image")
    _require(isinstance(annotation.get("id"), (int, str)), f"{which} has no id")
    box = annotation.get("bbox")
    _require(is_box(box), f"{which} has the box {box!r}")
    _require(annotation.get("iscrowd", 0) in (0, 1), f"{which} has iscrowd {annotation.get('iscrowd')!r}")
    keypoints = annotation.get("keypoints") or []
    _require(isinstance(keypoints, list) and all(map(is_number, keypoints)), f"{which} has keypoints that are none")
    if annotation.get("segmentation"):
        reason = _fault_of_mask(annotation["segmentation"])
        _require(reason is None, f"{which} has a segmentation {reason}")


def _fault_of_mask(mask: Any) -> Optional[str]:
    """pycocotools takes memory, and writes to it, by what a mask says of itself."""
    if isinstance(mask, list):
        if not all(map(_is_polygon, mask)):
            return "that is no list of polygons"
        return None if all(map(_is_near, mask)) else f"that reaches over more than {FARTHEST:.0f} pixels"
    if not isinstance(mask, dict):
        return "that is neither polygons nor run lengths"
    size, counts = mask.get("size"), mask.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(v, int) and 0 < v for v in size)):
        return f"of the size {size!r}"
    if size[0] * size[1] >= MOST_PIXELS:
        return f"of the size {size!r}"
    if isinstance(counts, str):
        return None if _decoded_length(counts) == size[0] * size[1] else "whose run lengths are not of its size"
    if not (isinstance(counts, list) and all(isinstance(v, int) and v >= 0 for v in counts)):
        return "without run lengths"
    return None if sum(counts) == size[0] * size[1] else "whose run lengths are not of its size"


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
        return False
    try:
        return all(map(math.isfinite, polygon))
    except OverflowError:  # of an integer that no float is as large as
        return False


def _is_near(polygon: List[float]) -> bool:
    """pycocotools walks along the outline and keeps every pixel of it: memory, and beyond 2**31 any address."""
    if not polygon:
        return True
    least, most = min(polygon), max(polygon)
    if least < -FARTHEST or most > FARTHEST:
        return False
    return len(polygon) * (most - least) <= FARTHEST or _outline(polygon) <= FARTHEST


def _outline(polygon: List[float]) -> float:
    """The length, in pixels, that is walked along; of each side its larger component."""
    xs, ys = polygon[::2], polygon[1::2]
    sides = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1])
    return sum(max(abs(x2 - x1), abs(y2 - y1)) for x1, y1, x2, y2 in sides)


def _decoded_length(text: str) -> int:
    """Pixels that COCO's compressed run lengths cover; -1 where they are none.

    Each length is written in groups of 5 bits and a bit that more follows, as characters from "0" on, and from the
    third on as its difference to the one two before.
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
