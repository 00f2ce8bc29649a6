"""The base class of the bottom-up networks of all libraries: frozen blocks, norms, and the file of weights."""

from abc import abstractmethod
from typing import Callable, Dict, List, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from .blocks import Block, frozen_blocks, replace_module
from .config import level_stride
from .preprocessing import Preprocessing


class LibraryBottomUp(Backbone):
    """Compute the feature maps of a library's classifier, as Detectron2's `FPN` wants them.

    Attributes:
        key: config key of the file of ImageNet weights, for messages.
        model_name: name of the model in the library.
        weights: path of the file of ImageNet weights, or "".
        preprocessing: the images that the library's ImageNet weights expect.
    """

    key: str
    model_name: str
    weights: str
    preprocessing: Preprocessing

    def __init__(self) -> None:
        super().__init__()
        self._frozen: List[str] = []  # paths of frozen blocks in `library_module`
        self._channels: Dict[str, int] = {}

    @property
    @abstractmethod
    def library_module(self) -> nn.Module:
        """Return the module whose tensors have the library's names."""

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return {
            level: ShapeSpec(channels=channels, stride=level_stride(level))
            for level, channels in self._channels.items()
        }

    def set_norm(self, norm: str, freeze: Callable[[nn.Module], nn.Module], sync: Callable[..., nn.Module]) -> None:
        """Convert the BatchNorm layers of all blocks, in place.

        Args:
            norm: "BN", "FrozenBN" or "SyncBN".
            freeze: returns a module with frozen BatchNorm, as `FrozenBatchNorm2d.convert_frozen_batchnorm` does.
            sync: returns a module with synchronised BatchNorm.
        """
        convert = {"BN": None, "FrozenBN": freeze, "SyncBN": sync}[norm]
        if convert is not None:
            convert(self.library_module)

    def freeze(
        self, blocks: Sequence[Block], freeze_at: int, first_stride: int, freeze: Callable[[nn.Module], nn.Module]
    ) -> None:
        """Freeze blocks from the image on: no gradient, fixed BatchNorm, and eval mode also in training.

        Args:
            blocks: the calls of the blocks in order.
            freeze_at: MODEL.BACKBONE.FREEZE_AT; see `frozen_blocks`.
            first_stride: stride of the first feature map.
            freeze: returns a module with frozen BatchNorm.
        """
        root = self.library_module
        self._frozen = frozen_blocks(blocks, freeze_at, first_stride)
        for name in self._frozen:
            replace_module(root, name, freeze(root.get_submodule(name)))
            root.get_submodule(name).requires_grad_(False)
        if self._frozen:  # parameters outside of blocks, such as a position embedding, belong to the stem
            for parameter in root.parameters(recurse=False):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "LibraryBottomUp":
        super().train(mode)
        for name in self._frozen:
            self.library_module.get_submodule(name).eval()  # without dropped paths, too
        return self

    @abstractmethod
    def forward(self, image: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Return the feature maps (B, C, H, W) of an image (B, 3, H, W) by level, such as "res4"."""
