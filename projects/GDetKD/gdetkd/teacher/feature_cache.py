"""Keep the teacher's features of images that come again (DISTILL.TEACHER.CACHE_MB)."""

import hashlib
import logging
from typing import Callable, Dict, Sequence

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

Features = Dict[str, torch.Tensor]


def key_of(image: torch.Tensor) -> bytes:
    """Return a digest of an image's pixels and size. An image on a GPU would make the CPU wait."""
    pixels = image.contiguous().cpu().numpy()
    return hashlib.blake2b(pixels.data, digest_size=16, key=str(tuple(image.shape)).encode()).digest()


def size_of(features: Features) -> int:
    """Return the bytes of feature maps."""
    return sum(feature_map.nbytes for feature_map in features.values())


class FeatureCache:
    """Keep features in main memory by the pixels of the image, up to a limit.

    A frozen teacher has the same features for the same image. With a fixed image size and random flips, an image comes
    in two views only, so most of a training needs no pass through the teacher's backbone. Each image is padded for
    itself, so that its features do not depend on the other images in its batch.

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
        self._kept: Dict[bytes, Features] = {}
        self.hits = self.misses = 0

    def features(self, keys: Sequence[bytes], compute: Callable[[int], Features], device: torch.device) -> Features:
        """Return the features of a batch by name, (images, C, H, W).

        A map is as large as the largest of the images needs. The maps of smaller images are 0 at the right and at the
        bottom.

        Args:
            keys: by image, what `key_of` returned.
            compute: returns the features (1, C, h, w) of an image, by its place in the batch.
            device: where the returned features are.
        """
        found = [self._features(key, place, compute) for place, key in enumerate(keys)]
        return {name: _joined([features[name] for features in found], device) for name in found[0]}

    def _features(self, key: bytes, place: int, compute: Callable[[int], Features]) -> Features:
        if key in self._kept:
            self.hits += 1
            return self._kept[key]
        self.misses += 1
        features = compute(place)
        self._keep(key, features)
        return features

    def _keep(self, key: bytes, features: Features) -> None:
        size = size_of(features)
        if size <= self._free:
            self._free -= size
            # A copy of its own: a part of a larger tensor would keep all of it in memory.
            self._kept[key] = {
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


def _joined(maps: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Join maps (1, C, h, w) of several sizes on a device, with zeros at the right and at the bottom."""
    height, width = (max(level.shape[side] for level in maps) for side in (2, 3))
    on_device = [level.to(device, non_blocking=True) for level in maps]
    return torch.cat([F.pad(level, (0, width - level.shape[3], 0, height - level.shape[2])) for level in on_device])
