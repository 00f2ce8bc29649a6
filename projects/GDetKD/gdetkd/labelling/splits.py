"""Compare images with the labelled splits of a config by their content: size in bytes first, then SHA-256."""

import os
from typing import Dict, Iterable, List, Sequence, Set, Tuple

from detectron2.config import CfgNode

from ..engine.preflight import load_dataset
from ..errors import GDetKDError, some
from ..safe_load import sha256_of_file
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
    copies = find_copies(images, _files_of(held_back))
    if copies:
        raise GDetKDError(
            f"{len(copies)} of the {len(images)} images are also in {some(held_back)}, which measures the student: "
            f"{some(sorted(copies), MOST_NAMED)}. A student that trains on them would be measured too high. Remove "
            "them from the images to label."
        )
    trained = find_copies(images, _files_of(cfg.DATASETS.TRAIN))
    remaining = [image for image in images if image.name not in trained]
    if not remaining:
        raise GDetKDError(
            f"All {len(images)} images are in DATASETS.TRAIN ({some(cfg.DATASETS.TRAIN)}), so they have labels "
            "already. Name images without labels."
        )
    return remaining, len(trained)


def find_copies(images: Sequence[ImageFile], paths: Iterable[str]) -> Set[str]:
    """Return the names of the images whose content one of the files has.

    Args:
        paths: files to compare with. A file that does not exist is skipped.
    """
    sizes = {image.bytes for image in images}
    by_size: Dict[int, List[str]] = {}
    for path in paths:
        if os.path.isfile(path) and os.path.getsize(path) in sizes:
            by_size.setdefault(os.path.getsize(path), []).append(path)
    digests = {size: {sha256_of_file(path) for path in same} for size, same in by_size.items()}
    suspects = [image for image in images if image.bytes in digests]
    return {image.name for image in suspects if sha256_of_file(image.path) in digests[image.bytes]}


def _files_of(datasets: Iterable[str]) -> List[str]:
    return [os.fspath(sample["file_name"]) for name in datasets for sample in load_dataset(name)]
