"""Pyramids of dense detectors that Detectron2 lacks. They differ from RetinaNet's in how p6 and p7 are made."""

from typing import List

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7

from .pyramid import build_fpn


class PlainP6P7(LastLevelP6P7):
    """Make p6 and p7 by two convolutions with no ReLU between them. Detectron2's own class has one."""

    def forward(self, feature: torch.Tensor) -> List[torch.Tensor]:
        p6 = self.p6(feature)
        return [p6, self.p7(p6)]


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build RetinaNet's backbone, but make p6 and p7 from p5, not from res5, as Detectron2's FCOS config does."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return build_fpn(cfg, build_resnet_backbone(cfg, input_shape), LastLevelP6P7(channels, channels, in_feature="p5"))


@BACKBONE_REGISTRY.register()
def build_mmdet_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build RetinaNet's backbone, but without the ReLU between p6 and p7, as mmdetection does.

    Its weights have the names and shapes of Detectron2's backbone.
    """
    resnet = build_resnet_backbone(cfg, input_shape)
    return build_fpn(cfg, resnet, PlainP6P7(resnet.output_shape()["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS))
