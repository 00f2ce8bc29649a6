"""Read RetinaNet and FCOS: the adapters hold what differs between the two families.

Shapes: B images, A anchors of a location, N regions.
"""

import logging
from typing import List, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes
from torch import nn

from ..device import on_device
from .base import DETECTOR_ADAPTER_REGISTRY
from .dense import DenseAdapter
from .sources import by_anchor

logger = logging.getLogger(__name__)


@DETECTOR_ADAPTER_REGISTRY.register()
class RetinaNetAdapter(DenseAdapter):
    """Read a RetinaNet. A region belongs to the level with the anchor that overlaps a box of its size best."""

    def __init__(self, model: nn.Module, role: str, cfg: CfgNode) -> None:
        super().__init__(model, role, cfg)
        sides = [level[:, 2:] - level[:, :2] for level in model.anchor_generator.cell_anchors]
        growth = self._guessed_growth()
        if growth:
            sides = [sides[0] * factor for factor in growth]
        self._anchor_sides = [level.tolist() for level in sides]  # torchvision's anchors do not move with the model

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, RetinaNet)

    def choose_levels(self, boxes: torch.Tensor) -> torch.Tensor:
        sides = boxes[:, 2:] - boxes[:, :2]
        anchors = [on_device(level, like=sides) for level in self._anchor_sides]
        return torch.stack([_iou_at_one_centre(sides, level).amax(dim=1) for level in anchors], dim=1).argmax(dim=1)

    def _guessed_growth(self) -> List[float]:
        """Return the factors by which anchors grow from the first level on. It is empty if the anchors say so."""
        sides = [Boxes(anchors).area().sqrt() for anchors in self.model.anchor_generator.cell_anchors]
        smallest = [level.min().item() for level in sides]
        if all(side < following for side, following in zip(smallest, smallest[1:])):
            return []
        if self.role == "teacher":
            logger.warning(
                "The smallest anchors of the teacher do not grow from level to level: %s pixels. So the level of a "
                "region is a guess: GDetKD takes them to grow as the strides do. Check MODEL.ANCHOR_GENERATOR.SIZES.",
                ", ".join(f"{side:g}" for side in smallest),
            )
        strides = list(self.spec.strides.values())
        return [stride / strides[0] for stride in strides]

    def scores(self, predictions: Sequence[List[torch.Tensor]]) -> List[torch.Tensor]:
        return [by_anchor(logits, self.model.num_classes).amax(dim=2).sigmoid() for logits in predictions[0]]


def _iou_at_one_centre(sides: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the IoU (N, A) of boxes and anchors that have the same centre.

    Args:
        sides: (N, 2) width and height of the boxes in pixels.
        anchors: (A, 2) width and height of the anchors in pixels.
    """
    common = torch.minimum(sides[:, None], anchors).prod(dim=2)
    return common / (sides.prod(dim=1)[:, None] + anchors.prod(dim=1) - common)


@DETECTOR_ADAPTER_REGISTRY.register()
class FCOSAdapter(DenseAdapter):
    """Read an FCOS.

    A location is trained on its level if the farthest side of the object is 4 to 8 strides away. Seen from the centre
    of the object, the longer side is then 8 to 16 strides long.
    """

    anchor_based = False  # Detectron2's FCOS has anchors, but they only mark the locations

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, FCOS)

    def choose_levels(self, boxes: torch.Tensor) -> torch.Tensor:
        longer = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1)
        starts = [8 * stride for stride in self.spec.strides.values()][1:]
        return sum(((longer >= start).long() for start in starts), torch.zeros_like(longer).long())

    def scores(self, predictions: Sequence[List[torch.Tensor]]) -> List[torch.Tensor]:
        logits, _, centerness = predictions
        return [
            (by_anchor(cls, self.model.num_classes).amax(dim=2).sigmoid() * ctr.sigmoid()).sqrt()
            for cls, ctr in zip(logits, centerness)
        ]
