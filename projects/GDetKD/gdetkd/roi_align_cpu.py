"""RoIAlign for the CPU, as a product with a sparse matrix.

torchvision's kernel is slow on the CPU, because it takes one channel of a sample at a time.

A bin of a region is a weighted sum of cells. The weights depend on the boxes alone and are the same for all channels.
With the cells of all maps as rows of a matrix (cells, C), the forward pass is a weighted sum of rows for each bin, and
the backward pass a weighted sum for each cell. `embedding_bag` computes such sums along contiguous channels.

Shapes: B images, N regions in all images, L levels, C channels, (h, w) the pooled size, s the sampling ratio.
"""

from typing import Any, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .structures import Regions


def roi_align_cpu(
    maps: Sequence[torch.Tensor], strides: Sequence[int], regions: Regions, size: Tuple[int, int], sampling_ratio: int
) -> torch.Tensor:
    """Pool each region on each level by RoIAlign. The values are torchvision's.

    Args:
        maps: by level, (B, C, H_l, W_l).
        strides: by level, pixels of the input image per cell.
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
    """Sum the weighted cells of each bin."""

    @staticmethod
    def forward(ctx: Any, cells: torch.Tensor, weights: torch.Tensor, *maps: torch.Tensor) -> torch.Tensor:
        """Return the pooled features (N, L, h w, C).

        Args:
            cells: (N, L, h w, K) row indices of the K cells of each bin.
            weights: (N, L, h w, K) weights of these cells.
            maps: by level, (B, C, H_l, W_l).
        """
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
            # A stable sort keeps the order of the sums, so results repeat. `index_select` is much faster than `[]`.
            ordered, order = cells[:, level].flatten().sort(stable=True)
            level_cells = torch.arange(first, first + images * height * width, dtype=cells.dtype)
            rows = F.embedding_bag(
                bins[:, level].flatten().index_select(0, order),
                gradient,
                torch.searchsorted(ordered, level_cells, out_int32=True),
                mode="sum",
                per_sample_weights=weights[:, level].flatten().index_select(0, order),
            )
            gradients.append(rows.view(images, height, width, channels).permute(0, 3, 1, 2).contiguous())
            first += len(level_cells)
        return (None, None, *gradients)


def _weights_of_cells(
    regions: Regions,
    dtype: torch.dtype,
    shapes: Sequence[torch.Size],
    strides: Sequence[int],
    size: Tuple[int, int],
    sampling_ratio: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Find the 4 s s cells of each bin and their weights.

    Returns:
        row indices of the cells, with the cells of all maps one under another, and weights; both (N, L, h w, 4 s s).
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
        # Both sides are repeated to all pairs of taps first: elementwise operations are fast on a long last axis.
        torch.add(_repeat(lines, taps)[:, :, None], columns.repeat(1, 1, taps)[:, None], out=cells[:, level])
        torch.mul(_repeat(along_y, taps)[:, :, None], along_x.repeat(1, 1, taps)[:, None], out=weights[:, level])
        start += images * height * width
    return cells.flatten(2, 3), weights.flatten(2, 3)


def _repeat(values: torch.Tensor, times: int) -> torch.Tensor:
    return values.repeat_interleave(times, dim=2)


def _taps(
    start: torch.Tensor, end: torch.Tensor, bins: int, cells: int, sampling_ratio: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Find the two cells beside each sample and their shares of the bin, along one axis of N intervals in cell units.

    As in torchvision, a sample more than one cell outside the map counts as zero. A sample closer to the map moves to
    the border.

    Returns:
        indices of the cells and shares, both (N, bins, 2 s).
    """
    offsets = (torch.arange(bins * sampling_ratio, dtype=start.dtype) + 0.5) / sampling_ratio
    samples = start[:, None] + offsets * ((end - start) / bins)[:, None]  # (N, bins s)
    inside = (samples >= -1) & (samples <= cells)
    samples = samples.clamp(0, cells - 1)
    first = samples.floor()
    beyond = samples - first
    shares = torch.stack([1 - beyond, beyond], dim=2) * (inside[..., None] / sampling_ratio)
    first = first.nan_to_num().int()  # a box that is not finite needs valid indices; the shares stay not finite
    neighbours = torch.stack([first, (first + 1).clamp(max=cells - 1)], dim=2)
    shape = len(start), bins, 2 * sampling_ratio
    return neighbours.view(shape), shares.view(shape)
