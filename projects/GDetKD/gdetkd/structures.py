"""What a detector shows of itself to the losses."""

from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Optional, Tuple

import torch
from detectron2.structures import Boxes


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """float32 of a half-precision tensor; others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass
class Regions:
    """Boxes of one step, the same for teacher and student.

    Attributes:
        boxes: one `Boxes` an image, xyxy in pixels of the (augmented, unpadded) input image; N in all.
        sources: (N, 4) level, row, column and anchor of the dense prediction that each box is; None where the boxes
            come from proposals.
    """

    boxes: List[Boxes]
    sources: Optional[torch.Tensor] = None

    def tensor(self) -> torch.Tensor:
        """(N, 4) xyxy in pixels, images one after another."""
        return torch.cat([boxes.tensor for boxes in self.boxes])

    def image_ids(self) -> torch.Tensor:
        """(N,) index of each region's image in the batch."""
        # Filled on the device: neither copied to it nor counted there, for which a GPU would wait.
        ids = [boxes.tensor.new_full((len(boxes),), image, dtype=torch.long) for image, boxes in enumerate(self.boxes)]
        return torch.cat(ids)

    def __len__(self) -> int:
        return sum(len(boxes) for boxes in self.boxes)


@dataclass
class Predictions:
    """Of a later stage of a cascade, on boxes of its own.

    Attributes:
        regions: N_k boxes.
        logits: (N_k, n + 1) class scores, background last; (N_k, n) where classes are scored independently (sigmoid).
        deltas: (N_k, 4 n) box regression, or (N_k, 4) where it is class-agnostic.
    """

    regions: Regions
    logits: torch.Tensor
    deltas: torch.Tensor


@dataclass
class DetectorOutputs:
    """One detector's view of the regions; what a loss did not ask for is None.

    Attributes:
        pyramid: feature maps by name, finest first, each (images, C, H, W).
        strides: pixels of the input image per cell of each map, by the same names.
        regions: the boxes that all below is about.
        pooled: (N, C, h, w) RoIAlign on the level that the box-size rule assigns.
        embeddings: (N, D) the vector just before the classification layer.
        logits: (N, n + 1) class scores, background last; (N, n) where classes are scored independently (sigmoid).
        deltas: (N, 4 n) box regression, or (N, 4) where it is class-agnostic.
        later_stages: of a cascade, what its stages after the first predict.
        levels: (N,) index in `strides` of the level that the box-size rule assigns to each region; of a teacher alone.
        gt_boxes: the ground truth of each image, xyxy in pixels as the regions are; of a student alone.
        towers: of a dense detector, by convolution of its classification tower and then of its box tower, by level:
            (images, D, H, W) before the activation; of a student alone.
        head: a dense detector's own head, to be run on other features; of a teacher alone.
    """

    pyramid: Dict[str, torch.Tensor]
    strides: Dict[str, int]
    regions: Optional[Regions] = None
    pooled: Optional[torch.Tensor] = None
    embeddings: Optional[torch.Tensor] = None
    logits: Optional[torch.Tensor] = None
    deltas: Optional[torch.Tensor] = None
    later_stages: List[Predictions] = field(default_factory=list)
    levels: Optional[torch.Tensor] = None
    gt_boxes: Optional[List[Boxes]] = None
    towers: Optional[Tuple[List[List[torch.Tensor]], List[List[torch.Tensor]]]] = None
    head: Optional[Any] = None

    @property
    def device(self) -> torch.device:
        """Of what it holds."""
        tensors = [*self.pyramid.values(), self.pooled, self.embeddings, self.logits]
        return next(tensor.device for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class DenseSpec:
    """What only a dense detector has, known before it runs.

    Attributes:
        anchors: stride and anchors (xyxy in pixels about the location) of each level. Two dense detectors can be
            compared if they predict from the same anchors. An anchor-free detector has one for each location.
        tower_channels: the width of each convolution of the two towers.
        anchor_based: whether boxes are regressed from anchors; if not, from locations.
    """

    anchors: Tuple[Tuple[int, Tuple[Tuple[float, ...], ...]], ...] = ()
    tower_channels: Tuple[int, ...] = ()
    anchor_based: bool = True


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
        later_regression_weights: the same of a cascade's stages after the first.
        class_names: in the order of its scores; None where they are not known.
        location_anchors: anchors that boxes are regressed from at each location of each map, xyxy in pixels about the
            location; None of an anchor-free detector, or where they are not known.
        anchor_offset: where the location that anchors lie about is in a cell, in strides from its left upper corner.
        independent_classes: whether classes are scored independently (sigmoid, without background): true for a dense
            detector, and for a two-stage one with MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE. Else a softmax scores them.
        regions_per_image: the most regions that a student has in one image; None where it is not known.
        dense: what only dense detectors have; None of a two-stage detector.
    """

    channels: int
    strides: Dict[str, int]
    pooled_size: Tuple[int, int]
    embedding_dim: int
    num_classes: int
    regression_weights: Optional[Tuple[float, ...]]
    later_regression_weights: Tuple[Tuple[float, ...], ...] = ()
    class_names: Optional[Tuple[str, ...]] = None
    location_anchors: Optional[Dict[str, Tuple[Tuple[float, ...], ...]]] = None
    anchor_offset: float = 0.0
    independent_classes: bool = False
    regions_per_image: Optional[int] = None
    dense: Optional[DenseSpec] = None

    @property
    def num_stages(self) -> int:
        """Return the number of stages that predict classes and boxes: more than 1 for a cascade alone."""
        return 1 + len(self.later_regression_weights)

    @property
    def family(self) -> str:
        """Return what authors of losses tell apart: "TWO_STAGE", "ANCHOR_BASED" or "ANCHOR_FREE"."""
        if self.dense is None:
            return "TWO_STAGE"
        return "ANCHOR_BASED" if self.dense.anchor_based else "ANCHOR_FREE"


def with_class_names(spec: DetectorSpec, names: Optional[Tuple[str, ...]]) -> DetectorSpec:
    """The spec with the names of its classes, unless there are not as many: then they are another detector's."""
    return replace(spec, class_names=names if names is not None and len(names) == spec.num_classes else None)
