"""The outputs of a detector that losses read, and the description of a detector.

Shapes: N regions, n foreground classes, C channels, D the width of an embedding, (h, w) the pooled size.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.structures import Boxes


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a half-precision tensor to float32. Return any other tensor as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass
class Regions:
    """Hold the boxes of a step. Teacher and student look at the same boxes.

    Attributes:
        boxes: by image, xyxy in pixels of the augmented image without padding; N in total.
        sources: (N, 4) level, row, column and anchor of the dense predictions that became the boxes. None if the boxes
            are proposals.
    """

    boxes: List[Boxes]
    sources: Optional[torch.Tensor] = None

    def tensor(self) -> torch.Tensor:
        """Return the boxes of all images (N, 4), xyxy in pixels."""
        return torch.cat([boxes.tensor for boxes in self.boxes])

    def image_ids(self) -> torch.Tensor:
        """Return the index (N,) of each region's image in the batch."""
        # `new_full` fills the tensors on the device. A copy to the GPU would make the CPU wait.
        ids = [boxes.tensor.new_full((len(boxes),), image, dtype=torch.long) for image, boxes in enumerate(self.boxes)]
        return torch.cat(ids)

    def rois(self) -> torch.Tensor:
        """Return the regions (N, 5) as RoIAlign takes them: index of the image, and xyxy in pixels."""
        boxes = self.tensor()
        return torch.cat([self.image_ids()[:, None].to(boxes.dtype), boxes], dim=1)

    def scaled(self, factor: float) -> "Regions":
        """Return the regions in an image that is `factor` times as large. `sources` do not change."""
        return Regions([Boxes(boxes.tensor * factor) for boxes in self.boxes], self.sources)

    def split_by_level(self, levels: torch.Tensor, num_levels: int) -> Tuple[List["Regions"], torch.Tensor]:
        """Split the regions by level. This waits for the device once.

        Args:
            levels: (N,) index of each region's level.

        Returns:
            the regions of each level, over the same images and without `sources`; and the place (N,) of each region in
            their concatenation.
        """
        images = len(self.boxes)
        # The box-size rule gives no valid level to a box that is not finite.
        groups = levels.clamp(0, num_levels - 1) * images + self.image_ids()
        order = groups.argsort(stable=True)
        sizes = (groups[:, None] == torch.arange(num_levels * images, device=groups.device)).sum(dim=0).tolist()
        parts = [Boxes(boxes) for boxes in self.tensor()[order].split(sizes)]
        by_level = [Regions(parts[first : first + images]) for first in range(0, len(parts), images)]
        return by_level, order.argsort()

    def on_levels(self, levels: torch.Tensor, compute: Sequence[Callable[["Regions"], torch.Tensor]]) -> torch.Tensor:
        """Compute something for each region on its level. This waits for the device once.

        Args:
            levels: (N,) index of each region's level.
            compute: by level, a function of M regions that returns a tensor (M, ...). It is called also for M = 0.

        Returns:
            (N, ...) in the order of the regions.
        """
        by_level, places = self.split_by_level(levels, len(compute))
        return torch.cat([on_level(part) for on_level, part in zip(compute, by_level)])[places]

    def __len__(self) -> int:
        return sum(len(boxes) for boxes in self.boxes)


@dataclass
class Predictions:
    """Hold the predictions of a cascade's later stage, which has its own boxes.

    Attributes:
        regions: N_k boxes.
        logits: (N_k, n + 1) class logits of a softmax, background last, or (N_k, n) of sigmoids.
        deltas: (N_k, 4 n) box deltas, or (N_k, 4) if they are class-agnostic.
    """

    regions: Regions
    logits: torch.Tensor
    deltas: torch.Tensor


