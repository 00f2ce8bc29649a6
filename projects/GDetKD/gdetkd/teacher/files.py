"""Read the file that describes a teacher, whatever its kind."""

import os
from typing import Any, Sequence

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..errors import GDetKDError
from .base import TeacherFile
from .lazy_file import LazyTeacher
from .torchvision_file import PREFIX, TorchvisionTeacher
from .yaml_file import YamlTeacher


def read_teacher_file(cfg: CfgNode) -> TeacherFile:
    """Read the file that DISTILL.TEACHER.CONFIG_FILE names, or look the teacher up in torchvision.

    A file that ends in .py is run as a program. "torchvision:fasterrcnn_resnet50_fpn_v2" is a model of torchvision.

    Raises:
        GDetKDError: no file is given, the file is missing or invalid, or DISTILL.TEACHER.OPTS is invalid.
    """
    path = cfg.DISTILL.TEACHER.CONFIG_FILE
    if not path:
        raise GDetKDError("DISTILL.TEACHER.CONFIG_FILE is empty. Set it to the teacher's Detectron2 config file.")
    _check_pairs(cfg.DISTILL.TEACHER.OPTS)
    if path.startswith(PREFIX):
        return TorchvisionTeacher(cfg)
    if not PathManager.isfile(path):
        raise GDetKDError(
            f"The teacher's config {path!r} is not there. The current folder is {os.getcwd()}. Correct "
            "DISTILL.TEACHER.CONFIG_FILE."
        )
    return LazyTeacher(cfg) if path.endswith(".py") else YamlTeacher(cfg)


def _check_pairs(opts: Sequence[Any]) -> None:
    if len(opts) % 2:
        raise GDetKDError(
            f"DISTILL.TEACHER.OPTS must hold pairs of a key and a value, but has {len(opts)} entries: {list(opts)}. "
            "Add the missing key or value."
        )
