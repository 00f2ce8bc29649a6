"""Freeze the BatchNorm layers of timm's models so that they keep the precision of their input."""

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

# The buffers of a frozen BatchNorm.
BUFFERS = ("weight", "bias", "running_mean", "running_var")


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """Apply Detectron2's frozen BatchNorm, and then the dropout and the activation that timm has in its norms.

    Args:
        norm: timm's norm.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(len(norm.weight), norm.eps)
        self.drop = norm.drop
        self.act = norm.act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


def freeze_batch_norms(module: nn.Module) -> nn.Module:
    """Freeze all BatchNorm layers of a part of a timm model.

    timm's own frozen norms return float32 in mixed precision, so that all feature maps take twice the memory.
    Detectron2's return the type of their input.

    Returns:
        the module itself, or its replacement if it is a BatchNorm layer.
    """
    if not isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        for name, child in module.named_children():
            module.add_module(name, freeze_batch_norms(child))
        return module
    norm = FrozenBatchNormAct2d(module) if hasattr(module, "act") else FrozenBatchNorm2d(len(module.weight), module.eps)
    for name in BUFFERS:
        setattr(norm, name, getattr(module, name).detach())
    return norm.train(module.training)