@dataclass
class DetectorOutputs:
    """Hold a detector's outputs for the losses. A field that no loss needs is None.

    Attributes:
        pyramid: feature maps (images, C, H, W) by name, finest first.
        strides: pixels of the student's input image per cell of a map, by the same names.
        regions: the boxes of the fields below.
        pooled: (N, C, h, w) features pooled by RoIAlign on the level that the box-size rule assigns.
        embeddings: (N, D) vectors before the classification layer.
        logits: (N, n + 1) class logits of a softmax, background last, or (N, n) of sigmoids.
        deltas: (N, 4 n) box deltas, or (N, 4) if they are class-agnostic.
        later_stages: predictions of a cascade's stages after the first.
        levels: (N,) index in `strides` of the level that the box-size rule assigns. Only a teacher has it.
        gt_boxes: ground truth by image, xyxy in pixels as in `regions`. Only a student has it.
        towers: features (images, D, H, W) of a dense detector's classification tower and box tower before each
            activation, by tower, convolution and level; see `DenseHead.towers`. Only a student has it.
        head: a dense detector's `DenseHead`, to run on other features. Only a teacher has it.
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
        """Return the device of the tensors."""
        tensors = [*self.pyramid.values(), self.pooled, self.embeddings, self.logits]
        return next(tensor.device for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class DenseSpec:
    """Describe the parts that only a dense detector has.

    Attributes:
        anchors: stride and anchors (xyxy in pixels about the location) of each level. CLS and REG can compare two
            dense detectors if these are equal. An anchor-free detector has one anchor for each location.
        tower_channels: width of each convolution of a tower.
        anchor_based: whether boxes are regressed from anchors. If not, they are regressed from locations.
        scales_deltas: whether the deltas of each level are multiplied by a learned factor after the last layer.
    """

    anchors: Tuple[Tuple[int, Tuple[Tuple[float, ...], ...]], ...] = ()
    tower_channels: Tuple[int, ...] = ()
    anchor_based: bool = True
    scales_deltas: bool = False


@dataclass(frozen=True)
class DetectorSpec:
    """Describe a detector, before it runs.

    Attributes:
        channels: channels of the pyramid's maps.
        strides: pixels per cell, by the names of the maps, finest first.
        pooled_size: (h, w) of RoIAlign before the box head.
        embedding_dim: width of the vector before the classification layer.
        num_classes: number of foreground classes.
        regression_weights: `BBOX_REG_WEIGHTS`, the units of the deltas. None if the detector has no such head.
        later_regression_weights: `BBOX_REG_WEIGHTS` of a cascade's stages after the first.
        class_names: names in the order of the scores, or None if they are unknown.
        location_anchors: by map, the anchors of a location, xyxy in pixels about the location. None for an anchor-free
            detector, or if they are unknown.
        anchor_offset: position of the location in a cell, in strides from the left upper corner.
        independent_classes: whether sigmoids score the classes, without background. It is true for a dense detector,
            and for a two-stage detector with MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE. Otherwise a softmax scores them.
        regions_per_image: largest number of regions of an image of a student, or None if it is unknown.
        dense: the parts that only a dense detector has. None for a two-stage detector.
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
        """Return the number of stages that predict classes and boxes. Only a cascade has more than 1."""
        return 1 + len(self.later_regression_weights)

    @property
    def family(self) -> str:
        """Return "TWO_STAGE", "ANCHOR_BASED" or "ANCHOR_FREE". Some losses have different defaults for them."""
        if self.dense is None:
            return "TWO_STAGE"
        return "ANCHOR_BASED" if self.dense.anchor_based else "ANCHOR_FREE"


def seen_at_scale(spec: DetectorSpec, scale: float) -> DetectorSpec:
    """Describe a detector that sees images at `scale` times their size: strides and anchors in pixels of the images."""
    if scale == 1:
        return spec
    dense = spec.dense
    if dense is not None:
        anchors = tuple((stride / scale, _divided(cells, scale)) for stride, cells in dense.anchors)
        dense = replace(dense, anchors=anchors)
    location_anchors = spec.location_anchors
    if location_anchors is not None:
        location_anchors = {name: _divided(cells, scale) for name, cells in location_anchors.items()}
    strides = {name: stride / scale for name, stride in spec.strides.items()}
    return replace(spec, strides=strides, dense=dense, location_anchors=location_anchors)


def _divided(cells: Tuple[Tuple[float, ...], ...], scale: float) -> Tuple[Tuple[float, ...], ...]:
    return tuple(tuple(side / scale for side in cell) for cell in cells)


def with_class_names(spec: DetectorSpec, names: Optional[Tuple[str, ...]]) -> DetectorSpec:
    """Return the spec with class names. Names of another number belong to another detector and are dropped."""
    return replace(spec, class_names=names if names is not None and len(names) == spec.num_classes else None)
