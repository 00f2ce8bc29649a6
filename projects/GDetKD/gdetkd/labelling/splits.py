"""Compare images with the labelled splits of a config by their content."""

import os
from typing import List, Sequence, Set, Tuple

from detectron2.config import CfgNode

from ..data.catalog import load_dataset
from ..data.content import same_files
from ..errors import GDetKDError, some
from .images import MOST_NAMED, ImageFile


def without_labelled(cfg: CfgNode, images: Sequence[ImageFile], validation: str) -> Tuple[List[ImageFile], int]:
    """Leave out the images of DATASETS.TRAIN, which have better labels already.

    Args:
        images: the images to label.
        validation: the dataset on which the thresholds are chosen, or "".

    Returns:
        the images that remain, and how many are left out.

    Raises:
        GDetKDError: an image is also in DATASETS.TEST or in `validation`, or no image remains.
    """
    held_back = list(dict.fromkeys([*cfg.DATASETS.TEST, *([validation] if validation else [])]))
    copies = _names_in(images, held_back)
    if copies:
        raise GDetKDError(
            f"{len(copies)} of the {len(images)} images are also in {some(held_back)}, which measures the student: "
            f"{some(sorted(copies), MOST_NAMED)}. A student that trains on them would be measured too high. Remove "
            "them from the images to label."
        )
    trained = _names_in(images, cfg.DATASETS.TRAIN)
    remaining = [image for image in images if image.name not in trained]
    if not remaining:
        raise GDetKDError(
            f"All {len(images)} images are in DATASETS.TRAIN ({some(cfg.DATASETS.TRAIN)}), so they have labels "
            "already. Name images without labels."
        )
    return remaining, len(trained)


def _names_in(images: Sequence[ImageFile], datasets: Sequence[str]) -> Set[str]:
    """Return the names of the images whose content an image of the datasets has."""
    files = [os.fspath(sample["file_name"]) for name in datasets for sample in load_dataset(name)]
    same = same_files([image.path for image in images], files)
    return {image.name for image in images if image.path in same}
