"""Read from a checkpoint how its weights were trained, and compare that with a config."""

from typing import Any, Dict, List, NamedTuple, Optional

import yaml
from detectron2.config import CfgNode

from .dotted_keys import changed_keys, flat_config

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

    GDetKD's checkpoints hold it under "run", and the files of tools/convert_torchvision.py under "settings".

    Args:
        path: the file's path or address. It tells the settings of a classifier of Detectron2's model zoo.
    """
    record = checkpoint.get("run")
    if not isinstance(record, dict):
        zoo: Dict[str, Any] = next((settings for start, settings in ZOO.items() if path.startswith(start)), {})
        return TrainedWith(settings=_unseen(checkpoint.get("settings") or zoo))
    try:
        settings = _unseen(flat_config(record.get("config") or "{}"))
    except yaml.YAMLError:  # of an object that a user's own key holds
        settings = {}
    return TrainedWith(record.get("classes"), settings)


def _unseen(settings: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in settings.items() if key.startswith(UNSEEN)}


def other_settings(settings: Dict[str, Any], cfg: CfgNode) -> List[str]:
    """Describe the differences between `TrainedWith.settings` and a config, such as "INPUT.FORMAT 'RGB' -> 'BGR'"."""
    now = flat_config(cfg.dump())
    known = {key: value for key, value in settings.items() if key in now}
    return list(changed_keys(known, {key: now[key] for key in known}).values())
