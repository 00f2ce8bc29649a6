"""Find the names of the classes that a config trains on, and compare their order."""

from typing import Dict, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .kinds import find_kind


def class_names(cfg: CfgNode) -> Optional[Tuple[str, ...]]:
    """Return the class names of the first dataset in DATASETS.TRAIN in order, or None if they are not known."""
    if not cfg.DATASETS.TRAIN:
        return None
    name = cfg.DATASETS.TRAIN[0]
    return names_of_dataset(name, [entry for entry in cfg.DATASETS.REGISTER if entry["name"] == name])


def names_of_dataset(name: str, entries: Sequence[Dict] = ()) -> Optional[Tuple[str, ...]]:
    """Return the class names of a dataset in order, or None if they are not known.

    Args:
        name: the dataset's name in Detectron2's catalog.
        entries: the entries of that name in a config's DATASETS.REGISTER.

    Raises:
        GDetKDError: a file of the dataset exists, but its class names cannot be read.
    """
    entries = [dict(entry) for entry in entries]
    if name in MetadataCatalog.list():
        metadata = MetadataCatalog.get(name)
        if entries and metadata.get("gdetkd_entry") != entries[0]:
            # The catalog has another dataset of this name: student and teacher may use one name for two datasets.
            return _names_of_entry(entries[0])
        if metadata.get("thing_classes"):
            return tuple(metadata.thing_classes)
        if metadata.get("gdetkd_entry"):  # registered, but not read yet
            entries.append(metadata.gdetkd_entry)
    return _names_of_entry(entries[0]) if entries else None


def _names_of_entry(entry: Dict) -> Optional[Tuple[str, ...]]:
    if "classes" in entry:
        return tuple(entry["classes"])
    kind = find_kind(entry)
    if kind is None or kind.find_problems(entry):
        return None
    names = kind(entry, allow_outside=True).class_names()
    return None if names is None else tuple(names)


def is_reordered(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether two lists hold the same class names in different orders. Upper and lower case do not matter."""
    lower, other = in_lower_case(first), in_lower_case(second)
    if lower == other:  # then only names that differ in case alone can have changed places
        return list(first) != list(second) and sorted(map(str, first)) == sorted(map(str, second))
    return sorted(lower) == sorted(other)


def in_lower_case(names: Sequence[str]) -> List[str]:
    """Return class names in lower case, without spaces around them."""
    return [str(name).strip().lower() for name in names]
