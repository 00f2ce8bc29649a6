"""Pool regions by RoIAlign, on every level of a pyramid or each region on its own level.

Shapes: B images, N regions in all images, L levels, C channels, (h, w) the pooled size.
"""

from functools import partial
from typing import Sequence, Tuple

import torch
from torchvision.ops import roi_align

from .roi_align_cpu import roi_align_cpu
from .structures import Regions, full_precision


def pool_all_levels(
    maps: Sequence[torch.Tensor],
    strides: Sequence[int],
    regions: Regions,
    size: Tuple[int, int],
    sampling_ratio: int,
) -> torch.Tensor:
    """Pool each region on each level by RoIAlign (aligned: shifted by half a pixel).

    Args:
        maps: by level, (B, C, H_l, W_l).
        strides: by level, pixels of the input image per cell.
        regions: N boxes over B images.
        size: (h, w).
        sampling_ratio: samples per bin and axis, at least 1.

    Returns:
        (N, L, C, h, w), channels last in memory, because SGFI's convolutions are faster so (docs/performance.md).
    """
    # The boxes get the precision of the maps. Half precision would move them by pixels.
    maps = [full_precision(feature_map) for feature_map in maps]
    pool = roi_align_cpu if maps[0].device.type == "cpu" else _pool_with_torchvision
    return pool(maps, strides, regions, size, sampling_ratio)


def _pool_with_torchvision(
    maps: Sequence[torch.Tensor], strides: Sequence[int], regions: Regions, size: Tuple[int, int], sampling_ratio: int
) -> torch.Tensor:
    parts = [roi_align_torchvision(*level, regions, size, sampling_ratio) for level in zip(maps, strides)]
    return torch.stack([part.permute(0, 2, 3, 1) for part in parts], dim=1).permute(0, 1, 4, 2, 3)


def roi_align_torchvision(
    feature_map: torch.Tensor, stride: int, regions: Regions, size: Tuple[int, int], sampling_ratio: int
) -> torch.Tensor:
    """Pool each region on one level by torchvision's RoIAlign: (N, C, h, w). Arguments are as in `pool_all_levels`."""
    boxes = [boxes.tensor.to(feature_map.dtype) for boxes in regions.boxes]
    return roi_align(feature_map, boxes, size, 1.0 / stride, sampling_ratio, aligned=True)


def pool_on_levels(
    maps: Sequence[torch.Tensor],
    strides: Sequence[int],
    regions: Regions,
    levels: torch.Tensor,
    size: Tuple[int, int],
    sampling_ratio: int,
) -> torch.Tensor:
    """Pool each region on its level by RoIAlign. The other arguments are as in `pool_all_levels`.

    Args:
        levels: (N,) index of each region's level.

    Returns:
        (N, C, h, w)
    """

    def pool(feature_map: torch.Tensor, stride: int, part: Regions) -> torch.Tensor:
        return pool_all_levels([feature_map], [stride], part, size, sampling_ratio)[:, 0]

    # A level without regions stays in the graph, so that SyncBN's backward pass is the same on every process.
    return regions.on_levels(levels, [partial(pool, *level) for level in zip(maps, strides)])
