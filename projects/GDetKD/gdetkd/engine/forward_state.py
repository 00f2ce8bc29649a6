"""Save and restore what a forward pass in training writes into a model."""

from typing import Dict, List, Mapping, Optional, Tuple

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

from .._compat.training import batch_norms, keeps_moving_average
from ..losses import DistillLoss

# Detectron2's dense detectors divide their losses by a moving average of this name. It is a plain number that no
# `state_dict` holds.
NORMALIZER = "loss_normalizer"


class ForwardState:
    """Restore BatchNorm's statistics, dense detectors' normalizers and the losses' buffers after a forward pass.

    Args:
        model: the model whose forward passes are to be undone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = batch_norms(model)
        self._dense = [module for module in model.modules() if keeps_moving_average(module)]
        self._losses = [module for module in model.modules() if isinstance(module, DistillLoss)]
        self._statistics: List[Tuple[nn.Module, str, torch.Tensor]] = []
        self._normalizers: List[Optional[float]] = []

    def save(self) -> None:
        """Remember the present state."""
        # `restore` looks buffers up by name, because PreciseBN replaces the tensors.
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
                delattr(module, NORMALIZER)  # the first forward pass made it
        for loss in self._losses:
            loss.undo_step()


def share_statistics(model: nn.Module) -> None:
    """Give BatchNorm's running statistics of the main process to all processes. All must call this together.

    Each process has statistics of its own images, and a checkpoint holds those of the main process. They change no
    training step.
    """
    if comm.get_world_size() > 1:
        for norm in batch_norms(model):
            for buffer in norm.buffers(recurse=False):
                dist.broadcast(buffer, src=0)


def normalizers(model: nn.Module) -> Dict[str, float]:
    """Return the moving averages that a model's dense detectors divide their losses by, by the modules' names."""
    return {
        name: getattr(module, NORMALIZER)
        for name, module in model.named_modules()
        if keeps_moving_average(module) and hasattr(module, NORMALIZER)
    }


def set_normalizers(model: nn.Module, values: Mapping[str, float]) -> None:
    """Set the moving averages that `normalizers` returned."""
    modules = dict(model.named_modules())
    for name, value in values.items():
        if name in modules and keeps_moving_average(modules[name]):
            setattr(modules[name], NORMALIZER, value)
