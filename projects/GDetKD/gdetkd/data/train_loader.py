"""Load training batches that depend only on the seed and their position, so that a resumed run gets the same batches.

Detectron2's sampler starts over on resume, and its augmentations depend on the worker that runs them.
"""

import random
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.detection_utils import check_image_size, read_image
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..errors import GDetKDError
from ..random_state import random_state
from .batches import Batch, ImageCounts, Skipping, choose_batches
from .clean import BadImages, without_bad_images
from .headers import IMAGE_ERRORS
from .samplers import build_sampler, check_sampler
from .train_images import are_wide, describe, load_images
from .train_mapper import build_mapper
from .unlabeled import describe_labels, is_unlabeled, load_unlabeled, unlabeled_per_batch
from .workers import OutlivingLoader

Sample = Dict[str, Any]
# The key under which a sample lists the broken images that it replaces, with the reasons.
BAD_IMAGES = "bad_images"
ATTEMPTS = 100  # images to try in the place of a broken image


class PositionedDataset(Dataset):
    """Map (index, position) to a sample whose augmentations depend only on seed and position.

    Args:
        dicts: images in Detectron2's format, as a list or serialised in Detectron2's `DatasetFromList`.
        labeled: the number of images with labels, which come first. None: all images.
    """

    def __init__(
        self,
        dicts: Sequence[Sample],
        mapper: Callable[[Sample], Sample],
        seed: int,
        labeled: Optional[int] = None,
    ) -> None:
        self._dicts = dicts
        self._labeled = len(dicts) if labeled is None else labeled
        self._mapper = mapper
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dicts)

    def __getitem__(self, key: Tuple[int, int]) -> Sample:
        index, position = key
        bad: Dict[str, str] = {}
        for attempt in range(ATTEMPTS):
            # An image that replaces a broken image, and the unlabelled image at this position, get augmentations of
            # their own. Zeros at the end do not change a seed.
            with random_state((self._seed, position, attempt, int(index >= self._labeled))):
                index = self._another(index) if attempt else index
                dataset_dict = self._dicts[index]
                try:
                    sample = self._mapper(dataset_dict)
                except GDetKDError:
                    raise
                except IMAGE_ERRORS as e:
                    if not isinstance(e, OSError) and _is_sound(dataset_dict):
                        raise GDetKDError(
                            f"The image {dataset_dict['file_name']!r} is sound, but no training sample could be made "
                            f"of it ({type(e).__name__}: {e}). Check its annotations and the dataset mapper."
                        ) from e
                    bad[dataset_dict["file_name"]] = f"does not open ({type(e).__name__}: {e})"
                    continue
            return {**sample, BAD_IMAGES: bad} if bad else sample
        path, reason = next(iter(bad.items()))
        raise GDetKDError(
            f"{ATTEMPTS} images in turn cannot be used. The first is {path!r}, which {reason}. Correct the files."
        )

    def _another(self, index: int) -> int:
        """Draw an image that has labels if the image at `index` has labels."""
        return random.randrange(self._labeled) if index < self._labeled else random.randrange(self._labeled, len(self))


def _is_sound(sample: Sample) -> bool:
    """Return whether an image opens. Mistakes in annotations and mappers raise the same errors as broken images."""
    try:
        check_image_size(dict(sample), read_image(sample["file_name"], "RGB"))
    except IMAGE_ERRORS:
        return False
    return True


