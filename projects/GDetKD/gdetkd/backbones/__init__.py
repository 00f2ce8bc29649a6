"""Backbones that Detectron2 lacks, for students and teachers. Importing this package registers their builders."""

from .config import add_backbone_config
from .dense import build_fcos_resnet_fpn_backbone, build_mmdet_retinanet_resnet_fpn_backbone
from .preprocessing import Preprocessing
from .pretrained import find_bottom_up, load_pretrained
from .timm_models import build_timm_fpn_backbone
from .torchvision_models import build_torchvision_fpn_backbone

__all__ = [
    "Preprocessing",
    "add_backbone_config",
    "build_fcos_resnet_fpn_backbone",
    "build_mmdet_retinanet_resnet_fpn_backbone",
    "build_timm_fpn_backbone",
    "build_torchvision_fpn_backbone",
    "find_bottom_up",
    "load_pretrained",
]
