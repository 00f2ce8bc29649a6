"""Two-stage detectors: Faster R-CNN and Mask R-CNN with an FPN."""

from typing import Collection, Dict, List

import torch
from detectron2.modeling import GeneralizedRCNN
from torch import nn

from ..errors import GDetKDError
from ..recorder import Call
from ..structures import DetectorOutputs, DetectorSpec, Regions
from .base import DETECTOR_ADAPTER_REGISTRY, DetectorAdapter


@DETECTOR_ADAPTER_REGISTRY.register()
class RCNNAdapter(DetectorAdapter):
    """The regions are the proposals that the student's own sampler keeps for its box head (method section 4)."""

    def __init__(self, model: nn.Module, role: str) -> None:
        super().__init__(model, role)
        heads = model.roi_heads
        features = getattr(heads, "box_in_features", None)
        if features is None or len(features) < 2:
            raise GDetKDError(
                f"The {role} has no FPN: its box head ({type(heads).__name__}) reads "
                f"{'one feature map' if features is None else ', '.join(features)}. GDetKD imitates pyramids; take a "
                "config whose MODEL.BACKBONE.NAME builds an FPN and whose MODEL.ROI_HEADS.NAME is StandardROIHeads."
            )
        if isinstance(heads.box_head, nn.ModuleList):
            raise GDetKDError(f"The {role} has a cascade of box heads ({type(heads).__name__}), not supported yet.")
        self._features = list(features)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, GeneralizedRCNN)

    @property
    def spec(self) -> DetectorSpec:
        heads = self.model.roi_heads
        shapes = self.model.backbone.output_shape()
        head_shape = heads.box_head.output_shape
        return DetectorSpec(
            channels=shapes[self._features[0]].channels,
            strides={name: shapes[name].stride for name in self._features},
            pooled_size=tuple(heads.box_pooler.output_size),
            embedding_dim=head_shape.channels * (head_shape.height or 1) * (head_shape.width or 1),
            num_classes=heads.num_classes,
            regression_weights=tuple(heads.box_predictor.box2box_transform.weights),
        )

    def points(self) -> Dict[str, nn.Module]:
        heads = self.model.roi_heads
        return {"pooler": heads.box_pooler, "head": heads.box_head, "predictor": heads.box_predictor}

    def observe(self, calls: Dict[str, List[Call]]) -> DetectorOutputs:
        # The pooler's own inputs, because TRAIN_ON_PRED_BOXES replaces the boxes in the proposals afterwards.
        maps, boxes = calls["pooler"][0].inputs
        logits, deltas = calls["predictor"][0].output
        return DetectorOutputs(
            pyramid=dict(zip(self._features, maps)),
            strides=self.spec.strides,
            regions=Regions(list(boxes)),
            pooled=calls["pooler"][0].output,
            embeddings=calls["head"][0].output.flatten(start_dim=1),
            logits=logits,
            deltas=deltas,
        )

    def look(self, images: torch.Tensor, regions: Regions, needs: Collection[str]) -> DetectorOutputs:
        heads = self.model.roi_heads
        features = self.model.backbone(images)
        maps = [features[name] for name in self._features]
        outputs = DetectorOutputs(dict(zip(self._features, maps)), self.spec.strides, regions)
        outputs.pooled = heads.box_pooler(maps, regions.boxes)
        if {"embeddings", "logits", "deltas"} & set(needs):
            head = heads.box_head(outputs.pooled)
            outputs.embeddings = head.flatten(start_dim=1)
            if {"logits", "deltas"} & set(needs):
                outputs.logits, outputs.deltas = heads.box_predictor(head)
        return outputs
