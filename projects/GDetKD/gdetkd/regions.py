"""RoIAlign of the same regions on every level of a pyramid, and which of a dense detector's boxes are regions.

Shapes: B images, N regions in all of them, L levels, C channels, (h, w) the pooled size.
"""

from typing import Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling.sampling import subsample_labels
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou, nms, roi_align

from .structures import Regions

# Cells of a feature map up to which, on a CPU, two matrix products are faster than torchvision's RoIAlign,
# whose backward scatters one sample at a time (benchmarks/roi_align.py; figures in docs/results.md).
SEPARABLE_MAX_CELLS = 10_000


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
    pooled = []
    for feature_map, stride in zip(maps, strides):
        small = feature_map.shape[-2] * feature_map.shape[-1] <= SEPARABLE_MAX_CELLS
        pool = roi_align_separable if small and not feature_map.is_cuda else roi_align_torchvision
        pooled.append(pool(feature_map, stride, regions, size, sampling_ratio))
    return torch.stack([each.permute(0, 2, 3, 1) for each in pooled], dim=1).permute(0, 1, 4, 2, 3)


def roi_align_torchvision(
    feature_map: torch.Tensor, stride: int, regions: Regions, size: Tuple[int, int], sampling_ratio: int
) -> torch.Tensor:
    """(N, C, h, w): torchvision's RoIAlign, arguments as in `pool_all_levels`."""
    boxes = [boxes.tensor.to(feature_map.dtype) for boxes in regions.boxes]
    return roi_align(feature_map, boxes, size, 1.0 / stride, sampling_ratio, aligned=True)


def roi_align_separable(
    feature_map: torch.Tensor, stride: int, regions: Regions, size: Tuple[int, int], sampling_ratio: int
) -> torch.Tensor:
    """(N, C, h, w): the same values, as two matrix products.

    Bilinear interpolation and the mean over a bin's samples both factor into a vertical and a horizontal part, so a
    region's output is A_y F A_x^T with A_y (h, H) and A_x (w, W). Its backward is two more products.
    """
    images, channels, height, width = feature_map.shape
    counts = [len(boxes) for boxes in regions.boxes]
    # All images at once: those with fewer regions than the most, n, get empty ones that are dropped again.
    boxes = pad_sequence([boxes.tensor for boxes in regions.boxes], batch_first=True).flatten(0, 1)  # (B n, 4)
    x1, y1, x2, y2 = (boxes.to(feature_map.dtype) / stride - 0.5).unbind(dim=1)
    along_x = _sampling_matrix(x1, x2, size[1], width, sampling_ratio)  # (B n, w, W)
    along_y = _sampling_matrix(y1, y2, size[0], height, sampling_ratio)  # (B n, h, H)
    # Channels last throughout, so that both products run along contiguous channels.
    lines = feature_map.permute(0, 2, 3, 1).reshape(images, height, width * channels)
    rows = torch.bmm(along_y.view(images, max(counts) * size[0], height), lines)  # (B, n h, W C)
    pooled = torch.matmul(along_x[:, None], rows.view(len(boxes), size[0], width, channels))  # (B n, h, w, C)
    pooled = pooled.permute(0, 3, 1, 2)
    if min(counts) == max(counts):
        return pooled
    real = torch.cat([torch.arange(max(counts)) < count for count in counts]).to(pooled.device)
    return pooled[real]


def _sampling_matrix(
    start: torch.Tensor, end: torch.Tensor, bins: int, cells: int, sampling_ratio: int
) -> torch.Tensor:
    """(n, bins, cells): the weight of each cell in each bin along one axis, for n intervals in cell units.

    As in torchvision, a sample more than one cell outside counts as zero and others are moved to the border.
    """
    offsets = (torch.arange(bins * sampling_ratio, dtype=start.dtype, device=start.device) + 0.5) / sampling_ratio
    samples = start[:, None] + offsets * ((end - start) / bins)[:, None]  # (n, bins * sampling_ratio)
    inside = (samples >= -1) & (samples <= cells)
    cell = torch.arange(cells, dtype=start.dtype, device=start.device)
    weights = (1 - (samples.clamp(0, cells - 1)[..., None] - cell).abs()).clamp(min=0) * inside[..., None]
    return weights.view(len(start), bins, sampling_ratio, cells).mean(dim=2)


def suppress(boxes: torch.Tensor, scores: torch.Tensor, config: CfgNode) -> torch.Tensor:
    """Indices of the boxes that stand for the others, best first (method section 4).

    Args:
        boxes: (K, 4) xyxy in pixels, finite, with area.
        scores: (K,) the class-maximum score.
        config: the node DISTILL.REGIONS.
    """
    return nms(boxes, scores, config.NMS_THRESH)[: config.POST_NMS_TOPK]


def match_and_sample(boxes: torch.Tensor, gt_boxes: torch.Tensor, config: CfgNode) -> torch.Tensor:
    """Indices of the boxes that become regions: positives, those that overlap an object, and negatives.

    Args:
        boxes: (K, 4) xyxy in pixels.
        gt_boxes: (G, 4), G may be 0.
        config: the node DISTILL.REGIONS.

    Returns:
        at most BATCH_SIZE_PER_IMAGE indices; fewer positives than POSITIVE_FRACTION are made up for by negatives.
    """
    overlap = box_iou(gt_boxes, boxes).amax(dim=0) if len(gt_boxes) else boxes.new_zeros(len(boxes))
    labels = (overlap >= config.IOU_THRESHOLD).long()
    sampled = subsample_labels(labels, config.BATCH_SIZE_PER_IMAGE, config.POSITIVE_FRACTION, bg_label=0)
    return torch.cat(sampled)
