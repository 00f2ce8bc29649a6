"""Check the datasets of a run before it starts."""

import logging
from typing import Any, Collection, Dict, List, NamedTuple, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..data.catalog import load_dataset
from ..data.clean import check_images, find_bad_images
from ..data.task_labels import check_test_labels, check_train_labels
from ..detector_config import PRECOMPUTED, needs_proposals
from ..errors import GDetKDError
from ..safe_load import read_weights
from .class_checks import check_class_order

logger = logging.getLogger(__name__)


def check_datasets(cfg: CfgNode) -> None:
    """Check the datasets of a training.

    Raises:
        GDetKDError: one of these holds.
            - DATASETS.TRAIN is empty, or names a dataset without labels.
            - A dataset is not registered or has no images.
            - Two datasets have their classes in different orders.
            - A dataset of DATASETS.TEST cannot be evaluated on, or an image of it cannot be read.
            - DATASETS.TEST is empty although DISTILL.EVAL_TEACHER asks for an evaluation.
            - Precomputed proposals are missing, or a file of them cannot be trusted.
            - The first dataset of DATASETS.TEST gives no AP although TEST.PATIENCE asks for it.
    """
    if not cfg.DATASETS.TRAIN:
        raise GDetKDError("DATASETS.TRAIN is empty. Name the dataset to train on.")
    if cfg.MODEL.META_ARCHITECTURE == "GDetKD" and cfg.DISTILL.EVAL_TEACHER and not cfg.DATASETS.TEST:
        raise GDetKDError(
            "DISTILL.EVAL_TEACHER is True, but DATASETS.TEST is empty. Name a dataset to evaluate the teacher on, or "
            "set DISTILL.EVAL_TEACHER to False."
        )
    check_proposals(cfg, "TRAIN")
    check_proposals(cfg, "TEST")
    train_files = set()
    for name in cfg.DATASETS.TRAIN:
        dicts = load_dataset(name)  # takes long for a large dataset
        check_train_labels(cfg, dicts, name)
        train_files.update(files_of(dicts))
    test_sets = check_test_sets(cfg)
    _check_first_test_set(cfg, test_sets.without_ap)
    for name in cfg.DATASETS.TRAIN:
        if MetadataCatalog.get(name).get("evaluator_type") == "images":
            raise GDetKDError(
                f"The dataset {name!r} in DATASETS.TRAIN has images without labels: the student would learn to find "
                "nothing. Label the images, or remove the dataset from DATASETS.TRAIN."
            )
    check_class_order([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    warn_of_shared_images(train_files.intersection(test_sets.files), len(test_sets.files))


def files_of(dicts: Sequence[dict]) -> List[str]:
    """Return the image files of a dataset. The dicts of a user's own loader may have none."""
    return [image["file_name"] for image in dicts if "file_name" in image]


def warn_of_shared_images(files: Collection[str], total: int) -> None:
    """Warn that images of DATASETS.TEST are also in DATASETS.TRAIN.

    Args:
        files: these images.
        total: the number of images in DATASETS.TEST.
    """
    if files:
        logger.warning(
            "%d of the %d images in DATASETS.TEST are also in DATASETS.TRAIN, for example %s. So the AP will be too "
            "high. Take them out of one of the two.",
            len(files),
            total,
            min(files),
        )


class TestSets(NamedTuple):
    """Describe the datasets of DATASETS.TEST.

    Attributes:
        without_ap: names of those without annotations, which give no AP.
        files: the image files.
    """

    without_ap: List[str]
    files: List[str]


def check_test_sets(cfg: CfgNode, needed: bool = False) -> TestSets:
    """Check the datasets of DATASETS.TEST.

    Args:
        needed: whether DATASETS.TEST must name a dataset.

    Raises:
        GDetKDError: DATASETS.TEST is empty although it is needed, or a dataset
            - is not registered or has no image,
            - has annotations, but no object to find,
            - lacks a key that Detectron2's evaluation reads,
            - has two images with the same id,
            - is an LVIS dataset, whose metrics GDetKD does not compute, or
            - has an image that cannot be read completely.
    """
    if needed and not cfg.DATASETS.TEST:
        raise GDetKDError("DATASETS.TEST is empty, so there is nothing to evaluate on. Name a registered dataset.")
    without_ap, files = [], []
    for name in cfg.DATASETS.TEST:
        dicts = load_dataset(name)
        _check_kind(name)
        _check_keys(dicts, name)
        if not _check_objects(dicts, name):
            without_ap.append(name)
        check_test_labels(cfg, dicts, name)
        check_images(dicts, name)
        files += files_of(dicts)
    return TestSets(without_ap, files)


def _check_kind(name: str) -> None:
    """Check that COCO's metrics are those of the dataset.

    Raises:
        GDetKDError: it is an LVIS dataset. Each of its images has labels of some classes only, and COCO's metrics would
            count right detections of the other classes as wrong.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind == "lvis":
        raise GDetKDError(
            f"The dataset {name!r} in DATASETS.TEST is an LVIS dataset, and GDetKD does not compute LVIS's metrics. "
            "Remove it from DATASETS.TEST, and evaluate the checkpoint with plain Detectron2, which loads it as it is."
        )
    if kind == "coco_panoptic_seg":
        logger.warning("%s is evaluated by its boxes and masks alone. GDetKD does not compute PQ.", name)


def _check_keys(dicts: List[dict], name: str) -> None:
    """Check the keys that an evaluation needs. Training needs none of them, so a user's own dataset may lack them.

    Raises:
        GDetKDError: an image lacks a key that Detectron2's evaluation reads, the dataset does not name its classes, or
            two images have the same id.
    """
    metadata, needed = MetadataCatalog.get(name), {"image_id"}
    # Detectron2 then writes the dataset as a COCO file first.
    is_written = metadata.get("json_file") is None and metadata.get("evaluator_type") != "images"
    if is_written:
        needed |= {"width", "height"}
    incomplete = [image for image in dicts if not needed <= image.keys()]
    unusable = find_bad_images(incomplete)  # such an image may have no size; `check_images` says why
    for image in incomplete:
        lacking = sorted(needed - image.keys())
        if image["file_name"] not in unusable:
            raise GDetKDError(
                f"The dataset {name!r} cannot be evaluated on: the dict of {image['file_name']!r} has no "
                f"{' and no '.join(lacking)}. Add this to every dict in the function that is registered for the "
                "dataset. Training does not need it."
            )
    if is_written and not metadata.get("thing_classes"):
        raise GDetKDError(
            f"The dataset {name!r} cannot be evaluated on: it does not name its classes. Give them with "
            f"MetadataCatalog.get({name!r}).set(thing_classes=[...]). Training does not need them."
        )
    _check_distinct_ids(dicts, name)


def _check_distinct_ids(dicts: List[dict], name: str) -> None:
    """Check that no two images have the same id. Detectron2 would mix up their objects and detections.

    Raises:
        GDetKDError: two images have the same id.
    """
    files: Dict[Any, str] = {}
    for image in dicts:
        identity, file = image.get("image_id"), image["file_name"]
        if identity is not None and identity in files:
            raise GDetKDError(
                f"The dataset {name!r} cannot be evaluated on: {files[identity]!r} and {file!r} have the same image_id "
                f"{identity!r}, so their objects and detections would be mixed up. Give every image its own image_id."
            )
        files[identity] = file


def _check_objects(dicts: List[dict], name: str) -> bool:
    """Return whether a test set has annotations. Warn if it has none.

    Raises:
        GDetKDError: all annotations are of crowds. COCO's metrics have no AP for crowds.
    """
    annotations = [annotation for image in dicts for annotation in image.get("annotations", ())]
    if annotations and all(annotation.get("iscrowd", 0) for annotation in annotations):
        raise GDetKDError(
            f"The dataset {name!r} cannot be evaluated on: all of its {len(annotations)} annotations are of crowds "
            "(iscrowd 1), which do not count. Correct them, or remove the dataset from DATASETS.TEST."
        )
    if not annotations and MetadataCatalog.get(name).get("evaluator_type") != "images":
        logger.warning("%s has no annotation, so there is no AP. Only the detections are written.", name)
    return bool(annotations)


def check_has_ap(name: str) -> None:
    """Check that a dataset gives an AP.

    Raises:
        GDetKDError: the dataset has no annotation.
    """
    if not any(image.get("annotations") for image in load_dataset(name)):
        raise GDetKDError(
            f"The dataset {name!r} in DATASETS.TEST has no annotation, so there is no AP to compare. Name a dataset "
            "with labels."
        )


def _check_first_test_set(cfg: CfgNode, without_ap: Sequence[str]) -> None:
    """Check that the first dataset of DATASETS.TEST gives an AP, by which TEST.PATIENCE and TEST.KEEP_BEST decide.

    Raises:
        GDetKDError: TEST.PATIENCE is on, and that dataset has no annotation.
    """
    names = cfg.DATASETS.TEST
    if not names or names[0] not in without_ap:
        return
    reason = f"{names[0]!r}, the first dataset of DATASETS.TEST, has no annotation and so no AP"
    if cfg.TEST.PATIENCE:
        raise GDetKDError(
            f"TEST.PATIENCE is {cfg.TEST.PATIENCE}, but {reason}. Name a dataset with labels first, or set "
            "TEST.PATIENCE to 0."
        )
    if cfg.TEST.KEEP_BEST and len(names) > 1:
        logger.warning("%s, so no model_best.pth will be written. Name a dataset with labels first.", reason)


def check_proposals(cfg: CfgNode, key: str) -> None:
    """Check the files of precomputed proposals. Detectron2 unpickles them, which would run code in them.

    Args:
        key: "TRAIN" or "TEST".

    Raises:
        GDetKDError: the student needs proposals but loads none, a dataset has no file of proposals, or a file holds
            anything but arrays and plain containers, or cannot be read.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        if needs_proposals(cfg):
            raise GDetKDError(
                f"MODEL.PROPOSAL_GENERATOR.NAME is {PRECOMPUTED!r}, but MODEL.LOAD_PROPOSALS is False. Set it to True, "
                "and name a file of proposals for each dataset, or choose another generator, such as RPN."
            )
        return
    names, paths = cfg.DATASETS[key], cfg.DATASETS[f"PROPOSAL_FILES_{key}"]
    # Detectron2 takes the file of a test set by its place, and joins those of all training sets.
    if len(paths) < len(names) or (key == "TRAIN" and len(paths) > len(names)):
        raise GDetKDError(
            f"DATASETS.{key} names {len(names)} datasets, but DATASETS.PROPOSAL_FILES_{key} names {len(paths)} files. "
            "MODEL.LOAD_PROPOSALS needs a file for each dataset, in the same order."
        )
    for path in paths[: len(names)]:
        read_weights(PathManager.get_local_path(path))
