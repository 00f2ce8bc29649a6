"""Match the classes of student and teacher by name, and restrict predictions to the common classes.

Shapes: N regions, n foreground classes of a detector, m common classes.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Dict, List, Optional, Tuple

import torch
from detectron2.config import CfgNode

from ..errors import GDetKDError, some
from ..structures import DetectorSpec

logger = logging.getLogger(__name__)

# What to do if the class names of a detector are unknown.
_NAMING = {
    "student": "Name the student's classes with MetadataCatalog.get(DATASET).set(thing_classes=[...])",
    "teacher": "List the teacher's names in DISTILL.TEACHER.CLASSES",
}


@dataclass(frozen=True)
class ClassMap:
    """Hold the indices of the m common classes in each detector, in the same order.

    None: the two detectors have the same classes in the same order.
    """

    student: Optional[Tuple[int, ...]] = None
    teacher: Optional[Tuple[int, ...]] = None


def match_classes(loss: str, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> ClassMap:
    """Match the classes of student and teacher, for a loss that compares class by class.

    Classes of the same name match. DISTILL.CLASS_MAP adds pairs of different names.

    Args:
        loss: name of the loss, for messages.
        cfg: the config of the distillation.

    Raises:
        GDetKDError: no class matches, the class names are unknown but needed, or DISTILL.CLASS_MAP is invalid.
    """
    if student.class_names is None or teacher.class_names is None:
        return _assume_same_order(loss, cfg, student, teacher)
    positions = positions_of_others(cfg, student.class_names, teacher.class_names)
    both = sorted((index, other) for other, index in enumerate(positions) if index is not None)
    matched = [student.class_names[index] for index, _ in both]
    alone = [name for name in student.class_names if name not in matched]
    unused = [name for index, name in enumerate(teacher.class_names) if index not in {index for _, index in both}]
    if not both:
        raise GDetKDError(
            f"{loss} compares class by class, but the student's classes ({some(alone)}) and the teacher's "
            f"({some(unused)}) have no name in common. Pair classes that mean the same in DISTILL.CLASS_MAP, as "
            f"[student class, teacher class], or take {loss} out of DISTILL.LOSSES. SGFI and CKD need no common class."
        )
    if not alone and not unused and all(index == other for index, other in both):
        return ClassMap()
    logger.info("%s: %d classes of student and teacher match: %s", loss, len(both), ", ".join(matched))
    if alone or unused:
        logger.warning(
            "%s leaves out classes that only one detector has. Student: %s. Teacher: %s.",
            loss,
            some(alone) or "none",
            some(unused) or "none",
        )
    return ClassMap(tuple(index for index, _ in both), tuple(index for _, index in both))


def _assume_same_order(loss: str, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> ClassMap:
    lacking = "student" if student.class_names is None else "teacher"
    if cfg.DISTILL.CLASS_MAP or student.num_classes != teacher.num_classes:
        raise GDetKDError(
            f"{loss} compares class by class, but the class names of the {lacking} are unknown: its DATASETS.TRAIN "
            f"does not tell them. The student has {student.num_classes} classes and the teacher {teacher.num_classes}. "
            f"{_NAMING[lacking]}, or take {loss} out of DISTILL.LOSSES. SGFI and CKD need no common class."
        )
    warn_of_unknown_names(loss, lacking)
    return ClassMap()


def warn_of_unknown_names(what: str, lacking: str) -> None:
    """Warn that student and teacher are assumed to have the same classes.

    Args:
        what: subject of the message, such as the name of a loss.
        lacking: "student" or "teacher", the detector whose class names are unknown.
    """
    logger.warning(
        "%s assumes that student and teacher have the same classes in the same order, because the class names of the "
        "%s are unknown. %s.",
        what,
        lacking,
        _NAMING[lacking],
    )


def other_names(cfg: CfgNode, student: Tuple[str, ...], teacher: Tuple[str, ...]) -> Dict[str, str]:
    """Return DISTILL.CLASS_MAP as a dictionary from student names to teacher names.

    Raises:
        GDetKDError: a pair names an unknown class, or a class of one detector would match two of the other detector.
    """
    pairs: Dict[str, str] = {}
    for pair in cfg.DISTILL.CLASS_MAP:
        if len(pair) != 2 or pair[0] not in student or pair[1] not in teacher:
            raise GDetKDError(
                f"DISTILL.CLASS_MAP has {pair!r}. Give pairs of a student class ({some(student)}) and a teacher class "
                f"({some(teacher)})."
            )
        if pairs.setdefault(pair[0], pair[1]) != pair[1]:
            raise GDetKDError(
                f"DISTILL.CLASS_MAP pairs the student class {pair[0]!r} with two teacher classes, {pairs[pair[0]]!r} "
                f"and {pair[1]!r}. Remove one of the pairs."
            )
    _check_one_to_one(pairs, student, teacher)
    return pairs


def positions_of_others(cfg: CfgNode, student: Tuple[str, ...], other: Tuple[str, ...]) -> List[Optional[int]]:
    """Return the student's class index for each class of another detector, or None for a class that the student lacks.

    A class of the other detector whose name DISTILL.CLASS_MAP replaces by another one has no match.

    Raises:
        GDetKDError: as `other_names`.
    """
    pairs = other_names(cfg, student, other)
    position = {pairs.get(name, name): index for index, name in enumerate(student)}
    return [position.get(name) for name in other]


def _check_one_to_one(pairs: Dict[str, str], student: Tuple[str, ...], teacher: Tuple[str, ...]) -> None:
    """Raise an error if two student classes map to the same teacher class: they would learn to look alike."""
    student_name_of: Dict[str, str] = {}
    for name in student:
        teacher_name = pairs.get(name, name)
        if teacher_name not in teacher:
            continue
        if teacher.count(teacher_name) > 1:
            raise GDetKDError(
                f"The teacher has {teacher.count(teacher_name)} classes with the name {teacher_name!r}. Give them "
                "different names in DISTILL.TEACHER.CLASSES."
            )
        if teacher_name in student_name_of:
            raise GDetKDError(
                f"The teacher class {teacher_name!r} matches two student classes, {student_name_of[teacher_name]!r} "
                f"and {name!r}. They would learn to look alike. Remove a pair of DISTILL.CLASS_MAP, or give one of the "
                "student classes a name that the teacher does not have."
            )
        student_name_of[teacher_name] = name


@lru_cache(maxsize=64)
def _index(classes: Tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return an index tensor. It is kept, because a copy to the GPU at every step would make the CPU wait."""
    return torch.tensor(classes, device=device)


