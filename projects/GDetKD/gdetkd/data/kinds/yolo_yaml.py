"""Read what describes a dataset in YOLO's layout: a data.yaml, darknet's obj.data, or a folder with class names."""

import os
import reprlib
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import yaml

from ...errors import GDetKDError
from ..folders import is_inside, leaves, read_text, resolve

# Names of the same split. Tools use different ones in data.yaml and obj.data.
SAME_SPLITS = ("val", "valid", "validation")
# Files in which tools list the classes, one a line: labelImg and Label Studio, darknet and CVAT, Roboflow's darknet.
CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels")
# CVAT writes paths as darknet sees them, which starts one folder above.
DARKNETS_FOLDER = "data/"
# Writes a value of a file into a message. Without a limit of levels, a few lines of YAML could make gigabytes.
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
short = _REPR.repr


class Description(NamedTuple):
    """
    Attributes:
        path: the file that describes the dataset, for messages; or the folder or list of images.
        folder: where its relative paths start.
        splits: by name what the file says: a folder, a list of images, or several of them.
        classes: in the order of their indices.
        keypoints: columns of keypoints that a label has.
    """

    path: str
    folder: str
    splits: Dict[str, Any]
    classes: List[str]
    keypoints: int = 0


def read_description(path: str, allow_outside: bool = False) -> Description:
    """Read a data.yaml, or darknet's obj.data.

    Raises:
        GDetKDError: the file is not such a file, or does not name its classes in a clear order.
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
    raise GDetKDError(f"{path!r} does not describe a dataset of YOLO's layout ({reason}). Correct that file.")


def describe_folder(path: str, classes: Optional[Sequence[str]]) -> Description:
    """Describe a folder, or a list of images, that has no data.yaml.

    Args:
        classes: in the order of their indices; None: those of a file of class names beside the images or labels.

    Raises:
        GDetKDError: there is no such file, or several with other names.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if classes is None:
        label_folder = find_label_folder(folder)
        places = dict.fromkeys([folder, label_folder, os.path.dirname(folder), os.path.dirname(label_folder)])
        files = [os.path.join(place, name) for place in places for name in CLASS_FILES]
        found = {file: _read_names(file) for file in files if os.path.isfile(file)}
        if len(set(map(tuple, found.values()))) != 1:
            what = f"{' and '.join(found)} name different ones" if found else f"there is no {' or '.join(CLASS_FILES)}"
            raise GDetKDError(
                f"The classes of {path!r} are not known: {what}. Name them as `classes` in DATASETS.REGISTER, in the "
                "order of their indices, or give `yaml` and `split` if there is a data.yaml."
            )
        classes = next(iter(found.values()))
    return Description(path, folder, {"": os.path.abspath(path)}, list(classes))


def find_label_folder(folder: str) -> str:
    """Return the folder of the labels of a folder of images.

    The last `images` of the path becomes `labels`. Without such a folder the labels lie beside the images.
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
            f"{path!r} leads to {place!r}, which is neither in its folder nor in {os.path.abspath(resolve(''))!r}. "
            "Move the data there, or set DATASETS.ALLOW_OUTSIDE to True."
        )


def _start_folder(beside: str, path: Any) -> str:
    """Return the folder that `path` in a data.yaml means: from the file or from Detectron2's data folder on.

    A `path` that is not there is of another computer. The paths of the splits then start at the file.
    """
    if path is not None and not isinstance(path, str):
        raise ValueError(f"its path is {short(path)}, not text")
    path = (path or "").replace("\\", "/")
    candidates = [os.path.join(beside, path)] + [resolve(path)] * bool(path)
    return os.path.normpath(next((each for each in candidates if os.path.isdir(each)), beside))


def _names(content: Dict[Any, Any]) -> List[str]:
    """Return the class names of a data.yaml: a list, or a dictionary by index."""
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
    """Read darknet's obj.data: lines such as `train = data/train.txt`, seen from the folder where darknet runs."""
    pairs = [line.split("=", 1) for line in text.splitlines() if "=" in line]
    content = {key.strip(): value.strip().replace("\\", "/") for key, value in pairs}
    folder = os.path.dirname(path)
    named = content.get("names", "obj.names")
    names = next(
        (
            place
            for place in (named, without_darknets_folder(named), os.path.basename(named))
            if not leaves(place) and os.path.isfile(os.path.join(folder, place))
        ),
        None,
    )
    if names is None:
        raise ValueError(f"the file of its class names, {named}, is not in its folder")
    splits = {key: content[key] for key in ("train", "test", *SAME_SPLITS) if content.get(key)}
    return Description(path, folder, splits, _read_names(os.path.join(folder, names)))


def _read_names(path: str) -> List[str]:
    names = [line.strip() for line in read_text(path).strip().splitlines()]
    if not all(names):
        raise GDetKDError(f"{path!r} has an empty line {names.index('') + 1}: there has to be one class name a line.")
    return names
