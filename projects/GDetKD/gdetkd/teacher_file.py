"""The file that describes a teacher: a yaml config, or a Python file of Detectron2's LazyConfig, which is run."""

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

from .config import add_gdetkd_config, flat_config, plain_config
from .config_file import merge_config_file, merge_words
from .data.class_names import class_names, names_of_dataset
from .errors import GDetKDError

logger = logging.getLogger(__name__)

# What a yaml says of the detector, its images and its classes.
CONTENT = (
    "MODEL.",
    "INPUT.FORMAT",
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "DATASETS.TRAIN",
    "DATASETS.REGISTER",
)


class TeacherFile(ABC):
    """What is known of a teacher before it is built.

    Attributes:
        path: of the file.
        weights: a path or URL; empty where none is given.
        input_format: channel order of its images, "RGB" or "BGR".
    """

    path: str
    weights: str
    input_format: str

    @abstractmethod
    def build(self) -> nn.Module:
        """The detector, untrained, on the student's device."""

    @abstractmethod
    def content(self) -> str:
        """What the file says of the detector, its images and its classes."""

    @abstractmethod
    def class_names(self) -> Optional[Tuple[str, ...]]:
        """Of the set it was trained on, in order; None where they cannot be known here."""

    @abstractmethod
    def test_loader(self, dataset_name: str) -> Any:
        """A registered set's images in the size and channel order that the teacher is evaluated with."""


class YamlTeacher(TeacherFile):
    """
    Attributes:
        cfg: its own config, with DISTILL.TEACHER.OPTS applied.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.path = cfg.DISTILL.TEACHER.CONFIG_FILE
        own = get_cfg()
        add_gdetkd_config(own)
        merge_config_file(own, self.path)
        merge_words(own, list(cfg.DISTILL.TEACHER.OPTS), "DISTILL.TEACHER.OPTS")
        own.MODEL.DEVICE = cfg.MODEL.DEVICE
        if cfg.DISTILL.TEACHER.WEIGHTS:
            own.MODEL.WEIGHTS = cfg.DISTILL.TEACHER.WEIGHTS
        if own.MODEL.LOAD_PROPOSALS:
            raise GDetKDError(
                "A teacher with precomputed proposals (MODEL.LOAD_PROPOSALS) cannot look at the student's."
            )
        own.freeze()
        self.cfg = plain_config(own)
        self.weights = self.cfg.MODEL.WEIGHTS
        self.input_format = self.cfg.INPUT.FORMAT

    def build(self) -> nn.Module:
        return build_model(self.cfg)

    def content(self) -> str:
        said = flat_config(self.cfg.dump()).items()
        return str(sorted((key, value) for key, value in said if key.startswith(CONTENT) and key != "MODEL.DEVICE"))

    def class_names(self) -> Optional[Tuple[str, ...]]:
        return class_names(self.cfg)

    def test_loader(self, dataset_name: str) -> Any:
        return build_detection_test_loader(self.cfg, dataset_name)


class LazyTeacher(TeacherFile):
    """A LazyConfig file, with DISTILL.TEACHER.OPTS applied: pairs of a dotted key and a value.

    Its `model` is built; `dataloader.test.mapper` says in which channel order and size its images come, and
    `dataloader.train.dataset.names` whose classes it has.

    Raises:
        GDetKDError: the file lacks `model`, or does not tell the channel order; or DISTILL.TEACHER.OPTS could name a
            function to call.
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
            raise GDetKDError(f"The teacher's file {self.path!r} defines no `model`: give one of a detector.")
        self.input_format = self._input_format()

    def _input_format(self) -> str:
        read = self._get("dataloader.test.mapper.image_format") or self._get("dataloader.train.mapper.image_format")
        drawn = self._get("model.input_format")
        if not read and not drawn:
            raise GDetKDError(
                f"The teacher's file {self.path!r} does not say whether it reads images as RGB or BGR. Give it in "
                'DISTILL.TEACHER.OPTS: ["model.input_format", "BGR"].'
            )
        if read and drawn and read != drawn:
            logger.warning(
                "%s reads images as %s and draws them as %s (model.input_format): it is given %s.",
                self.path,
                read,
                drawn,
                read,
            )
        return read or drawn

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
                f"The teacher's file {self.path!r} has no dataloader.test.mapper, which says how large its images are: "
                "it cannot be evaluated here. It can teach: leave DISTILL.EVAL_TEACHER and --eval-teacher out."
            )
        dicts = get_detection_dataset_dicts(dataset_name, filter_empty=False)
        return build_detection_test_loader(dicts, mapper=instantiate(mapper))


def _check_plain(key: Any, value: Any) -> None:
    """The file is a program that the user chose; what changes it comes from a yaml, which may be a stranger's.

    Raises:
        GDetKDError: the change could make a call, or another one, of what the file describes.
    """
    if not isinstance(key, str) or any(part.startswith("_") for part in re.split(r"[.\[\]]", key)):
        reason = "is no plain dotted key: a part that starts with '_' says what is called"
    elif not _is_plain(value):
        # OmegaConf makes mappings of strings, too: "${oc.create:{...}}".
        reason = f"has the value {value!r}: mappings and strings with '${{' can name functions to call"
    else:
        return
    raise GDetKDError(
        f"DISTILL.TEACHER.OPTS: {key!r} {reason}. Give numbers, strings, or lists of them, and write anything else "
        "into the teacher's .py file."
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return not isinstance(value, Mapping) and not (isinstance(value, str) and "${" in value)


def read_teacher_file(cfg: CfgNode) -> TeacherFile:
    """The file that DISTILL.TEACHER.CONFIG_FILE names; one that ends in .py is run as a program.

    Raises:
        GDetKDError: it is not given or not there.
    """
    path = cfg.DISTILL.TEACHER.CONFIG_FILE
    if not path:
        raise GDetKDError("DISTILL.TEACHER.CONFIG_FILE is empty: give the Detectron2 config file of the teacher.")
    if not PathManager.isfile(path):
        raise GDetKDError(
            f"The teacher's config {path!r} (DISTILL.TEACHER.CONFIG_FILE) is not there, seen from {os.getcwd()}."
        )
    if len(cfg.DISTILL.TEACHER.OPTS) % 2:
        raise GDetKDError(f"DISTILL.TEACHER.OPTS are pairs of a key and a value: {list(cfg.DISTILL.TEACHER.OPTS)}.")
    return LazyTeacher(cfg) if path.endswith(".py") else YamlTeacher(cfg)
