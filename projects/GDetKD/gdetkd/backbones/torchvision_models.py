"""Build a pyramid on a classifier of torchvision: MODEL.BACKBONE.NAME "build_torchvision_fpn_backbone"."""

from typing import Dict, List

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN
from torch import nn

from ..errors import GDetKDError
from .blocks import Block, keep_only, probe_blocks
from .bottom_up import LibraryBottomUp
from .config import check_backbone_values, check_levels, check_model_name, level_of
from .preprocessing import of_unit_range
from .pyramid import build_fpn, top_block


class TorchvisionBottomUp(LibraryBottomUp):
    """Run the blocks of a torchvision classifier one after another.

    A level is the last map at its stride: what the network computes before it halves the size again. Blocks after the
    last level are left out. The tensors keep torchvision's names, such as "features.0.0.weight".

    Args:
        cfg: the keys are MODEL.TORCHVISION, MODEL.FPN.IN_FEATURES and MODEL.BACKBONE.FREEZE_AT.

    Raises:
        GDetKDError: torchvision has no such model, or the model is no chain of blocks with the wanted levels.
    """

    key = "MODEL.TORCHVISION.WEIGHTS"

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        config, levels = cfg.MODEL.TORCHVISION, cfg.MODEL.FPN.IN_FEATURES
        check_model_name("MODEL.TORCHVISION.NAME", config.NAME, torchvision.models.list_models(torchvision.models))
        self.model_name, self.weights = config.NAME, config.WEIGHTS
        transforms = torchvision.models.get_model_weights(config.NAME).DEFAULT.transforms()
        self.preprocessing = of_unit_range(transforms.mean, transforms.std)
        model = torchvision.models.get_model(config.NAME, weights=None)
        blocks = _chain(config.NAME, model)
        last = {level_of(block.map_stride): index for index, block in enumerate(blocks) if block.map_stride}
        check_levels("MODEL.TORCHVISION.NAME", config.NAME, levels, {level: last[level] for level in last if level})
        blocks = blocks[: last[levels[-1]] + 1]
        keep_only(model, [block.name for block in blocks])
        for name, child in model.named_children():
            self.add_module(name, child)
        self._steps = [(block.name, "") for block in blocks]
        for level in levels:
            block = blocks[last[level]]
            self._steps[last[level]] = (block.name, level)
            self._channels[level] = block.output.shape[1]
        self.set_norm(config.NORM, FrozenBatchNorm2d.convert_frozen_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm)
        first_stride = next(block.map_stride for block in blocks if block.map_stride)
        self.freeze(blocks, cfg.MODEL.BACKBONE.FREEZE_AT, first_stride, FrozenBatchNorm2d.convert_frozen_batchnorm)

    @property
    def library_module(self) -> nn.Module:
        return self

    def forward(self, image: torch.Tensor) -> Dict[str, torch.Tensor]:
        maps, x = {}, image
        for name, level in self._steps:
            x = self.get_submodule(name)(x)
            if level:
                maps[level] = x
        return maps


def _chain(name: str, model: nn.Module) -> List[Block]:
    """Return the blocks from the image on, as long as each block reads nothing but the output of the block before.

    Raises:
        GDetKDError: the network does something else with the image first.
    """
    calls, image, _ = probe_blocks(f"MODEL.TORCHVISION.NAME {name!r}", model, model)
    chain, x = [], image
    for block in calls:
        if block.source is not x:
            break
        chain.append(block)
        x = block.output
    if not chain or getattr(model, "transform_input", None) is not None:  # GoogLeNet and Inception
        raise GDetKDError(
            f"MODEL.TORCHVISION.NAME {name!r} changes the image before its first block, which GDetKD does not support. "
            "Choose another model (docs/backbones.md)."
        )
    return chain


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's FPN on the torchvision model of MODEL.TORCHVISION, with random weights.

    Raises:
        GDetKDError: a value is invalid.
    """
    check_backbone_values(cfg)
    return build_fpn(cfg, TorchvisionBottomUp(cfg), top_block(cfg))
