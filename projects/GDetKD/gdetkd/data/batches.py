"""Choose the images of each batch. A batch is a list of (index, position).

The position of an image counts the images that all processes have taken so far. With the seed it determines the
augmentations.
"""

from itertools import islice
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from .samplers import SeededSampler

Batch = List[Tuple[int, int]]


class BatchStream:
    """Iterate endlessly over the batches of this process, which are lists of (index, position).

    Args:
        indices: yields this process's image indices, endlessly.
        batch_size: the number of images in a batch.
        wide: says for each image whether it is wider than high. A batch then has only wide images or none, as with
            Detectron2's ASPECT_RATIO_GROUPING. None: no grouping.
    """

    def __init__(
        self, indices: Callable[[], Iterator[int]], batch_size: int, wide: Optional[Sequence[bool]] = None
    ) -> None:
        self._indices = indices
        self._batch_size = batch_size
        self._wide = wide

    def __iter__(self) -> Iterator[Batch]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        buckets: Dict[bool, Batch] = {False: [], True: []}
        for step, index in enumerate(self._indices()):
            bucket = buckets[bool(self._wide is not None and self._wide[index])]
            bucket.append((index, step * world_size + rank))
            if len(bucket) == self._batch_size:
                yield bucket[:]
                bucket.clear()


class MixedStream:
    """Join each labelled batch and an unlabelled one, which are lists of (index, position). Both streams are endless.

    Args:
        offset: is added to the indices of the unlabelled stream.
    """

    def __init__(self, labeled: Iterable[Batch], unlabeled: Iterable[Batch], offset: int) -> None:
        self._labeled = labeled
        self._unlabeled = unlabeled
        self._offset = offset

    def __iter__(self) -> Iterator[Batch]:
        for labeled, unlabeled in zip(self._labeled, self._unlabeled):
            yield [*labeled, *((index + self._offset, position) for index, position in unlabeled)]


class Skipping:
    """Iterate over items without the first `count` items."""

    def __init__(self, items: Iterable[Batch], count: int) -> None:
        self._items = items
        self._count = count

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self._items), self._count, None)


class ImageCounts(NamedTuple):
    """Count the images of a training, and say which are wide. The labelled images come first."""

    labeled: int
    total: int
    wide: Optional[np.ndarray]


def choose_batches(
    seed: int, sampler: SeededSampler, images: ImageCounts, labeled: int, unlabeled: int
) -> Iterable[Batch]:
    """Return the batches of this process, which are lists of (index, position).

    Args:
        labeled, unlabeled: the numbers of images of a batch with and without labels.
    """
    stream = BatchStream(lambda: iter(sampler(seed)), labeled, images.wide)
    if not unlabeled:
        return stream
    wide = None if images.wide is None else images.wide[images.labeled :]
    order = TrainingSampler(images.total - images.labeled, seed=seed)
    return MixedStream(stream, BatchStream(lambda: iter(order), unlabeled, wide), images.labeled)
