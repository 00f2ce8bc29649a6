"""Describe a dataset in YOLO's layout by its data.yaml, by darknet's obj.data, or by a folder with class names."""

import os
import reprlib
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import yaml

from ...errors import GDetKDError
from ..folders import is_inside, leaves, read_text, resolve

# Names that tools use for the same split in data.yaml and obj.data.
SAME_SPLITS = ("val", "valid", "validation")
# Files with one class name a line, by labelImg and Label Studio, darknet and CVAT, and Roboflow's darknet export.
CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels")
# CVAT writes paths for darknet, which starts one folder above.
DARKNETS_FOLDER = "data/"
# Shortens a value of a file for a message. Without a limit of levels, a few lines of YAML could become gigabytes.
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
short = _REPR.repr


class Description(NamedTuple):
    """Describe a dataset in YOLO's layout.

    Attributes:
        path: the file that describes the dataset, or the folder or list of images.
        folder: the folder where relative paths start.
        splits: maps the name of a split to a folder, a list of images, or several of them.
        classes: class names in order.
        keypoints: how many columns of keypoints a label has.
    """

    path: str
    folder: str
    splits: Dict[str, Any]
    classes: List[str]
    keypoints: int = 0


def read_description(path: str, allow_outside: bool = False) -> Description:
    """Read a data.yaml, or darknet's obj.data.

    Raises:
        GDetKDError: the file is neither, or does not give its class names in a clear order.
    """
    try:
        text = read_text(path)
        if path.endswith(".data"):
            return _read_obj_data(path, text)
        content = yaml.safe_load(text)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dictionary")
        splits = {key: content[key] for key in ("train", "test", *SAME_SPLITS) if content.get(key)}
        folder = _start_folder(os.path.dirname(path), content.get("path"))
        check_inside(folder, path, allow_outside)
        return Description(path, folder, splits, _names(content), _keypoint_columns(content.get("kpt_shape")))
    except GDetKDError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
    raise GDetKDError(f"{path!r} does not describe a dataset in YOLO's layout ({reason}). Correct that file.")


def describe_folder(path: str, classes: Optional[Sequence[str]]) -> Description:
    """Describe a folder or a list of images that has no data.yaml.

    Args:
        classes: class names in order. None: read them from a file beside the images or labels.

    Raises:
        GDetKDError: there is no such file, or two files list different names.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if classes is None:
        label_folder = find_label_folder(folder)
        places = dict.fromkeys([folder, label_folder, os.path.dirname(folder), os.path.dirname(label_folder)])
        files = [os.path.join(place, name) for place in places for name in CLASS_FILES]
        found = {file: _read_names(file) for file in files if os.path.isfile(file)}
        if len(set(map(tuple, found.values()))) != 1:
            problem = (
                f"{' and '.join(found)} list different names" if found else f"there is no {' or '.join(CLASS_FILES)}"
            )
            raise GDetKDError(
                f"The classes of {path!r} are not known: {problem}. List them in order as `classes` in "
                "DATASETS.REGISTER, or give `yaml` and `split` if there is a data.yaml."
            )
        classes = next(iter(found.values()))
    return Description(path, folder, {"": os.path.abspath(path)}, list(classes))


def find_label_folder(folder: str) -> str:
    """Return the folder of the labels that belong to a folder of images.

    The last `images` in the path becomes `labels`. If there is no such folder, labels lie beside the images.
    """
    parts = os.path.abspath(folder).split(os.sep)
    for index in range(len(parts) - 1, 0, -1):
        if parts[index].lower() == "images":
            parent = os.sep.join(parts[:index]) or os.sep
            labels = next((name for name in sorted(os.listdir(parent)) if name.lower() == "labels"), None)
            if labels is not None and os.path.isdir(os.path.join(parent, labels)):
                return os.path.join(parent, labels, *parts[index + 1 :])
            break
    return folder


def without_darknets_folder(path: str) -> str:
    return path[len(DARKNETS_FOLDER) :] if path.startswith(DARKNETS_FOLDER) else path


def is_allowed(place: str, path: str, allow_outside: bool) -> bool:
    start = path if os.path.isdir(path) else os.path.dirname(path)
    return allow_outside or is_inside(place, start) or is_inside(place, resolve(""))


def check_inside(place: str, path: str, allow_outside: bool) -> None:
    if not is_allowed(place, path, allow_outside):
        raise GDetKDError(
            f"{path!r} leads to {place!r}, which is neither in that file's folder nor in "
            f"{os.path.abspath(resolve(''))!r}. "
            "Move the data there, or set DATASETS.ALLOW_OUTSIDE to True."
        )


def _start_folder(beside: str, path: Any) -> str:
    """Return the folder that `path` in a data.yaml means, relative to the file or to Detectron2's data folder.

    If there is no such folder, `path` was written on another computer. Then return the folder of the file.
    """
    if path is not None and not isinstance(path, str):
        raise ValueError(f"its path is {short(path)}, not text")
    path = (path or "").replace("\\", "/")
    candidates = [os.path.join(beside, path)] + [resolve(path)] * bool(path)
    return os.path.normpath(next((folder for folder in candidates if os.path.isdir(folder)), beside))


def _names(content: Dict[Any, Any]) -> List[str]:
    """Return the class names of a data.yaml, which are a list or a dictionary by index."""
    names, count = content.get("names"), content.get("nc")
    if names is None and isinstance(count, int) and 0 < count < 10**6:
        return [f"class_{index}" for index in range(count)]
    if isinstance(names, dict):
        by_index = {str(index): name for index, name in names.items()}
        if set(by_index) != set(map(str, range(len(names)))):
            raise ValueError(f"the indices of its names are {short(list(names))}, not 0, 1, 2 and so on")
        names = [by_index[str(index)] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"its names are {short(names)}, not a list of classes")
    wrong = [name for name in names if isinstance(name, bool) or not isinstance(name, (str, int, float))]
    if wrong:
        raise ValueError(f"YAML reads a class name as {short(wrong[0])}: put it in quotes")
    if count is not None and count != len(names):
        raise ValueError(f"nc is {short(count)}, but it has {len(names)} names")
    return [str(name).strip() for name in names]


def _keypoint_columns(shape: Any) -> int:
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(v, int) and 0 < v < 10**4 for v in shape):
        raise ValueError(f"its kpt_shape is {short(shape)}, not [number of keypoints, 2 or 3]")
    return shape[0] * shape[1]


def _read_obj_data(path: str, text: str) -> Description:
    """Read darknet's obj.data, which has lines such as `train = data/train.txt`. Paths start where darknet runs."""
    pairs = [line.split("=", 1) for line in text.splitlines() if "=" in line]
    content = {key.strip(): value.strip().replace("\\", "/") for key, value in pairs}
    folder = os.path.dirname(path)
    named = content.get("names", "obj.names")
    candidates = (named, without_darknets_folder(named), os.path.basename(named))
    inside = [place for place in candidates if not leaves(place)]
    names = next((place for place in inside if os.path.isfile(os.path.join(folder, place))), None)
    if names is None:
        raise ValueError(f"the file of its class names, {named}, is not in its folder")
    splits = {key: content[key] for key in ("train", "test", *SAME_SPLITS) if content.get(key)}
    return Description(path, folder, splits, _read_names(os.path.join(folder, names)))


def _read_names(path: str) -> List[str]:
    names = [line.strip() for line in read_text(path).strip().splitlines()]
    if not all(names):
        raise GDetKDError(f"{path!r} has an empty line {names.index('') + 1}. Write one class name a line.")
    return names
