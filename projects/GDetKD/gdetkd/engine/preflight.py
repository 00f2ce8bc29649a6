"""Checks that cost no time, made before every training."""

import logging
from typing import List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import nn

from ..data.class_names import class_names
from ..data.clean import check_images, find_bad_images
from ..data.task_labels import check_test_labels, check_train_labels
from ..detectors import build_adapter, find_adapter
from ..errors import GDetKDError, some
from ..losses.classes import other_names, warn_of_unknown_names
from ..safe_load import read_weights
from ..structures import DetectorSpec, with_class_names
from ..teacher import FrozenTeacher

logger = logging.getLogger(__name__)

# Where a config says how many classes the detector has.
CLASS_KEYS = {"GeneralizedRCNN": "ROI_HEADS", "RetinaNet": "RETINANET", "FCOS": "FCOS"}


def check_architecture(cfg: CfgNode) -> None:
    """
    Raises:
        GDetKDError: the config asks for distillation of a detector that would be trained without.
    """
    if cfg.MODEL.META_ARCHITECTURE != "GDetKD" and (cfg.DISTILL.LOSSES or cfg.DISTILL.HEAD_TRANSFER):
        raise GDetKDError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, with which DISTILL has no effect: set it to "
            "'GDetKD' and DISTILL.STUDENT_META_ARCHITECTURE to the student's, or empty DISTILL.LOSSES."
        )


def check_datasets(cfg: CfgNode) -> None:
    """
    Raises:
        GDetKDError: DATASETS.TRAIN is empty; it or TEST names a set that is not registered, one without images or, in
            TRAIN, one of mere images; their classes are in different orders; a set of TEST cannot be evaluated on, or
            an image of it cannot be read.
    """
    if not cfg.DATASETS.TRAIN:
        raise GDetKDError("DATASETS.TRAIN is empty: name the data set to train on.")
    for name in cfg.DATASETS.TRAIN:
        check_train_labels(cfg, load_dataset(name), name)
    check_test_sets(cfg)
    for name in cfg.DATASETS.TRAIN:
        if MetadataCatalog.get(name).get("evaluator_type") == "images":
            raise GDetKDError(
                f"The data set {name!r} is of images alone: the student would learn to find nothing in them. Label "
                "them, or take it out of DATASETS.TRAIN."
            )
    check_class_order([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])


def check_test_sets(cfg: CfgNode, needed: bool = False) -> None:
    """
    Args:
        needed: whether DATASETS.TEST must name a set.

    Raises:
        GDetKDError: DATASETS.TEST is empty although it is needed; it names a set that is not registered, has no image
            or, though annotated, no object to be found, lacks what Detectron2's evaluation reads, or has an image that
            cannot be read to its end; or a file of proposals is not to be trusted.
    """
    if needed and not cfg.DATASETS.TEST:
        raise GDetKDError("DATASETS.TEST is empty, so there is nothing to evaluate on: name a registered data set.")
    check_proposals(cfg)
    for name in cfg.DATASETS.TEST:
        dicts = load_dataset(name)
        _check_keys(dicts, name)
        _check_objects(dicts, name)
        check_test_labels(cfg, dicts, name)
        check_images(dicts, name)


def _check_keys(dicts: List[dict], name: str) -> None:
    """Training does without these keys, so that a set may lack them that a user registers in Python.

    Raises:
        GDetKDError: an image lacks a key that Detectron2's evaluation reads, or the set does not name its classes.
    """
    metadata, needed = MetadataCatalog.get(name), {"image_id"}
    # Detectron2 then writes the set as a COCO file first.
    is_written = metadata.get("json_file") is None and metadata.get("evaluator_type") != "images"
    if is_written:
        needed |= {"width", "height"}
    incomplete = [image for image in dicts if not needed <= image.keys()]
    unusable = find_bad_images(incomplete)  # such an image may have no size; `check_images` says why
    for image in incomplete:
        lacking = sorted(needed - image.keys())
        if image["file_name"] not in unusable:
            raise GDetKDError(
                f"The data set {name!r} cannot be evaluated on: the dict of {image['file_name']!r} has no "
                f"{' and no '.join(lacking)}. Let the function that is registered for the set add that to every dict. "
                "Training does without."
            )
    if is_written and not metadata.get("thing_classes"):
        raise GDetKDError(
            f"The data set {name!r} cannot be evaluated on: it does not name its classes. Give them with "
            f"MetadataCatalog.get({name!r}).set(thing_classes=[...]). Training does without."
        )


def _check_objects(dicts: List[dict], name: str) -> None:
    """
    Raises:
        GDetKDError: all annotations are of crowds, of which COCO's metrics know no AP.
    """
    annotations = [annotation for image in dicts for annotation in image.get("annotations", ())]
    if annotations and all(annotation.get("iscrowd", 0) for annotation in annotations):
        raise GDetKDError(
            f"The data set {name!r} cannot be evaluated on: all of its {len(annotations)} annotations are of crowds "
            "(iscrowd 1), which count for nothing. Correct them, or take it out of DATASETS.TEST."
        )
    if not annotations and MetadataCatalog.get(name).get("evaluator_type") != "images":
        logger.warning("%s has no annotation: no AP can be told on it, its detections alone are written.", name)


