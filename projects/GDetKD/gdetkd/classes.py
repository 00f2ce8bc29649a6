"""Which classes of student and teacher are the same, by name, and predictions restricted to those."""

import json
import logging
import os
from dataclasses import dataclass, replace
from typing import Dict, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .data.folders import resolve
from .data.register import declared_classes
from .errors import GDetKDError
from .structures import DetectorSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassMap:
    """Indices of the m classes that both have, in the same order on both sides; None: all, in the same order."""

    student: Optional[Tuple[int, ...]] = None
    teacher: Optional[Tuple[int, ...]] = None


def class_names(cfg: CfgNode) -> Optional[Tuple[str, ...]]:
    """The classes of the first set that a config trains on, in order; None where they cannot be known here.

    They are known of a set whose metadata Detectron2's catalog has, and of one that DATASETS.REGISTER names.
    """
    if not cfg.DATASETS.TRAIN:
        return None
    name = cfg.DATASETS.TRAIN[0]
    return names_of_dataset(name, [entry for entry in cfg.DATASETS.REGISTER if entry["name"] == name])


def names_of_dataset(name: str, entries: Sequence[Dict] = ()) -> Optional[Tuple[str, ...]]:
    """Return the class names of a dataset in order, or None if they are not known.

    Args:
        name: the dataset's name in Detectron2's catalog.
        entries: what a config's DATASETS.REGISTER says of it, for a dataset that is not in the catalog.
    """
    entries = [dict(entry) for entry in entries]
    if name in MetadataCatalog.list():
        metadata = MetadataCatalog.get(name)
        if entries and metadata.get("gdetkd_entry") != entries[0]:
            # The catalog has another dataset of that name: a teacher's file and the student's may both name one so.
            return _names_of_entry(entries[0])
        if metadata.get("thing_classes"):
            return tuple(metadata.thing_classes)
        if metadata.get("gdetkd_entry"):  # registered, but not read yet
            entries.append(metadata.gdetkd_entry)
    return _names_of_entry(entries[0]) if entries else None


def _names_of_entry(entry: Dict) -> Optional[Tuple[str, ...]]:
    declared = declared_classes(entry)
    if declared is not None:
        return tuple(declared)
    if "json" not in entry:
        return None
    path = resolve(entry["json"])
    if not os.path.exists(path):
        return None
    try:
        with open(path, "rb") as file:
            categories = json.load(file)["categories"]
        return tuple(category["name"].strip() for category in sorted(categories, key=lambda each: each["id"]))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise GDetKDError(f"The categories cannot be read from {path!r} ({type(e).__name__}: {e}).") from e


def with_class_names(spec: DetectorSpec, names: Optional[Tuple[str, ...]]) -> DetectorSpec:
    """The spec with the names of its classes, unless there are not as many: then they are another detector's."""
    return replace(spec, class_names=names if names is not None and len(names) == spec.num_classes else None)


