"""Read an mmdetection checkpoint: its tensors, its config and its class names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

import torch

from ..errors import GDetKDError
from ..safe_load import read_weights
from .config_text import Unreadable, read_config_file, read_config_text

# What mmengine keeps of the training's log in checkpoints that mmdetection 3.x did not publish. It is not needed.
LOG_OBJECTS = ("mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr")


@dataclass(frozen=True)
class MMDetCheckpoint:
    """Hold what the conversion needs of a checkpoint.

    Attributes:
        path: the file.
        tensors: weights by mmdetection's names.
        config: values of the config by name, such as "model".
        classes: class names in the order of the labels, or None if the file does not say.
    """

    path: str
    tensors: Dict[str, torch.Tensor]
    config: Dict[str, Any]
    classes: Optional[Tuple[str, ...]]

    @property
    def model(self) -> Dict[str, Any]:
        return self.config["model"]


def read_checkpoint(path: str, config_file: str = "") -> MMDetCheckpoint:
    """Read a checkpoint of mmdetection 2.x or 3.x without running anything in it.

    Args:
        path: the checkpoint.
        config_file: the detector's config file of mmdetection, if the checkpoint holds none that can be read.

    Raises:
        UntrustedFileError, DamagedFileError, UnreadableFileError: see `read_weights`.
        GDetKDError: the file is no such checkpoint, or no config can be read.
    """
    content = read_weights(path, leave_out=LOG_OBJECTS)
    tensors = content.get("state_dict")
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise GDetKDError(
            f"{path!r} has no tensors under 'state_dict' (its keys: {', '.join(map(repr, list(content)[:5]))}), so it "
            "is no mmdetection checkpoint."
        )
    meta = content.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    _check_version(path, meta)
    config = read_config_file(Path(config_file).resolve()) if config_file else _config_of(path, meta)
    if not isinstance(config.get("model"), dict):
        found = config.get("model", "it assigns no `model`")
        reason = found.place if isinstance(found, Unreadable) else str(found)[:100]
        raise GDetKDError(
            f"The config {'file ' + repr(config_file) if config_file else 'in ' + repr(path)} does not describe the "
            f"detector: {reason}. Name the detector's config file of mmdetection with --config. Configs that import "
            "others (`with read_base()`) cannot be read."
        )
    return MMDetCheckpoint(path, tensors, config, _classes_of(meta))


def _check_version(path: str, meta: Mapping[str, Any]) -> None:
    version = str(meta.get("mmdet_version", ""))
    if version.startswith(("0.", "1.")):
        raise GDetKDError(
            f"{path!r} is of mmdetection {version}, which counts classes, anchors and boxes otherwise than 2.x. Choose "
            "a checkpoint that mmdetection 2.0 or later trained."
        )


def _config_of(path: str, meta: Mapping[str, Any]) -> Dict[str, Any]:
    text = meta.get("cfg", meta.get("config"))  # of 3.x and of 2.x
    if not isinstance(text, str):
        raise GDetKDError(
            f"{path!r} holds no config, and shapes alone do not tell how images are normalised and boxes are encoded. "
            "Name the detector's config file of mmdetection with --config."
        )
    return read_config_text(text, f"The config in {path!r}")


def _classes_of(meta: Mapping[str, Any]) -> Optional[Tuple[str, ...]]:
    dataset = meta.get("dataset_meta")  # of 3.x
    dataset = dataset if isinstance(dataset, dict) else {}
    names = dataset.get("classes", dataset.get("CLASSES", meta.get("CLASSES")))
    if isinstance(names, str):  # mmdetection keeps a single name as it is
        return (names,)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)
