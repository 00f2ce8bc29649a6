"""The head of a dense detector, taken apart: its towers, and what follows them, to be run on the features of another.

Shapes: B images, L levels, R anchors of all levels, D the width of a tower, n classes.
"""

from typing import Any, Dict, List, Sequence, Tuple

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances
from torch import nn

from ..recorder import Call

# The features of both towers at a cut, each by level.
Cut = Sequence[List[torch.Tensor]]


class DenseHead:
    """RetinaNet's or FCOS's head; it holds the detector without being a module, and changes nothing of it.

    Both towers are rows of convolution, norm and activation. They are cut before the k-th activation, or, for k = 0,
    before everything.

    Args:
        model: a dense Detectron2 detector.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._towers = [model.head.cls_subnet, model.head.bbox_subnet]

    @property
    def channels(self) -> Tuple[int, ...]:
        """The width of each convolution of a tower; both towers have the same."""
        return tuple(module.out_channels for module in self._towers[0] if isinstance(module, nn.Conv2d))

    def points(self) -> Dict[str, nn.Module]:
        """The activations, for a `Recorder`; `towers` reads their calls."""
        return {
            f"tower{side}.{k}": tower[place]
            for side, tower in enumerate(self._towers)
            for k, place in enumerate(_activations(tower), start=1)
        }

    def towers(self, calls: Dict[str, List[Call]]) -> Tuple[List[List[torch.Tensor]], List[List[torch.Tensor]]]:
        """For each tower, by k from 0 on, by level: the features (B, D, H, W) that a forward pass had at the cut."""
        maps = calls["head"][0].inputs[0]
        return tuple(
            [list(maps)]
            + [[call.inputs[0] for call in calls[f"tower{side}.{k}"]] for k in range(1, len(_activations(tower)) + 1)]
            for side, tower in enumerate(self._towers)
        )

    def start(self, maps: Sequence[torch.Tensor], k: int) -> Cut:
        """From the pyramid's maps, each (B, C, H, W), to the features at the cut, each (B, D, H, W)."""
        return [[tower[: _cut(tower, k)](each) for each in maps] for tower in self._towers]

    def finish(self, features: Cut, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """From the features at the cut to class scores (B, R, n), before the sigmoid, and box deltas (B, R, 4).

        A norm with statistics of each level turns to the next level at each call, so `features` has all levels.
        """
        head = self._model.head
        ends = [[tower[_cut(tower, k) :](each) for each in maps] for tower, maps in zip(self._towers, features)]
        logits = [permute_to_N_HWA_K(head.cls_score(each), self._model.num_classes) for each in ends[0]]
        deltas = [permute_to_N_HWA_K(head.bbox_pred(each), 4) for each in ends[1]]
        return torch.cat(logits, dim=1), torch.cat(deltas, dim=1)

    def decode(self, deltas: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B, R, 4) box deltas on maps of these sizes -> boxes (B, R, 4) xyxy in pixels."""
        anchors = self._anchors(maps).expand(len(deltas), -1, -1)
        # A copy: FCOS's decoding changes what it is given.
        boxes = self._model.box2box_transform.apply_deltas(deltas.flatten(0, 1).clone(), anchors.flatten(0, 1))
        return boxes.view_as(deltas)

    @torch.no_grad()
    def label(self, gt_boxes: Sequence[Boxes], maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B, R): 1 of anchors that the detector's label assignment takes for an object, 0 for none, -1 for neither.

        Args:
            gt_boxes: of each image, xyxy in pixels.
            maps: of the pyramid, whose sizes say which anchors there are.
        """
        anchors = list(self._model.anchor_generator(list(maps)))
        labels = torch.zeros(len(gt_boxes), sum(map(len, anchors)), device=maps[0].device)
        for image, boxes in enumerate(gt_boxes):
            if len(boxes):  # v0.6's FCOS fails on none
                labels[image] = self._label_image(anchors, boxes)
        return labels

    def _label_image(self, anchors: List[Boxes], boxes: Boxes) -> torch.Tensor:
        # Which class an object is of plays no part, and the teacher may not have it.
        instances = Instances((0, 0), gt_boxes=boxes, gt_classes=torch.zeros_like(boxes.tensor[:, 0]).long())
        classes: Any = self._model.label_anchors(anchors, [instances])[0][0]
        return torch.where(classes == self._model.num_classes, 0, torch.where(classes < 0, -1, 1)).float()

    def _anchors(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([each.tensor for each in self._model.anchor_generator(list(maps))])


def _activations(tower: nn.Sequential) -> List[int]:
    return [place for place, module in enumerate(tower) if isinstance(module, nn.ReLU)]


def _cut(tower: nn.Sequential, k: int) -> int:
    return 0 if k == 0 else _activations(tower)[k - 1]
