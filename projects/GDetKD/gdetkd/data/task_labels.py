"""Check that a dataset has the labels that a detector needs: masks, keypoints, panoptic labels.

Without this check Detectron2 fails in training or, hours later, in the first evaluation.
"""

import importlib.util
import logging
from typing import Any, Dict, Iterable, List, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config import student_architecture
from ..errors import GDetKDError

logger = logging.getLogger(__name__)

Item = Dict[str, Any]
# Detectors without a mask or keypoint head, whatever MODEL.MASK_ON and MODEL.KEYPOINT_ON say.
BOXES_ALONE = ("RetinaNet", "FCOS")
# Detectors that need a map of stuff classes for every training image.
PANOPTIC = ("PanopticFPN", "SemanticSegmentor", "PanopticDeepLab")
# The number of keypoints in COCO. pycocotools uses COCO's sigmas if TEST.KEYPOINT_OKS_SIGMAS is empty.
COCO_KEYPOINTS = 17


def check_train_labels(cfg: CfgNode, dicts: List[Item], name: str) -> None:
    """Check that a training set has the labels that the detector needs.

    Args:
        dicts: the images in Detectron2's format.
        name: the dataset's name, for messages.

    Raises:
        GDetKDError: masks, keypoints or panoptic labels are missing, in the wrong form or of the wrong size, or the
            package that cuts masks is not installed.
    """
    if student_architecture(cfg) in PANOPTIC:
        _check_panoptic(student_architecture(cfg), dicts, name)
    if key := _key_that_needs_masks(cfg):
        _check_share_with_masks(cfg, key, dicts, name)
    if cfg.MODEL.MASK_ON and cfg.INPUT.CROP.ENABLED:
        _check_polygons_can_be_cut(dicts, name)
    if has_mask_head(cfg):
        _check_mask_format(cfg, dicts, name)
        _check_mask_sizes([_with_annotations(image, objects_of(image)) for image in dicts], name)
    if has_keypoint_head(cfg):
        _check_keypoints(cfg, dicts, name)
        _check_keypoint_names(cfg, name)


def check_test_labels(cfg: CfgNode, dicts: List[Item], name: str) -> None:
    """Check the labels of a test set. A dataset without any mask or keypoint is evaluated by its boxes.

    Raises:
        GDetKDError: only some objects have masks, a mask is not as large as its image, or keypoints do not fit the
            detector or TEST.KEYPOINT_OKS_SIGMAS.
    """
    if has_mask_head(cfg):
        annotations = [annotation for image in dicts for annotation in image.get("annotations", ())]
        missing = sum(not has_mask(annotation) for annotation in annotations)
        if 0 < missing < len(annotations):
            raise GDetKDError(
                f"The dataset {name!r} cannot be evaluated on: {missing} of its {len(annotations)} annotations have no "
                "mask, which COCO's mask AP needs. Add masks, or take the images of these objects out of the dataset."
            )
        if annotations and missing:
            logger.warning("%s has no masks: only the AP of boxes is evaluated on it.", name)
        _check_mask_sizes(dicts, name)
    if has_keypoint_head(cfg) and _check_keypoints(cfg, dicts, name):
        _check_sigmas(cfg, name)


def with_usable_labels(cfg: CfgNode, dicts: List[Item], names: str) -> List[Item]:
    """Return training images with only the annotations that the detector can use.

    - If the detector needs masks, objects without a mask are left out and counted. Images that then have no object are
      left out, too, unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False.
    - If the detector needs keypoints, objects without keypoints get unlabelled keypoints.

    Args:
        dicts: the images of the training sets.
        names: the names of the datasets, for messages.

    Raises:
        GDetKDError: more objects than INPUT.MAX_BAD_FRACTION allows have no mask.
    """
    if key := _key_that_needs_masks(cfg):
        missing = _check_share_with_masks(cfg, key, dicts, names)
        usable = [
            _with_annotations(image, filter(_is_crowd_or_has_mask, image.get("annotations", ()))) for image in dicts
        ]
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            usable = [new for new, old in zip(usable, dicts) if objects_of(new) or not objects_of(old)]
        dicts = usable
        if missing:
            logger.warning("%s: %d objects have no mask and are left out, because %s is True.", names, missing, key)
    if has_keypoint_head(cfg):
        unlabelled = [0.0] * (3 * cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)
        dicts = [
            _with_annotations(image, (_with_keypoints(item, unlabelled) for item in image.get("annotations", ())))
            for image in dicts
        ]
    return dicts


def _with_annotations(image: Item, annotations: Iterable[Item]) -> Item:
    return {**image, "annotations": list(annotations)}


def _with_keypoints(annotation: Item, unlabelled: List[float]) -> Item:
    return annotation if _is_given(annotation.get("keypoints")) else {**annotation, "keypoints": unlabelled}


def _is_crowd_or_has_mask(annotation: Item) -> bool:
    return bool(annotation.get("iscrowd", 0)) or has_mask(annotation)


def _check_polygons_can_be_cut(dicts: List[Item], name: str) -> None:
    polygons = any(isinstance(item.get("segmentation"), list) for item in _objects(dicts))
    if polygons and importlib.util.find_spec("shapely") is None:
        raise GDetKDError(
            f"INPUT.CROP cuts the masks of {name!r} with the package shapely, which is not installed. Install it with "
            "pip install shapely, set INPUT.CROP.ENABLED to False, or set MODEL.MASK_ON to False."
        )


def has_mask(annotation: Item) -> bool:
    return _is_given(annotation.get("segmentation"))


def _is_given(value: Any) -> bool:
    return value.size > 0 if isinstance(value, np.ndarray) else bool(value)


def has_mask_head(cfg: CfgNode) -> bool:
    return cfg.MODEL.MASK_ON and student_architecture(cfg) not in BOXES_ALONE


