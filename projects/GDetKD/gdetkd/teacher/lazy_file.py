"""Teachers from Python files of Detectron2's LazyConfig, which are run as programs."""

import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Tuple

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..data.class_names import names_of_dataset
from ..errors import GDetKDError
from .base import TeacherFile

logger = logging.getLogger(__name__)

# Parts of a file that describe the detector, its images and its classes.
CONTENT = ("model", "dataloader")
# Detectron2 imports the files under a name that differs from time to time.
PACKAGE = re.compile(r"detectron2\._cfg_loader[0-9a-f]*\.")


class LazyTeacher(TeacherFile):
    """Read a teacher's LazyConfig file, and apply DISTILL.TEACHER.OPTS: pairs of a dotted key and a value.

    The file describes the teacher by these keys:

    - `model`: the detector.
    - `dataloader.test.mapper`: channel order and size of the images.
    - `dataloader.train.dataset.names`: the training dataset, which tells the class names.

    Raises:
        GDetKDError: the file lacks `model` or the channel order, or DISTILL.TEACHER.OPTS could call a function.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.path = cfg.DISTILL.TEACHER.CONFIG_FILE
        self.weights = cfg.DISTILL.TEACHER.WEIGHTS
        self._device = cfg.MODEL.DEVICE
        self._file: DictConfig = LazyConfig.load(self.path)
        opts = list(cfg.DISTILL.TEACHER.OPTS)
        for key, value in zip(opts[::2], opts[1::2]):
            _check_plain(key, value)
            OmegaConf.update(self._file, key, value)
        if "model" not in self._file:
            raise GDetKDError(
                f"The teacher's file {self.path!r} defines no `model`. Name a LazyConfig file whose `model` is a "
                "detector."
            )
        self.input_format = self._input_format()

    def _input_format(self) -> str:
        mapper_format = self._get("dataloader.test.mapper.image_format") or self._get(
            "dataloader.train.mapper.image_format"
        )
        model_format = self._get("model.input_format")
        if not mapper_format and not model_format:
            raise GDetKDError(
                f"The teacher's file {self.path!r} does not say whether it reads images as RGB or BGR. Set it, for "
                'example by DISTILL.TEACHER.OPTS: ["model.input_format", "BGR"].'
            )
        if mapper_format and model_format and mapper_format != model_format:
            logger.warning(
                "%s has the channel order %s in its dataloader and %s in model.input_format. The teacher gets %s.",
                self.path,
                mapper_format,
                model_format,
                mapper_format,
            )
        return mapper_format or model_format

    def _get(self, key: str) -> Any:
        return OmegaConf.select(self._file, key)

    def build(self) -> nn.Module:
        return instantiate(self._file.model).to(self._device)

    def content(self) -> str:
        # The text alone would not show the values that the file imports from others.
        parts = [OmegaConf.to_container(part) for part in map(self._get, CONTENT) if OmegaConf.is_config(part)]
        return Path(self.path).read_text() + PACKAGE.sub("", describe(parts))

    def class_names(self) -> Optional[Tuple[str, ...]]:
        names = self._get("dataloader.train.dataset.names")
        name = names if isinstance(names, str) or not names else names[0]
        return names_of_dataset(name) if name else None

    def check_can_detect(self) -> None:
        if self._get("dataloader.test.mapper") is None:
            raise GDetKDError(
                f"The teacher's file {self.path!r} has no dataloader.test.mapper, so the size of test images is "
                "unknown. The teacher can be neither evaluated nor used to label images. It can still teach: leave out "
                "DISTILL.EVAL_TEACHER and --eval-teacher."
            )

    def test_loader(self, dataset_name: str) -> Any:
        self.check_can_detect()
        mapper = self._get("dataloader.test.mapper")
        dicts = get_detection_dataset_dicts(dataset_name, filter_empty=False)
        return build_detection_test_loader(dicts, mapper=instantiate(mapper))


def describe(value: Any) -> str:
    """Describe a value in a config by text that is the same in each process.

    Objects are described without their address in memory, and sets in a fixed order.
    """
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{describe(key)}: {describe(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(describe, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(describe, value)))}}}"
    if isinstance(value, functools.partial):
        return describe([value.func, value.args, value.keywords])
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


def _check_plain(key: Any, value: Any) -> None:
    """Check that a change of DISTILL.TEACHER.OPTS cannot call a function.

    The user chose to run the teacher's file. The change comes from a yaml, which may be from a stranger.

    Raises:
        GDetKDError: the change could add a call, or change the function of a call.
    """
    if not isinstance(key, str) or any(part.startswith("_") for part in re.split(r"[.\[\]]", key)):
        reason = "is no plain dotted key: a part that starts with '_' can name a function to call"
    elif not _is_plain(value):
        # OmegaConf turns strings such as "${oc.create:{...}}" into mappings.
        reason = f"has the value {value!r}: mappings and strings with '${{' can name functions to call"
    else:
        return
    raise GDetKDError(
        f"DISTILL.TEACHER.OPTS: {key!r} {reason}. Give numbers, strings or lists of them. Write anything else into the "
        "teacher's .py file."
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return not isinstance(value, Mapping) and not (isinstance(value, str) and "${" in value)
