"""The head of a dense detector in two parts, so that the second part can run on another detector's features.

Shapes: B images, R anchors of all levels, C channels of the pyramid, D the width of a tower, n classes.
"""

from typing import Any, Dict, List, Sequence, Tuple

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances
from torch import nn

from ..recorder import Call

# Features of the classification tower and of the box tower at the cut, by level.
Cut = Sequence[List[torch.Tensor]]


class DenseHead:
    """Run RetinaNet's or FCOS's head in two parts. The detector stays unchanged and is no submodule.

    The head has a tower for classes and a tower for boxes. A tower is a row of convolutions, norms and activations. The
    cut lies before the k-th activation. With k = 0, it lies before the tower.

    Args:
        model: a dense Detectron2 detector.
        scale: pixels of the detector's images per pixel of the images that ground truth belongs to
            (DISTILL.TEACHER.SCALE).
    """

    def __init__(self, model: nn.Module, scale: float = 1.0) -> None:
        self._model = model
        self._scale = scale
        self._towers = [model.head.cls_subnet, model.head.bbox_subnet]
        self._made: Dict[Tuple[torch.Size, ...], List[Boxes]] = {}

    def at_scale(self, scale: float) -> "DenseHead":
        return DenseHead(self._model, scale)

    @property
    def channels(self) -> Tuple[int, ...]:
        """Return the widths of a tower's convolutions. Both towers have the same widths."""
        return tuple(module.out_channels for module in self._towers[0] if isinstance(module, nn.Conv2d))

    def points(self) -> Dict[str, nn.Module]:
        """Return the activations, for a `Recorder`. `towers` reads their calls."""
        return {
            f"tower{side}.{k}": tower[index]
            for side, tower in enumerate(self._towers)
            for k, index in enumerate(_activations(tower), start=1)
        }

    def towers(self, calls: Dict[str, List[Call]]) -> Tuple[List[List[torch.Tensor]], List[List[torch.Tensor]]]:
        """Return the recorded features (B, D, H, W) at every cut.

        Returns:
            for the classification tower and the box tower: by k from 0 on, by level.
        """
        maps = calls["head"][0].inputs[0]
        return tuple(
            [list(maps)]
            + [[call.inputs[0] for call in calls[f"tower{side}.{k}"]] for k in range(1, len(_activations(tower)) + 1)]
            for side, tower in enumerate(self._towers)
        )

    def start(self, maps: Sequence[torch.Tensor], k: int) -> Cut:
        """Run the first part: from the pyramid's maps (B, C, H, W) to the features (B, D, H, W) at the cut."""
        return [[tower[: _cut(tower, k)](level) for level in maps] for tower in self._towers]

    def finish(self, features: Cut, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """Run the second part, from the features at the cut to the predictions.

        `features` must have all levels, because a norm with statistics for each level steps on at each call.

        Returns:
            class logits (B, R, n) and box deltas (B, R, 4).
        """
        head = self._model.head
        ends = [[tower[_cut(tower, k) :](level) for level in maps] for tower, maps in zip(self._towers, features)]
        logits = [permute_to_N_HWA_K(head.cls_score(level), self._model.num_classes) for level in ends[0]]
        deltas = [head.bbox_pred(level) for level in ends[1]]
        if hasattr(head, "level_scales"):  # an FCOS with MODEL.FCOS.LEVEL_SCALES
            deltas = [level * scale for level, scale in zip(deltas, head.level_scales)]
        return torch.cat(logits, dim=1), torch.cat([permute_to_N_HWA_K(level, 4) for level in deltas], dim=1)

    def decode(self, deltas: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Decode box deltas (B, R, 4) to boxes (B, R, 4), xyxy in the detector's pixels.

        The sizes of `maps` tell the anchors.
        """
        anchors = torch.cat([level.tensor for level in self._anchors(maps)]).expand(len(deltas), -1, -1)
        # FCOS's decoding changes its input in place, so it gets a copy.
        boxes = self._model.box2box_transform.apply_deltas(deltas.flatten(0, 1).clone(), anchors.flatten(0, 1))
        return boxes.view_as(deltas)

    @torch.no_grad()
    def label(self, gt_boxes: Sequence[Boxes], maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Label the anchors by the detector's own label assignment.

        Args:
            gt_boxes: by image, xyxy in pixels.
            maps: the pyramid, whose sizes tell the anchors.

        Returns:
            (B, R), 1 for an object, 0 for background, -1 for an anchor that training ignores.
        """
        anchors = self._anchors(maps)
        labels = torch.zeros(len(gt_boxes), sum(map(len, anchors)), device=maps[0].device)
        for image, boxes in enumerate(gt_boxes):
            if len(boxes):  # v0.6's FCOS fails on an image without objects
                labels[image] = self._label_image(anchors, Boxes(boxes.tensor * self._scale))
        return labels

    def _label_image(self, anchors: List[Boxes], boxes: Boxes) -> torch.Tensor:
        # All objects get class 0: the class does not matter here, and the teacher may lack it.
        instances = Instances((0, 0), gt_boxes=boxes, gt_classes=torch.zeros_like(boxes.tensor[:, 0]).long())
        classes: Any = self._model.label_anchors(anchors, [instances])[0][0]
        return torch.where(classes == self._model.num_classes, 0, torch.where(classes < 0, -1, 1)).float()

    def _anchors(self, maps: Sequence[torch.Tensor]) -> List[Boxes]:
        """Return the anchors by level. They are kept: Detectron2's main branch waits for the device at each level."""
        sizes = tuple(level.shape[-2:] for level in maps)
        if sizes not in self._made:
            self._made[sizes] = list(self._model.anchor_generator(list(maps)))
        return self._made[sizes]


def _activations(tower: nn.Sequential) -> List[int]:
    return [index for index, module in enumerate(tower) if isinstance(module, nn.ReLU)]


def _cut(tower: nn.Sequential, k: int) -> int:
    return 0 if k == 0 else _activations(tower)[k - 1]
