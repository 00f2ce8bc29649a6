"""Compute how large a cache of the teacher's features must be to hold a training set (DISTILL.TEACHER.CACHE_MB)."""

import math
import statistics
from typing import Any, List

from detectron2.config import CfgNode

from ..distiller import GDetKD
from ..teacher.feature_cache import size_of

# Above this size nothing is said. Source: our choice.
LARGEST_MB = 16_000


def cache_advice(cfg: CfgNode, distiller: GDetKD, batches: List[Any], images: int) -> str:
    """Return advice on the size of the cache that holds all views of the training images, or "" if it would not help.

    There is no advice for a GPU, where nothing was measured. If a loss reads whole maps, an image has a view for each
    padded size. Then there is no advice if batches have several padded sizes.

    Args:
        batches: some training batches, to learn the mean size of the features.
        images: number of training images.
    """
    views = views_of_an_image(cfg)
    if views == 0 or cfg.MODEL.DEVICE != "cpu":
        return ""
    teacher = distiller.teacher
    padded_sizes = {teacher.preprocess(batch).tensor.shape[-2:] for batch in batches}
    if len(padded_sizes) > 1 and not distiller.reads_regions_alone:
        return ""
    size = statistics.fmean(size_of(teacher.extract([inputs])) for batch in batches for inputs in batch)
    megabytes = math.ceil(views * images * size / 1e6)
    if megabytes > LARGEST_MB or cfg.DISTILL.TEACHER.CACHE_MB >= megabytes:
        return ""
    return (
        f"Augmentation makes {views} view{'s' if views > 1 else ''} of each image. DISTILL.TEACHER.CACHE_MB "
        f"{megabytes} would keep the teacher's features of all views in main memory, in each process. Then its "
        "backbone runs once for each view."
    )


def views_of_an_image(cfg: CfgNode) -> int:
    """Return the number of views that Detectron2's augmentations make of an image, or 0 if they are many."""
    node = cfg.INPUT
    sizes = set(node.MIN_SIZE_TRAIN)
    if node.CROP.ENABLED or node.INSTABOOST.ENABLED or (node.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) > 1):
        return 0
    return len(sizes) * (1 if node.RANDOM_FLIP == "none" else 2)
