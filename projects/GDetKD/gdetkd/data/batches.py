"""Choose the images of each batch. A batch is a list of (index, position).

The position of an image counts the images that all processes have taken so far. With the seed it determines the
augmentations.
"""

from collections import deque
from itertools import islice
from typing import Callable, Deque, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from .samplers import SeededSampler

Batch = List[Tuple[int, int]]
# Batches of unlabelled images that wait for a labelled batch of their shape.
MOST_WAITING = 16


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

    If images are grouped by their shape, both batches have wide images, or neither has. If the unlabelled stream has
    too few batches of one kind, the other kind takes their place.

    Args:
        offset: is added to the indices of the unlabelled stream.
        wide: says for each image of both streams whether it is wider than high. None: no grouping.
    """

    def __init__(
        self,
        labeled: Iterable[Batch],
        unlabeled: Iterable[Batch],
        offset: int,
        wide: Optional[Sequence[bool]] = None,
    ) -> None:
        self._labeled = labeled
        self._unlabeled = unlabeled
        self._offset = offset
        self._wide = wide

    def _is_wide(self, batch: Batch) -> bool:
        return bool(self._wide is not None and self._wide[batch[0][0]])

    def __iter__(self) -> Iterator[Batch]:
        waiting: Dict[bool, Deque[Batch]] = {False: deque(), True: deque()}
        unlabeled = ([(index + self._offset, position) for index, position in batch] for batch in self._unlabeled)
        for labeled in self._labeled:
            kind = self._is_wide(labeled)
            while not waiting[kind] and len(waiting[not kind]) < MOST_WAITING:
                batch = next(unlabeled)
                waiting[self._is_wide(batch)].append(batch)
            yield [*labeled, *(waiting[kind] or waiting[not kind]).popleft()]


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
    order = TrainingSampler(images.total - images.labeled, seed=seed + 1)
    unlabeled_stream = BatchStream(lambda: iter(order), unlabeled, wide)
    return MixedStream(stream, unlabeled_stream, images.labeled, images.wide)
