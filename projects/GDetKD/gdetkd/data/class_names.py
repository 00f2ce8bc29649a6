"""Find the names of the classes that a config trains on."""

import json
import os
from typing import Dict, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..errors import GDetKDError
from .folders import resolve
from .register import declared_classes


def class_names(cfg: CfgNode) -> Optional[Tuple[str, ...]]:
    """The classes of the first set that a config trains on, in order; None where they cannot be known here.

    They are known of a set whose metadata Detectron2's catalog has, and of one that DATASETS.REGISTER names.
    """
    if not cfg.DATASETS.TRAIN:
        return None
    name = cfg.DATASETS.TRAIN[0]
    return names_of_dataset(name, [entry for entry in cfg.DATASETS.REGISTER if entry["name"] == name])


def names_of_dataset(name: str, entries: Sequence[Dict] = ()) -> Optional[Tuple[str, ...]]:
    """Return the class names of a dataset in order, or None if they are not known.

    Args:
        name: the dataset's name in Detectron2's catalog.
        entries: what a config's DATASETS.REGISTER says of it, for a dataset that is not in the catalog.
    """
    entries = [dict(entry) for entry in entries]
    if name in MetadataCatalog.list():
        metadata = MetadataCatalog.get(name)
        if entries and metadata.get("gdetkd_entry") != entries[0]:
            # The catalog has another dataset of that name: a teacher's file and the student's may both name one so.
            return _names_of_entry(entries[0])
        if metadata.get("thing_classes"):
            return tuple(metadata.thing_classes)
        if metadata.get("gdetkd_entry"):  # registered, but not read yet
            entries.append(metadata.gdetkd_entry)
    return _names_of_entry(entries[0]) if entries else None


def _names_of_entry(entry: Dict) -> Optional[Tuple[str, ...]]:
    declared = declared_classes(entry)
    if declared is not None:
        return tuple(declared)
    if "json" not in entry:
        return None
    path = resolve(entry["json"])
    if not os.path.exists(path):
        return None
    try:
        with open(path, "rb") as file:
            categories = json.load(file)["categories"]
        return tuple(category["name"].strip() for category in sorted(categories, key=lambda each: each["id"]))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise GDetKDError(f"The categories cannot be read from {path!r} ({type(e).__name__}: {e}).") from e
