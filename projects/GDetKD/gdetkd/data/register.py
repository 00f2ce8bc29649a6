"""Datasets that DATASETS.REGISTER names: COCO JSON, VOC's layout, YOLO's layout, and images without labels."""

import json
import logging
import os
import tempfile
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json

from ..errors import GDetKDError
from .clean import Findings, clean_annotations
from .coco_json import read_coco
from .coco_quirks import Counts, describe
from .folders import leaves, resolve
from .keypoints import flip_map, keypoint_names
from .mistakes import find_mistakes
from .plain_images import load_images
from .voc import load_voc
from .voc_layout import find_classes, find_layout
from .yolo import Sizes, load_yolo
from .yolo_files import find_images
from .yolo_yaml import Description, describe_folder, read_description

logger = logging.getLogger(__name__)

# Returns a dataset in Detectron2's format, and how often each quirk was put right, by what a message calls it.
Loader = Callable[[], Tuple[List[Dict[str, Any]], Counts]]


class Keys(NamedTuple):
    """Keys that an entry must have and may have. `limit` may stand in any."""

    required: Set[str]
    optional: Set[str] = set()


# By kind. The entry has to match one of the alternatives.
KEYS = {
    "coco": (Keys({"json", "images"}),),
    "voc": (Keys({"root"}, {"split", "classes", "first_pixel"}),),
    "yolo": (Keys({"yaml", "split"}), Keys({"images"}, {"classes"})),
    "images": (Keys({"images"}, {"classes"}),),
}
PATHS = ("json", "images", "root", "split", "yaml")


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
        REGISTER[entry["kind"]](entry, allow_outside, cfg.INPUT.MAX_BAD_FRACTION)
        MetadataCatalog.get(name).set(gdetkd_entry=dict(entry))


def declared_classes(entry: Mapping[str, Any]) -> Optional[List[str]]:
    """Return the class names, in order, that an entry or a file of its dataset lists; None if there is none yet.

    A COCO file is not looked at: `class_names.names_of_dataset` reads it.
    """
    if "classes" in entry:
        return list(entry["classes"])
    if entry.get("kind") == "voc" and "root" in entry and os.path.isdir(resolve(entry["root"])):
        return find_classes(resolve(entry["root"]), entry.get("split"))
    if entry.get("kind") == "yolo" and os.path.exists(resolve(entry.get("yaml", entry.get("images", "")))):
        return _describe(entry, allow_outside=True).classes  # names alone; registering the dataset looks at its paths
    return None


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, Mapping) or "name" not in entry or entry.get("kind") not in KEYS:
        raise GDetKDError(f"DATASETS.REGISTER: {entry!r} needs a `name` and a `kind` of {', '.join(KEYS)}.")
    keys, alternatives = set(entry) - {"name", "kind", "limit"}, KEYS[entry["kind"]]
    # The alternative that the entry has most keys of is the one that is meant.
    meant = max(alternatives, key=lambda each: len(keys & each.required))
    unknown = keys - meant.required - meant.optional
    wrong = [f"lacks {key}" for key in sorted(meant.required - keys)] + [f"has {key}" for key in sorted(unknown)]
    wrong += [f"has {key} {entry[key]!r}, not text" for key in PATHS if not isinstance(entry.get(key, ""), str)]
    classes = entry.get("classes", [])
    if not isinstance(classes, (list, tuple)) or not all(isinstance(each, str) for each in classes):
        wrong.append(f"has classes {classes!r}, not a list of texts (put numbers, yes and no in quotes)")
    if entry.get("first_pixel", 1) not in (0, 1):
        wrong.append(f"has first_pixel {entry['first_pixel']!r}, not 0 or 1")
    if wrong:
        raise GDetKDError(f"DATASETS.REGISTER: {entry['name']!r} (kind {entry['kind']}) {', '.join(wrong)}.")
    limit = entry.get("limit", 1)
    if not isinstance(limit, int) or limit < 1:
        raise GDetKDError(f"DATASETS.REGISTER: the limit of {entry['name']!r} is {limit!r}, not a number of images.")


def _check_paths(entry: Mapping[str, Any]) -> None:
    for key in PATHS:
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

    def load() -> Tuple[List[Dict[str, Any]], Counts]:
        nonlocal is_as_written
        if is_as_written:
            return load_coco_json(json_file, images, name), {}
        content, counts = read_coco(json_file, name, images, allow_outside, most_bad)
        is_as_written = not counts
        _name_keypoints(name, content["categories"])
        dicts = _load_content(content, images, name) if counts else load_coco_json(json_file, images, name)
        return dicts, counts

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
    root, split = _existing(entry, entry["root"]), entry.get("split")
    find_layout(root, split, allow_outside)  # raises an error if it is not there
    classes = declared_classes(entry)
    first_pixel = entry.get("first_pixel")
    _register(entry, lambda: load_voc(root, split, classes, allow_outside, first_pixel, most_bad), root)
    MetadataCatalog.get(entry["name"]).set(evaluator_type="coco")
    if classes is not None:
        MetadataCatalog.get(entry["name"]).set(thing_classes=classes)


def _register_yolo(entry: Mapping[str, Any], allow_outside: bool, most_bad: float) -> None:
    _existing(entry, entry.get("yaml", entry.get("images")))
    description, split = _describe(entry, allow_outside), entry.get("split", "")
    find_images(description, split, allow_outside)  # raises an error if they are not there
    sizes: Sizes = {}  # kept, because the catalog loads a set anew for each of its readers
    _register(entry, lambda: load_yolo(description, split, allow_outside, sizes), description.path)
    MetadataCatalog.get(entry["name"]).set(thing_classes=description.classes, evaluator_type="coco")


def _describe(entry: Mapping[str, Any], allow_outside: bool) -> Description:
    if "yaml" in entry:
        return read_description(resolve(entry["yaml"]), allow_outside)
    return describe_folder(resolve(entry["images"]), entry.get("classes"))


def _register_images(entry: Mapping[str, Any], allow_outside: bool, most_bad: float) -> None:
    folder = _existing(entry, entry["images"])
    _register(entry, lambda: load_images(folder), folder)
    metadata = MetadataCatalog.get(entry["name"]).set(evaluator_type="images")
    if "classes" in entry:
        metadata.set(thing_classes=list(entry["classes"]))


REGISTER = {"coco": _register_coco, "voc": _register_voc, "yolo": _register_yolo, "images": _register_images}


def _register(
    entry: Mapping[str, Any],
    load: Loader,
    source: str,
    note: Callable[[Findings], None] = lambda findings: None,
) -> None:
    name, is_known = entry["name"], False  # the catalog loads a set anew for each of its readers

    def load_clean() -> List[Dict[str, Any]]:
        nonlocal is_known
        try:
            dicts, counts = load()
            dicts = dicts[: entry.get("limit")]
            classes = MetadataCatalog.get(name).get("thing_classes") or ()
            mistakes = [] if is_known else find_mistakes(dicts, classes, name)
            findings = clean_annotations(dicts)
            note(findings)
        except (FileNotFoundError, GDetKDError):
            raise  # names the file itself
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, AssertionError, SyntaxError, OSError) as e:
            raise GDetKDError(
                f"The data set {name!r} cannot be read from {source!r} ({type(e).__name__}: {e}). Correct that file "
                "or the entry in DATASETS.REGISTER."
            ) from e
        said = [text for text in (describe(counts), str(findings), *mistakes) if text]
        if said and not is_known:
            logger.warning("%s: %s.", name, "; ".join(said))
        is_known = True
        return dicts

    DatasetCatalog.register(name, load_clean)
