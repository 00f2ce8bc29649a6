"""Save and restore what a forward pass in training writes into a model."""

from typing import Dict, List, Mapping, Optional, Tuple

import torch
from torch import nn

from ..losses import DistillLoss

# Detectron2's dense detectors divide their losses by a moving average of this name. It is a plain number, in no
# `state_dict`.
NORMALIZER = "loss_normalizer"


class ForwardState:
    """Restore BatchNorm's statistics, dense detectors' normalizers and the losses' buffers after a forward pass.

    Args:
        model: the model whose forward passes are to be undone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._dense = [module for module in model.modules() if _has_average(module)]
        self._losses = [module for module in model.modules() if isinstance(module, DistillLoss)]
        self._statistics: List[Tuple[nn.Module, str, torch.Tensor]] = []
        self._normalizers: List[Optional[float]] = []

    def save(self) -> None:
        """Remember the present state."""
        # Looked up by name: PreciseBN puts new tensors in the place of the old ones.
        self._statistics = [
            (module, name, buffer.clone())
            for module in self._norms
            if module.training and module.track_running_stats
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self._normalizers = [getattr(module, NORMALIZER, None) for module in self._dense]
        for loss in self._losses:
            loss.before_step()

    def restore(self) -> None:
        """Undo what forward passes wrote since `save`."""
        for module, name, before in self._statistics:
            getattr(module, name).copy_(before)
        for module, before in zip(self._dense, self._normalizers):
            if before is not None:
                setattr(module, NORMALIZER, before)
            elif hasattr(module, NORMALIZER):
                delattr(module, NORMALIZER)  # the first forward pass makes it
        for loss in self._losses:
            loss.undo_step()


def normalizers(model: nn.Module) -> Dict[str, float]:
    """Return the moving averages that a model's dense detectors divide their losses by, by the modules' names."""
    return {
        name: getattr(module, NORMALIZER)
        for name, module in model.named_modules()
        if _has_average(module) and hasattr(module, NORMALIZER)
    }


def set_normalizers(model: nn.Module, values: Mapping[str, float]) -> None:
    """Set the moving averages that `normalizers` returned."""
    modules = dict(model.named_modules())
    for name, value in values.items():
        if name in modules and _has_average(modules[name]):
            setattr(modules[name], NORMALIZER, value)


def _has_average(module: nn.Module) -> bool:
    """Return whether a module keeps the moving average. Keypoint heads have a constant of that name."""
    return hasattr(module, "_ema_update")
