"""Where dense predictions stand in what a head returns: level, row, column and anchor, the source of a box.

Shapes: B images, A anchors a location, N regions.
"""

from typing import Sequence

import torch


def gather(maps: Sequence[torch.Tensor], image_ids: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """(N, K): what stands at each source.

    Args:
        maps: by level, (B, A, K, H, W).
        image_ids: (N,)
        sources: (N, 4) level, row, column, anchor.
    """
    level, row, column, anchor = sources.unbind(dim=1)
    found = maps[0].new_zeros(len(sources), maps[0].shape[2])
    for index, values in enumerate(maps):
        # Something of each level, chosen by value: to select those of a level would make a GPU wait for their number.
        height, width = values.shape[-2:]
        here = values[image_ids, anchor, :, row.clamp(max=height - 1), column.clamp(max=width - 1)]
        found = torch.where((level == index)[:, None], here, found)
    return found


def by_anchor(prediction: torch.Tensor, width: int) -> torch.Tensor:
    """(B, A K, H, W) -> (B, A, K, H, W), K = width"""
    return prediction.unflatten(1, (-1, width))


def without_anchor(sources: torch.Tensor) -> torch.Tensor:
    """(N, 4): the same locations in maps that have one vector for all of a location's anchors."""
    return sources * sources.new_tensor([1, 1, 1, 0])


def places(level: int, scores: torch.Tensor) -> torch.Tensor:
    """(H W A, 4) level, row, column, anchor, in the order of Detectron2's anchors; scores (A, H, W)."""
    anchors, height, width = scores.shape
    ranges = [torch.arange(count, device=scores.device) for count in (height, width, anchors)]
    within = torch.cartesian_prod(*ranges).view(-1, 3)
    return torch.cat([within.new_full((len(within), 1), level), within], dim=1)
