"""Build a pyramid on a model of timm: MODEL.BACKBONE.NAME "build_timm_fpn_backbone"."""

import importlib
import importlib.util
from types import ModuleType
from typing import Any, Dict, List, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from ..errors import GDetKDError
from .blocks import freeze_unread, map_stride, probe_blocks
from .bottom_up import LibraryBottomUp
from .config import check_backbone_values, check_levels, check_model_name, level_of
from .frozen_norms import freeze_batch_norms
from .preprocessing import of_unit_range
from .pyramid import SimplePyramid, build_fpn, norm_builder, top_block

KEY = "MODEL.TIMM.NAME"
OLDEST = (1, 0, 22)  # earlier versions cannot build all models without memory


class TimmBottomUp(LibraryBottomUp):
    """Run a timm model that `features_only` has cut off after the last wanted feature map.

    A level is the last feature map of its stride in timm's list of them. A plain vision transformer has maps of one
    stride. Then there is one level, of the last map. The tensors have timm's names behind "model.".

    Args:
        cfg: the keys are MODEL.TIMM, MODEL.FPN.IN_FEATURES and MODEL.BACKBONE.FREEZE_AT.

    Attributes:
        is_plain: whether the model is a plain vision transformer.

    Raises:
        GDetKDError: timm is not installed, has no such model, or the model lacks the wanted levels.
    """

    key = "MODEL.TIMM.WEIGHTS"

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        timm, config, levels = _timm(), cfg.MODEL.TIMM, list(cfg.MODEL.FPN.IN_FEATURES)
        check_model_name(KEY, config.NAME, [*timm.list_models(), *timm.list_pretrained()])
        self.model_name, self.weights = config.NAME, config.WEIGHTS
        last = _last_maps(timm, config.NAME)
        self.is_plain = len(last) == 1
        self._levels = list(last) if self.is_plain else levels
        check_levels(KEY, config.NAME, self._levels, last)
        features = _features(timm, config.NAME, [last[level] for level in self._levels])
        self.preprocessing = of_unit_range(features.pretrained_cfg["mean"], features.pretrained_cfg["std"])
        self.model, self._indices = features.model, features.out_indices
        blocks, _, maps = probe_blocks(f"{KEY} {config.NAME!r}", self.model, self._maps)
        named = [(level_of(map_stride(feature_map)), feature_map.shape[1]) for feature_map in maps]
        made = {level: channels for level, channels in named if level}
        check_levels(KEY, config.NAME, self._levels, made)
        self._channels = {level: made[level] for level in self._levels}
        # Detectron2's conversion would lose the activation that timm has in its norms.
        sync = importlib.import_module("timm.layers").convert_sync_batchnorm
        self.set_norm(config.NORM, freeze_batch_norms, sync)
        first_stride = self.output_shape()[self._levels[0]].stride
        self.freeze(blocks, cfg.MODEL.BACKBONE.FREEZE_AT, first_stride, freeze_batch_norms)
        freeze_unread(self.model, self._maps)  # HRNet fuses levels into maps that are not wanted

    @property
    def library_module(self) -> nn.Module:
        return self.model

    def _maps(self, image: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.model.forward_intermediates(image, indices=self._indices, intermediates_only=True)

    def forward(self, image: torch.Tensor) -> Dict[str, torch.Tensor]:
        return dict(zip(self._levels, self._maps(image)))


def _timm() -> ModuleType:
    if importlib.util.find_spec("timm") is None:
        raise GDetKDError(
            'MODEL.BACKBONE.NAME is "build_timm_fpn_backbone", but timm is not installed. Run: pip install timm'
        )
    timm = importlib.import_module("timm")
    if tuple(map(int, timm.__version__.split(".")[:3])) < OLDEST:
        raise GDetKDError(
            f"timm is version {timm.__version__}, but must be {'.'.join(map(str, OLDEST))} or later. Run: "
            "pip install --upgrade timm"
        )
    return timm


def _last_maps(timm: ModuleType, name: str) -> Dict[str, int]:
    """Return the index of the last feature map of each level in timm's list of a model's maps.

    Raises:
        GDetKDError: timm does not list the maps, or they have other strides than powers of two.
    """
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
        raise GDetKDError(f"{KEY} {name!r} does not give feature maps in timm. Choose another model.")
    strides = [info["reduction"] for info in model.feature_info]
    last = {level_of(stride): index for index, stride in enumerate(strides)}
    if not any(last):
        raise GDetKDError(
            f"{KEY} {name!r} has feature maps of stride {', '.join(map(str, sorted(set(strides))))}. A pyramid needs "
            "powers of two. Choose another model."
        )
    return {level: index for level, index in last.items() if level}


def _features(timm: ModuleType, name: str, indices: List[int]) -> nn.Module:
    """Build the part of a model that computes the feature maps of the given indices. Nothing is downloaded."""
    pretrained = timm.get_pretrained_cfg(name)
    any_size: Dict[str, Any] = {"dynamic_img_size": True} if getattr(pretrained, "fixed_input_size", False) else {}
    try:
        return timm.create_model(
            name, pretrained=False, features_only=True, feature_cls="getter", out_indices=tuple(indices), **any_size
        )
    except TypeError as e:
        raise GDetKDError(
            f"{KEY} {name!r} takes images of one size only ({e}), but a detector has images of many sizes. Choose "
            "another model."
        ) from e


def _layer_norm(channels: int) -> nn.Module:
    return importlib.import_module("timm.layers").LayerNorm2d(channels)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a pyramid on the timm model of MODEL.TIMM, with random weights.

    This is Detectron2's FPN. For a plain vision transformer, whose maps have one stride, it is the simple pyramid.

    Raises:
        GDetKDError: a value is invalid, or timm is not installed.
    """
    check_backbone_values(cfg)
    bottom_up, config = TimmBottomUp(cfg), cfg.MODEL.FPN
    if not bottom_up.is_plain:
        return build_fpn(cfg, bottom_up, top_block(cfg))
    norm = norm_builder(config.NORM, _layer_norm)
    return SimplePyramid(bottom_up, config.IN_FEATURES, config.OUT_CHANNELS, norm, top_block(cfg))
