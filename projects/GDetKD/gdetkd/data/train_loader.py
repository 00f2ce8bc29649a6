"""A training loader whose every batch is a function of seed and position, so that a run continues where it stopped.

Detectron2's sampler starts over on resume, and its augmentations draw from the state of whichever worker runs them.
"""

import os
import random
import signal
import threading
from itertools import islice
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.data.detection_utils import check_image_size, read_image
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..errors import GDetKDError
from ..random_state import random_state
from .clean import BadImages, without_bad_images
from .headers import IMAGE_ERRORS
from .instaboost import InstaBoostMapper
from .samplers import build_sampler, check_sampler
from .train_images import are_wide, describe, load_images

Sample = Dict[str, Any]
# Under this key a sample says which images it was taken in place of, and why.
BAD_IMAGES = "bad_images"
ATTEMPTS = 100  # at an image that can be used


class PositionedDataset(Dataset):
    """Maps (index, position) to a sample whose augmentations depend on seed and position alone.

    Args:
        dicts: of the images, in Detectron2's format; a list, or serialised as Detectron2's `DatasetFromList`.
    """

    def __init__(self, dicts: Sequence[Sample], mapper: Callable[[Sample], Sample], seed: int) -> None:
        self._dicts = dicts
        self._mapper = mapper
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dicts)

    def __getitem__(self, key: Tuple[int, int]) -> Sample:
        index, position = key
        bad: Dict[str, str] = {}
        for attempt in range(ATTEMPTS):
            # Another image in the place of a broken one is a function of seed and position, too.
            seed = (self._seed, position, attempt) if attempt else (self._seed, position)
            with random_state(seed):
                index = random.randrange(len(self)) if attempt else index
                dataset_dict = self._dicts[index]
                try:
                    sample = self._mapper(dataset_dict)
                except GDetKDError:
                    raise
                except IMAGE_ERRORS as e:
                    if not isinstance(e, OSError) and _is_sound(dataset_dict):
                        raise GDetKDError(
                            f"The image {dataset_dict['file_name']!r} is sound, but no training sample could be made "
                            f"of it ({type(e).__name__}: {e}). Look at its annotations, and at what maps them."
                        ) from e
                    bad[dataset_dict["file_name"]] = f"does not open ({type(e).__name__}: {e})"
                    continue
            return {**sample, BAD_IMAGES: bad} if bad else sample
        raise GDetKDError(f"{ATTEMPTS} images in turn cannot be used, of them {next(iter(bad.items()))}.")


def _is_sound(sample: Sample) -> bool:
    """What a broken image raises is what a mistake in annotations or in a mapper raises, too."""
    try:
        check_image_size(dict(sample), read_image(sample["file_name"], "RGB"))
    except IMAGE_ERRORS:
        return False
    return True


class BatchStream:
    """The endless stream of batches of this process, as lists of (index, position).

    Args:
        indices: yields this process's image indices, endlessly.
        batch_size: images of a batch.
        wide: of each image, whether it is wider than high; batches are of one kind, as Detectron2's
            ASPECT_RATIO_GROUPING makes them. None: no grouping.
    """

    def __init__(
        self, indices: Callable[[], Iterator[int]], batch_size: int, wide: Optional[Sequence[bool]] = None
    ) -> None:
        self._indices = indices
        self._batch_size = batch_size
        self._wide = wide

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        buckets: Dict[bool, List[Tuple[int, int]]] = {False: [], True: []}
        for step, index in enumerate(self._indices()):
            bucket = buckets[bool(self._wide is not None and self._wide[index])]
            bucket.append((index, step * world_size + rank))
            if len(bucket) == self._batch_size:
                yield bucket[:]
                bucket.clear()


