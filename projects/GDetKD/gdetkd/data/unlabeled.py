"""Mix images without labels, whose boxes a teacher found, into the batches of a training.

A sample of DATASETS.UNLABELED has two more keys: "unlabeled", which is True, and "doubtful", its doubtful boxes.
"""

import logging
import os
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.structures import Boxes, Instances

from ..errors import GDetKDError, some
from ..safe_load import sha256_of_file
from .class_names import class_names
from .content import same_files
from .kinds import Pseudo, find_kind

logger = logging.getLogger(__name__)

Sample = Dict[str, Any]
UNLABELED = "unlabeled"
DOUBTFUL = "doubtful"


def is_unlabeled(sample: Sample) -> bool:
    """Return whether a training sample comes from DATASETS.UNLABELED."""
    return bool(sample.get(UNLABELED, False))


def pseudo_sets(cfg: CfgNode) -> List[Pseudo]:
    """Return the datasets of DATASETS.UNLABELED.

    Raises:
        GDetKDError: a name is not that of an entry of kind `pseudo` in DATASETS.REGISTER.
    """
    entries = {entry["name"]: entry for entry in cfg.DATASETS.REGISTER if is_pseudo(entry)}
    for name in cfg.DATASETS.UNLABELED:
        if name not in entries:
            raise GDetKDError(
                f"DATASETS.UNLABELED names {name!r}. The entries of kind `pseudo` in DATASETS.REGISTER are "
                f"{some(sorted(entries)) or 'none'}. Add the entry. tools/label.py writes its JSON (docs/unlabeled.md)."
            )
    return [
        find_kind(entries[name])(entries[name], cfg.DATASETS.ALLOW_OUTSIDE, cfg.INPUT.MAX_BAD_FRACTION)
        for name in cfg.DATASETS.UNLABELED
    ]


