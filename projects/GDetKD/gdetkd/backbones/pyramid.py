"""Build the pyramid on a bottom-up network: Detectron2's FPN, or the simple pyramid of a plain vision transformer."""

from typing import Callable, Dict, List, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import nn

from .bottom_up import LibraryBottomUp
from .config import level_stride, node_of


def build_fpn(cfg: CfgNode, bottom_up: Backbone, top: Optional[nn.Module]) -> FPN:
    """Build Detectron2's FPN on a bottom-up network with a feature map for each level of MODEL.FPN.IN_FEATURES.

    Args:
        top: makes further levels.
    """
    config = cfg.MODEL.FPN
    return FPN(
        bottom_up=bottom_up,
        in_features=config.IN_FEATURES,
        out_channels=config.OUT_CHANNELS,
        norm=config.NORM,
        top_block=top,
        fuse_type=config.FUSE_TYPE,
    )


def top_block(cfg: CfgNode) -> Optional[nn.Module]:
    """Build the module of TOP_BLOCK, which makes further levels from the last level of the pyramid."""
    name, last = cfg.MODEL[node_of(cfg)].TOP_BLOCK, pyramid_level(cfg.MODEL.FPN.IN_FEATURES[-1])
    if name == "LastLevelP6P7":
        return LastLevelP6P7(cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=last)
    if name == "LastLevelMaxPool":
        block = LastLevelMaxPool()
        block.in_feature = last  # Detectron2 assumes p5
        return block
    return None


def pyramid_level(level: str) -> str:
    """Return the level of the pyramid that is made from a feature map: "p4" for "res4"."""
    return level.replace("res", "p")


class SimplePyramid(Backbone):
    """Make a pyramid from the last feature map of a plain vision transformer, without a top-down path.

    Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022, section 3: transposed
    convolutions of stride 2 make finer levels and max pooling makes coarser levels. Each level then has a 1x1 and a 3x3
    convolution.

    Args:
        bottom_up: has one feature map.
        levels: names of the levels, such as "res3".
        out_channels: channels of each level.
        norm: builds a norm from a number of channels. None for no norm.
        top: makes further levels from the last level.
    """

    def __init__(
        self,
        bottom_up: LibraryBottomUp,
        levels: Sequence[str],
        out_channels: int,
        norm: Optional[Callable[[int], nn.Module]],
        top: Optional[nn.Module],
    ) -> None:
        super().__init__()
        [(self._source, shape)] = bottom_up.output_shape().items()
        self.bottom_up = bottom_up
        self.levels = nn.ModuleDict()
        for level in levels:
            layers = _resize(shape, level_stride(level), norm)
            channels = next((layer.out_channels for layer in reversed(layers) if hasattr(layer, "out_channels")), None)
            layers += _with_norm(nn.Conv2d(channels or shape.channels, out_channels, 1, bias=norm is None), norm)
            layers += _with_norm(nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=norm is None), norm)
            self.levels[pyramid_level(level)] = nn.Sequential(*layers)
        self.top_block = top
        strides = [level_stride(level) for level in levels]
        strides += [strides[-1] * 2**number for number in range(1, 1 + (top.num_levels if top is not None else 0))]
        self._shapes = {f"p{s.bit_length() - 1}": ShapeSpec(channels=out_channels, stride=s) for s in strides}
        self._size_divisibility = max(shape.stride, level_stride(levels[-1]))

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return self._shapes

    def forward(self, image: torch.Tensor) -> Dict[str, torch.Tensor]:
        source = self.bottom_up(image)[self._source]
        maps = [level(source) for level in self.levels.values()]
        if self.top_block is not None:
            maps += self.top_block(maps[-1])
        return dict(zip(self._shapes, maps))


def norm_builder(name: str, layer_norm: Callable[[int], nn.Module]) -> Optional[Callable[[int], nn.Module]]:
    """Return a function that builds the norm of MODEL.FPN.NORM. Detectron2 v0.6 has no "LN"."""
    if not name:
        return None
    return layer_norm if name == "LN" else lambda channels: get_norm(name, channels)


def _resize(shape: ShapeSpec, stride: int, norm: Optional[Callable[[int], nn.Module]]) -> List[nn.Module]:
    """Build the layers that bring a feature map to a stride. Each halving of the stride halves the channels."""
    if stride > shape.stride:
        return [nn.MaxPool2d(stride // shape.stride, stride // shape.stride)]
    layers: List[nn.Module] = []
    channels = shape.channels
    for number in range((shape.stride // stride).bit_length() - 1):
        if number:
            layers += [*([norm(channels)] if norm is not None else []), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels //= 2
    return layers


def _with_norm(conv: nn.Module, norm: Optional[Callable[[int], nn.Module]]) -> List[nn.Module]:
    return [conv] if norm is None else [conv, norm(conv.out_channels)]
