"""Load the images of DATASETS.TRAIN, and describe them before the loader serialises them."""

import hashlib
import logging
import os
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts

from ..errors import GDetKDError
from .headers import has_size
from .samplers import WEIGHTED
from .task_labels import has_keypoint_head, with_usable_labels

logger = logging.getLogger(__name__)

Sample = Dict[str, Any]


def load_images(cfg: CfgNode) -> Tuple[List[Sample], np.ndarray]:
    """Load the images of DATASETS.TRAIN, and (images,) indices of their datasets.

    If the sampler does not read the indices, all of them are 0 and Detectron2 filters all datasets at once.
    """
    train = list(cfg.DATASETS.TRAIN)
    proposals = list(cfg.DATASETS.PROPOSAL_FILES_TRAIN) if cfg.MODEL.LOAD_PROPOSALS else None
    if cfg.DATALOADER.SAMPLER_TRAIN not in WEIGHTED:
        dicts = _load_filtered(cfg, train, proposals)
        return dicts, np.zeros(len(dicts), np.int64)
    parts = [
        _load_filtered(cfg, [name], proposals and proposals[index : index + 1]) for index, name in enumerate(train)
    ]
    return [image for part in parts for image in part], np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def _load_filtered(cfg: CfgNode, names: List[str], proposals: Optional[List[str]]) -> List[Sample]:
    try:
        dicts = get_detection_dataset_dicts(
            names,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if has_keypoint_head(cfg) else 0,
            proposal_files=proposals,
            check_consistency=_have_equal_names(names),  # "Car" may be "car" elsewhere; see `check_class_order`
        )
    except AssertionError as e:  # raised by Detectron2
        raise GDetKDError(
            f"{', '.join(names)}: no image has an object to learn from ({e}). Correct the annotations, or set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS to False to train on images without objects."
        ) from e
    return with_usable_labels(cfg, dicts, ", ".join(names))


def _have_equal_names(names: List[str]) -> bool:
    classes = [MetadataCatalog.get(name).get("thing_classes") for name in names]
    return all(other == classes[0] for other in classes)


def describe(dicts: List[Sample]) -> Dict[str, Any]:
    """Return the number of images, and a hash of their file names in order. The folder does not matter."""
    names = "\n".join(os.path.basename(sample["file_name"]) for sample in dicts)
    return {"images": len(dicts), "sha256": hashlib.sha256(names.encode("utf-8", "replace")).hexdigest()}


def are_wide(dicts: List[Sample], names: str) -> np.ndarray:
    """Return (len(dicts),) booleans that say which images are wider than high.

    The size of a remote image may be unknown before it is fetched. Such an image counts as not wide. If it is wide, its
    batch only needs more padding.
    """
    unknown = sum(not has_size(image) for image in dicts)
    if unknown:
        logger.info(
            "%s: %d images are remote and have no width and height in their dicts. Batches are made as if they were "
            "not wider than high.",
            names,
            unknown,
        )
    return np.array([has_size(image) and image["width"] > image["height"] for image in dicts], bool)
