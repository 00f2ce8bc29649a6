"""RoIAlign as matrix products, for the CPU, where torchvision's backward scatters one sample at a time.

Bilinear interpolation and the mean over a bin's samples both factor into a vertical and a horizontal part, so a
region's output is A_y F A_x^T with A_y (h, H) and A_x (w, W), and its backward is two more products.

Shapes: B images, N regions in all of them, n of one image, L levels, C channels, (h, w) the pooled size.
"""

from typing import Any, List, Sequence, Tuple

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .structures import Regions


def roi_align_separable(
    maps: Sequence[torch.Tensor], strides: Sequence[int], regions: Regions, size: Tuple[int, int], sampling_ratio: int
) -> torch.Tensor:
    """RoIAlign of each region on each level, in torchvision's values.

    Args:
        maps: L maps, each (B, C, H_l, W_l).
        strides: pixels of the input image per cell of each map.
        regions: N boxes over B images; no gradient flows to them.
        size: (h, w).
        sampling_ratio: samples per bin and axis, at least 1.

    Returns:
        (N, L, C, h, w), channels last in memory.
    """
    counts = [len(boxes) for boxes in regions.boxes]
    boxes = regions.tensor().to(maps[0].dtype)
    pooled = _RoIAlign.apply(boxes, counts, tuple(strides), tuple(size), sampling_ratio, *maps)
    return pooled.permute(0, 1, 4, 2, 3)


class _RoIAlign(Function):
    """Image by image, so that what lies between the two products stays in the processor's cache.

    Channels are last throughout, so that both products run along contiguous channels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        boxes: torch.Tensor,
        counts: List[int],
        strides: Tuple[int, ...],
        size: Tuple[int, int],
        sampling_ratio: int,
        *maps: torch.Tensor,
    ) -> torch.Tensor:
        pooled = maps[0].new_empty(len(boxes), len(maps), *size, maps[0].shape[1])  # (N, L, h, w, C)
        ctx.counts, ctx.shapes = counts, [feature_map.shape for feature_map in maps]
        matrices = []
        for level, (feature_map, stride) in enumerate(zip(maps, strides)):
            _, channels, height, width = feature_map.shape
            x1, y1, x2, y2 = (boxes / stride - 0.5).unbind(dim=1)
            along_x = _sampling_matrix(x1, x2, size[1], width, sampling_ratio)  # (N, w, W)
            along_y = _sampling_matrix(y1, y2, size[0], height, sampling_ratio)  # (N, h, H)
            matrices += [along_x, along_y]
            for image, mine in _of_each_image(counts):
                lines = feature_map[image].permute(1, 2, 0).reshape(height, width * channels)
                rows = along_y[mine].flatten(0, 1) @ lines  # (n h, W C)
                pooled[mine, level] = along_x[mine, None] @ rows.view(-1, size[0], width, channels)
        ctx.save_for_backward(*matrices)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Tuple[Any, ...]:
        gradients = []
        for level, (images, channels, height, width) in enumerate(ctx.shapes):
            along_x, along_y = ctx.saved_tensors[2 * level : 2 * level + 2]
            of_map = gradient.new_zeros(images, channels, height, width)
            for image, mine in _of_each_image(ctx.counts):
                rows = along_x[mine, None].transpose(2, 3) @ gradient[mine, level]  # (n, h, W, C)
                lines = along_y[mine].flatten(0, 1).t() @ rows.flatten(0, 1).flatten(1)  # (H, W C)
                of_map[image] = lines.view(height, width, channels).permute(2, 0, 1)
            gradients.append(of_map)
        return (None, None, None, None, None, *gradients)


def _of_each_image(counts: List[int]) -> List[Tuple[int, slice]]:
    """Each image that has regions, and where they stand among all."""
    found, start = [], 0
    for image, count in enumerate(counts):
        if count:
            found.append((image, slice(start, start + count)))
        start += count
    return found


def _sampling_matrix(
    start: torch.Tensor, end: torch.Tensor, bins: int, cells: int, sampling_ratio: int
) -> torch.Tensor:
    """(N, bins, cells): the weight of each cell in each bin along one axis, for N intervals in cell units.

    As in torchvision, a sample more than one cell outside counts as zero and others are moved to the border.
    """
    offsets = (torch.arange(bins * sampling_ratio, dtype=start.dtype, device=start.device) + 0.5) / sampling_ratio
    samples = start[:, None] + offsets * ((end - start) / bins)[:, None]  # (N, bins * sampling_ratio)
    inside = (samples >= -1) & (samples <= cells)
    cell = torch.arange(cells, dtype=start.dtype, device=start.device)
    weights = (1 - (samples.clamp(0, cells - 1)[..., None] - cell).abs()).clamp(min=0) * inside[..., None]
    return weights.view(len(start), bins, sampling_ratio, cells).mean(dim=2)
