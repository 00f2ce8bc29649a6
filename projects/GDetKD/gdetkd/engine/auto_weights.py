"""Let the weights of the distillation terms follow from their gradients (DISTILL.WEIGHTS "auto")."""

import logging
import math
from typing import Any, Dict, List, Mapping, Optional

import torch
from detectron2.config import CfgNode
from torch import nn

from ..distiller import term_name
from ..errors import GDetKDError
from .gradients import OWN, term_gradients

logger = logging.getLogger(__name__)

# Largest change of a weight, as a factor, since it was first set. Source: our choice.
LARGEST_CHANGE = 100.0
# A warning reports a term once if its weight is reduced to less than this share. Source: our choice.
NOTABLE_REDUCTION = 0.8
KINDS = ("norm", "cosine")


class AutoWeights:
    """Weight each term so that its gradient has a given norm, in multiples of that of the student's own losses.

    The gradients are taken in the backbone's outputs, which all losses share. So they need no backward pass through the
    backbone, as in MGDA-UB (https://arxiv.org/abs/1810.04650). Balancing the norms of gradients is the idea of GradNorm
    (https://arxiv.org/abs/1711.02257). Here the weights are computed from the norms. GradNorm learns them.

    A term whose gradient points against that of the student's own losses gets less: its weight is multiplied by 1 plus
    the cosine of the two, if the cosine is negative. Norms and cosines are smoothed over measurements.

    Args:
        cfg: gives DISTILL.AUTO, and SHARE of each loss in DISTILL.LOSSES.
        backbone: the student's backbone.

    Raises:
        GDetKDError: no parameter of the backbone is trained.
    """

    def __init__(self, cfg: CfgNode, backbone: nn.Module) -> None:
        if not any(parameter.requires_grad for parameter in backbone.parameters()):
            raise GDetKDError(
                'DISTILL.WEIGHTS "auto" compares gradients in the outputs of the backbone, but no parameter of the '
                'backbone is trained. Train a part of it, or set DISTILL.WEIGHTS to "fixed".'
            )
        self._shares = {term_name(name): cfg.DISTILL[name].SHARE for name in cfg.DISTILL.LOSSES}
        self._period = cfg.DISTILL.AUTO.PERIOD
        self._momentum = cfg.DISTILL.AUTO.MOMENTUM
        self._first: Dict[str, float] = {}  # logarithm of the first weight, by term
        self._logs: Dict[str, float] = {}  # logarithm of the weight, smoothed
        self._cosines: Dict[str, float] = {}  # smoothed
        self._reported: List[str] = []
        self._features: List[torch.Tensor] = []
        backbone.register_forward_hook(self._keep_features)

    def weight(self, term: str) -> float:
        """Return the factor on a term. It is 0 until a gradient of the term has been measured."""
        return math.exp(self._logs[term]) * self._agreement(term) if term in self._logs else 0.0

    def _agreement(self, term: str) -> float:
        return 1.0 + min(0.0, self._cosines[term])

    def attach(self, model: nn.Module) -> Any:
        """Forget what was kept before each forward pass of `model`. Return the handle that undoes this."""
        return model.register_forward_pre_hook(lambda module, inputs: self._features.clear())

    def _keep_features(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # With images without labels, later calls in the same step return parts of these maps.
        if module.training and torch.is_grad_enabled() and not self._features:
            maps = output.values() if isinstance(output, Mapping) else output
            self._features = [features for features in maps if features.requires_grad]

    def measure(self, losses: Mapping[str, torch.Tensor], iteration: int, scale: float) -> Dict[str, float]:
        """Measure the gradients if that is due at this iteration. Otherwise return nothing.

        If a gradient is not finite, or the forward pass failed, the values are not a number. So all processes return
        equally many.

        Args:
            losses: the losses of this step. The terms have no weight.
            scale: factor on the losses in the backward pass, undone in the result. Half precision needs a large factor.
        """
        features, self._features = self._features, []
        if self._logs and (iteration + 1) % self._period:
            return {}
        gradients = term_gradients(losses, list(self._shares), features, scale) if features else {}
        unknown = dict.fromkeys(KINDS, math.nan)
        return {f"{kind}/{name}": gradients.get(name, unknown)[kind] for name in [OWN, *self._shares] for kind in KINDS}

    def follow(self, measured: Mapping[str, float]) -> None:
        """Move the weights towards those that give each term its share.

        A term without a gradient, and values that are not finite, change nothing.

        Args:
            measured: means over the processes of what `measure` returned.
        """
        own = measured.get(f"norm/{OWN}", 0.0)
        for term, share in self._shares.items():
            norm = measured.get(f"norm/{term}", 0.0)
            if share > 0 and norm > 0 and own > 0 and math.isfinite(own) and math.isfinite(norm):
                self._move(term, math.log(share * own / norm), measured[f"cosine/{term}"])

    def _move(self, term: str, log: float, cosine: float) -> None:
        first = self._first.setdefault(term, log)
        widest = math.log(LARGEST_CHANGE)
        log = min(max(log, first - widest), first + widest)
        self._logs[term] = self._smooth(self._logs.get(term), log)
        self._cosines[term] = self._smooth(self._cosines.get(term), cosine)
        if self._agreement(term) < NOTABLE_REDUCTION and term not in self._reported:
            self._reported.append(term)
            logger.warning(
                "The gradient of %s points against that of the student's own losses (cosine %.2f, smoothed). Its "
                "weight is multiplied by %.2f, and by less or more as the cosine changes.",
                term,
                self._cosines[term],
                self._agreement(term),
            )

    def _smooth(self, before: Optional[float], now: float) -> float:
        return now if before is None else self._momentum * before + (1 - self._momentum) * now

    def state_dict(self) -> Dict[str, Any]:
        return {"first": dict(self._first), "logs": dict(self._logs), "cosines": dict(self._cosines)}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._first, self._logs, self._cosines = (dict(state[name]) for name in ("first", "logs", "cosines"))