def check_proposals(cfg: CfgNode) -> None:
    """Detectron2 unpickles files of precomputed proposals, and would run what they hold.

    Raises:
        GDetKDError: one of them holds something else than arrays and plain containers, or cannot be read.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        for path in [*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST]:
            read_weights(PathManager.get_local_path(path))


def load_dataset(name: str) -> List[dict]:
    """A registered set's dicts in Detectron2's format, and with them its metadata.

    Raises:
        GDetKDError: it is not registered, its files are not there, or it holds no image.
    """
    if name not in DatasetCatalog.list():
        similar = [known for known in DatasetCatalog.list() if known.split("_")[0] == name.split("_")[0]]
        hint = f" Similar names: {', '.join(sorted(similar))}." if similar else ""
        raise GDetKDError(f"The data set {name!r} is not registered: add it to DATASETS.REGISTER.{hint}")
    try:
        dicts = DatasetCatalog.get(name)
    except FileNotFoundError as e:
        raise GDetKDError(
            f"A file of the data set {name!r} is not there: {e.filename}. Is DETECTRON2_DATASETS the folder it is in?"
        ) from e
    if not dicts:
        raise GDetKDError(f"The data set {name!r} holds no image.")
    return dicts


def check_student_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """`check_classes` of the student that a config describes, before it is built: its losses would speak of other
    things. A family that is not Detectron2's is passed over.

    Raises:
        GDetKDError: a data set has another number of classes.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture == "GDetKD":
        architecture = cfg.DISTILL.STUDENT_META_ARCHITECTURE
    if architecture in CLASS_KEYS:
        check_classes(names, cfg.MODEL[CLASS_KEYS[architecture]].NUM_CLASSES)


def check_student(cfg: CfgNode, student: nn.Module, teacher: Optional[FrozenTeacher]) -> Optional[DetectorSpec]:
    """Whether the student fits the data and, where it takes over a teacher's head, that.

    Returns:
        what it is like; None for a family that only plain training knows.

    Raises:
        GDetKDError: it has another number of classes than a data set, or the teacher's in another order.
    """
    if find_adapter(student) is None:
        return None
    spec = build_adapter(student, "student", cfg).spec
    check_classes([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], spec.num_classes)
    spec = with_class_names(spec, class_names(cfg))
    if cfg.DISTILL.HEAD_TRANSFER and teacher is not None:
        check_transfer(cfg, spec, teacher.spec)
    return spec


def check_classes(names: Sequence[str], num_classes: int, role: str = "student") -> None:
    """
    Raises:
        GDetKDError: a data set has another number of classes than the detector, which neither training nor evaluation
            would notice.
    """
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and len(classes) != num_classes:
            remedy = (
                "Name its classes in DISTILL.TEACHER.CLASSES, so that they are found by name, evaluate it on a set of "
                "its own classes, or leave DISTILL.EVAL_TEACHER off."
                if role == "teacher"
                else "Set the student's number of classes (MODEL.ROI_HEADS.NUM_CLASSES, MODEL.RETINANET.NUM_CLASSES, "
                f"MODEL.FCOS.NUM_CLASSES) to {len(classes)}."
            )
            raise GDetKDError(
                f"The data set {name!r} has {len(classes)} classes and the {role} {num_classes}. {remedy}"
            )


def check_class_order(names: Sequence[str]) -> None:
    """Warns of sets with other classes, which may be other names of the same; upper and lower case are.

    Raises:
        GDetKDError: two data sets have the same classes in another order, by which evaluation would mistake them.
    """
    known = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    sets = [(name, list(classes)) for name, classes in known.items() if classes is not None]
    for name, classes in sets[1:]:
        first, expected = sets[0]
        if classes == expected or len(classes) != len(expected):  # `check_classes` looks at numbers
            continue
        ours, its = ([str(each).strip().lower() for each in side] for side in (expected, classes))
        if sorted(map(str, expected)) == sorted(map(str, classes)) or (ours != its and sorted(ours) == sorted(its)):
            raise GDetKDError(
                f"The data sets {first!r} and {name!r} have the same classes in another order: {some(expected)}; and "
                f"{some(classes)}. Give them one order (in COCO JSON, by category id)."
            )
        if ours == its:
            continue
        others = [f"{one!r} is {other!r}" for one, other in zip(expected, classes) if one != other]
        logger.warning(
            "The data sets %r and %r have classes of other names, which are taken to be the same, one by one: %s in "
            "the second.",
            first,
            name,
            some(others, 5),
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
        warn_of_unknown_names("Head transfer", "student" if student.class_names is None else "teacher")
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
