"""Build Detectron2's optimizer, or AdamW with the same parameter groups and gradient clipping."""

from typing import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from ..errors import GDetKDError


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that SOLVER.OPTIMIZER names.

    Raises:
        GDetKDError: SOLVER.OPTIMIZER is neither "SGD" nor "AdamW", or Detectron2 does not know the way of clipping.
    """
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    if clipping.ENABLED and clipping.CLIP_TYPE not in ("value", "norm"):
        raise GDetKDError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clipping.CLIP_TYPE!r}. Set it to 'value' or 'norm'.")
    if cfg.SOLVER.OPTIMIZER == "SGD":
        return build_sgd(cfg, model)
    if cfg.SOLVER.OPTIMIZER != "AdamW":
        raise GDetKDError(f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}. Set it to 'SGD' or 'AdamW'.")
    params = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    optimizer_class = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return optimizer_class(params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)


def exempt_from_decay(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Move the parameters into groups of their own that have no weight decay, in place.

    The other settings of their groups stay. This works on the built optimizer, so it also works for a trainer that
    builds another optimizer.
    """
    exempt = set(parameters)
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if parameter in exempt]
        if not chosen or not group.get("weight_decay"):
            continue
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        group["params"] = [parameter for parameter in group["params"] if parameter not in exempt]
        optimizer.add_param_group({**settings, "params": chosen, "weight_decay": 0.0})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
