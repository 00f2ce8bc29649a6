"""Loading the student's starting weights, and what of it they leave out."""

import logging
from typing import Any, List

from torch import nn

from ..safe_load import SafeCheckpointer

logger = logging.getLogger(__name__)


class StudentCheckpointer(SafeCheckpointer):
    """Detectron2's, which only warns of what a file leaves out; this one remembers it.

    Attributes:
        unloaded: names of the student's tensors that no file has set yet.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.unloaded: List[str] = list(model.state_dict())

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        left = {*incompatible.missing_keys, *(key for key, _, _ in incompatible.incorrect_shapes)}
        # How many batches a BatchNorm has seen plays no part, and old files lack it.
        self.unloaded = sorted(key for key in left if not key.endswith("num_batches_tracked"))
        return incompatible

    def unloaded_backbone(self) -> List[str]:
        """Those below the pyramid, which weights for a detector or for classification should both hold."""
        return [name for name in self.unloaded if name.startswith("backbone.bottom_up.")]

    def warn_of_backbone(self, path: str) -> None:
        """A student whose backbone starts from nothing, although weights were given, is only worse in the end."""
        left = self.unloaded_backbone()
        if path and left:
            logger.warning(backbone_message(path, left))


def backbone_message(path: str, unloaded: List[str]) -> str:
    return (
        f"MODEL.WEIGHTS {path!r} leaves {len(unloaded)} tensors of the student's backbone as they were initialised "
        f"({unloaded[0]}, ...). Do the file and MODEL.RESNETS belong together?"
    )
