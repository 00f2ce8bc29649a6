"""Adapters of torchvision's detectors, which can teach but not learn here.

Shapes: B images, N regions, K labels of the torchvision model, n classes.
"""

import math
from functools import cached_property, partial
from typing import Any, ClassVar, Collection, Dict, List, Optional, Sequence, Tuple, Type

import torch
from detectron2.config import CfgNode
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from ..errors import GDetKDError
from ..recorder import Call
from ..regions import SAMPLING_RATIO
from ..roi_align import pool_on_levels
from ..structures import DenseSpec, DetectorOutputs, DetectorSpec, Regions, full_precision
from .base import DETECTOR_ADAPTER_REGISTRY, DetectorAdapter
from .dense import POOLED_SIZE, DenseAdapter
from .dense_families import FCOSAdapter, RetinaNetAdapter
from .torchvision_detector import TorchvisionDetector

# Side in pixels of the image that shows the strides of a pyramid. Every stride up to 128 divides it.
PROBE_SIZE = 256


class _OnlyTeaches(DetectorAdapter):
    """Refuse a torchvision detector as a student."""

    family: ClassVar[Type[nn.Module]]

    def __init__(self, model: nn.Module, role: str, cfg: CfgNode) -> None:
        if role == "student":
            raise GDetKDError(
                "The student is a torchvision detector. Detectron2 cannot train those, so they only teach. Choose a "
                "student of Detectron2, for example DISTILL.STUDENT_META_ARCHITECTURE GeneralizedRCNN."
            )
        self._strides = _strides(model)
        super().__init__(model, role, cfg)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, TorchvisionDetector) and isinstance(model.torchvision_model, cls.family)

    def points(self) -> Dict[str, nn.Module]:
        return {}

    def observe(self, calls: Dict[str, List[Call]], batched_inputs: List[Dict[str, Any]]) -> DetectorOutputs:
        raise NotImplementedError("A torchvision detector is no student.")


