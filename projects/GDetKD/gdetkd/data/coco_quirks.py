"""Quirks of COCO files that can be read in only one way. Each is put right and counted; docs/own-data.md lists them.

Annotation tools write them: text in place of numbers, ids of another type, two corners in place of a polygon.
"""

import os
from typing import Any, Callable, Dict, List, Optional, Sequence

from .keypoints import count_keypoints, fill_keypoints

Item = Dict[str, Any]
# Maps the name of a quirk, as a message gives it, to how often the quirk was put right.
Counts = Dict[str, int]

NUMBERS = ("iscrowd", "area", "ignore")
# Numbers of a polygon with fewer corners than a triangle.
LEAST_POLYGON = 6


class InvalidItem(Exception):
    """Says what is wrong with an item of the file."""


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(is_number, box))


def put_right(images: List[Item], categories: List[Item], annotations: List[Item], folder: str) -> Counts:
    """Put the quirks of a COCO file's items right, in place. What cannot be read stays for `read_coco` to refuse.

    Args:
        folder: the folder of the images.

    Returns:
        how often each quirk was put right, by what a message calls it.
    """
    counts: Counts = {}
    for items, quirks in ((images, IMAGE_QUIRKS), (categories, CATEGORY_QUIRKS), (annotations, ANNOTATION_QUIRKS)):
        for name, quirk in quirks.items():
            _count(counts, name, sum(map(quirk, items)))
    _count(counts, "file names are not spelt as their files", _respell(images, folder))
    _count(
        counts, "annotations name their class by an id of another type", _match(annotations, "category_id", categories)
    )
    _count(counts, "annotations name their image by an id of another type", _match(annotations, "image_id", images))
    _count(counts, "annotations lack keypoints, which are taken to be without labels", fill_keypoints(annotations))
    return counts


def keep_matched(images: List[Item], annotations: List[Item], most_unmatched: float) -> Counts:
    """Leave out annotations of no image, in place, and number the others anew where their ids mislead pycocotools.

    Args:
        images: with distinct ids.
        annotations: may change.
        most_unmatched: the share of annotations that may be of no image.

    Returns:
        counts as `put_right`.

    Raises:
        InvalidItem: more annotations than that are of no image.
    """
    counts: Counts = {}
    kept = _of_an_image(annotations, images, most_unmatched)
    _count(counts, "annotations are of no image and are left out", len(annotations) - len(kept))
    annotations[:] = kept
    _count(counts, "annotation ids are not distinct numbers from 1 on and are numbered anew", _renumber(kept))
    return counts


def _count(counts: Counts, name: str, number: int) -> None:
    if number:
        counts[name] = counts.get(name, 0) + number


