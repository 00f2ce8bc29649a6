"""Open Detectron2's checkpointer."""

from typing import Any, Dict

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer


class _TorchFormat(Checkpointer):
    """Call `read_torch_file` where Detectron2's checkpointer calls the step of its base class."""

    def _load_file(self, f: str) -> Dict[str, Any]:
        return self.read_torch_file(f)


class CheckpointSteps(DetectionCheckpointer, _TorchFormat):
    """Name the steps of loading that a subclass of Detectron2's checkpointer changes.

    fvcore up to 0.1.5 and Detectron2 v0.6 and main have private names for these steps.
    """

    def read_file(self, filename: str) -> Dict[str, Any]:
        """Return what a checkpoint file of any format holds. For torch's format this calls `read_torch_file`."""
        return super()._load_file(filename)

    def read_torch_file(self, filename: str) -> Dict[str, Any]:
        """Return what a file in torch's format holds."""
        return Checkpointer._load_file(self, filename)

    def load_weights(self, checkpoint: Dict[str, Any]) -> Any:
        """Load a checkpoint's weights into the model. Return which keys do not agree."""
        return super()._load_model(checkpoint)

    def _load_file(self, filename: str) -> Dict[str, Any]:
        return self.read_file(filename)

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        return self.load_weights(checkpoint)
