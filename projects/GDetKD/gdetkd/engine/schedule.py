"""Weight the distillation terms over the training."""

from typing import Any, Dict, List, Mapping, Optional

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage
from torch import nn

from ..distiller import term_name
from .auto_weights import AutoWeights


class LossSchedule:
    """Weight the distillation terms among a model's losses, and leave the student's losses unchanged.

    Args:
        cfg: gives DISTILL.WARMUP_ITERS, and WEIGHT and WARMUP_ITERS of each loss in DISTILL.LOSSES.
        auto: gives the weights in place of WEIGHT, for DISTILL.WEIGHTS "auto".
    """

    def __init__(self, cfg: CfgNode, auto: Optional[AutoWeights] = None) -> None:
        self._warmup_iters = cfg.DISTILL.WARMUP_ITERS
        self._nodes = {term_name(name): cfg.DISTILL[name] for name in cfg.DISTILL.LOSSES}
        self._auto = auto
        self._scalars: Dict[str, torch.Tensor] = {}
        self._gradients: Dict[str, float] = {}

    @property
    def terms(self) -> List[str]:
        """Return the names of the distillation terms among a model's losses."""
        return list(self._nodes)

    @property
    def is_auto(self) -> bool:
        """Return whether the weights follow from gradients."""
        return self._auto is not None

    def full_weight(self, term: str) -> float:
        """Return the factor on a term after its warm-up."""
        return self._nodes[term].WEIGHT if self._auto is None else self._auto.weight(term)

    def weight(self, term: str, iteration: int) -> float:
        """Return the factor on a term at an iteration. It rises linearly until iteration WARMUP_ITERS."""
        node = self._nodes[term]
        length = max(1, node.WARMUP_ITERS, self._warmup_iters)
        return self.full_weight(term) * min(1.0, (iteration + 1) / length)

    def __call__(self, losses: Dict[str, torch.Tensor], iteration: int) -> Dict[str, torch.Tensor]:
        """Return the losses, with each distillation term times its weight."""
        return {
            name: loss * self.weight(name, iteration) if name in self._nodes else loss for name, loss in losses.items()
        }

    def attach(self, model: nn.Module) -> None:
        """Weight the losses that `model` returns in training, and keep values for `take_scalars`."""
        if self._auto is not None:
            self._auto.attach(model)
        model.register_forward_hook(self._hook)

    def _hook(self, model: nn.Module, inputs: Any, output: Any) -> Optional[Dict[str, torch.Tensor]]:
        # There is no distillation without gradients, as in PreciseBN's forward passes.
        if not model.training or not self._nodes or not torch.is_grad_enabled():
            return None
        storage = get_event_storage()
        if self._auto is not None:
            self._gradients = self._auto.measure(output, storage.iter)
        if not any(name in output for name in self._nodes):  # after DISTILL.UNTIL
            return None
        weighted = self(output, storage.iter)
        # A student's loss may have the shape (1,), so it is summed.
        total = torch.stack([loss.detach().sum() for loss in weighted.values()]).sum()
        self._scalars = {f"raw/{name}": output[name].detach().sum() for name in self._nodes}
        self._scalars.update({f"share/{name}": weighted[name].detach().sum() / total for name in self._nodes})
        return weighted

    def take_scalars(self) -> Dict[str, torch.Tensor]:
        """Return each term's raw value and its share of the total loss in this step, to log, and forget them.

        The trainer logs the weighted values.
        """
        scalars, self._scalars = self._scalars, {}
        return scalars

    def take_gradients(self) -> Dict[str, float]:
        """Return what was measured in this step to set the weights, and forget it. In most steps this is nothing."""
        gradients, self._gradients = self._gradients, {}
        return gradients

    def follow(self, gradients: Mapping[str, float]) -> None:
        """Set the weights of the next steps, from the means over the processes of what `take_gradients` returned."""
        if self._auto is not None and gradients:
            self._auto.follow(gradients)

    def scalars(self) -> Dict[str, float]:
        """Return each term's weight after its warm-up, to log, if the weights change by themselves."""
        return {} if self._auto is None else {f"weight/{name}": self._auto.weight(name) for name in self._nodes}