def _as_number(value: Any) -> Any:
    """Return the number that a text spells, or the value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        pass
    try:
        return float(value)
    except ValueError:
        return value


def _replace(item: Item, key: str, value: Any) -> bool:
    """Set a key, and return whether that changed its value or type."""
    before = item.get(key)
    if type(before) is type(value) and (before == value or before is value):
        return False
    item[key] = value
    return True


def _size_from_text(image: Item) -> bool:
    return any([_replace(image, key, _as_number(image[key])) for key in ("width", "height") if key in image])


def _slashes(image: Item) -> bool:
    name = image.get("file_name")
    return isinstance(name, str) and "\\" in name and _replace(image, "file_name", name.replace("\\", "/"))


def _without_spaces(category: Item) -> bool:
    name = category.get("name")
    return isinstance(name, str) and _replace(category, "name", name.strip())


def _id_from_text(item: Item) -> bool:
    number = _as_number(item.get("id"))
    return isinstance(number, int) and _replace(item, "id", number)


def _numbers_from_text(annotation: Item) -> bool:
    changed = [_replace(annotation, key, _as_number(annotation[key])) for key in NUMBERS if key in annotation]
    box = annotation.get("bbox")
    if isinstance(box, list) and any(isinstance(value, str) for value in box):
        changed.append(_replace(annotation, "bbox", [_as_number(value) for value in box]))
    return any(changed)


def _is_crowd(annotation: Item) -> bool:
    value = annotation.get("iscrowd")
    return (value is None or isinstance(value, bool)) and _replace(annotation, "iscrowd", int(bool(value)))


def _corners_in_order(annotation: Item) -> bool:
    box = annotation.get("bbox")
    if not is_box(box) or not (box[2] < 0 or box[3] < 0):
        return False
    x, y, width, height = box
    annotation["bbox"] = [min(x, x + width), min(y, y + height), abs(width), abs(height)]
    return True


def _area_of_box(annotation: Item) -> bool:
    area = annotation.get("area")
    is_usable = is_number(area) and 0 <= area < float("inf")
    if is_usable or not is_box(annotation.get("bbox")):
        return False
    annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    return True


def _without_short_polygons(annotation: Item) -> bool:
    """Detectron2 leaves a whole object out if none of its polygons has three corners, even for a detector of boxes."""
    mask = annotation.get("segmentation")
    if not isinstance(mask, list) or not mask or not all(isinstance(polygon, list) for polygon in mask):
        return False
    kept = [polygon for polygon in mask if len(polygon) >= LEAST_POLYGON and len(polygon) % 2 == 0]
    if len(kept) == len(mask):
        return False
    if kept:
        annotation["segmentation"] = kept
    else:
        del annotation["segmentation"]
    return True


IMAGE_QUIRKS: Dict[str, Callable[[Item], bool]] = {
    "image ids are numbers as text": _id_from_text,
    "images have their size as text": _size_from_text,
    "file names have backslashes": _slashes,
}
CATEGORY_QUIRKS: Dict[str, Callable[[Item], bool]] = {
    "class names have spaces around them": _without_spaces,
    "category ids are text": _id_from_text,
}
ANNOTATION_QUIRKS: Dict[str, Callable[[Item], bool]] = {
    "annotations have numbers as text": _numbers_from_text,
    "annotations lack iscrowd and are taken for objects": _is_crowd,
    "boxes have their corners in another order": _corners_in_order,
    "annotations lack an area, which follows from the box": _area_of_box,
    "annotations lack num_keypoints, which follows from the keypoints": count_keypoints,
    "objects have polygons of fewer than three corners; they keep their box": _without_short_polygons,
}


def _match(annotations: Sequence[Item], key: str, items: Sequence[Item]) -> int:
    """Give annotations the id that another item has, where it is the same but for its type. Return how many."""
    ids = {item["id"] for item in items if isinstance(item.get("id"), (int, str))}
    by_text: Dict[str, Optional[Any]] = {}
    for identity in ids:
        text = str(identity).strip()
        by_text[text] = None if text in by_text else identity  # None: the text could mean two of them
    changed = 0
    for annotation in annotations:
        value = annotation.get(key)
        if not isinstance(value, (int, str, float)) or isinstance(value, bool):
            continue
        if value in ids and not isinstance(value, float):
            continue
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
        if by_text.get(text) is not None:
            annotation[key] = by_text[text]
            changed += 1
    return changed


def _of_an_image(annotations: List[Item], images: Sequence[Item], most: float) -> List[Item]:
    ids = {image["id"] for image in images if isinstance(image.get("id"), (int, str))}
    kept = [each for each in annotations if not isinstance(each.get("image_id"), (int, str)) or each["image_id"] in ids]
    lost = len(annotations) - len(kept)
    if lost > most * len(annotations):
        example = next(each for each in annotations if each.get("image_id") not in ids)
        raise InvalidItem(
            f"{lost} of {len(annotations)} annotations are of no image of the file, the first with image_id "
            f"{example.get('image_id')!r}. That is more than INPUT.MAX_BAD_FRACTION {most:g}: add the images, or "
            "correct the ids"
        )
    return kept


def _renumber(annotations: List[Item]) -> int:
    """Number annotations from 1 on if their ids are not distinct positive numbers. pycocotools takes the id 0 for none.

    An id says nothing beyond which annotation it is.
    """
    ids = [annotation.get("id") for annotation in annotations]
    are_numbers = all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in ids)
    if are_numbers and len(set(ids)) == len(ids):
        return 0
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return len(annotations)


def _respell(images: Sequence[Item], folder: str) -> int:
    """Give images the name of the file that differs in upper and lower case alone. Return how many."""
    listings: Dict[str, Dict[str, List[str]]] = {}
    changed = 0
    for image in images:
        name = image.get("file_name")
        if (
            not isinstance(name, str)
            or "\0" in name
            or os.path.isabs(name)
            or os.path.exists(os.path.join(folder, name))
        ):
            continue
        head, tail = os.path.split(name)
        if head not in listings:
            listings[head] = _by_lower_case(os.path.join(folder, head))
        found = listings[head].get(tail.lower(), [])
        if len(found) == 1:
            image["file_name"] = os.path.join(head, found[0])
            changed += 1
    return changed


def _by_lower_case(folder: str) -> Dict[str, List[str]]:
    names: Dict[str, List[str]] = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        names.setdefault(name.lower(), []).append(name)
    return names


def describe(counts: Counts) -> str:
    """Return one sentence on what was put right; empty if nothing was."""
    return "; ".join(f"{number} {name}" for name, number in counts.items())
