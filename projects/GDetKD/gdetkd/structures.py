"""What a detector shows of itself to the losses."""

from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

import torch
from detectron2.structures import Boxes


@dataclass
class Regions:
    """Boxes of one step, the same for teacher and student.

    Attributes:
        boxes: one `Boxes` an image, xyxy in pixels of the (augmented, unpadded) input image; N in all.
    """

    boxes: List[Boxes]

    def tensor(self) -> torch.Tensor:
        """(N, 4) xyxy in pixels, images one after another."""
        return torch.cat([boxes.tensor for boxes in self.boxes])

    def image_ids(self) -> torch.Tensor:
        """(N,) index of each region's image in the batch."""
        counts = torch.tensor([len(boxes) for boxes in self.boxes], device=self.boxes[0].device)
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def __len__(self) -> int:
        return sum(len(boxes) for boxes in self.boxes)


@dataclass
class DetectorOutputs:
    """One detector's view of the regions; what a loss did not ask for is None.

    Attributes:
        pyramid: feature maps by name, finest first, each (images, C, H, W).
        strides: pixels of the input image per cell of each map, by the same names.
        regions: the boxes that all below is about.
        pooled: (N, C, h, w) RoIAlign on the level that the box-size rule assigns.
        level_pooled: (N, L, C, h, w) RoIAlign on every level; of a student alone.
        embeddings: (N, D) the vector just before the classification layer.
        logits: (N, n + 1) class scores, background last.
        deltas: (N, 4 n) box regression, or (N, 4) where it is class-agnostic.
    """

    pyramid: Dict[str, torch.Tensor]
    strides: Dict[str, int]
    regions: Optional[Regions] = None
    pooled: Optional[torch.Tensor] = None
    level_pooled: Optional[torch.Tensor] = None
    embeddings: Optional[torch.Tensor] = None
    logits: Optional[torch.Tensor] = None
    deltas: Optional[torch.Tensor] = None


@dataclass(frozen=True)
class DetectorSpec:
    """What a detector is, known before it runs.

    Attributes:
        channels: of each pyramid map.
        strides: pixels per cell, by the pyramid maps' names, finest first.
        pooled_size: (h, w) of RoIAlign before its box head.
        embedding_dim: width of the vector before the classification layer.
        num_classes: foreground classes.
        regression_weights: `BBOX_REG_WEIGHTS`, the units of its deltas; None where it has no such head.
    """

    channels: int
    strides: Dict[str, int]
    pooled_size: Tuple[int, int]
    embedding_dim: int
    num_classes: int
    regression_weights: Optional[Tuple[float, ...]]
