"""Open fvcore's checkpointer."""

from typing import Any, Dict


class CheckpointSteps:
    """Name the two steps of loading that a subclass changes. Mix it in before a checkpointer.

    fvcore up to 0.1.5 and Detectron2 v0.6 and main have private names for these steps.
    """

    def read_file(self, filename: str) -> Dict[str, Any]:
        """Return what a checkpoint file holds."""
        return super()._load_file(filename)

    def load_weights(self, checkpoint: Dict[str, Any]) -> Any:
        """Load a checkpoint's weights into the model. Return which keys do not agree."""
        return super()._load_model(checkpoint)

    def _load_file(self, filename: str) -> Dict[str, Any]:
        return self.read_file(filename)

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        return self.load_weights(checkpoint)