def match_classes(loss: str, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> ClassMap:
    """The map for a loss that compares class by class.

    Args:
        loss: its name, for messages.
        cfg: DISTILL.CLASS_MAP holds pairs of a student's class and the teacher's of another name that means the same.

    Raises:
        GDetKDError: no class matches, names are needed and not known, or DISTILL.CLASS_MAP names unknown ones.
    """
    if student.class_names is None or teacher.class_names is None:
        return _assume_same_order(loss, cfg, student, teacher)
    other_name = other_names(cfg, student.class_names, teacher.class_names)
    position = {name: index for index, name in enumerate(teacher.class_names)}
    both = [
        (index, position[other_name.get(name, name)])
        for index, name in enumerate(student.class_names)
        if other_name.get(name, name) in position
    ]
    matched = [student.class_names[index] for index, _ in both]
    alone = [name for name in student.class_names if name not in matched]
    unused = [name for index, name in enumerate(teacher.class_names) if index not in {index for _, index in both}]
    if not both:
        raise GDetKDError(
            f"{loss} compares class by class, but no class of the student ({some(alone)}) is one of the teacher's "
            f"({some(unused)}). Name those that mean the same in DISTILL.CLASS_MAP, as pairs [student's, teacher's], "
            f"or take {loss} out of DISTILL.LOSSES (SGFI and CKD need no common class)."
        )
    if not alone and not unused and all(index == other for index, other in both):
        return ClassMap()
    logger.info("%s: %d classes of student and teacher match: %s", loss, len(both), ", ".join(matched))
    if alone or unused:
        logger.warning(
            "%s leaves out: of the student %s; of the teacher %s.",
            loss,
            some(alone) or "none",
            some(unused) or "none",
        )
    return ClassMap(tuple(index for index, _ in both), tuple(index for _, index in both))


def _assume_same_order(loss: str, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> ClassMap:
    lacking = "student" if student.class_names is None else "teacher"
    if cfg.DISTILL.CLASS_MAP or student.num_classes != teacher.num_classes:
        raise GDetKDError(
            f"{loss} compares class by class, the student has {student.num_classes} classes and the teacher "
            f"{teacher.num_classes}, and the names of the {lacking}'s are not known from its DATASETS.TRAIN. Give the "
            f"teacher's in DISTILL.TEACHER.CLASSES, or take {loss} out of DISTILL.LOSSES (SGFI and CKD do not need "
            "equal classes)."
        )
    _warn_of_unknown(loss, lacking)
    return ClassMap()


def _warn_of_unknown(what: str, lacking: str) -> None:
    logger.warning(
        "%s takes the classes of student and teacher to be the same in the same order: the names of the %s's are not "
        "known (DISTILL.TEACHER.CLASSES would give the teacher's).",
        what,
        lacking,
    )


def check_transfer(cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Head transfer copies a classification layer row by row.

    Raises:
        GDetKDError: the student has the teacher's classes in another order.
    """
    if student.num_classes != teacher.num_classes:
        return
    if student.family == teacher.family and student.independent_classes != teacher.independent_classes:
        logger.warning(
            "The student trains its classification layer with a %s, and head transfer starts it from one trained with "
            "a %s. So its first scores are wrong. Give both the same MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE.",
            *(("sigmoid", "softmax") if student.independent_classes else ("softmax", "sigmoid")),
        )
    if student.class_names is None or teacher.class_names is None:
        _warn_of_unknown("Head transfer", "student" if student.class_names is None else "teacher")
        return
    other_name = other_names(cfg, student.class_names, teacher.class_names)
    names = [other_name.get(name, name) for name in student.class_names]
    if names == list(teacher.class_names):
        return
    if sorted(names) == sorted(teacher.class_names):
        raise GDetKDError(
            f"DISTILL.HEAD_TRANSFER would start the student's classes ({some(names)}) from others: the teacher's are "
            f"in another order ({some(teacher.class_names)}). Bring the data sets' into one, or switch it off."
        )
    logger.warning(
        "Head transfer starts the student's classes (%s) from others of the teacher (%s).",
        some(student.class_names),
        some(teacher.class_names),
    )


def other_names(cfg: CfgNode, student: Tuple[str, ...], teacher: Tuple[str, ...]) -> Dict[str, str]:
    """DISTILL.CLASS_MAP as a dictionary from the student's names to the teacher's.

    Raises:
        GDetKDError: it names a class that does not exist, or with it one class of a side would be two of the other's.
    """
    pairs: Dict[str, str] = {}
    for pair in cfg.DISTILL.CLASS_MAP:
        if len(pair) != 2 or pair[0] not in student or pair[1] not in teacher:
            raise GDetKDError(
                f"DISTILL.CLASS_MAP: {pair!r} is not a pair of a class of the student ({some(student)}) and one of "
                f"the teacher ({some(teacher)})."
            )
        if pairs.setdefault(pair[0], pair[1]) != pair[1]:
            raise GDetKDError(
                f"DISTILL.CLASS_MAP makes {pair[0]!r} of the student both {pairs[pair[0]]!r} and {pair[1]!r} of the "
                "teacher. One of them can teach it: leave the other out."
            )
    _check_one_to_one(pairs, student, teacher)
    return pairs


def _check_one_to_one(pairs: Dict[str, str], student: Tuple[str, ...], teacher: Tuple[str, ...]) -> None:
    """Raise an error if two student classes map to the same teacher class: they would learn to look alike."""
    taught: Dict[str, str] = {}
    for name in student:
        other = pairs.get(name, name)
        if other not in teacher:
            continue
        if teacher.count(other) > 1:
            raise GDetKDError(
                f"The teacher has {teacher.count(other)} classes of the name {other!r}, so none of them can be told "
                "from "
                "the others. Give them different names in DISTILL.TEACHER.CLASSES."
            )
        if other in taught:
            raise GDetKDError(
                f"{other!r} of the teacher is both {taught[other]!r} and {name!r} of the student. It can teach one of "
                "them: leave out a pair of DISTILL.CLASS_MAP, or give the student's other class a name that the "
                "teacher "
                "does not have."
            )
        taught[other] = name


def some(names: Sequence[str], count: int = 10) -> str:
    """Names for a message, which is not to fill the screen."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def merge_logits(logits: torch.Tensor, classes: Optional[Tuple[int, ...]]) -> torch.Tensor:
    """(N, n + 1) -> (N, m + 1): softmax logits of the m given classes, and of "none of these" in the last column.

    Its softmax is that of `logits`, with the probabilities of background and all other classes summed.
    """
    if classes is None:
        return logits
    others = [index for index in range(logits.shape[1]) if index not in classes]
    return torch.cat([logits[:, list(classes)], logits[:, others].logsumexp(dim=1, keepdim=True)], dim=1)


def select_logits(logits: torch.Tensor, classes: Optional[Tuple[int, ...]]) -> torch.Tensor:
    """(N, n) -> (N, m): the given classes' sigmoid logits. Each class is scored by itself, so nothing is merged."""
    return logits if classes is None else logits[:, list(classes)]


def class_probabilities(logits: torch.Tensor, classes: Optional[Tuple[int, ...]], independent: bool) -> torch.Tensor:
    """(N, m): a detector's probabilities of the given foreground classes.

    Args:
        logits: (N, n) where classes are scored independently (sigmoid), else (N, n + 1) with background last (softmax).
        classes: indices of the m classes; None: all, and m = n.
        independent: `DetectorSpec.independent_classes` of the detector.
    """
    if independent:
        return select_logits(logits, classes).sigmoid()
    return merge_logits(logits, classes).softmax(dim=1)[:, :-1]


def select_deltas(deltas: torch.Tensor, num_classes: int, classes: Optional[Tuple[int, ...]]) -> torch.Tensor:
    """(N, 4 n) -> (N, 4 m): the given classes' box deltas; class-agnostic ones, (N, 4), as they are."""
    if classes is None or deltas.shape[1] == 4 and num_classes != 1:
        return deltas
    return deltas.unflatten(1, (-1, 4))[:, list(classes)].flatten(1)
