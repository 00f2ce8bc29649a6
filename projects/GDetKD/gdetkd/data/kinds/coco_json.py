"""Read a COCO file, and check what Detectron2 and pycocotools do not check."""

import json
from typing import Any, Dict, List, Set, Tuple

from ...errors import GDetKDError
from ..folders import leaves
from .base import Counts
from .coco_ids import InvalidItem, Item, drop_unmatched
from .coco_masks import MOST_PIXELS, find_mask_fault
from .coco_quirks import correct_quirks, is_box, is_number


def read_coco(
    path: str, name: str, folder: str, allow_outside: bool = False, max_unmatched: float = 0.01
) -> Tuple[Dict[str, Any], Counts]:
    """Read a COCO file, correct its quirks, and refuse content that would make its readers fail or go wrong silently.

    Args:
        path: the JSON file.
        name: the dataset's name, for messages.
        folder: the folder of the images.
        allow_outside: whether file names may lead out of that folder.
        max_unmatched: the share of annotations whose image may be missing in the file.

    Returns:
        the content, and how often each quirk was corrected.

    Raises:
        GDetKDError: the file is not a COCO file, or one of its items is invalid.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read()
        content = json.loads(raw)
        encoding = json.detect_encoding(raw)
        counts = {f"file is written in {encoding}": 1} if encoding != "utf-8" else {}
        parts = _lists(content)
        images, categories, annotations = parts["images"], parts["categories"], parts["annotations"]
        counts.update(correct_quirks(images, categories, annotations, folder))
        _check_images(images, folder, allow_outside)
        category_ids = _unique_ids("category", categories, int)
        counts.update(drop_unmatched(images, annotations, max_unmatched))
        for category in categories:
            _require(isinstance(category.get("name"), str), f"category {category['id']} has no name")
        for annotation in annotations:
            _check_annotation(annotation, category_ids)
    except InvalidItem as e:
        reason = str(e)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as e:  # invalid JSON, or text that is not UTF-8
        reason = f"{type(e).__name__}: {e}"
    else:
        return content, counts
    raise GDetKDError(
        f"The dataset {name!r} cannot be read from {path!r} ({reason}). Correct that file or the entry in "
        "DATASETS.REGISTER."
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidItem(message)


def _lists(content: Any) -> Dict[str, List[Item]]:
    _require(isinstance(content, dict), f"it holds a {type(content).__name__}, not a dictionary")
    parts = {}
    for key in ("images", "categories", "annotations"):
        # A dataset to predict on can come without annotations.
        part = content.get(key, [] if key == "annotations" else None)
        _require(isinstance(part, list), f"it has no list of {key}")
        _require(all(isinstance(item, dict) for item in part), f"an item of its {key} is not a dictionary")
        parts[key] = part
    _require(bool(parts["categories"]), "it names no category")
    return parts


def _unique_ids(what: str, items: List[Item], *types: type) -> Set[Any]:
    seen: Set[Any] = set()
    for item in items:
        identity = item.get("id")
        is_valid = isinstance(identity, types) and not isinstance(identity, bool)
        _require(is_valid, f"{what} id {identity!r} is not a number{' or text' if str in types else ''}")
        _require(identity not in seen, f"{what} id {identity!r} occurs twice")
        seen.add(identity)
    return seen


def _check_images(images: List[Item], folder: str, allow_outside: bool) -> None:
    # If two images had one id, Detectron2 would silently drop one of them and give its annotations to the other.
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


def _check_annotation(annotation: Item, category_ids: Set[Any]) -> None:
    which = f"annotation {annotation.get('id')!r}"
    category, box = annotation.get("category_id"), annotation.get("bbox")
    is_known = isinstance(category, int) and category in category_ids
    _require(is_known, f"{which} has category_id={category!r}, which is none of its categories")
    _require(isinstance(annotation.get("image_id"), (int, str)), f"{which} has no image_id")
    _require(isinstance(annotation.get("id"), (int, str)), f"{which} has no id")
    _require(is_box(box), f"{which} has the box {box!r}")
    _require(annotation.get("iscrowd", 0) in (0, 1), f"{which} has iscrowd {annotation.get('iscrowd')!r}")
    keypoints = annotation.get("keypoints") or []
    are_numbers = isinstance(keypoints, list) and all(map(is_number, keypoints))
    _require(are_numbers, f"{which} has keypoints that are not numbers")
    if annotation.get("segmentation"):
        fault = find_mask_fault(annotation["segmentation"])
        _require(fault is None, f"{which} has a segmentation {fault}")