def is_pseudo(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of DATASETS.REGISTER has the kind `pseudo`, or a kind that is derived from it."""
    kind = find_kind(entry)
    return kind is not None and issubclass(kind, Pseudo)


def load_unlabeled(cfg: CfgNode) -> List[Sample]:
    """Load the images of DATASETS.UNLABELED in Detectron2's format, marked as unlabelled.

    Images that are also in DATASETS.TRAIN are left out.

    Raises:
        GDetKDError: one of these holds.
            - A set is not of kind `pseudo`, or its classes are not the student's.
            - No image has an object.
            - An image has changed since the teacher labelled it.
            - An image is also in DATASETS.TEST.
    """
    sets = pseudo_sets(cfg)
    if not sets:
        return []
    expected = class_names(cfg)
    if expected is None:
        raise GDetKDError(
            f"The dataset {cfg.DATASETS.TRAIN[0]!r} does not name its classes, so the boxes of "
            f"{some(list(cfg.DATASETS.UNLABELED))} cannot be matched with them. Give them with "
            f"MetadataCatalog.get({cfg.DATASETS.TRAIN[0]!r}).set(thing_classes=[...])."
        )
    for pseudo in sets:
        _check_classes(pseudo, expected)
    try:
        dicts = get_detection_dataset_dicts(
            [pseudo.name for pseudo in sets], filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
    except AssertionError as e:  # raised by Detectron2
        raise GDetKDError(f"{some([pseudo.name for pseudo in sets])}: no image has an object ({e}).") from e
    known = {path: digest for pseudo in sets for path, digest in _known_digests(pseudo).items()}
    return [{**sample, UNLABELED: True} for sample in _without_known(cfg, dicts, known)]


def _known_digests(pseudo: Pseudo) -> Dict[str, Tuple[int, str]]:
    """Return the size in bytes and the SHA-256 of each image that has not changed since the teacher labelled it.

    An image that is newer than the boxes is left out. If its size did not change, it may be a copy of the same image.

    Raises:
        GDetKDError: the size of an image has changed.
    """
    known, labelled = pseudo.digests(), os.path.getmtime(pseudo.path("json"))
    here = {path: os.stat(path) for path in known if os.path.exists(path)}
    changed = [path for path, stat in here.items() if stat.st_size != known[path][0]]
    if changed:
        raise GDetKDError(
            f"{len(changed)} images of {pseudo.name!r} have changed since the teacher labelled them, such as "
            f"{changed[0]!r}. Their boxes may be wrong. Run tools/label.py again."
        )
    newer = {path for path, stat in here.items() if stat.st_mtime > labelled}
    return {path: digest for path, digest in known.items() if path not in newer}


def describe_labels(cfg: CfgNode) -> Dict[str, Any]:
    """Return a description of the labels of DATASETS.UNLABELED, for checkpoints. It is empty if there are none."""
    files = [pseudo.path("json") for pseudo in pseudo_sets(cfg)]
    return {"labels": [sha256_of_file(path) for path in files]} if files else {}


def _without_known(cfg: CfgNode, dicts: List[Sample], known: Dict[str, Tuple[int, str]]) -> List[Sample]:
    """Leave out the images that are also in DATASETS.TRAIN, and refuse images of DATASETS.TEST.

    Args:
        known: size in bytes and SHA-256 of images, by path.
    """
    files, names = [sample["file_name"] for sample in dicts], some(list(cfg.DATASETS.UNLABELED))
    in_test = same_files(files, _files_of(cfg.DATASETS.TEST), known)
    if in_test:
        path, other = next(iter(in_test.items()))
        raise GDetKDError(
            f"{len(in_test)} images of {names} are also in DATASETS.TEST, such as {path!r}, which is {other!r}. The AP "
            "would be too high. Take them out of the folder, and run tools/label.py again."
        )
    in_train = same_files(files, _files_of(cfg.DATASETS.TRAIN), known)
    kept = [sample for sample in dicts if sample["file_name"] not in in_train]
    if in_train:
        logger.warning("%s: %d images are also in DATASETS.TRAIN. They are left out.", names, len(in_train))
    if not kept:
        raise GDetKDError(f"All images of {names} are also in DATASETS.TRAIN. Name images without labels.")
    return kept


def _files_of(datasets: Sequence[str]) -> List[str]:
    return [sample["file_name"] for name in datasets for sample in DatasetCatalog.get(name)]


def _check_classes(pseudo: Pseudo, expected: Sequence[str]) -> None:
    found = pseudo.class_names()
    if found is not None and list(found) != list(expected):
        raise GDetKDError(
            f"The labels of {pseudo.name!r} were made for the classes {some(found)}, and the student has "
            f"{some(expected)}. Run tools/label.py again with this config."
        )


def unlabeled_per_batch(cfg: CfgNode, images: int) -> int:
    """Return how many of a process's images in a batch are unlabelled: DISTILL.UNLABELED.FRACTION, but at least one.

    Args:
        images: the number of images of a process in a batch.

    Raises:
        GDetKDError: a process takes a single image in a step.
    """
    if not cfg.DATASETS.UNLABELED:
        return 0
    if images < 2:
        raise GDetKDError(
            "Each process takes 1 image in a step, but DATASETS.UNLABELED needs an image with labels and one without. "
            "Raise SOLVER.IMS_PER_BATCH, or use fewer processes."
        )
    return min(max(1, round(cfg.DISTILL.UNLABELED.FRACTION * images)), images - 1)


class UnlabeledMapper:
    """Map labelled images by one mapper, and unlabelled images by another, which also gets the doubtful boxes.

    Args:
        labeled: the mapper of labelled images.
        unlabeled: Detectron2's mapper, or one with its behaviour: crowds are left out, boxes and classes are kept in
            order.
        num_classes: the number of classes.
    """

    def __init__(self, labeled: Callable[[Sample], Sample], unlabeled: Callable[[Sample], Sample], num_classes: int):
        self._labeled = labeled
        self._unlabeled = unlabeled
        self._num_classes = num_classes

    def __call__(self, dataset_dict: Sample) -> Sample:
        if not is_unlabeled(dataset_dict):
            return self._labeled(dataset_dict)
        # Doubtful boxes are crowds. As objects of classes that do not exist, they take part in the augmentations.
        objects = [
            {**item, "iscrowd": 0, "category_id": item["category_id"] + self._num_classes}
            if item.get("iscrowd", 0)
            else item
            for item in dataset_dict["annotations"]
        ]
        sample = self._unlabeled({**dataset_dict, "annotations": objects})
        instances: Instances = sample["instances"]
        is_doubtful = instances.gt_classes >= self._num_classes
        sample["instances"] = instances[~is_doubtful]
        sample[DOUBTFUL] = instances.gt_boxes.tensor[is_doubtful]
        return sample


def split_batch(batch: Sequence[Sample]) -> List[List[Sample]]:
    """Split a batch into its labelled and its unlabelled samples. Parts without a sample are left out."""
    parts = [[sample for sample in batch if is_unlabeled(sample) is kind] for kind in (False, True)]
    return [part for part in parts if part]


def doubtful_boxes(part: Sequence[Sample], device: torch.device) -> List[Boxes]:
    """Return the doubtful boxes of each image of a part, xyxy in pixels of its augmented image."""
    none = torch.zeros(0, 4)
    return [Boxes(sample.get(DOUBTFUL, none).to(device, non_blocking=True)) for sample in part]
