"""Data sets registered from the config: COCO JSON and VOC's layout, read by Detectron2's own loaders; mere images."""

import json
import logging
import os
import tempfile
from typing import Any, Callable, Dict, List, Mapping, Optional

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json

from ..errors import GDetKDError
from .clean import Findings, clean_annotations
from .coco_json import leaves, read_coco
from .coco_quirks import describe
from .keypoints import flip_map, keypoint_names
from .mistakes import find_mistakes
from .voc import load_voc

logger = logging.getLogger(__name__)

# What an entry of DATASETS.REGISTER must say, by kind, and may; `limit` may stand in any.
REQUIRED = {"coco": {"json", "images"}, "voc": {"root", "split", "classes"}, "images": {"images"}}
OPTIONAL = {"images": {"classes"}}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


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
        allow_outside = cfg.DATASETS.ALLOW_OUTSIDE
        if not allow_outside:
            _check_paths(entry)
        register = {"coco": _register_coco, "voc": _register_voc, "images": _register_images}[entry["kind"]]
        register(entry, allow_outside, cfg.INPUT.MAX_BAD_FRACTION)
        MetadataCatalog.get(name).set(gdetkd_entry=dict(entry))


def resolve(path: str) -> str:
    """A relative path seen from Detectron2's data folder."""
    return os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), path)


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, Mapping) or "name" not in entry or entry.get("kind") not in REQUIRED:
        raise GDetKDError(f"DATASETS.REGISTER: {entry!r} needs a `name` and a `kind` of {', '.join(REQUIRED)}.")
    keys, wanted = set(entry) - {"name", "kind", "limit"}, REQUIRED[entry["kind"]]
    unknown = keys - wanted - OPTIONAL.get(entry["kind"], set())
    wrong = [f"lacks {key}" for key in sorted(wanted - keys)] + [f"has {key}" for key in sorted(unknown)]
    if wrong:
        raise GDetKDError(f"DATASETS.REGISTER: {entry['name']!r} (kind {entry['kind']}) {', '.join(wrong)}.")
    limit = entry.get("limit", 1)
    if not isinstance(limit, int) or limit < 1:
        raise GDetKDError(f"DATASETS.REGISTER: the limit of {entry['name']!r} is {limit!r}, not a number of images.")


def _check_paths(entry: Mapping[str, Any]) -> None:
    for key in ("json", "images", "root", "split"):
        path = entry.get(key, "")
        # An absolute path is the user's own decision; `split` is part of one.
        if leaves(path) and (key == "split" or not os.path.isabs(path)):
            raise GDetKDError(
                f"DATASETS.REGISTER: {key} {path!r} of {entry['name']!r} leads out of the folder that it starts from. "
                "Give an absolute path, or set DATASETS.ALLOW_OUTSIDE to True."
            )


def _existing(entry: Mapping[str, Any], path: str) -> str:
    full = resolve(path)
    if not os.path.exists(full):
        raise GDetKDError(
            f"The data set {entry['name']!r} wants {os.path.abspath(full)!r}, which is not there. Correct its entry in "
            "DATASETS.REGISTER, or name the folder it is in with the environment variable DETECTRON2_DATASETS."
        )
    return full


def _register_coco(entry: Mapping[str, Any], allow_outside: bool, most_bad: float) -> None:
    name, json_file, images = entry["name"], _existing(entry, entry["json"]), _existing(entry, entry["images"])
    is_as_written: Optional[bool] = None  # whether the file has no quirk; None until it is read

    def load() -> List[Dict[str, Any]]:
        nonlocal is_as_written
        if is_as_written:
            return load_coco_json(json_file, images, name)
        content, counts = read_coco(json_file, name, images, allow_outside, most_bad)
        if is_as_written is None and counts:
            logger.warning("%s: %s.", name, describe(counts))
        is_as_written = not counts
        _name_keypoints(name, content["categories"])
        return _load_content(content, images, name) if counts else load_coco_json(json_file, images, name)

    def note(findings: Findings) -> None:
        # Detectron2 evaluates against the file where it is named. It must not where training reads something else:
        # then the evaluation writes a file of what training reads.
        metadata = MetadataCatalog.get(name)
        is_whole = is_as_written and not findings.left_out and "limit" not in entry
        if is_whole and metadata.get("json_file") is None:
            metadata.set(json_file=json_file)

    _register(entry, load, json_file, note=note)
    MetadataCatalog.get(name).set(image_root=images, evaluator_type="coco")


def _name_keypoints(name: str, categories: List[Dict[str, Any]]) -> None:
    """Tell Detectron2 the names of a COCO file's keypoints, and which of them change places in a flipped image."""
    metadata, names = MetadataCatalog.get(name), keypoint_names(categories)
    if names is None or metadata.get("keypoint_names") is not None:
        return
    metadata.set(keypoint_names=names, keypoint_flip_map=flip_map(names))


def _load_content(content: Dict[str, Any], images: str, name: str) -> List[Dict[str, Any]]:
    """Load a COCO file's content that was put right. Detectron2's loader reads files alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "annotations.json")
        with open(path, "w") as file:
            json.dump(content, file)
        return load_coco_json(path, images, name)


def _register_voc(entry: Mapping[str, Any], allow_outside: bool, most_bad: float) -> None:
    name, root = entry["name"], _existing(entry, entry["root"])
    _existing(entry, os.path.join(entry["root"], "ImageSets", "Main", entry["split"] + ".txt"))
    # VOC's corners are pixels, both inside the box, and Detectron2 widens the box to their outer edges: one that has
    # no area in the file is one pixel wide or high by then.
    _register(entry, lambda: load_voc(root, entry["split"], entry["classes"], allow_outside), root, least=1)
    MetadataCatalog.get(name).set(thing_classes=list(entry["classes"]), evaluator_type="coco")


def _register_images(entry: Mapping[str, Any], allow_outside: bool, most_bad: float) -> None:
    folder = _existing(entry, entry["images"])
    _register(entry, lambda: _load_images(folder), folder)
    metadata = MetadataCatalog.get(entry["name"]).set(evaluator_type="images")
    if "classes" in entry:
        metadata.set(thing_classes=list(entry["classes"]))


def _load_images(folder: str) -> List[Dict[str, Any]]:
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_ENDINGS))
    return [{"file_name": os.path.join(folder, name), "image_id": name} for name in names]


def _register(
    entry: Mapping[str, Any],
    load: Callable[[], List[Dict[str, Any]]],
    source: str,
    least: float = 0,
    note: Callable[[Findings], None] = lambda findings: None,
) -> None:
    name, is_known = entry["name"], False  # the catalog loads a set anew for each of its readers

    def load_clean() -> List[Dict[str, Any]]:
        nonlocal is_known
        try:
            dicts = load()[: entry.get("limit")]
            classes = MetadataCatalog.get(name).get("thing_classes") or ()
            mistakes = [] if is_known else find_mistakes(dicts, classes, name)
            findings = clean_annotations(dicts, least)
            note(findings)
        except (FileNotFoundError, GDetKDError):
            raise  # names the file itself
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, AssertionError, SyntaxError, OSError) as e:
            raise GDetKDError(
                f"The data set {name!r} cannot be read from {source!r} ({type(e).__name__}: {e}). Correct that file "
                "or the entry in DATASETS.REGISTER."
            ) from e
        said = [str(findings), *mistakes] if str(findings) else mistakes
        if said and not is_known:
            logger.warning("%s: %s.", name, "; ".join(said))
        is_known = True
        return dicts

    DatasetCatalog.register(name, load_clean)