@lru_cache(maxsize=64)
def _others(classes: Tuple[int, ...], columns: int) -> Tuple[int, ...]:
    return tuple(sorted(set(range(columns)) - set(classes)))


def merge_logits(logits: torch.Tensor, classes: Optional[Tuple[int, ...]]) -> torch.Tensor:
    """Keep the softmax logits of the given classes, and merge all other columns into the last one.

    The merged column stands for "none of these classes". Its probability is the sum over the columns that it replaces:

        >>> probabilities = torch.tensor([[0.5, 0.2, 0.2, 0.1]])  # cat, dog, car, background
        >>> merge_logits(probabilities.log(), classes=(0, 2)).softmax(dim=1)  # cat, car, neither
        tensor([[0.5000, 0.2000, 0.3000]])

    Args:
        logits: (N, n + 1), background last.
        classes: indices of the m classes to keep. None: keep `logits` as they are.

    Returns:
        (N, m + 1)
    """
    if classes is None:
        return logits
    merged = logits[:, _index(_others(classes, logits.shape[1]), logits.device)]
    kept = logits[:, _index(classes, logits.device)]
    return torch.cat([kept, merged.logsumexp(dim=1, keepdim=True)], dim=1)


def select_logits(logits: torch.Tensor, classes: Optional[Tuple[int, ...]]) -> torch.Tensor:
    """Select the sigmoid logits of the given classes: (N, n) -> (N, m). A sigmoid needs no merged column."""
    return logits if classes is None else logits[:, _index(classes, logits.device)]


def class_probabilities(logits: torch.Tensor, classes: Optional[Tuple[int, ...]], independent: bool) -> torch.Tensor:
    """Return a detector's probabilities (N, m) of the given foreground classes.

    Args:
        logits: (N, n) for sigmoid classes, or (N, n + 1) with background last for softmax classes.
        classes: indices of the m classes. None: all classes, and m = n.
        independent: `DetectorSpec.independent_classes` of the detector, true for sigmoid classes.
    """
    if independent:
        return select_logits(logits, classes).sigmoid()
    return merge_logits(logits, classes).softmax(dim=1)[:, :-1]


def select_deltas(deltas: torch.Tensor, num_classes: int, classes: Optional[Tuple[int, ...]]) -> torch.Tensor:
    """Select the box deltas of the given classes: (N, 4 n) -> (N, 4 m). Class-agnostic deltas (N, 4) stay as they are.

    Args:
        num_classes: n, which tells class-agnostic deltas from those of a single class.
    """
    if classes is None or deltas.shape[1] == 4 and num_classes != 1:
        return deltas
    return deltas.unflatten(1, (-1, 4))[:, _index(classes, deltas.device)].flatten(1)
