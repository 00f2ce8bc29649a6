"""Find the blocks that a network runs one after another, and the strides of their outputs."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import torch
from torch import nn

from ..errors import GDetKDError, first_line

# Height and width of the image that finds the strides. Both are multiples of 32, and they differ, so that a map's
# height and width are not mistaken for its channels.
PROBE_SIZE = (64, 96)


@dataclass
class Block:
    """Describe one call of a block.

    Attributes:
        name: path of the module in the network, such as "features.3".
        source: the first input.
        output: the output.
    """

    name: str
    source: Any
    output: Any

    @property
    def map_stride(self) -> int:
        """Return the stride of an output that is a feature map (B, C, H, W), or 0 for another output."""
        return map_stride(self.output)

    @property
    def stride(self) -> int:
        """Return the stride of an output (B, C, H, W) or (B, H, W, C), or 0 for another output, such as tokens."""
        return self.map_stride or (_stride(self.output.shape[1:3]) if _is_4d(self.output) else 0)


def probe_blocks(
    what: str, model: nn.Module, forward: Callable[[torch.Tensor], Any]
) -> Tuple[List[Block], torch.Tensor, Any]:
    """Run a network once on an empty image, in eval mode, and watch its blocks.

    Args:
        what: name of the network, for messages.
        forward: runs the network on an image (1, 3, H, W).

    Returns:
        the calls of the blocks in order, the image, and what `forward` returned.

    Raises:
        GDetKDError: the network cannot run on such an image.
    """
    calls: List[Block] = []
    handles = [module.register_forward_hook(_noting(name, calls)) for name, module in named_blocks(model)]
    image = _probe_image(model)
    try:
        with torch.no_grad(), _evaluating(model):
            output = forward(image)
    except (RuntimeError, AssertionError, ValueError) as e:
        raise GDetKDError(
            f"{what} cannot run on an image of {PROBE_SIZE[0]} x {PROBE_SIZE[1]} pixels ({first_line(e)}), but a "
            "detector has images of many sizes. Choose another model (docs/backbones.md)."
        ) from e
    finally:
        for handle in handles:
            handle.remove()
    return calls, image, output


def freeze_unread(model: nn.Module, forward: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> None:
    """Freeze the parameters on which no feature map depends, in place.

    They would get no gradient, and with several processes DistributedDataParallel would wait for it.

    Args:
        forward: returns the feature maps of an image (1, 3, H, W).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad(), _evaluating(model):
        maps = [feature_map.sum() for feature_map in forward(_probe_image(model)) if feature_map.requires_grad]
    if not maps:
        return
    for parameter, gradient in zip(parameters, torch.autograd.grad(sum(maps), parameters, allow_unused=True)):
        parameter.requires_grad_(gradient is not None)


def _probe_image(model: nn.Module) -> torch.Tensor:
    return torch.zeros(1, 3, *PROBE_SIZE, device=next(model.parameters()).device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set a network to eval mode, and each module back to its mode at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def map_stride(output: Any) -> int:
    """Return the stride of a feature map (B, C, H, W) of the image of `probe_blocks`, or 0 for another output."""
    return _stride(output.shape[2:]) if _is_4d(output) else 0


def named_blocks(module: nn.Module, prefix: str = "") -> Iterator[Tuple[str, nn.Module]]:
    """Yield the modules that a network calls itself, by path: its children, or the children of plain containers."""
    for name, child in module.named_children():
        if type(child).forward in (nn.Sequential.forward, nn.Module.forward):  # the latter for nn.ModuleList
            yield from named_blocks(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def frozen_blocks(blocks: Sequence[Block], freeze_at: int, first_stride: int) -> List[str]:
    """Return the names of the blocks that MODEL.BACKBONE.FREEZE_AT freezes.

    0 freezes nothing. K freezes the blocks up to stride 2^K, and the stem in any case. The stem is the first block, and
    the blocks of the same stride in the same container: a convolution "stem.0" and its norm "stem.1".

    Args:
        blocks: the calls of the blocks in order.
        first_stride: stride of the network's first feature map, for blocks whose output does not tell.
    """
    if freeze_at < 1:
        return []
    first, container = blocks[0].name, blocks[0].name.rpartition(".")[0]
    frozen, stride = [], first_stride
    for block in blocks:
        stride = block.stride or stride
        is_beside_first = bool(container) and block.name.startswith(f"{container}.") and stride == blocks[0].stride
        if block.name == first or is_beside_first or stride <= 2**freeze_at:
            frozen.append(block.name)
    return list(dict.fromkeys(frozen))


def keep_only(module: nn.Module, names: Sequence[str]) -> None:
    """Remove all descendants of a module, in place, that are neither named nor part of a named module."""
    for name, child in list(module.named_children()):
        inside = [path[len(name) + 1 :] for path in names if path.startswith(f"{name}.")]
        if name in names:
            continue
        if inside:
            keep_only(child, inside)
        else:
            delattr(module, name)


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a path of a network, in place of another module."""
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module)


def _noting(name: str, calls: List[Block]) -> Callable[..., None]:
    return lambda module, inputs, output: calls.append(Block(name, inputs[0], output))


def _is_4d(output: Any) -> bool:
    return isinstance(output, torch.Tensor) and output.dim() == 4


def _stride(size: Sequence[int]) -> int:
    strides = {full // part if full % part == 0 else 0 for full, part in zip(PROBE_SIZE, size)}
    return strides.pop() if len(strides) == 1 else 0
