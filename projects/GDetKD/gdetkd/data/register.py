"""Data sets registered from the config: COCO JSON, and VOC's layout, read by Detectron2's own loaders."""

import logging
import os
from typing import Any, Callable, Dict, List, Mapping

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.structures import BoxMode

from ..errors import GDetKDError

logger = logging.getLogger(__name__)

# What an entry of DATASETS.REGISTER must say, by kind; `limit` may stand in any.
REQUIRED = {"coco": {"json", "images"}, "voc": {"root", "split", "classes"}}


def register_datasets(cfg: CfgNode) -> None:
    """Registers DATASETS.REGISTER with Detectron2's catalog. Registering the same entry again changes nothing.

    Raises:
        GDetKDError: an entry is not understood, a file is not there, or another set has that name already.
    """
    for entry in cfg.DATASETS.REGISTER:
        _check_entry(entry)
        name = entry["name"]
        if name in DatasetCatalog.list():
            if MetadataCatalog.get(name).get("gdetkd_entry") != dict(entry):
                raise GDetKDError(f"DATASETS.REGISTER names {name!r}, but another data set has that name already.")
            continue
        {"coco": _register_coco, "voc": _register_voc}[entry["kind"]](entry)
        MetadataCatalog.get(name).set(gdetkd_entry=dict(entry))


def resolve(path: str) -> str:
    """A relative path seen from Detectron2's data folder."""
    return os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), path)


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, Mapping) or "name" not in entry or entry.get("kind") not in REQUIRED:
        raise GDetKDError(f"DATASETS.REGISTER: {entry!r} needs a `name` and a `kind` of {' or '.join(REQUIRED)}.")
    keys = set(entry) - {"name", "kind", "limit"}
    wanted = REQUIRED[entry["kind"]]
    if keys != wanted:
        wrong = [f"lacks {key}" for key in sorted(wanted - keys)] + [f"has {key}" for key in sorted(keys - wanted)]
        raise GDetKDError(f"DATASETS.REGISTER: {entry['name']!r} (kind {entry['kind']}) {', '.join(wrong)}.")
    limit = entry.get("limit", 1)
    if not isinstance(limit, int) or limit < 1:
        raise GDetKDError(f"DATASETS.REGISTER: the limit of {entry['name']!r} is {limit!r}, not a number of images.")


def _existing(entry: Mapping[str, Any], path: str) -> str:
    full = resolve(path)
    if not os.path.exists(full):
        raise GDetKDError(
            f"The data set {entry['name']!r} wants {os.path.abspath(full)!r}, which is not there. Correct its entry in "
            "DATASETS.REGISTER, or name the folder it is in with the environment variable DETECTRON2_DATASETS."
        )
    return full


def _register_coco(entry: Mapping[str, Any]) -> None:
    name, json_file, images = entry["name"], _existing(entry, entry["json"]), _existing(entry, entry["images"])
    _register(entry, lambda: load_coco_json(json_file, images, name))
    metadata = MetadataCatalog.get(name).set(image_root=images, evaluator_type="coco")
    # Detectron2 evaluates against the file itself where it is named; a shortened set has to be written anew.
    if "limit" not in entry:
        metadata.set(json_file=json_file)


def _register_voc(entry: Mapping[str, Any]) -> None:
    name, root = entry["name"], _existing(entry, entry["root"])
    _existing(entry, os.path.join(entry["root"], "ImageSets", "Main", entry["split"] + ".txt"))
    # VOC's corners are pixels, both inside the box, and Detectron2 widens the box to their outer edges: one that has
    # no area in the file is one pixel wide or high by then.
    _register(entry, lambda: load_voc_instances(root, entry["split"], list(entry["classes"])), least=1)
    MetadataCatalog.get(name).set(thing_classes=list(entry["classes"]), evaluator_type="coco")


def _register(entry: Mapping[str, Any], load: Callable[[], List[Dict[str, Any]]], least: float = 0) -> None:
    name, warned = entry["name"], []

    def load_clean() -> List[Dict[str, Any]]:
        dicts = load()[: entry.get("limit")]
        dropped = drop_boxes_without_area(dicts, least)
        if dropped and not warned:  # the catalog loads a set anew for each of its readers
            logger.warning("%s: %d annotations without area are left out.", name, dropped)
            warned.append(name)
        return dicts

    DatasetCatalog.register(name, load_clean)


def drop_boxes_without_area(dicts: List[Dict[str, Any]], least: float = 0) -> int:
    """Takes annotations out whose box is not wider and higher than `least` pixels; returns how many."""
    dropped = 0
    for image in dicts:
        annotations = image.get("annotations", [])
        kept = [annotation for annotation in annotations if _shorter_side(annotation) > least]
        dropped += len(annotations) - len(kept)
        if len(kept) < len(annotations):
            image["annotations"] = kept
    return dropped


def _shorter_side(annotation: Dict[str, Any]) -> float:
    x1, y1, x2, y2 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return min(x2 - x1, y2 - y1)
