"""Augment images by InstaBoost (Fang et al., ICCV 2019) with its authors' package, as G-DetKD's X-101 teacher does.

InstaBoost cuts objects out along their masks, fills the holes, and pastes the objects back, moved and turned a little.
"""

import copy
import importlib
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy, read_image
from detectron2.structures import BoxMode
from fvcore.transforms.transform import Transform
from PIL import Image

from ..errors import GDetKDError

# Maps (annotations, BGR image) to augmented annotations and image.
Boost = Callable[[List[Dict[str, Any]], np.ndarray], Tuple[List[Dict[str, Any]], np.ndarray]]


class InstaBoostMapper:
    """Apply InstaBoost with probability INPUT.INSTABOOST.PROBABILITY, and then another mapper.

    InstaBoost does not move crowds, and leaves images without objects as they are.

    Args:
        cfg: a config whose INPUT.INSTABOOST holds InstaBoost's parameters under their original names.
        mapper: the mapper that follows, with `augmentations`. None: Detectron2's mapper of training samples.

    Raises:
        GDetKDError: the package is not installed, or, when called, an object has no mask.
    """

    def __init__(self, cfg: CfgNode, mapper: Optional[Any] = None) -> None:
        self._mapper = mapper or DatasetMapper(cfg, is_train=True)
        self._boost = _load_boost(cfg.INPUT.INSTABOOST)
        self._probability = cfg.INPUT.INSTABOOST.PROBABILITY

    def __call__(self, dataset_dict: Dict[str, Any]) -> Dict[str, Any]:
        objects = [a for a in dataset_dict.get("annotations", []) if not a.get("iscrowd", 0)]
        if not objects or np.random.random() >= self._probability:
            return self._mapper(dataset_dict)
        image = read_image(dataset_dict["file_name"], "BGR")
        boosted, image = self._boost([_to_coco(a, dataset_dict["file_name"]) for a in objects], image)
        dataset_dict = dict(dataset_dict)
        dataset_dict["annotations"] = [_from_coco(a, image.shape[:2]) for a in boosted]
        # The mapper reads the image file. Its first augmentation then replaces the image by the boosted image.
        mapper = copy.copy(self._mapper)
        boosted_image = convert_PIL_to_numpy(Image.fromarray(image[:, :, ::-1]), mapper.image_format)
        mapper.augmentations = T.AugmentationList([_Replaced(boosted_image), *self._mapper.augmentations.augs])
        return mapper(dataset_dict)


class _Replaced(Transform):
    """Replace an image by another image of the same size."""

    def __init__(self, image: np.ndarray) -> None:
        super().__init__()
        self._image = image

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self._image

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords


def _load_boost(node: CfgNode) -> Boost:
    try:
        package = importlib.import_module("instaboostfast")
    except ImportError as e:
        raise GDetKDError(
            f"INPUT.INSTABOOST.ENABLED needs the package instaboostfast ({e}). Install it with "
            "pip install instaboostfast."
        ) from e
    config = package.InstaBoostConfig(
        action_candidate=tuple(node.ACTION_CANDIDATE),
        action_prob=tuple(node.ACTION_PROB),
        scale=tuple(node.SCALE),
        dx=node.DX,
        dy=node.DY,
        theta=tuple(node.THETA),
        color_prob=node.COLOR_PROB,
        heatmap_flag=node.HEATMAP_FLAG,
    )
    return lambda annotations, image: package.get_new_data(annotations, image, config)


def _to_coco(annotation: Dict[str, Any], file_name: str) -> Dict[str, Any]:
    """Convert an annotation to x, y, width, height and uncompressed run lengths, which the package reads."""
    mask = annotation.get("segmentation")
    if not mask:
        raise GDetKDError(
            f"INPUT.INSTABOOST cuts objects out along their masks, and an object in {file_name} has none. Train on a "
            "dataset with masks, or set INPUT.INSTABOOST.ENABLED to False."
        )
    if isinstance(mask, dict) and not isinstance(mask["counts"], list):
        mask = {"size": mask["size"], "counts": _run_lengths(mask_util.decode(mask))}
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)
    return {**annotation, "segmentation": mask, "bbox": [float(v) for v in box], "bbox_mode": BoxMode.XYWH_ABS}


def _from_coco(annotation: Dict[str, Any], size: Tuple[int, int]) -> Dict[str, Any]:
    mask = annotation["segmentation"]
    if isinstance(mask, dict):
        annotation = {**annotation, "segmentation": mask_util.frPyObjects(mask, *size)}
    return annotation


def _run_lengths(mask: np.ndarray) -> List[int]:
    """Return the lengths of alternating runs of 0 and 1 in COCO's column order. The first run is of 0."""
    flat = np.concatenate([[0], mask.flatten(order="F"), [2]]).astype(np.int8)
    return np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()