class ResumableLoader:
    """Iterates over training batches from iteration `start_iter` on, which may be set until the first is taken.

    Attributes:
        seed: determines the order of images and every augmentation.
        start_iter: iterations that an earlier run took already.
        description: as `describe` makes it. Every checkpoint holds it.

    Args:
        dicts: serialised. The loader lives as long as the training, and the dicts as Python objects are several times
            as large.
    """

    def __init__(
        self,
        dicts: DatasetFromList,
        mapper: Callable[[Sample], Sample],
        batches: Callable[[int], BatchStream],
        seed: int,
        num_workers: int,
        bad_images: BadImages,
        description: Dict[str, Any],
    ) -> None:
        self.seed = seed
        self.start_iter = 0
        self.description = description
        self._dicts = dicts
        self._mapper = mapper
        self._batches = batches
        self._num_workers = num_workers
        self._bad_images = bad_images

    def __iter__(self) -> Iterator[List[Sample]]:
        # A generator: Detectron2 v0.6 asks for it in the trainer's constructor, before it is known where to start.
        loader = DataLoader(
            PositionedDataset(self._dicts, self._mapper, self.seed),
            batch_sampler=_Skipping(self._batches(self.seed), self.start_iter),
            num_workers=self._num_workers,
            collate_fn=list,
            worker_init_fn=outlive_warning,
            # Of its own, because the loader would take its workers' seeds from the state that training draws from.
            generator=torch.Generator().manual_seed(self.seed % 2**63),
        )
        for batch in loader:
            for sample in batch:  # noted here, for a worker's counts are its own
                self._bad_images.note(sample.pop(BAD_IMAGES, {}))
            yield batch


def outlive_warning(worker: int) -> None:
    """A cluster warns every process by SIGTERM, and a training whose workers are gone could not save.

    The training process itself ends its workers by the same signal, so that it matters who sends it.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    # Some kernels deliver a signal in spite of `sigwaitinfo`. torch's handler would then end the worker.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class _Skipping:
    """An iterable without its first `count` items."""

    def __init__(self, items: BatchStream, count: int) -> None:
        self._items = items
        self._count = count

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        return islice(iter(self._items), self._count, None)


def images_per_process(cfg: CfgNode, processes: int) -> int:
    """Of a step.

    Raises:
        GDetKDError: the images of a step do not divide by the processes that share them.
    """
    images = cfg.SOLVER.IMS_PER_BATCH
    if images % processes:
        raise GDetKDError(
            f"SOLVER.IMS_PER_BATCH {images} does not divide by {processes} processes: set it to "
            f"{max(1, images // processes) * processes}, or take another number of GPUs."
        )
    return images // processes


def build_train_loader(cfg: CfgNode) -> ResumableLoader:
    """Detectron2's training loader, config keys and all, but resumable.

    Raises:
        GDetKDError: the number of images a step does not divide by the number of processes, which do not have the same
            images, or a value that the sampler reads is wrong.
    """
    count = images_per_process(cfg, comm.get_world_size())
    check_sampler(cfg)
    names, most = ", ".join(cfg.DATASETS.TRAIN), cfg.INPUT.MAX_BAD_FRACTION
    all_dicts, datasets = load_images(cfg)
    dicts, kept = without_bad_images(all_dicts, most, names)
    wide = are_wide(dicts, names) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
    sampler = build_sampler(cfg, dicts, datasets[kept])
    loader = ResumableLoader(
        DatasetFromList(dicts, copy=False),
        InstaBoostMapper(cfg) if cfg.INPUT.INSTABOOST.ENABLED else DatasetMapper(cfg, is_train=True),
        lambda seed: BatchStream(lambda: iter(sampler(seed)), count, wide),
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        bad_images=BadImages(len(all_dicts), len(all_dicts) - len(dicts), most, names),
        description=describe(dicts),
    )
    _check_same_everywhere(loader, names)
    return loader


def _check_same_everywhere(loader: ResumableLoader, names: str) -> None:
    """Each process leaves out what it cannot read, and one index would be several images.

    Raises:
        GDetKDError: on every process, they do not have the same images.
    """
    found = comm.all_gather(loader.description)
    if any(each != found[0] for each in found):
        counts = ", ".join(f"{each['images']} for process {rank}" for rank, each in enumerate(found))
        raise GDetKDError(
            f"{names}: the processes do not have the same images to train on ({counts}). Can all of them read the same "
            "folder? The log of each names what it left out."
        )
