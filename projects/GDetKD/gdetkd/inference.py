"""A frozen backbone made ready to do nothing but run forward: the same values, sooner."""

import copy

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .errors import GDetKDError

# What DISTILL.TEACHER.DTYPE may say.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Norms that in eval mode are a factor and an offset for each channel.
FIXED_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def fold_norms(module: nn.Module) -> int:
    """Folds the fixed norms of Detectron2's convolutions into their weights, in place; returns how many.

    Both are linear, so that this is exact but for rounding.
    """
    folded = 0
    for conv in module.modules():
        norm = getattr(conv, "norm", None)
        if isinstance(conv, Conv2d) and isinstance(norm, FIXED_NORMS):
            weight, bias = fuse_conv_bn_weights(
                *(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            )
            conv.weight = nn.Parameter(weight, requires_grad=False)
            conv.bias = nn.Parameter(bias, requires_grad=False)
            conv.norm = None
            folded += 1
    return folded


def for_inference(backbone: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a frozen backbone with its norms folded in, in channels-last order.

    The original stays as it was loaded, because it is what is evaluated, compared and transferred.

    Args:
        backbone: in eval mode.
        dtype: of the copy's weights.
    """
    ready = copy.deepcopy(backbone)
    fold_norms(ready)
    return ready.to(dtype=dtype, memory_format=torch.channels_last)


def parse_dtype(name: str, device: str, amp: bool) -> torch.dtype:
    """The dtype that the teacher runs in.

    Args:
        name: DISTILL.TEACHER.DTYPE; empty: half precision where the student trains in it, too.
        device: MODEL.DEVICE.
        amp: SOLVER.AMP.ENABLED.

    Raises:
        GDetKDError: there is no such dtype, or not on this device.
    """
    if not name:
        return torch.float16 if amp else torch.float32
    if name not in DTYPES:
        raise GDetKDError(f"DISTILL.TEACHER.DTYPE is {name!r}; there are {', '.join(DTYPES)}, or '' for the student's.")
    if name == "float16" and not device.startswith("cuda"):
        raise GDetKDError("DISTILL.TEACHER.DTYPE float16 needs a CUDA device. Set it to '' or float32.")
    return DTYPES[name]
