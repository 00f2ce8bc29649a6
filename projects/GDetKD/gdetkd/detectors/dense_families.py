"""Read RetinaNet and FCOS: the adapters hold what differs between the two families.

Shapes: B images, A anchors of a location.
"""

import logging
import math
from typing import List, Sequence, Tuple

import torch
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes
from torch import nn

from .base import DETECTOR_ADAPTER_REGISTRY
from .dense import DenseAdapter
from .sources import by_anchor

logger = logging.getLogger(__name__)


@DETECTOR_ADAPTER_REGISTRY.register()
class RetinaNetAdapter(DenseAdapter):
    """Read a RetinaNet. A region belongs to the level whose anchors overlap a box of its size best."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, RetinaNet)

    def level_starts(self) -> List[float]:
        smallest, largest = self._anchor_sides()
        # A box of this side overlaps the largest anchor of a level as well as the smallest of the next.
        return [math.sqrt(side * following) for side, following in zip(largest, smallest[1:])]

    def _anchor_sides(self) -> Tuple[List[float], List[float]]:
        """Return the sides of the smallest and of the largest anchor of each level, in pixels."""
        sides = [Boxes(anchors).area().sqrt() for anchors in self.model.anchor_generator.cell_anchors]
        smallest, largest = [level.min().item() for level in sides], [level.max().item() for level in sides]
        if all(side < following for side, following in zip(smallest, smallest[1:])):
            return smallest, largest
        if self.role == "teacher":
            logger.warning(
                "The smallest anchors of the teacher do not grow from level to level: %s pixels. So the level of a "
                "region is a guess: GDetKD takes them to grow as the strides do. Check MODEL.ANCHOR_GENERATOR.SIZES.",
                ", ".join(f"{side:g}" for side in smallest),
            )
        strides = list(self.spec.strides.values())
        growth = [stride / strides[0] for stride in strides]
        return [smallest[0] * factor for factor in growth], [largest[0] * factor for factor in growth]

    def scores(self, predictions: Sequence[List[torch.Tensor]]) -> List[torch.Tensor]:
        return [by_anchor(logits, self.model.num_classes).amax(dim=2).sigmoid() for logits in predictions[0]]


@DETECTOR_ADAPTER_REGISTRY.register()
class FCOSAdapter(DenseAdapter):
    """Read an FCOS.

    A level has the objects whose farthest side is 4 to 8 strides from a location, that is 8 to 16 strides long.
    """

    anchor_based = False  # Detectron2's FCOS has anchors, but they only mark the locations

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, FCOS)

    def level_starts(self) -> List[float]:
        return [8.0 * stride for stride in self.spec.strides.values()][1:]

    def scores(self, predictions: Sequence[List[torch.Tensor]]) -> List[torch.Tensor]:
        logits, _, centerness = predictions
        return [
            (by_anchor(cls, self.model.num_classes).amax(dim=2).sigmoid() * ctr.sigmoid()).sqrt()
            for cls, ctr in zip(logits, centerness)
        ]