def has_keypoint_head(cfg: CfgNode) -> bool:
    return cfg.MODEL.KEYPOINT_ON and student_architecture(cfg) not in BOXES_ALONE


def objects_of(image: Item) -> List[Item]:
    """Return the annotations of an image without crowds."""
    return [item for item in image.get("annotations", ()) if not item.get("iscrowd", 0)]


def _objects(dicts: Sequence[Item]) -> List[Item]:
    return [item for image in dicts for item in objects_of(image)]


def _check_panoptic(architecture: str, dicts: List[Item], name: str) -> None:
    missing = sum("sem_seg_file_name" not in image for image in dicts)
    if missing:
        raise GDetKDError(
            f"A {architecture} cannot learn from {name!r}: {missing} of its {len(dicts)} images have no "
            "`sem_seg_file_name`, the map of their stuff classes. Register the dataset with Detectron2's "
            "`register_coco_panoptic_separated`, or train a detector of things alone (GeneralizedRCNN)."
        )


def _key_that_needs_masks(cfg: CfgNode) -> str:
    if cfg.INPUT.INSTABOOST.ENABLED:
        return "INPUT.INSTABOOST.ENABLED"
    return "MODEL.MASK_ON" if has_mask_head(cfg) else ""


def _check_share_with_masks(cfg: CfgNode, key: str, dicts: List[Item], name: str) -> int:
    """Check that few enough objects lack a mask. Return how many do."""
    objects, max_fraction = _objects(dicts), cfg.INPUT.MAX_BAD_FRACTION
    missing = sum(not has_mask(item) for item in objects)
    if missing > max_fraction * len(objects):
        raise GDetKDError(
            f"{name}: {missing} of {len(objects)} objects have no mask, but {key} is True. That is more than "
            f"INPUT.MAX_BAD_FRACTION {max_fraction:g} allows. Set {key} to False, or add masks."
        )
    return missing


def _check_mask_format(cfg: CfgNode, dicts: List[Item], name: str) -> None:
    run_lengths = sum(has_mask(item) and not isinstance(item["segmentation"], list) for item in _objects(dicts))
    if run_lengths and cfg.INPUT.MASK_FORMAT == "polygon":
        raise GDetKDError(
            f"{run_lengths} objects of {name!r} have masks that are not polygons. Set INPUT.MASK_FORMAT to 'bitmask'."
        )


def _check_mask_sizes(dicts: List[Item], name: str) -> None:
    """Check that each mask of pixels is as large as its image. pycocotools gives other masks an IoU of -1."""
    sizes = [
        (image, _mask_size(annotation.get("segmentation")), [image["height"], image["width"]])
        for image in dicts
        if "height" in image and "width" in image
        for annotation in image.get("annotations", ())
    ]
    wrong = [(image, size, wanted) for image, size, wanted in sizes if size and size != wanted]
    if wrong:
        image, size, wanted = wrong[0]
        raise GDetKDError(
            f"{len(wrong)} masks of {name!r} are not as large as their images. In {image['file_name']!r}, a mask has "
            f"height and width {size}, and the image {wanted}. Correct the masks, or set MODEL.MASK_ON to False."
        )


def _mask_size(mask: Any) -> List[int]:
    """Return the height and width of a mask of pixels, an array or run lengths. It is empty for polygons."""
    if isinstance(mask, np.ndarray):
        return list(mask.shape)
    return list(mask.get("size", ())) if isinstance(mask, dict) else []


def _check_keypoints(cfg: CfgNode, dicts: List[Item], name: str) -> int:
    """Check the number of keypoints of every object. Return how many objects have keypoints."""
    wanted = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    counts = [len(item["keypoints"]) for item in _objects(dicts) if _is_given(item.get("keypoints"))]
    wrong = [count for count in counts if count != 3 * wanted]
    if wrong:
        raise GDetKDError(
            f"{len(wrong)} objects of {name!r} have another number of keypoints than the student's {wanted}: "
            f"{wrong[0]} numbers, {wrong[0] / 3:g} keypoints of x, y and visibility. Set "
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, or correct the annotations."
        )
    return len(counts)


def _check_keypoint_names(cfg: CfgNode, name: str) -> None:
    metadata, wanted = MetadataCatalog.get(name), cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    names = metadata.get("keypoint_names")
    if names is None or metadata.get("keypoint_flip_map") is None:
        raise GDetKDError(
            f"The dataset {name!r} does not name its keypoints, which Detectron2 needs to flip images. List them in a "
            "COCO file under `keypoints`, with the same list for all categories. For a dataset registered in Python, "
            f"use MetadataCatalog.get({name!r}).set(keypoint_names=[...], keypoint_flip_map=[...])."
        )
    if len(names) != wanted:
        raise GDetKDError(
            f"The dataset {name!r} names {len(names)} keypoints and the student has {wanted}. Set "
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, or correct the names."
        )
    if not metadata.get("keypoint_flip_map") and cfg.INPUT.RANDOM_FLIP == "horizontal":
        logger.warning(
            "%s: no names of keypoints differ by left and right, so no keypoints change places in a "
            "flipped image. If some should, name them like left_eye and right_eye, or set INPUT.RANDOM_FLIP to none.",
            name,
        )


def _check_sigmas(cfg: CfgNode, name: str) -> None:
    wanted, given = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if wanted != (given or COCO_KEYPOINTS):
        raise GDetKDError(
            f"The keypoints of {name!r} cannot be evaluated: TEST.KEYPOINT_OKS_SIGMAS has {given} numbers and the "
            f"student {wanted} keypoints. Give a number for every keypoint: the tolerance as a share of the object's "
            "size. COCO's numbers are 0.026 to 0.107 (https://cocodataset.org/#keypoints-eval)."
        )