class ResumableLoader:
    """Iterate over training batches from iteration `start_iter` on. Set it before the first batch is taken.

    Attributes:
        seed: determines the order of images and all augmentations.
        start_iter: the number of iterations of earlier runs.
        description: the description of the images by `describe`. Every checkpoint holds it.

    Args:
        dicts: serialised images. As Python objects they would take several times the memory for the whole training.
        bad_images: counts the bad images with labels, and then those without.
        labeled: the number of images with labels, which come first. None: all images.
    """

    def __init__(
        self,
        dicts: DatasetFromList,
        mapper: Callable[[Sample], Sample],
        batches: Callable[[int], Iterable[Batch]],
        seed: int,
        num_workers: int,
        bad_images: Sequence[BadImages],
        description: Dict[str, Any],
        labeled: Optional[int] = None,
    ) -> None:
        self.seed = seed
        self.start_iter = 0
        self.description = description
        self._dicts = dicts
        self._mapper = mapper
        self._batches = batches
        self._num_workers = num_workers
        self._bad_images = bad_images
        self._labeled = labeled

    def __iter__(self) -> Iterator[List[Sample]]:
        # This is a generator, because Detectron2 v0.6 calls it before `start_iter` is known.
        loader = DataLoader(
            PositionedDataset(self._dicts, self._mapper, self.seed, self._labeled),
            batch_sampler=Skipping(self._batches(self.seed), self.start_iter),
            num_workers=self._num_workers,
            collate_fn=list,
            # Without its own generator, the loader would change the random state of the training.
            generator=torch.Generator().manual_seed(self.seed % 2**63),
        )
        for batch in OutlivingLoader(loader):
            for sample in batch:  # counted here, because workers do not share their counts
                self._bad_images[is_unlabeled(sample)].note(sample.pop(BAD_IMAGES, {}))
            yield batch


def images_per_process(cfg: CfgNode, processes: int) -> int:
    """Return how many images of a step a process takes.

    Raises:
        GDetKDError: the images of a step cannot be divided evenly among the processes.
    """
    images = cfg.SOLVER.IMS_PER_BATCH
    if images % processes:
        raise GDetKDError(
            f"SOLVER.IMS_PER_BATCH {images} does not divide by {processes} processes: set it to "
            f"{max(1, images // processes) * processes}, or take another number of GPUs."
        )
    return images // processes


def build_train_loader(cfg: CfgNode) -> ResumableLoader:
    """Build a resumable training loader that reads the config keys of Detectron2's loader.

    Raises:
        GDetKDError: the images of a step cannot be divided evenly among the processes, the processes do not have the
            same images, or a config value for the sampler is invalid.
    """
    count = images_per_process(cfg, comm.get_world_size())
    count_unlabeled = unlabeled_per_batch(cfg, count)
    check_sampler(cfg)
    names, max_fraction = ", ".join(cfg.DATASETS.TRAIN), cfg.INPUT.MAX_BAD_FRACTION
    all_labeled, datasets = load_images(cfg)
    labeled, kept, bad_labeled = _usable(all_labeled, max_fraction, names)
    sampler = build_sampler(cfg, labeled, datasets[kept])
    unlabeled, _, bad_unlabeled = _usable(load_unlabeled(cfg), max_fraction, ", ".join(cfg.DATASETS.UNLABELED))
    dicts = [*labeled, *unlabeled]
    wide = are_wide(dicts, names) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
    images = ImageCounts(len(labeled), len(dicts), wide)  # the dicts themselves must not stay in memory
    counts = (count - count_unlabeled, count_unlabeled)
    loader = ResumableLoader(
        DatasetFromList(dicts, copy=False),
        build_mapper(cfg),
        lambda seed: choose_batches(seed, sampler, images, *counts),
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        bad_images=[bad_labeled, bad_unlabeled],
        description={**describe(dicts), **describe_labels(cfg)},
        labeled=len(labeled),
    )
    _check_same_everywhere(loader, names)
    return loader


def _usable(dicts: List[Sample], max_fraction: float, names: str) -> Tuple[List[Sample], np.ndarray, BadImages]:
    """Return the images that can be used, (len(dicts),) booleans that say which these are, and a counter."""
    usable, kept = without_bad_images(dicts, max_fraction, names)
    return usable, kept, BadImages(len(dicts), len(dicts) - len(usable), max_fraction, names)


def _check_same_everywhere(loader: ResumableLoader, names: str) -> None:
    """Raise an error on all processes if they do not have the same images.

    A process leaves out images that it cannot read. Then an index would mean different images.
    """
    found = comm.all_gather(loader.description)
    if any(description != found[0] for description in found):
        counts = ", ".join(f"{description['images']} for process {rank}" for rank, description in enumerate(found))
        raise GDetKDError(
            f"{names}: the processes do not have the same images to train on ({counts}). Check that all of them can "
            "read the same folder. Their logs name the images that they left out."
        )
