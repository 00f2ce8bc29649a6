"""Find the classes of a source of boxes among the student's classes, by name."""

import logging
from typing import List, Optional, Sequence, Tuple

from detectron2.config import CfgNode

from ..data.class_names import class_names
from ..errors import GDetKDError, some
from ..losses.classes import positions_of_others, warn_of_unknown_names

logger = logging.getLogger(__name__)


def student_classes(cfg: CfgNode) -> Tuple[str, ...]:
    """Return the student's classes in order: those of the first dataset in DATASETS.TRAIN.

    Raises:
        GDetKDError: DATASETS.TRAIN is empty, or its classes are unknown.
    """
    names = class_names(cfg)
    if names is None:
        raise GDetKDError(
            f"The student's classes are unknown: DATASETS.TRAIN is {tuple(cfg.DATASETS.TRAIN)!r}, whose first dataset "
            "names them. Name a dataset there, and register it in DATASETS.REGISTER."
        )
    return names


def find_among_students(
    cfg: CfgNode, student: Tuple[str, ...], names: Optional[Sequence[str]], count: int, is_teacher: bool
) -> List[Optional[int]]:
    """Find the classes of a source of boxes among the student's classes. DISTILL.CLASS_MAP counts.

    Args:
        student: the student's class names.
        names: the source's class names, or None if they are unknown.
        count: number of the source's classes.
        is_teacher: whether the source is the teacher of the config. DISTILL.CLASS_MAP may name classes of the teacher
            that other programs lack.

    Returns:
        (count,): the student's class index for each class of the source, or None for a class that the student lacks.

    Raises:
        GDetKDError: no class is common, or the names are unknown and the numbers of classes differ.
    """
    if names is None:
        if count != len(student):
            raise GDetKDError(
                f"The teacher's class names are unknown, and it has {count} classes but the student {len(student)}. "
                "List the teacher's names in DISTILL.TEACHER.CLASSES."
            )
        warn_of_unknown_names("Labelling", "teacher")
        return list(range(count))
    if not is_teacher:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DISTILL.CLASS_MAP = [pair for pair in cfg.DISTILL.CLASS_MAP if len(pair) == 2 and pair[1] in names]
    classes = positions_of_others(cfg, student, tuple(names))
    if all(index is None for index in classes):
        raise GDetKDError(
            f"The classes of the boxes ({some(names)}) and the student's classes ({some(student)}) have no name in "
            "common. Pair classes that mean the same in DISTILL.CLASS_MAP, as [student class, other class]."
        )
    return classes


def warn_of_classes_without_labels(student: Sequence[str], classes: Sequence[Optional[int]]) -> None:
    """Warn of the student's classes that the source of boxes lacks: their objects stay without a label."""
    lacking = [name for index, name in enumerate(student) if index not in classes]
    if lacking:
        logger.warning(
            "The source of boxes lacks %d of the student's %d classes: %s. Objects of these classes get no label, so a "
            "student that trains on the labels would learn them as background.",
            len(lacking),
            len(student),
            some(lacking),
        )
