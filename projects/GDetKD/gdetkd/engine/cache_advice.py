"""Say how large a cache of the teacher's features must be, where one is useful (DISTILL.TEACHER.CACHE_MB)."""

import math
from typing import Any, Dict, List

from detectron2.config import CfgNode

from ..teacher import FrozenTeacher

# Above this size nothing is said. Source: our choice.
LARGEST_MB = 16_000


def cache_advice(cfg: CfgNode, teacher: FrozenTeacher, batch: List[Dict[str, Any]], images: int) -> str:
    """Return a sentence on the cache that holds all views of the training images, or "" if it would not help.

    Args:
        batch: a training batch, to learn the size of the features.
        images: number of training images.
    """
    views = views_of_an_image(cfg)
    if views == 0:
        return ""
    features = teacher.extract(batch).values()
    size = sum(feature_map.numel() * feature_map.element_size() for feature_map in features) / len(batch)
    megabytes = math.ceil(1.1 * views * images * size / 1e6)  # images differ in size
    if megabytes > LARGEST_MB or cfg.DISTILL.TEACHER.CACHE_MB >= megabytes:
        return ""
    return (
        f"An image has {views} view{'s' if views > 1 else ''}. DISTILL.TEACHER.CACHE_MB {megabytes} would keep the "
        "teacher's features of all of them in main memory, so that its backbone runs once for each."
    )


def views_of_an_image(cfg: CfgNode) -> int:
    """Return the number of views that Detectron2's augmentations make of an image, or 0 if they are many."""
    node = cfg.INPUT
    sizes = set(node.MIN_SIZE_TRAIN)
    if node.CROP.ENABLED or node.INSTABOOST.ENABLED or (node.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) > 1):
        return 0
    return len(sizes) * (1 if node.RANDOM_FLIP == "none" else 2)
