"""Loading the student's weights, what of it a file leaves out, and going on with a run of the same student."""

import logging
from typing import Any, Dict, List

from torch import nn

from ..errors import GDetKDError, some
from .checkpoint import DurableCheckpointer

logger = logging.getLogger(__name__)


class StudentCheckpointer(DurableCheckpointer):
    """Detectron2's, which only warns of what a file leaves out; this one remembers it, and on resume refuses it.

    Args:
        run: a `RunRecord`, by which the run to be resumed is compared before anything of it is loaded.

    Attributes:
        unloaded: names of the student's tensors that no file has set yet.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.unloaded: List[str] = list(model.state_dict())
        self._resuming = False
        self._path = ""  # of what was loaded last

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        self._resuming = resume and self.has_checkpoint()
        return super().resume_or_load(path, resume=resume)

    def _load_model(self, checkpoint: Any) -> Any:
        if self._resuming and "run" in checkpoint and "run" in self.checkpointables:
            self.checkpointables["run"].load_state_dict(checkpoint.pop("run"))
        incompatible = super()._load_model(checkpoint)
        left = {*incompatible.missing_keys, *(key for key, _, _ in incompatible.incorrect_shapes)}
        # How many batches a BatchNorm has seen plays no part, and old files lack it.
        self.unloaded = sorted(key for key in left if not key.endswith("num_batches_tracked"))
        if not self._resuming and not set(self.model.state_dict()) - left:
            raise GDetKDError(
                f"The weights {self._path!r} set none of the student's {len(left)} tensors: no name and shape agrees. "
                "Does the file belong to MODEL.BACKBONE and to MODEL.RESNETS? To train from nothing, empty "
                "MODEL.WEIGHTS."
            )
        other = self.unloaded + incompatible.unexpected_keys
        if self._resuming and other and "trainer" in self.checkpointables:  # an evaluation may leave some out
            raise GDetKDError(
                f"This run was started with another student: {len(other)} tensors are not the same ({some(other, 5)}). "
                "Resume it with the config it was started with, or start in a new OUTPUT_DIR."
            )
        return incompatible

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        self._path = path
        return super().load(path, *args, **kwargs)

    def check_whole(self) -> None:
        """
        Raises:
            GDetKDError: some of the student is as it was initialised.
        """
        if self.unloaded:
            what = f"The weights {self._path!r} leave" if self._path else "MODEL.WEIGHTS is empty, which leaves"
            raise GDetKDError(
                f"{what} {len(self.unloaded)} of the student's {len(self.model.state_dict())} tensors as they were "
                f"initialised ({some(self.unloaded, 5)}). Give a checkpoint of this student, and the config that it "
                "was trained with."
            )

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
