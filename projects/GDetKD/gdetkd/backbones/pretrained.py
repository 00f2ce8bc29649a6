"""Start a backbone from its library's file of ImageNet weights: completely, or with an error."""

import logging
import os
from typing import Dict, List, Optional

import torch
from torch import nn

from ..errors import GDetKDError, some
from ..safe_load import read_weights
from ..weights_layout import with_model
from .bottom_up import LibraryBottomUp

logger = logging.getLogger(__name__)


def find_bottom_up(detector: nn.Module) -> Optional[LibraryBottomUp]:
    """Return the bottom-up network of a detector if it comes from torchvision or timm, else None."""
    return next((module for module in detector.modules() if isinstance(module, LibraryBottomUp)), None)


def load_pretrained(detector: nn.Module) -> List[str]:
    """Load the ImageNet weights that the detector's config names, in place. The file is read without running code.

    Like Detectron2's `build_model`, the builders leave the weights random. `DistillTrainer` calls this function.

    Returns:
        names of the loaded tensors in the detector's state dict. There are none if the config names no such file.

    Raises:
        GDetKDError: the file is missing, cannot be read, or does not hold every tensor of the backbone.
    """
    bottom_up = find_bottom_up(detector)
    if bottom_up is None or not bottom_up.weights:
        return []
    _check_path(bottom_up)
    given = with_model(read_weights(bottom_up.weights), bottom_up.weights)["model"]
    own = bottom_up.library_module.state_dict()
    _check_complete(bottom_up, own, given)
    for name, tensor in own.items():
        if name in given:
            tensor.copy_(torch.as_tensor(given[name]))
    logger.info(
        "The backbone %s starts from %s, with all of its %d tensors. The weights expect images in %s. Unused: %s.",
        bottom_up.model_name,
        bottom_up.weights,
        len(own),
        bottom_up.preprocessing,
        some([name for name in given if name not in own]) or "none",
    )
    prefix = next(name for name, module in detector.named_modules() if module is bottom_up.library_module)
    return [f"{prefix}.{name}" for name in own]


def _check_path(bottom_up: LibraryBottomUp) -> None:
    path = bottom_up.weights
    if "://" in path:
        raise GDetKDError(
            f"{bottom_up.key} is {path!r}, but must be a file on this machine: backbones download nothing. "
            "docs/backbones.md says how to get the file."
        )
    if not os.path.isfile(path):
        raise GDetKDError(
            f"{bottom_up.key} {path!r} is not there. The current folder is {os.getcwd()}. Correct the path, or get the "
            "file (docs/backbones.md). To start from random weights, empty the key."
        )


def _check_complete(bottom_up: LibraryBottomUp, own: Dict[str, torch.Tensor], given: Dict[str, torch.Tensor]) -> None:
    """Check that a file holds every tensor, except a BatchNorm's count of batches, which has no effect."""
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    misshapen = [
        f"{name} {tuple(given[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if missing or misshapen:
        raise GDetKDError(
            f"{bottom_up.key} {bottom_up.weights!r} lacks {len(missing) + len(misshapen)} of the {len(own)} tensors of "
            f"{bottom_up.model_name}'s backbone ({some(misshapen + missing)}). The tensors of the file are "
            f"{some(list(given), 3)}. Give the file of this model, with the library's names (docs/backbones.md)."
        )
