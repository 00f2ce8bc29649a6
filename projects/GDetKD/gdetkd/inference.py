"""Make a frozen backbone faster for inference, with the same values up to rounding."""

import copy

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from .errors import GDetKDError

# Values of DISTILL.TEACHER.DTYPE.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Norms that multiply each channel by a factor and add an offset in eval mode.
FIXED_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d)


def fold_norms(module: nn.Module) -> int:
    """Fold the fixed norms of Detectron2's convolutions into the weights, in place. Return the number of norms.

    A convolution and a fixed norm are both linear, so the result is the same up to rounding.
    """
    folded = 0
    for conv in module.modules():
        norm = getattr(conv, "norm", None)
        if isinstance(conv, Conv2d) and isinstance(norm, FIXED_NORMS):
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            conv.weight = nn.Parameter(weight, requires_grad=False)
            conv.bias = nn.Parameter(bias, requires_grad=False)
            conv.norm = None
            folded += 1
    return folded


def settle_statistics(module: nn.Module) -> None:
    """Move the statistics of all fixed norms into their factor and offset, in place.

    Otherwise a small variance becomes 0 in half precision, and the result infinite if the norm's eps is 0, as in some
    of torchvision's detectors.
    """
    for norm in module.modules():
        if not isinstance(norm, FIXED_NORMS) or norm.running_mean is None:
            continue
        factor = (norm.running_var + norm.eps).rsqrt()
        factor = factor if norm.weight is None else norm.weight.detach() * factor
        offset = -norm.running_mean * factor
        offset = offset if norm.bias is None else norm.bias.detach() + offset
        is_parameter = not isinstance(norm, (FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d))
        for name, value in (("weight", factor), ("bias", offset)):
            setattr(norm, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
        norm.running_mean = torch.zeros_like(norm.running_mean)
        norm.running_var = torch.full_like(norm.running_var, 1 - norm.eps)


def for_inference(backbone: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a frozen backbone with folded norms, in channels-last order.

    The original stays as loaded, because evaluation, comparison and head transfer use it.

    Args:
        backbone: a backbone in eval mode.
        dtype: dtype of the copy's weights.
    """
    faster = copy.deepcopy(backbone)
    fold_norms(faster)
    if torch.finfo(dtype).bits < 32:
        settle_statistics(faster)
    return faster.to(dtype=dtype, memory_format=torch.channels_last)


def parse_dtype(name: str, device: str, amp: bool) -> torch.dtype:
    """Return the dtype that the teacher runs in.

    Args:
        name: DISTILL.TEACHER.DTYPE. Empty: float16 if the student trains with AMP on CUDA, else float32.
        device: MODEL.DEVICE.
        amp: SOLVER.AMP.ENABLED.

    Raises:
        GDetKDError: the dtype is unknown, or the device does not support it.
    """
    if not name:
        return torch.float16 if amp and device.startswith("cuda") else torch.float32
    if name not in DTYPES:
        raise GDetKDError(
            f"DISTILL.TEACHER.DTYPE is {name!r}. Set it to {', '.join(DTYPES)}, or '' for the student's precision."
        )
    if name == "float16" and not device.startswith("cuda"):
        raise GDetKDError(
            f"DISTILL.TEACHER.DTYPE float16 needs a CUDA device, but MODEL.DEVICE is {device!r}. Set the dtype to '' "
            "or float32."
        )
    return DTYPES[name]
