"""RoIAlign as a product with a sparse matrix, for the CPU, where torchvision takes one channel of a sample at a time.

A bin of a region is a weighted sum of cells, all channels alike, and the weights depend on the boxes alone. With a row
for each cell of all maps, pooling is a weighted sum of rows for each bin, and its backward pass one for each cell:
twice `embedding_bag`, which runs along contiguous channels.

Shapes: B images, N regions in all of them, L levels, C channels, (h, w) the pooled size, s the sampling ratio.
"""

from typing import Any, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..structures import Regions


def roi_align_cpu(
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
    shapes = [feature_map.shape for feature_map in maps]
    cells, weights = _weights_of_cells(regions, maps[0].dtype, shapes, strides, size, sampling_ratio)
    pooled = _SumsOfRows.apply(cells, weights, *maps)
    return pooled.unflatten(2, size).permute(0, 1, 4, 2, 3)


class _SumsOfRows(Function):
    @staticmethod
    def forward(ctx: Any, cells: torch.Tensor, weights: torch.Tensor, *maps: torch.Tensor) -> torch.Tensor:
        """(N, L, h w, K) and (N, L, h w, K) of K cells for each bin, and the maps -> (N, L, h w, C)"""
        ctx.save_for_backward(cells, weights)
        ctx.shapes = [feature_map.shape for feature_map in maps]
        rows = torch.cat([feature_map.permute(0, 2, 3, 1).flatten(0, 2) for feature_map in maps])
        weights = weights.flatten(0, 2)
        pooled = F.embedding_bag(cells.flatten(0, 2), rows, mode="sum", per_sample_weights=weights)
        return pooled.view(*cells.shape[:3], rows.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Tuple[Any, ...]:
        cells, weights = ctx.saved_tensors
        bins = torch.arange(cells.shape[:3].numel(), dtype=cells.dtype).view(*cells.shape[:3], 1).expand_as(cells)
        gradient = gradient.flatten(0, 2).contiguous()
        gradients, first = [], 0
        for level, (images, channels, height, width) in enumerate(ctx.shapes):
            # Stable, so that sums are always taken in the same order. `index_select` is several times as fast as `[]`.
            ordered, order = cells[:, level].flatten().sort(stable=True)
            mine = torch.arange(first, first + images * height * width, dtype=cells.dtype)
            rows = F.embedding_bag(
                bins[:, level].flatten().index_select(0, order),
                gradient,
                torch.searchsorted(ordered, mine, out_int32=True),
                mode="sum",
                per_sample_weights=weights[:, level].flatten().index_select(0, order),
            )
            gradients.append(rows.view(images, height, width, channels).permute(0, 3, 1, 2).contiguous())
            first += len(mine)
        return (None, None, *gradients)


def _weights_of_cells(
    regions: Regions,
    dtype: torch.dtype,
    shapes: Sequence[torch.Size],
    strides: Sequence[int],
    size: Tuple[int, int],
    sampling_ratio: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The 4 s s cells that each bin is made of, as rows of all maps one under another, and their weights.

    Returns:
        both (N, L, h w, 4 s s).
    """
    boxes, image_ids = regions.tensor().to(dtype), regions.image_ids().int()
    taps = 2 * sampling_ratio
    cells = image_ids.new_empty(len(boxes), len(shapes), *size, taps * taps)
    weights = boxes.new_empty(cells.shape)
    start = 0
    for level, ((images, _, height, width), stride) in enumerate(zip(shapes, strides)):
        x1, y1, x2, y2 = (boxes / stride - 0.5).unbind(dim=1)
        columns, along_x = _taps(x1, x2, size[1], width, sampling_ratio)  # (N, w, 2 s)
        lines, along_y = _taps(y1, y2, size[0], height, sampling_ratio)  # (N, h, 2 s)
        lines = start + (image_ids[:, None, None] * height + lines) * width
        # Both repeated to the pairs of taps first: a long last axis is what elementwise operations are fast on.
        torch.add(_every(lines, taps)[:, :, None], columns.repeat(1, 1, taps)[:, None], out=cells[:, level])
        torch.mul(_every(along_y, taps)[:, :, None], along_x.repeat(1, 1, taps)[:, None], out=weights[:, level])
        start += images * height * width
    return cells.flatten(2, 3), weights.flatten(2, 3)


def _every(values: torch.Tensor, times: int) -> torch.Tensor:
    return values.repeat_interleave(times, dim=2)


def _taps(
    start: torch.Tensor, end: torch.Tensor, bins: int, cells: int, sampling_ratio: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Along one axis, for N intervals in cell units: the two cells beside each sample, and their shares of the bin.

    As in torchvision, a sample more than one cell outside counts as zero and others are moved to the border.

    Returns:
        both (N, bins, 2 s).
    """
    offsets = (torch.arange(bins * sampling_ratio, dtype=start.dtype) + 0.5) / sampling_ratio
    samples = start[:, None] + offsets * ((end - start) / bins)[:, None]  # (N, bins s)
    inside = (samples >= -1) & (samples <= cells)
    samples = samples.clamp(0, cells - 1)
    first = samples.floor()
    beyond = samples - first
    shares = torch.stack([1 - beyond, beyond], dim=2) * (inside[..., None] / sampling_ratio)
    first = first.nan_to_num().int()  # of a box that is not finite, whose weights say so
    both = torch.stack([first, (first + 1).clamp(max=cells - 1)], dim=2)
    shape = len(start), bins, 2 * sampling_ratio
    return both.view(shape), shares.view(shape)
