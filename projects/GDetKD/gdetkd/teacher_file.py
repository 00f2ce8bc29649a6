"""The config file of a teacher: a yaml, or a Python file of Detectron2's LazyConfig, which is run as a program."""

import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Tuple

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .config import add_gdetkd_config, plain_config
from .config_file import merge_config_file, merge_words
from .data.class_names import class_names, names_of_dataset
from .dotted_keys import flat_config
from .errors import GDetKDError

logger = logging.getLogger(__name__)

# Keys of a yaml that describe the detector, its images and its classes.
CONTENT = (
    "MODEL.",
    "INPUT.FORMAT",
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "DATASETS.TRAIN",
    "DATASETS.REGISTER",
)


class TeacherFile(ABC):
    """Describe a teacher before it is built.

    Attributes:
        path: path of the config file.
        weights: path or URL of the weights, or "" if none is given.
        input_format: channel order of the images, "RGB" or "BGR".
    """

    path: str
    weights: str
    input_format: str

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the detector with random weights, on the student's device."""

    @abstractmethod
    def content(self) -> str:
        """Return the parts of the file that describe the detector, its images and its classes, to compare teachers."""

    @abstractmethod
    def class_names(self) -> Optional[Tuple[str, ...]]:
        """Return the class names of the teacher's training dataset in order, or None if they are unknown here."""

    @abstractmethod
    def test_loader(self, dataset_name: str) -> Any:
        """Load the images of a registered dataset in the size and channel order of the teacher's evaluation."""


class YamlTeacher(TeacherFile):
    """Read a teacher's yaml config.

    Attributes:
        cfg: the teacher's config, with DISTILL.TEACHER.OPTS applied.

    Raises:
        GDetKDError: the file is no valid config, or the teacher needs precomputed proposals.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.path = cfg.DISTILL.TEACHER.CONFIG_FILE
        teacher_cfg = get_cfg()
        add_gdetkd_config(teacher_cfg)
        merge_config_file(teacher_cfg, self.path)
        merge_words(teacher_cfg, list(cfg.DISTILL.TEACHER.OPTS), "DISTILL.TEACHER.OPTS")
        teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
        if cfg.DISTILL.TEACHER.WEIGHTS:
            teacher_cfg.MODEL.WEIGHTS = cfg.DISTILL.TEACHER.WEIGHTS
        if teacher_cfg.MODEL.LOAD_PROPOSALS:
            raise GDetKDError(
                f"The teacher's config {self.path!r} sets MODEL.LOAD_PROPOSALS. A teacher with precomputed proposals "
                "cannot look at the student's regions. Choose a teacher that makes its own proposals."
            )
        teacher_cfg.freeze()
        self.cfg = plain_config(teacher_cfg)
        self.weights = self.cfg.MODEL.WEIGHTS
        self.input_format = self.cfg.INPUT.FORMAT

    def build(self) -> nn.Module:
        return build_model(self.cfg)

    def content(self) -> str:
        items = flat_config(self.cfg.dump()).items()
        return str(sorted((key, value) for key, value in items if key.startswith(CONTENT) and key != "MODEL.DEVICE"))

    def class_names(self) -> Optional[Tuple[str, ...]]:
        return class_names(self.cfg)

    def test_loader(self, dataset_name: str) -> Any:
        return build_detection_test_loader(self.cfg, dataset_name)


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
        return Path(self.path).read_text()

    def class_names(self) -> Optional[Tuple[str, ...]]:
        names = self._get("dataloader.train.dataset.names")
        name = names if isinstance(names, str) or not names else names[0]
        return names_of_dataset(name) if name else None

    def test_loader(self, dataset_name: str) -> Any:
        mapper = self._get("dataloader.test.mapper")
        if mapper is None:
            raise GDetKDError(
                f"The teacher's file {self.path!r} has no dataloader.test.mapper, so the size of test images is "
                "unknown and the teacher cannot be evaluated. It can still teach: leave out DISTILL.EVAL_TEACHER and "
                "--eval-teacher."
            )
        dicts = get_detection_dataset_dicts(dataset_name, filter_empty=False)
        return build_detection_test_loader(dicts, mapper=instantiate(mapper))


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


def read_teacher_file(cfg: CfgNode) -> TeacherFile:
    """Read the file that DISTILL.TEACHER.CONFIG_FILE names. A file that ends in .py is run as a program.

    Raises:
        GDetKDError: no file is given, the file is missing or invalid, or DISTILL.TEACHER.OPTS is invalid.
    """
    path = cfg.DISTILL.TEACHER.CONFIG_FILE
    if not path:
        raise GDetKDError("DISTILL.TEACHER.CONFIG_FILE is empty. Set it to the teacher's Detectron2 config file.")
    if not PathManager.isfile(path):
        raise GDetKDError(
            f"The teacher's config {path!r} is not there. The current folder is {os.getcwd()}. Correct "
            "DISTILL.TEACHER.CONFIG_FILE."
        )
    if len(cfg.DISTILL.TEACHER.OPTS) % 2:
        raise GDetKDError(
            f"DISTILL.TEACHER.OPTS must hold pairs of a key and a value, but has {len(cfg.DISTILL.TEACHER.OPTS)} "
            f"entries: {list(cfg.DISTILL.TEACHER.OPTS)}. Add the missing key or value."
        )
    return LazyTeacher(cfg) if path.endswith(".py") else YamlTeacher(cfg)
