"""Check that detectors and datasets agree on the number and the order of classes."""

import logging
from typing import Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..data.class_names import in_lower_case, is_reordered
from ..errors import GDetKDError, some
from ..losses.classes import other_names, warn_of_unknown_names
from ..structures import DetectorSpec

logger = logging.getLogger(__name__)


def check_classes(names: Sequence[str], num_classes: int, role: str = "student") -> None:
    """Check that datasets have the detector's number of classes. Neither training nor evaluation would notice an error.

    Raises:
        GDetKDError: a dataset has another number of classes than the detector.
    """
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and len(classes) != num_classes:
            remedy = (
                "Name the teacher's classes in DISTILL.TEACHER.CLASSES, so that they are found by name, evaluate it on "
                "a dataset with its own classes, or set DISTILL.EVAL_TEACHER to False."
                if role == "teacher"
                else "Set the student's number of classes (MODEL.ROI_HEADS.NUM_CLASSES, MODEL.RETINANET.NUM_CLASSES, "
                f"MODEL.FCOS.NUM_CLASSES) to {len(classes)}."
            )
            raise GDetKDError(f"The dataset {name!r} has {len(classes)} classes and the {role} {num_classes}. {remedy}")


def check_class_order(names: Sequence[str]) -> None:
    """Check that all datasets have the same classes in the same order. Upper and lower case do not matter.

    Other names are only warned of, because they may mean the same classes.

    Raises:
        GDetKDError: two datasets have the same classes in different orders. An evaluation would mix them up.
    """
    known = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    sets = [(name, list(classes)) for name, classes in known.items() if classes is not None]
    for name, classes in sets[1:]:
        first, expected = sets[0]
        if classes == expected or len(classes) != len(expected):  # `check_classes` looks at numbers
            continue
        if is_reordered(expected, classes):
            raise GDetKDError(
                f"The datasets {first!r} and {name!r} have the same classes in different orders: {some(expected)}; and "
                f"{some(classes)}. Give them the same order (in COCO JSON, by category id)."
            )
        if in_lower_case(expected) == in_lower_case(classes):
            continue
        pairs = [f"{before!r} is {after!r}" for before, after in zip(expected, classes) if before != after]
        logger.warning(
            "The datasets %r and %r name their classes differently. They are taken to be the same classes in the same "
            "order: %s in the second. Check that this is right.",
            first,
            name,
            some(pairs, 5),
        )


def check_trained_order(names: Sequence[str], trained: Optional[Sequence[str]]) -> None:
    """Check that datasets have the classes in the order in which a detector was trained.

    Args:
        trained: names of the detector's classes, in order. None if they are not known.

    Raises:
        GDetKDError: a dataset has the same classes in another order. An evaluation would mix them up.
    """
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if trained is not None and classes is not None and is_reordered(trained, classes):
            raise GDetKDError(
                f"The weights were trained on the classes {some(trained)}, but the dataset {name!r} has them in "
                f"another order: {some(classes)}. Give it the order of the training (in COCO JSON, by category id)."
            )


def check_transfer(cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Check that head transfer gives each class of the student the teacher's weights for the same class.

    Head transfer copies a classification layer row by row.

    Raises:
        GDetKDError: a class of the student would start from the weights of another class, although the teacher has it.
    """
    if student.num_classes != teacher.num_classes:
        return
    if student.family == teacher.family and student.independent_classes != teacher.independent_classes:
        logger.warning(
            "The student trains its classification layer with a %s, and head transfer starts it from a layer that was "
            "trained with a %s. So its first scores are wrong. Give both the same MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE.",
            "sigmoid" if student.independent_classes else "softmax",
            "sigmoid" if teacher.independent_classes else "softmax",
        )
    if student.class_names is None or teacher.class_names is None:
        warn_of_unknown_names("Head transfer", "student" if student.class_names is None else "teacher")
        return
    other_name = other_names(cfg, student.class_names, teacher.class_names)
    names = [other_name.get(name, name) for name in student.class_names]
    if names == list(teacher.class_names):
        return
    pairs = zip(names, teacher.class_names)
    if moved := [name for name, other in pairs if name != other and name in teacher.class_names]:
        raise GDetKDError(
            f"DISTILL.HEAD_TRANSFER would start the student's {some(moved)} from wrong classes: the student has the "
            f"classes {some(names)}, and the teacher has them in another order: {some(teacher.class_names)}. Give both "
            "datasets the same order, or set DISTILL.HEAD_TRANSFER to False."
        )
    logger.warning(
        "Head transfer starts the student's classes (%s) from classes of the teacher with other names (%s).",
        some(student.class_names),
        some(teacher.class_names),
    )


def check_copied_layers(cfg: CfgNode, copied: Sequence[str], student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Check the layers that head transfer copies. Warn if they predict boxes in other units or from other anchors.

    Args:
        copied: names of the tensors that head transfer copies.

    Raises:
        GDetKDError: it copies a classification layer of another number of classes. Their products with the numbers of
            anchors can agree.
    """
    if _has_layer(copied, "cls_score") and student.num_classes != teacher.num_classes:
        raise GDetKDError(
            f"DISTILL.HEAD_TRANSFER would mix up anchors and classes: the student has {student.num_classes} classes, "
            f"and the teacher {teacher.num_classes}. Their classification layers have the same shape, because the "
            "numbers of anchors differ, too. Give both the same MODEL.ANCHOR_GENERATOR, or set DISTILL.HEAD_TRANSFER "
            "to False."
        )
    student_units = [student.regression_weights, *student.later_regression_weights]
    teacher_units = [teacher.regression_weights, *teacher.later_regression_weights]
    differ = []
    if _has_layer(copied, "bbox_pred") and any(a != b for a, b in zip(student_units, teacher_units)):
        differ.append("BBOX_REG_WEIGHTS")
    student_anchors, teacher_anchors = student.location_anchors or {}, teacher.location_anchors or {}
    have_other_anchors = any(student_anchors[name] != teacher_anchors.get(name, ()) for name in student_anchors)
    predicts_from_anchors = _has_layer(copied, "anchor_deltas" if student.dense is None else "bbox_pred")
    # With DISTILL.TEACHER.SCALE, the teacher is described in pixels of the student's images.
    if predicts_from_anchors and have_other_anchors and cfg.DISTILL.TEACHER.SCALE == 1:
        differ.append("MODEL.ANCHOR_GENERATOR")
    # A student's own factors start at 1.
    if _has_layer(copied, "bbox_pred") and _scales_deltas(teacher) and not _scales_deltas(student):
        differ.append("MODEL.FCOS.LEVEL_SCALES")
    if differ:
        logger.warning(
            "Head transfer copies the layers that predict boxes, but %s of student and teacher differ. So the "
            "student's first boxes are wrong. Give both the same values.",
            " and ".join(differ),
        )


def _scales_deltas(spec: DetectorSpec) -> bool:
    return spec.dense is not None and spec.dense.scales_deltas


def _has_layer(names: Sequence[str], layer: str) -> bool:
    return any(name.endswith(f"{layer}.weight") for name in names)
