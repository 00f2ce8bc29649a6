"""Find dense predictions in the outputs of a head. The source of a prediction is its level, row, column and anchor.

Shapes: B images, A anchors of a location, K numbers of a prediction, N regions.
"""

from typing import Sequence

import torch


def gather(maps: Sequence[torch.Tensor], image_ids: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Gather the predictions at the given sources.

    Args:
        maps: by level, (B, A, K, H, W).
        image_ids: (N,) index of each region's image.
        sources: (N, 4) level, row, column, anchor.

    Returns:
        (N, K)
    """
    level, row, column, anchor = sources.unbind(dim=1)
    found = maps[0].new_zeros(len(sources), maps[0].shape[2])
    for index, values in enumerate(maps):
        # Every level is read for all sources, and `where` keeps the right values. Selecting the sources of a level
        # would make the GPU wait for their number.
        height, width = values.shape[-2:]
        on_level = values[image_ids, anchor, :, row.clamp(max=height - 1), column.clamp(max=width - 1)]
        found = torch.where((level == index)[:, None], on_level, found)
    return found


def by_anchor(prediction: torch.Tensor, width: int) -> torch.Tensor:
    """Split the channels by anchor: (B, A K, H, W) -> (B, A, K, H, W), K = width."""
    return prediction.unflatten(1, (-1, width))


def without_anchor(sources: torch.Tensor) -> torch.Tensor:
    """Set the anchor of sources (N, 4) to 0, for maps that have one vector for all anchors of a location."""
    return torch.cat([sources[:, :3], torch.zeros_like(sources[:, :1])], dim=1)


def places(level: int, scores: torch.Tensor) -> torch.Tensor:
    """List the sources of a level, in the order of Detectron2's anchors.

    Args:
        scores: (A, H, W), whose shape counts.

    Returns:
        (H W A, 4) level, row, column, anchor.
    """
    anchors, height, width = scores.shape
    ranges = [torch.arange(count, device=scores.device) for count in (height, width, anchors)]
    within = torch.cartesian_prod(*ranges).view(-1, 3)
    return torch.cat([within.new_full((len(within), 1), level), within], dim=1)
