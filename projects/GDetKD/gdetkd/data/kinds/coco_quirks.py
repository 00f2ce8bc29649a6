"""Correct the quirks of COCO files that have only one possible meaning. docs/own-data.md lists them.

Annotation tools write numbers as text, ids of different types, and two corners in place of a polygon.
"""

import os
from typing import Any, Callable, Dict, List

from .base import Counts
from .coco_ids import Item, match_ids, respell_file_names
from .coco_keypoints import count_keypoints, fill_keypoints

NUMBERS = ("iscrowd", "area", "ignore")
LEAST_POLYGON = 6  # numbers of a triangle


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(is_number, box))


def correct_quirks(images: List[Item], categories: List[Item], annotations: List[Item], folder: str) -> Counts:
    """Correct the quirks of a COCO file's items in place. Leave what cannot be read for `read_coco` to refuse.

    Args:
        folder: the folder of the images.

    Returns:
        how often each quirk was corrected.
    """
    counts: Counts = {}
    for items, quirks in ((images, IMAGE_QUIRKS), (categories, CATEGORY_QUIRKS), (annotations, ANNOTATION_QUIRKS)):
        counts.update({name: sum(map(correct, items)) for name, correct in quirks.items()})
    counts.update(_match_types_of_ids(images))
    counts["file names have backslashes"] = sum(_slashes(image, folder) for image in images)
    counts["file names are not spelt as their files"] = respell_file_names(images, folder)
    counts["annotations name their class by an id of another type"] = match_ids(annotations, "category_id", categories)
    counts["annotations name their image by an id of another type"] = match_ids(annotations, "image_id", images)
    counts["annotations lack keypoints, which are taken to be without labels"] = fill_keypoints(annotations)
    return {name: count for name, count in counts.items() if count}


def _as_number(value: Any) -> Any:
    """Return the number that a text spells, or the value as it is."""
    if not isinstance(value, str) or "_" in value:  # Python reads "2023_01" as 202301
        return value
    for number_type in (int, float):
        try:
            return number_type(value)
        except ValueError:
            continue
    return value


def _as_whole(number: Any) -> Any:
    """Return a whole float as an integer, or the value as it is."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _replace(item: Item, key: str, value: Any) -> bool:
    """Set a key, and return whether that changed its value or type."""
    before = item.get(key)
    if type(before) is type(value) and (before == value or before is value):
        return False
    item[key] = value
    return True


def _match_types_of_ids(images: List[Item]) -> Counts:
    """Give all image ids one type, because Detectron2 sorts them.

    They become numbers if every text is a plain number such as "7". Otherwise all become text, because "007" would lose
    its zeros.
    """
    texts = [image for image in images if isinstance(image.get("id"), str)]
    if all(image["id"].isdecimal() and str(int(image["id"])) == image["id"] for image in texts):
        return {"image ids are numbers as text": sum(map(id_from_text, texts))}
    numbers = [image for image in images if isinstance(image.get("id"), int)]
    return {"image ids are numbers among texts": sum(_replace(image, "id", str(image["id"])) for image in numbers)}


# A function below corrects one quirk of an item in place, and returns whether the item had the quirk.


def _whole_size(image: Item) -> bool:
    return any([_replace(image, key, _as_whole(_as_number(image[key]))) for key in ("width", "height") if key in image])


def _slashes(image: Item, folder: str) -> bool:
    name = image.get("file_name")
    if not isinstance(name, str) or "\\" not in name or "\0" in name or os.path.exists(os.path.join(folder, name)):
        return False  # on Linux, a backslash may be a part of the name
    return _replace(image, "file_name", name.replace("\\", "/"))


def _without_spaces(category: Item) -> bool:
    name = category.get("name")
    return isinstance(name, str) and _replace(category, "name", name.strip())


def id_from_text(item: Item) -> bool:
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
    # Detectron2 leaves out an object if none of its polygons has three corners, even for a detector without masks.
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
    "images have their size as text or with a decimal point": _whole_size,
}
CATEGORY_QUIRKS: Dict[str, Callable[[Item], bool]] = {
    "class names have spaces around them": _without_spaces,
    "category ids are text": id_from_text,
}
ANNOTATION_QUIRKS: Dict[str, Callable[[Item], bool]] = {
    "annotations have numbers as text": _numbers_from_text,
    "annotations lack iscrowd and are taken for objects": _is_crowd,
    "boxes have their corners in another order": _corners_in_order,
    "annotations lack an area, which follows from the box": _area_of_box,
    "annotations lack num_keypoints, which follows from the keypoints": count_keypoints,
    "objects have polygons of fewer than three corners; they keep their box": _without_short_polygons,
}
