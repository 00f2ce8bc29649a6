"""Let the weights of the distillation terms follow from their gradients (DISTILL.WEIGHTS "auto")."""

import logging
import math
from typing import Any, Dict, List, Mapping

import torch
from detectron2.config import CfgNode
from torch import nn

from ..distiller import term_name
from ..errors import GDetKDError
from .gradients import OWN, gradients_at_scales

logger = logging.getLogger(__name__)

# The first steps in which gradients are measured. Their mean is the reference of the bounds. Source: our choice.
FIRST_STEPS = 5
# Largest change of a weight from the reference, as a factor. Source: our choice.
LARGEST_CHANGE = 1000.0
# A warning reports a term once if its weight is reduced to less than this share. Source: our choice.
NOTABLE_REDUCTION = 0.8
# Factor on a loss in the backward pass in half precision. After an overflow the next measurement takes a lower one.
HALF_SCALE, SCALE_STEP = 2.0**8, 2.0**4
KINDS = ("norm", "cosine")
STATE = ("counts", "references", "logs", "cosines")


class AutoWeights:
    """Weight each term so that its gradient has a given norm, in multiples of that of the student's own losses.

    The gradients are taken in the backbone's outputs, which all losses share. So they need no backward pass through the
    backbone, as in MGDA-UB (https://arxiv.org/abs/1810.04650). A map that is made of another one, such as p6, counts in
    both. Balancing the norms of gradients is the idea of GradNorm (https://arxiv.org/abs/1711.02257). Here the weights
    are computed from the norms. GradNorm learns them.

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
        self._counts: Dict[str, int] = {}  # number of measurements, by term
        self._references: Dict[str, float] = {}  # logarithm of the weight after the first measurements
        self._logs: Dict[str, float] = {}  # logarithm of the weight, smoothed
        self._cosines: Dict[str, float] = {}  # smoothed
        self._scales: Dict[str, float] = {}  # in half precision
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

    def measure(self, losses: Mapping[str, torch.Tensor], iteration: int) -> Dict[str, float]:
        """Measure the gradients if that is due at this iteration. Otherwise return nothing.

        If a gradient is not finite, or the forward pass failed, the values are not a number. So all processes return
        equally many.

        Args:
            losses: the losses of this step. The terms have no weight.
        """
        features, self._features = self._features, []
        if iteration >= FIRST_STEPS and (iteration + 1) % self._period:
            return {}
        names = [OWN, *self._shares]
        if not features:
            return {f"{kind}/{name}": math.nan for name in names for kind in KINDS}
        half = features[0].dtype in (torch.float16, torch.bfloat16)
        scales = {name: self._scales.get(name, HALF_SCALE) if half else 1.0 for name in names}
        gradients = gradients_at_scales(losses, list(self._shares), features, scales)
        for name in names:
            if half and not math.isfinite(gradients[name]["norm"]):
                self._scales[name] = scales[name] / SCALE_STEP
        return {f"{kind}/{name}": gradients[name][kind] for name in names for kind in KINDS}

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
        count = self._counts[term] = self._counts.get(term, 0) + 1
        if count > FIRST_STEPS:
            widest = math.log(LARGEST_CHANGE)
            log = min(max(log, self._references[term] - widest), self._references[term] + widest)
        # The first measurements count equally.
        momentum = min(self._momentum, (count - 1) / count) if count <= FIRST_STEPS else self._momentum
        self._logs[term] = momentum * self._logs.get(term, 0.0) + (1 - momentum) * log
        self._cosines[term] = momentum * self._cosines.get(term, 0.0) + (1 - momentum) * cosine
        if count <= FIRST_STEPS:
            self._references[term] = self._logs[term]
        if self._agreement(term) < NOTABLE_REDUCTION and term not in self._reported:
            self._reported.append(term)
            logger.warning(
                "The gradient of %s points against that of the student's own losses (cosine %.2f, smoothed). Its "
                "weight is multiplied by %.2f, and by less or more as the cosine changes.",
                term,
                self._cosines[term],
                self._agreement(term),
            )

    def state_dict(self) -> Dict[str, Any]:
        return {name: dict(getattr(self, f"_{name}")) for name in STATE}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, f"_{name}", dict(state[name]))
