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
    return names_of_dataset(name, next((dict(entry) for entry in cfg.DATASETS.REGISTER if entry["name"] == name), None))


def names_of_dataset(name: str, entry: Optional[Dict] = None) -> Optional[Tuple[str, ...]]:
    """Return the class names of a dataset in order, or None if they are not known.

    Args:
        name: the dataset's name in Detectron2's catalog.
        entry: the entry of that name in a config's DATASETS.REGISTER.

    Raises:
        GDetKDError: a file of the dataset exists, but its class names cannot be read.
    """
    if name in MetadataCatalog.list():
        metadata = MetadataCatalog.get(name)
        registered = metadata.get("gdetkd_entry")
        # Student and teacher may use one name for two datasets. Then the catalog has another dataset than the entry.
        if entry is None or entry == registered:
            if metadata.get("thing_classes"):
                return tuple(metadata.thing_classes)
            entry = registered  # it may not be read yet
    return None if entry is None else _names_of_entry(entry)


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


def as_student_names(names: Sequence[str], student: Optional[Sequence[str]]) -> Sequence[str]:
    """Return class names as the student spells them. `check_class_order` lets upper and lower case differ.

    Args:
        names: the class names of a dataset or of a teacher, in order.
        student: the student's class names, or None if they are unknown.
    """
    return student if student is not None and in_lower_case(names) == in_lower_case(student) else names


def in_lower_case(names: Sequence[str]) -> List[str]:
    """Return class names in lower case, without spaces around them."""
    return [str(name).strip().lower() for name in names]
