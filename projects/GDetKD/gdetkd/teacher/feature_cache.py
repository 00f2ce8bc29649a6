"""Keep the teacher's features of images that come again (DISTILL.TEACHER.CACHE_MB)."""

import logging
from typing import Callable, Dict, Sequence, Tuple

import torch

logger = logging.getLogger(__name__)

Features = Dict[str, torch.Tensor]
Key = Tuple[bytes, Tuple[int, ...]]


def size_of(features: Features) -> int:
    """Return the bytes of feature maps."""
    return sum(feature_map.nbytes for feature_map in features.values())


class FeatureCache:
    """Keep features in main memory by the pixels of the image, up to a limit.

    A frozen teacher has the same features for the same image. With a fixed image size and random flips, an image comes
    in two views only, so most of a training needs no pass through the teacher's backbone.

    When the limit is reached, the features that are kept stay. To drop the oldest ones would be useless, because the
    images of an epoch come in turn.

    Args:
        megabytes: the limit.

    Attributes:
        hits, misses: number of images since the last `take_share` whose features were, and were not, in the cache.
        is_full: whether features did not fit.
    """

    def __init__(self, megabytes: float) -> None:
        self._free = megabytes * 1e6  # bytes
        self.is_full = False
        self._kept: Dict[Key, Features] = {}
        self.hits = self.misses = 0

    def features(
        self, images: Sequence[torch.Tensor], keys: Sequence[bytes], compute: Callable[[torch.Tensor], Features]
    ) -> Features:
        """Return the features of a batch by name, (images, C, H, W).

        Args:
            images: (1, 3, height, width) each, preprocessed and padded, on the device. If they differ in size, the
                last row and column of the maps of smaller images are repeated.
            keys: by image, what `gdetkd.data.teacher_view.key_of` returned for the image before that.
            compute: runs the backbone. It gets one image at a time, so that the features of an image do not depend on
                the others in its batch, and a resumed run is exact.
        """
        found = [self._features(image, key, compute) for image, key in zip(images, keys)]
        return {name: _joined([features[name] for features in found]) for name in found[0]}

    def _features(self, image: torch.Tensor, key: bytes, compute: Callable[[torch.Tensor], Features]) -> Features:
        place = key, tuple(image.shape)  # padding has an effect on the features
        if place in self._kept:
            self.hits += 1
            return {name: kept.to(image.device, non_blocking=True) for name, kept in self._kept[place].items()}
        self.misses += 1
        features = compute(image)
        self._keep(place, features)
        return features

    def _keep(self, place: Key, features: Features) -> None:
        size = size_of(features)
        if size <= self._free:
            self._free -= size
            # A copy of its own: a part of a larger tensor would keep all of it in memory.
            self._kept[place] = {
                name: feature_map.detach().to("cpu", copy=True) for name, feature_map in features.items()
            }
        elif not self.is_full:
            self.is_full = True
            logger.info(
                "The teacher's features of %d views fill DISTILL.TEACHER.CACHE_MB. The teacher's backbone runs for "
                "all other views.",
                len(self._kept),
            )

    def take_share(self) -> float:
        """Return the fraction of images since the last call that were found in the cache, and count anew."""
        share = self.hits / max(1, self.hits + self.misses)
        self.hits = self.misses = 0
        return share


def _joined(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join maps (1, C, h, w) of an image each. The last row and the last column of smaller maps are repeated.

    RoIAlign reads the border of an image's own map in the same way. So what it reads does not depend on the batch.
    """
    if len({level.shape for level in maps}) == 1:
        return torch.cat(list(maps))
    height, width = (max(level.shape[side] for level in maps) for side in (2, 3))
    rows, columns = (torch.arange(size, device=maps[0].device) for size in (height, width))
    return torch.cat(
        [level[:, :, rows.clamp(max=level.shape[2] - 1)][..., columns.clamp(max=level.shape[3] - 1)] for level in maps]
    )
