"""Let the weights of the distillation terms follow from their gradients (DISTILL.WEIGHTS "auto")."""

import logging
import math
from typing import Any, Dict, List, Mapping

import torch
from detectron2.config import CfgNode
from torch import nn

from ..distiller import term_name
from ..errors import GDetKDError
from .forward_guard import BROKEN
from .gradients import OWN, gradients_at_scales

logger = logging.getLogger(__name__)

# Number of measurements at the start, one in each step. Their mean is the reference of the bounds. Source: our choice.
FIRST_STEPS = 5
# A measured weight is clamped between the reference times this factor, and divided by it. Source: our choice.
LARGEST_CHANGE = 1000.0
# A gradient that is smaller, in multiples of that of the student's own losses, is rounding. Source: our choice.
SMALLEST_RATIO = 1e-6
# A warning reports a term once if its weight is reduced to less than this share. Source: our choice.
NOTABLE_REDUCTION = 0.8
# Factor on a loss in the backward pass in half precision. After an overflow it is divided by SCALE_STEP, but not below
# 1. After any other measurement it is doubled, up to HALF_SCALE. Source: our choice.
HALF_SCALE, SCALE_STEP = 2.0**8, 2.0**4
KINDS = ("norm", "cosine")
STATE = ("counts", "references", "logs", "cosines", "scales")


class AutoWeights:
    """Weight each term so that its gradient has a given norm, in multiples of that of the student's own losses.

    The gradients are taken in the backbone's outputs, which all losses share. So they need no backward pass through the
    backbone, as in MGDA-UB (https://arxiv.org/abs/1810.04650). A loss on p6, which is computed from p5, counts in both
    maps. Balancing the norms of gradients is the idea of GradNorm (https://arxiv.org/abs/1711.02257). Here the weights
    are computed from the norms. GradNorm learns them.

    If the gradient of a term points against the gradient of the student's own losses, the weight is multiplied by 1
    plus their cosine. The logarithms of the weights, and the cosines, are smoothed over measurements.

    Args:
        cfg: gives DISTILL.AUTO, and SHARE of each loss in DISTILL.LOSSES.
        student: a plain detector.

    Raises:
        GDetKDError: the student has no `backbone`, or no parameter of it is trained.
    """

    def __init__(self, cfg: CfgNode, student: nn.Module) -> None:
        backbone = getattr(student, "backbone", None)
        if backbone is None:
            raise GDetKDError(
                f'A {type(student).__name__} has no attribute `backbone`. DISTILL.WEIGHTS "auto" compares gradients '
                'in its outputs. Give the student\'s backbone this name, or set DISTILL.WEIGHTS to "fixed".'
            )
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
        # In half precision. The dtype of the maps does not tell: a norm in the pyramid may return float32.
        self._is_half = cfg.SOLVER.AMP.ENABLED
        self._scales: Dict[str, float] = {}
        self._followed = 0  # measurements in this process
        self._reported: List[str] = []  # names of warnings
        self._features: List[torch.Tensor] = []
        backbone.register_forward_hook(self._keep_features)

    def weight(self, term: str) -> float:
        """Return the factor on a term. It is 0 until a gradient of the term has been measured."""
        return math.exp(self._logs[term]) * self._agreement(term) if term in self._logs else 0.0

    def _agreement(self, term: str) -> float:
        return max(0.0, 1.0 + min(0.0, self._cosines[term]))  # rounding may make a cosine less than -1

    def attach(self, model: nn.Module) -> None:
        """Drop the feature maps of the previous pass before each forward pass of `model`."""
        model.register_forward_pre_hook(lambda module, inputs: self._features.clear())

    def _keep_features(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # Keep the maps of the first call. With images without labels, later calls return slices of these maps, and a
        # gradient in a slice would miss the rest.
        if torch.is_grad_enabled() and not self._features:
            maps = output.values() if isinstance(output, Mapping) else output
            self._features = [features for features in maps if features.requires_grad]

    def measure(self, losses: Mapping[str, torch.Tensor], iteration: int) -> Dict[str, float]:
        """Return the measured norms and cosines, or an empty dict if no measurement is due at this iteration.

        None is due if `losses` has no term, as after DISTILL.UNTIL.

        Every process returns the same keys, because the values are averaged over the processes. So a gradient that is
        not finite gives a norm that is not finite, and a forward pass that failed gives NaN for all values.

        Args:
            losses: the losses of this step. The terms have no weight.
        """
        features, self._features = self._features, []
        if not any(term in losses for term in self._shares):
            return {}
        if iteration >= FIRST_STEPS and (iteration + 1) % self._period:
            return {}
        names = [OWN, *self._shares]
        if not features or BROKEN in losses:
            return {f"{kind}/{name}": math.nan for name in names for kind in KINDS}
        gradients = gradients_at_scales(
            losses, list(self._shares), features, {name: self._scale(name) for name in names}
        )
        return {f"{kind}/{name}": gradients[name][kind] for name in names for kind in KINDS}

    def _scale(self, name: str) -> float:
        return self._scales.get(name, HALF_SCALE) if self._is_half else 1.0

    def follow(self, measured: Mapping[str, float]) -> None:
        """Move the weights towards those that give each term its share.

        A term does not change if its SHARE is 0, if its gradient is 0 or only rounding, or if a norm is not finite.

        Args:
            measured: means over the processes of what `measure` returned.
        """
        if not measured:
            return
        self._followed += 1
        own = measured[f"norm/{OWN}"]
        for term, share in self._shares.items():
            norm = measured[f"norm/{term}"]
            if share > 0 and norm > SMALLEST_RATIO * own > 0 and math.isfinite(own) and math.isfinite(norm):
                self._move(term, math.log(share * own / norm), measured[f"cosine/{term}"])
            elif share > 0 and self._followed > FIRST_STEPS and term not in self._logs:
                self._warn_without_weight(term, norm, own)
        if self._is_half:
            self._adapt_scales(measured)

    def _adapt_scales(self, measured: Mapping[str, float]) -> None:
        for name in (OWN, *self._shares):
            scale = self._scale(name)
            is_finite = math.isfinite(measured[f"norm/{name}"])
            self._scales[name] = min(HALF_SCALE, 2 * scale) if is_finite else max(1.0, scale / SCALE_STEP)

    def _warn_without_weight(self, term: str, norm: float, own: float) -> None:
        if f"{term} without weight" in self._reported:
            return
        self._reported.append(f"{term} without weight")
        logger.warning(
            "%s has had no weight for %d measurements, so it has no effect: the norm of its gradient is %g, and that "
            "of the student's own losses %g. Check that the losses are finite and that this one has regions. If its "
            "gradient is only rounding, student and teacher agree already: remove the loss from DISTILL.LOSSES.",
            term,
            self._followed,
            norm,
            own,
        )

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
                "weight is now multiplied by %.2f, and the factor follows the cosine. If this lasts, lower the SHARE "
                "of this loss or remove it from DISTILL.LOSSES.",
                term,
                self._cosines[term],
                self._agreement(term),
            )

    def state_dict(self) -> Dict[str, Any]:
        return {name: dict(getattr(self, f"_{name}")) for name in STATE}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, f"_{name}", dict(state[name]))
