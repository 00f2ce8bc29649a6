"""Copy the teacher's heads to the student (Yao et al., "G-DetKD", ICCV 2021, https://arxiv.org/abs/2108.07482)."""

import logging
from typing import List

from torch import nn

from ..errors import GDetKDError, some

logger = logging.getLogger(__name__)

# Tensors outside of the heads start like this.
NOT_HEADS = ("backbone.", "pixel_")
# Ending of the class frequencies of the detector's own dataset (MODEL.ROI_BOX_HEAD.USE_FED_LOSS). They are not learned.
CLASS_FREQUENCIES = "fed_loss_cls_weights"


def transferable(teacher: nn.Module, student: nn.Module) -> List[str]:
    """Return the names of the tensors outside the backbone that agree in name, shape and place in their sequence."""
    source = teacher.state_dict()
    other_sequences = tuple(f"{name}." for name in _other_sequences(teacher, student))
    return [
        name
        for name, tensor in student.state_dict().items()
        if _is_in_head(name)
        and name in source
        and source[name].shape == tensor.shape
        and not name.startswith(other_sequences)
    ]


def _other_sequences(teacher: nn.Module, student: nn.Module) -> List[str]:
    """Return the names of sequences with other layers than the teacher's: equal names mean different layers there.

    A tower with norms and a tower without them are such sequences, and so are box heads of different depths.
    """
    layers = {name: _layers(module) for name, module in teacher.named_modules() if isinstance(module, nn.Sequential)}
    modules = [(name, module) for name, module in student.named_modules() if name in layers]
    return [name for name, module in modules if _layers(module) != layers[name]]


def _layers(module: nn.Module) -> List[type]:
    return [type(layer) for layer in module.children()]


def _is_in_head(name: str) -> bool:
    return not (name.startswith(NOT_HEADS) or name.endswith(CLASS_FREQUENCIES))


def transfer_heads(teacher: nn.Module, student: nn.Module) -> List[str]:
    """Copy the teacher's heads to the student, in place: the tensors that `transferable` names.

    Returns:
        names of the copied tensors.

    Raises:
        GDetKDError: no tensor agrees.
    """
    source, own = teacher.state_dict(), student.state_dict()
    copied = transferable(teacher, student)
    for name in copied:
        own[name].copy_(source[name])
    skipped = [name for name in own if _is_in_head(name) and name not in copied]
    if not copied:
        raise GDetKDError(
            "DISTILL.HEAD_TRANSFER would transfer nothing: no tensor outside the backbones agrees in name, shape and "
            f"layer (the student has {some(skipped)}). Give the student the teacher's head widths and FPN channels, or "
            "set DISTILL.HEAD_TRANSFER to False."
        )
    logger.info("Head transfer: %d tensors copied from the teacher.", len(copied))
    if skipped:
        logger.warning(
            "Head transfer leaves %d tensors of the student's heads as they were (%s), because the teacher has no such "
            "tensor of the same shape and place. To copy them, too, give the student's heads the teacher's depths and "
            "widths, and its FPN the teacher's channels.",
            len(skipped),
            some(skipped),
        )
    return copied
