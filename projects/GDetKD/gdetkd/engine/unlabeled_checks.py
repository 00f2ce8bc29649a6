"""Check DATASETS.UNLABELED, and describe it for `--check`."""

import os
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from ..config import student_architecture
from ..data.class_names import class_names
from ..data.kinds.pseudo import Pseudo
from ..data.task_labels import BOXES_ALONE, PANOPTIC
from ..data.train_loader import images_per_process
from ..data.unlabeled import is_pseudo, load_unlabeled, pseudo_sets, unlabeled_per_batch
from ..errors import GDetKDError

# The share of a class among all objects differs much between two sets if one share is this many times the other.
MUCH = 3.0


def check_unlabeled(cfg: CfgNode) -> None:
    """Check the images without labels of a training.

    Raises:
        GDetKDError: one of these holds.
            - A set of kind `pseudo` is in DATASETS.TRAIN or DATASETS.TEST.
            - A set of DATASETS.UNLABELED is not of kind `pseudo`, or was made for other classes.
            - The model cannot use unlabelled images, or a step has no place for them.
    """
    names = [entry["name"] for entry in cfg.DATASETS.REGISTER if is_pseudo(entry)]
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name in names:
                raise GDetKDError(
                    f"DATASETS.{key} names {name!r}, whose boxes a teacher found (kind `pseudo`). Name it in "
                    "DATASETS.UNLABELED."
                )
    if not cfg.DATASETS.UNLABELED:
        return
    _check_model(cfg)
    unlabeled_per_batch(cfg, images_per_process(cfg, comm.get_world_size()))
    pseudo_sets(cfg)


def _check_model(cfg: CfgNode) -> None:
    if cfg.MODEL.META_ARCHITECTURE != "GDetKD":
        raise GDetKDError(
            f"DATASETS.UNLABELED needs MODEL.META_ARCHITECTURE 'GDetKD', not {cfg.MODEL.META_ARCHITECTURE!r}. Without "
            "distillation terms, leave DISTILL.LOSSES empty."
        )
    if cfg.MODEL.LOAD_PROPOSALS:
        raise GDetKDError(
            "MODEL.LOAD_PROPOSALS is True, but images of DATASETS.UNLABELED have no precomputed proposals. Set it to "
            "False, or empty DATASETS.UNLABELED."
        )
    if student_architecture(cfg) in PANOPTIC:
        raise GDetKDError(
            f"A {student_architecture(cfg)} learns from maps of stuff classes, but the labels of DATASETS.UNLABELED "
            "are boxes. Empty DATASETS.UNLABELED, or train a detector of things alone (GeneralizedRCNN)."
        )
    heads = [key for key in ("MASK_ON", "KEYPOINT_ON") if cfg.MODEL[key]]
    if heads and student_architecture(cfg) not in BOXES_ALONE:
        raise GDetKDError(
            f"MODEL.{heads[0]} is True, but the labels of DATASETS.UNLABELED are boxes. Set it to False, or empty "
            "DATASETS.UNLABELED."
        )


def other_teachers(cfg: CfgNode, sha256: str) -> List[str]:
    """Return a warning for each set that another teacher than this run's labelled.

    Args:
        sha256: the SHA-256 of the weights of this run's teacher.
    """
    warnings = []
    for pseudo in pseudo_sets(cfg):
        info = pseudo.read_info()
        teacher = info.get("teacher", {})
        if info.get("source") == "teacher" and teacher.get("sha256") not in (None, sha256):
            warnings.append(
                f"The boxes of {pseudo.name!r} come from another teacher ({teacher.get('weights')!r}) than "
                "DISTILL.TEACHER. If that is not intended, run tools/label.py again."
            )
    return warnings


class UnlabeledReport:
    """Compare the unlabelled images of a config with its labelled images.

    Attributes:
        images: the number of unlabelled images that are trained on.
        doubtful: the number of doubtful boxes.
        rows: for each class: its name, its objects in DATASETS.TRAIN and in DATASETS.UNLABELED, and the precision and
            recall of the labels on the validation split, if the thresholds of the file are in use.
        pages: the pages of sample images that exist beside the labels.
        warnings: classes that are never found, or whose shares differ much.
    """

    def __init__(self, cfg: CfgNode) -> None:
        samples = load_unlabeled(cfg)
        self.images = len(samples)
        self.doubtful = sum(bool(item.get("iscrowd", 0)) for sample in samples for item in sample["annotations"])
        names = class_names(cfg) or ()
        train = _counts([sample for name in cfg.DATASETS.TRAIN for sample in DatasetCatalog.get(name)])
        pseudo = _counts(samples)
        self.pages: List[str] = []
        sets = pseudo_sets(cfg)
        for dataset in sets:
            page = os.path.splitext(dataset.path("json"))[0] + ".html"
            self.pages += [page] if os.path.exists(page) else []
        thresholds = _thresholds_in_use(sets)
        self.rows = [
            [name, train[index], pseudo[index], *(_rate(thresholds.get(name), key) for key in ("precision", "recall"))]
            for index, name in enumerate(names)
        ]
        self.warnings = _differences(self.rows)


def _thresholds_in_use(sets: Sequence[Pseudo]) -> Dict[str, Any]:
    """Return what the files say of their thresholds, by class. Empty if an entry sets others, or the files differ."""
    found = [{} if "min_score" in dataset.entry else dataset.read_info().get("thresholds", {}) for dataset in sets]
    return found[0] if found and all(thresholds == found[0] for thresholds in found) else {}


def _counts(samples: Sequence[Dict[str, Any]]) -> "Counter[int]":
    return Counter(
        item["category_id"]
        for sample in samples
        for item in sample.get("annotations", ())
        if not item.get("iscrowd", 0)
    )


def _rate(threshold: Optional[Dict[str, Any]], key: str) -> Optional[float]:
    return (threshold or {}).get(key)


def _differences(rows: Sequence[Sequence[Any]]) -> List[str]:
    warnings = []
    total, total_pseudo = (max(1, sum(row[column] for row in rows)) for column in (1, 2))
    for name, count, pseudo, *_ in rows:
        if count and not pseudo:
            warnings.append(
                f"The teacher's boxes have no {name!r}, of which the labelled images have {count}. The student would "
                "learn that it is background there: lower its min_score, or check the teacher's classes."
            )
        elif count and pseudo:
            ratio = (pseudo / total_pseudo) / (count / total)
            if not 1 / MUCH <= ratio <= MUCH:
                warnings.append(
                    f"{name!r} is {pseudo / total_pseudo:.1%} of the teacher's boxes, and {count / total:.1%} of the "
                    "labelled objects. Look at the samples: the images may differ, or the threshold may not fit."
                )
    return warnings
