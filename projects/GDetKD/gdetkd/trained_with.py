"""Read from a checkpoint how its weights were trained, and compare that with a config."""

import math
from typing import Any, Dict, List, NamedTuple, Optional

import yaml
from detectron2.config import CfgNode

from .backbones.preprocessing import TOLERANCE
from .dotted_keys import flat_config

# Keys that change what a detector sees or predicts, although every tensor still fits.
UNSEEN = (
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.ANCHOR_GENERATOR",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.RPN.BBOX_REG_WEIGHTS",
    "MODEL.RETINANET.BBOX_REG_WEIGHTS",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE",
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
)
# Those of them that change what a backbone sees or computes.
OF_IMAGES = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1")
# Settings of torchvision's classifiers.
TORCHVISION: Dict[str, Any] = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
}
# Settings of the classifiers in Detectron2's model zoo, by the start of their address. The files do not tell them.
# Source: MODEL_ZOO.md and the configs of Detectron2.
_CAFFE = {"INPUT.FORMAT": "BGR", "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675]}
ZOO: Dict[str, Dict[str, Any]] = {
    "detectron2://ImageNetPretrained/MSRA/": {
        **_CAFFE,
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
    },
    "detectron2://ImageNetPretrained/FAIR/X-101-32x8d": {
        **_CAFFE,
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    },
    "detectron2://ImageNetPretrained/torchvision/": {**TORCHVISION, "MODEL.RESNETS.STRIDE_IN_1X1": False},
}


class TrainedWith(NamedTuple):
    """Hold what a checkpoint tells about the training of its weights.

    Attributes:
        classes: names of the classes that the weights were trained on, in order. None if the file does not tell them.
        settings: values of keys under `UNSEEN`, by dotted key. Empty if the file does not tell them.
    """

    classes: Optional[List[str]] = None
    settings: Dict[str, Any] = {}


def trained_with(checkpoint: Dict[str, Any], path: str = "") -> TrainedWith:
    """Return what a checkpoint tells about the training of its weights.

    GDetKD's checkpoints hold it under "run", and the files of tools/convert_torchvision.py under "settings". Files of
    other programs may have anything under these names.

    Args:
        path: the file's path or address. It tells the settings of a classifier of Detectron2's model zoo.
    """
    run, settings = checkpoint.get("run"), checkpoint.get("settings")
    if isinstance(run, dict):
        classes = run.get("classes")
        return TrainedWith(classes if isinstance(classes, list) else None, _unseen(_read(run.get("config"))))
    if not isinstance(settings, dict):
        settings = next((values for start, values in ZOO.items() if path.startswith(start)), {})
    return TrainedWith(settings=_unseen(settings))


def _read(dump: Any) -> Dict[str, Any]:
    """Return a config's yaml as a flat dictionary. It is empty if the text is something else."""
    try:
        return flat_config(dump) if isinstance(dump, str) else {}
    except (yaml.YAMLError, AttributeError):  # an object of Python, or no mapping
        return {}


def _unseen(settings: Dict[Any, Any]) -> Dict[str, Any]:
    return {key: value for key, value in settings.items() if str(key).startswith(UNSEEN)}


def other_settings(settings: Dict[str, Any], cfg: CfgNode, images_alone: bool = False) -> List[str]:
    """Describe the differences between `TrainedWith.settings` and a config: "INPUT.FORMAT was 'RGB' and is now 'BGR'".

    Args:
        images_alone: whether to compare only what the backbone sees, for weights whose heads may be replaced.
    """
    now = flat_config(cfg.dump())
    return [
        f"{key} was {value!r} and is now {now[key]!r}"
        for key, value in settings.items()
        if key in now and (key in OF_IMAGES or not images_alone) and not _is_close(key, value, now[key])
    ]


def _is_close(key: str, first: Any, second: Any) -> bool:
    """Return whether two values have the same effect. Programs round the mean and the std of pixels differently."""
    if not key.startswith("MODEL.PIXEL_") or len(first) != len(second):
        return first == second
    absolute, relative = (TOLERANCE, 0.0) if key == "MODEL.PIXEL_MEAN" else (0.0, 0.05)
    return all(math.isclose(a, b, abs_tol=absolute, rel_tol=relative) for a, b in zip(first, second))