@torch.no_grad()
def _strides(model: TorchvisionDetector) -> Dict[str, int]:
    """Return the strides of a backbone's maps by name. torchvision's backbones do not tell them."""
    was_training = model.training
    maps = model.eval().backbone(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=model.device))
    model.train(was_training)
    return {name: PROBE_SIZE // feature_map.shape[-1] for name, feature_map in maps.items()}


@DETECTOR_ADAPTER_REGISTRY.register()
class TorchvisionRCNNAdapter(_OnlyTeaches):
    """Read torchvision's Faster R-CNN or Mask R-CNN."""

    family = FasterRCNN  # MaskRCNN is a subclass

    @cached_property
    def spec(self) -> DetectorSpec:
        heads = self.model.roi_heads
        names = [name for name in heads.box_roi_pool.featmap_names if name in self._strides]
        return DetectorSpec(
            channels=self.model.backbone.out_channels,
            strides={name: self._strides[name] for name in names},
            pooled_size=tuple(heads.box_roi_pool.output_size),
            embedding_dim=heads.box_predictor.cls_score.in_features,
            num_classes=self.model.num_classes,
            regression_weights=tuple(heads.box_coder.weights),
        )

    def look(
        self,
        features: Dict[str, torch.Tensor],
        regions: Optional[Regions],
        needs: Collection[str],
        later_regions: Sequence[Regions] = (),
    ) -> DetectorOutputs:
        heads, strides = self.model.roi_heads, self.spec.strides
        outputs = DetectorOutputs({name: features[name] for name in strides}, strides, regions)
        if not {"levels", "pooled", "embeddings", "logits", "deltas"} & set(needs):
            return outputs
        outputs.levels = self._levels(regions)
        if not {"pooled", "embeddings", "logits", "deltas"} & set(needs):
            return outputs
        if "pooled" in needs:  # torchvision's own pooling lies half a cell beside the student's
            maps, size = list(outputs.pyramid.values()), self.spec.pooled_size
            levels = outputs.levels
            outputs.pooled = pool_on_levels(maps, list(strides.values()), regions, levels, size, SAMPLING_RATIO)
        if {"embeddings", "logits", "deltas"} & set(needs):
            outputs.embeddings = heads.box_head(self._pool(outputs.pyramid, regions, outputs.levels))
        if {"logits", "deltas"} & set(needs):
            logits, deltas = heads.box_predictor(outputs.embeddings)
            outputs.logits, outputs.deltas = self.model.class_logits(logits), self.model.class_deltas(deltas)
        return outputs

    def _levels(self, regions: Regions) -> torch.Tensor:
        """Return the index (N,) of each region's level, by torchvision's box-size rule."""
        pooler, strides = self.model.roi_heads.box_roi_pool, list(self.spec.strides.values())
        ends = int(math.log2(strides[0])), int(math.log2(strides[-1]))
        rule = LevelMapper(*ends, canonical_scale=pooler.canonical_scale, canonical_level=pooler.canonical_level)
        return rule([boxes.tensor for boxes in regions.boxes])

    def _pool(self, pyramid: Dict[str, torch.Tensor], regions: Regions, levels: torch.Tensor) -> torch.Tensor:
        """Pool as torchvision's `MultiScaleRoIAlign`, which would wait for the device at each level."""
        pooler = self.model.roi_heads.box_roi_pool

        def pool(feature_map: torch.Tensor, stride: int, part: Regions) -> torch.Tensor:
            return roi_align(feature_map, part.rois(), pooler.output_size, 1 / stride, pooler.sampling_ratio)

        maps = map(full_precision, pyramid.values())
        return regions.on_levels(levels, [partial(pool, *level) for level in zip(maps, self.spec.strides.values())])


class _TorchvisionDenseAdapter(_OnlyTeaches, DenseAdapter):
    """Read a dense detector of torchvision. Its outputs are defined as those of Detectron2's dense detectors."""

    @property
    def feature_names(self) -> List[str]:
        return list(self._strides)

    @property
    def num_scores(self) -> int:
        return self.model.num_labels

    @cached_property
    def spec(self) -> DetectorSpec:
        model = self.model
        cells = [tuple(map(tuple, anchors.tolist())) for anchors in model.anchor_generator.cell_anchors]
        return DetectorSpec(
            channels=model.backbone.out_channels,
            strides=self._strides,
            pooled_size=POOLED_SIZE,
            embedding_dim=model.head.classification_head.cls_logits.in_channels,
            num_classes=model.num_classes,
            regression_weights=tuple(model.torchvision_model.box_coder.weights) if self.anchor_based else None,
            independent_classes=True,
            dense=DenseSpec(tuple(zip(self._strides.values(), cells)), anchor_based=self.anchor_based),
        )

    @property
    def classification_tower(self) -> nn.Module:
        return self.model.head.classification_head.conv

    def predict(self, maps: List[torch.Tensor]) -> Sequence[List[torch.Tensor]]:
        classes, boxes = self.model.head.classification_head, self.model.head.regression_head
        logits = [classes.cls_logits(classes.conv(level)) for level in maps]
        return logits, [self.final_deltas(boxes.bbox_reg(boxes.conv(level))) for level in maps]

    def location_steps(self, towers: Sequence[torch.Tensor]) -> List[Tuple[int, int]]:
        # torchvision divides the padded image by the size of each map. On coarse levels that is not the stride.
        stride = next(iter(self._strides.values()))
        height, width = (stride * cells for cells in towers[0].shape[-2:])
        return [(width // tower.shape[-1], height // tower.shape[-2]) for tower in towers]

    def final_deltas(self, deltas: torch.Tensor) -> torch.Tensor:
        """Return the deltas of the head from the output of its last convolution."""
        return deltas

    def fill_predictions(self, outputs: DetectorOutputs, predictions: Sequence[List[torch.Tensor]]) -> None:
        super().fill_predictions(outputs, predictions)
        outputs.logits = outputs.logits[:, self.model.classes]


@DETECTOR_ADAPTER_REGISTRY.register()
class TorchvisionRetinaNetAdapter(_TorchvisionDenseAdapter, RetinaNetAdapter):
    """Read torchvision's RetinaNet. Its anchors have another order than Detectron2's, so CLS and REG refuse them."""

    family = RetinaNet


@DETECTOR_ADAPTER_REGISTRY.register()
class TorchvisionFCOSAdapter(_TorchvisionDenseAdapter, FCOSAdapter):
    """Read torchvision's FCOS. Its locations start at the corner of the image, as with ANCHOR_GENERATOR.OFFSET 0."""

    family = FCOS

    def final_deltas(self, deltas: torch.Tensor) -> torch.Tensor:
        return deltas.relu()
