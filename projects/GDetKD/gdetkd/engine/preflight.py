"""Check that the detectors of a run fit its config, its classes and each other."""

import logging
from typing import Optional, Sequence

from detectron2.config import CfgNode
from torch import nn

from ..config import student_architecture
from ..data.class_names import class_names
from ..detectors import build_adapter, find_adapter
from ..errors import GDetKDError
from ..structures import DetectorSpec, with_class_names
from ..teacher import FrozenTeacher, transferable
from .class_checks import check_classes, check_copied_layers, check_transfer

logger = logging.getLogger(__name__)

# The config node that holds the number of classes, by meta-architecture.
CLASS_KEYS = {"GeneralizedRCNN": "ROI_HEADS", "RetinaNet": "RETINANET", "FCOS": "FCOS"}


def check_architecture(cfg: CfgNode) -> None:
    """Check that the meta-architecture can distil if the config asks for distillation. Warn of an unused teacher.

    Raises:
        GDetKDError: the config asks for distillation, but its meta-architecture trains without.
    """
    if cfg.MODEL.META_ARCHITECTURE != "GDetKD" and (cfg.DISTILL.LOSSES or cfg.DISTILL.HEAD_TRANSFER):
        raise GDetKDError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, so DISTILL has no effect. Set it to 'GDetKD' "
            "and DISTILL.STUDENT_META_ARCHITECTURE to the student's architecture, or empty DISTILL.LOSSES and set "
            "DISTILL.HEAD_TRANSFER to False."
        )
    distill = cfg.DISTILL
    if distill.TEACHER.CONFIG_FILE and not (distill.LOSSES or distill.HEAD_TRANSFER or distill.EVAL_TEACHER):
        logger.warning(
            "The student trains alone: DISTILL.LOSSES is empty and DISTILL.HEAD_TRANSFER is False, so nothing uses the "
            "teacher."
        )


def check_student_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Check the student's number of classes before it is built: the errors of its losses would be hard to understand.

    Only Detectron2's families are checked.

    Raises:
        GDetKDError: a dataset has another number of classes.
    """
    architecture = student_architecture(cfg)
    if architecture in CLASS_KEYS:
        check_classes(names, cfg.MODEL[CLASS_KEYS[architecture]].NUM_CLASSES)


def check_student(cfg: CfgNode, student: nn.Module, teacher: Optional[FrozenTeacher]) -> Optional[DetectorSpec]:
    """Check that the student fits the data and, for head transfer, the teacher.

    Returns:
        the student's description, or None for a detector that can only be trained without distillation.

    Raises:
        GDetKDError: a dataset has another number of classes, the teacher has the classes in another order, or the
            student cannot be distilled although the config asks for it.
    """
    if find_adapter(student) is None:
        return None
    try:
        spec = build_adapter(student, "student", cfg).spec
    except GDetKDError:
        if cfg.DISTILL.LOSSES or cfg.DISTILL.HEAD_TRANSFER:
            raise
        return None  # for example, a plain student without an FPN
    check_classes([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], spec.num_classes)
    spec = with_class_names(spec, class_names(cfg))
    if cfg.DISTILL.HEAD_TRANSFER and teacher is not None:
        check_transfer(cfg, spec, teacher.spec)
        check_copied_layers(cfg, transferable(teacher.model, student), spec, teacher.spec)
    return spec
