"""Checks that cost no time, made before every training."""

from typing import List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..classes import some
from ..data.clean import check_images
from ..errors import GDetKDError
from ..safe_load import read_weights


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
        load_dataset(name)
    check_test_sets(cfg)
    for name in cfg.DATASETS.TRAIN:
        if MetadataCatalog.get(name).get("evaluator_type") == "images":
            raise GDetKDError(
                f"The data set {name!r} is of images alone: the student would learn to find nothing in them. Label "
                "them, or take it out of DATASETS.TRAIN."
            )
    check_class_order([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])


def check_test_sets(cfg: CfgNode) -> None:
    """
    Raises:
        GDetKDError: DATASETS.TEST names a set that is not registered, has no image, or has one that cannot be read to
            its end or a JSON that cannot be evaluated against; or a file of proposals is not to be trusted.
    """
    check_proposals(cfg)
    for name in cfg.DATASETS.TEST:
        dicts = load_dataset(name)
        fault = MetadataCatalog.get(name).get("evaluation_fault")
        if fault is not None:
            raise GDetKDError(
                f"The data set {name!r} cannot be evaluated against {MetadataCatalog.get(name).json_file!r}: {fault}. "
                "COCO's metrics need it of every annotation: add it to that file. Training does without."
            )
        check_images(dicts, name)


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
                "Evaluate it on a set of its own classes, or without DISTILL.EVAL_TEACHER."
                if role == "teacher"
                else "Set the student's number of classes (MODEL.ROI_HEADS.NUM_CLASSES, MODEL.RETINANET.NUM_CLASSES, "
                f"MODEL.FCOS.NUM_CLASSES) to {len(classes)}."
            )
            raise GDetKDError(
                f"The data set {name!r} has {len(classes)} classes and the {role} {num_classes}. {remedy}"
            )


def check_class_order(names: Sequence[str]) -> None:
    """
    Raises:
        GDetKDError: two data sets have the same classes in another order, by which evaluation would mistake them.
    """
    first: Optional[str] = None
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is None:
            continue
        first = first or name
        expected = MetadataCatalog.get(first).thing_classes
        if list(classes) != list(expected) and sorted(classes) == sorted(expected):
            raise GDetKDError(
                f"The data sets {first!r} and {name!r} have the same classes in another order: {some(expected)}; and "
                f"{some(classes)}. Give them one order (in COCO JSON, by category id)."
            )
