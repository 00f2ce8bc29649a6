"""Match the ids and file names of a COCO file that are written in two ways."""

import os
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence

from ..folders import spelling_key
from .base import Counts

Item = Dict[str, Any]


class InvalidItem(Exception):
    """Say what is wrong with an item of the file."""


def match_ids(annotations: Sequence[Item], key: str, items: Sequence[Item]) -> int:
    """Correct ids in annotations that differ from an item's id only by their type. Return how many were corrected.

    Args:
        key: the key of the id in an annotation, `image_id` or `category_id`.
        items: the images or categories that have the ids.
    """
    ids = {item["id"] for item in items if isinstance(item.get("id"), (int, str))}
    spellings = (_as_text, _without_zeros)
    tables = [_by_spelling(ids, spell) for spell in spellings]
    changed = 0
    for annotation in annotations:
        value = annotation.get(key)
        if not isinstance(value, (int, str, float)) or isinstance(value, bool):
            continue
        if value in ids and not isinstance(value, float):
            continue
        matches = [table.get(spell(value)) for table, spell in zip(tables, spellings)]
        match = next((match for match in matches if match is not None), None)
        if match is not None:
            annotation[key] = match
            changed += 1
    return changed


def _as_text(identity: Any) -> str:
    is_whole = isinstance(identity, float) and identity.is_integer()
    return str(int(identity)) if is_whole else str(identity).strip()


def _without_zeros(identity: Any) -> str:
    text = _as_text(identity)
    return str(int(text)) if text.isdecimal() else text


def _by_spelling(ids: Iterable[Any], spell: Callable[[Any], str]) -> Dict[str, Optional[Any]]:
    """Return ids by their spelling, and None for a spelling that could mean two ids."""
    found: Dict[str, Optional[Any]] = {}
    for identity in ids:
        text = spell(identity)
        found[text] = None if text in found else identity
    return found


def drop_unmatched(images: Sequence[Item], annotations: List[Item], max_unmatched: float) -> Counts:
    """Leave out annotations whose image is not in the file. Number the rest anew if their ids mislead pycocotools.

    Args:
        images: items with distinct ids.
        annotations: changed in place.
        max_unmatched: the share of annotations whose image may be missing.

    Returns:
        how often each quirk was corrected.

    Raises:
        InvalidItem: more annotations than `max_unmatched` allows have no image.
    """
    kept = _with_image(annotations, images, max_unmatched)
    counts = {
        "annotations are of no image and are left out": len(annotations) - len(kept),
        "annotation ids are not distinct numbers from 1 on and are numbered anew": _renumber(kept),
    }
    annotations[:] = kept
    return {name: count for name, count in counts.items() if count}


def _with_image(annotations: List[Item], images: Sequence[Item], max_unmatched: float) -> List[Item]:
    ids = {image["id"] for image in images if isinstance(image.get("id"), (int, str))}
    kept = [a for a in annotations if not isinstance(a.get("image_id"), (int, str)) or a["image_id"] in ids]
    dropped = len(annotations) - len(kept)
    if dropped > max_unmatched * len(annotations):
        example = next(a for a in annotations if a.get("image_id") not in ids)
        raise InvalidItem(
            f"{dropped} of {len(annotations)} annotations are of no image of the file, the first with image_id "
            f"{example.get('image_id')!r}. That is more than INPUT.MAX_BAD_FRACTION {max_unmatched:g}: add the images, "
            "or correct the ids"
        )
    return kept


def _renumber(annotations: List[Item]) -> int:
    """Number annotations from 1 on if their ids are not distinct positive numbers. Return how many were numbered.

    pycocotools takes the id 0 for "no match". Nothing else refers to the id of an annotation.
    """
    ids = [annotation.get("id") for annotation in annotations]
    are_numbers = all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in ids)
    if are_numbers and len(set(ids)) == len(ids):
        return 0
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return len(annotations)


def respell_file_names(images: Sequence[Item], folder: str) -> int:
    """Correct file names that differ from a file only in case or in the form of accents.

    A file that another image names, or has been given, is not taken.

    Returns:
        how many names were corrected.
    """
    listings: Dict[str, Dict[str, List[str]]] = {}
    taken = {image["file_name"] for image in images if isinstance(image.get("file_name"), str)}
    changed = 0
    for image in images:
        name = image.get("file_name")
        is_relative = isinstance(name, str) and "\0" not in name and not os.path.isabs(name)
        if not is_relative or os.path.exists(os.path.join(folder, name)):
            continue
        head, tail = os.path.split(name)
        if head not in listings:
            listings[head] = _by_spelling_key(os.path.join(folder, head))
        found = [os.path.join(head, other) for other in listings[head].get(spelling_key(tail), [])]
        if len(found) == 1 and found[0] not in taken:
            image["file_name"] = found[0]
            taken.add(found[0])
            changed += 1
    return changed


def _by_spelling_key(folder: str) -> Dict[str, List[str]]:
    names: Dict[str, List[str]] = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        names.setdefault(spelling_key(name), []).append(name)
    return names
