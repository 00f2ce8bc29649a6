"""RoIAlign of the same regions on every level of a pyramid.

Shapes: B images, N regions in all of them, L levels, C channels, (h, w) the pooled size.
"""

from typing import Sequence, Tuple

import torch
from torchvision.ops import roi_align

from ..structures import Regions, full_precision
from .roi_align_cpu import roi_align_cpu


def pool_all_levels(
    maps: Sequence[torch.Tensor],
    strides: Sequence[int],
    regions: Regions,
    size: Tuple[int, int],
    sampling_ratio: int,
) -> torch.Tensor:
    """RoIAlign (aligned, i.e. half a pixel shifted) of each region on each level.

    Args:
        maps: L maps, each (B, C, H_l, W_l).
        strides: pixels of the input image per cell of each map.
        regions: N boxes over B images.
        size: (h, w).
        sampling_ratio: samples per bin and axis, at least 1.

    Returns:
        (N, L, C, h, w), channels last in memory, in which SGFI convolves them faster (docs/performance.md).
    """
    maps = [full_precision(each) for each in maps]  # boxes would get the precision of the maps
    pool = roi_align_cpu if maps[0].device.type == "cpu" else _pool_with_torchvision
    return pool(maps, strides, regions, size, sampling_ratio)


def _pool_with_torchvision(
    maps: Sequence[torch.Tensor], strides: Sequence[int], regions: Regions, size: Tuple[int, int], sampling_ratio: int
) -> torch.Tensor:
    parts = [roi_align_torchvision(*level, regions, size, sampling_ratio) for level in zip(maps, strides)]
    return torch.stack([each.permute(0, 2, 3, 1) for each in parts], dim=1).permute(0, 1, 4, 2, 3)


def roi_align_torchvision(
    feature_map: torch.Tensor, stride: int, regions: Regions, size: Tuple[int, int], sampling_ratio: int
) -> torch.Tensor:
    """(N, C, h, w): torchvision's RoIAlign, arguments as in `pool_all_levels`."""
    boxes = [boxes.tensor.to(feature_map.dtype) for boxes in regions.boxes]
    return roi_align(feature_map, boxes, size, 1.0 / stride, sampling_ratio, aligned=True)
