"""Find the detector's tensors in a checkpoint of any common training program."""

import logging
from typing import Any, Dict

import numpy as np
import torch

from .errors import GDetKDError

logger = logging.getLogger(__name__)

# Keys of the model in checkpoints of training programs, in the order of trying. Detectron2 reads "model".
MODEL_KEYS = ("model", "state_dict", "model_state_dict", "model_state")
# Keys of weights averaged over the training.
AVERAGE_KEYS = (
    "ema",
    "model_ema",
    "ema_model",
    "ema_state",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema_state_dict",
)


def with_model(content: Dict[str, Any], path: str) -> Dict[str, Any]:
    """Return a checkpoint with the tensors under "model", where Detectron2 reads them.

    Entries of the model that are no tensors, such as a count of iterations, are left out and logged.

    Args:
        content: content of the file, with the model under one of `MODEL_KEYS` or at the top.
        path: the file, for messages.

    Raises:
        GDetKDError: the file holds no tensors in these places.
    """
    key = next((key for key in MODEL_KEYS if _is_model(content.get(key))), None)
    if key is None and not _is_model(content):
        keys = ", ".join(map(repr, list(content)[:5])) or "none"
        raise GDetKDError(
            f"The weights {path!r} hold no model: there are no tensors in the file or under {', '.join(MODEL_KEYS)}. "
            f"The keys of the file are: {keys}. Write the file by torch.save({{'model': model.state_dict()}}, ...)."
        )
    weights = content if key is None else content[key]
    no_tensors = [name for name, value in weights.items() if not is_tensor(value)]
    if no_tensors:
        logger.warning("%s: %s is not a tensor and is left out.", path, ", ".join(map(str, no_tensors[:5])))
    if key not in ("model", None):
        logger.info("%s: the weights are read from the key %r.", path, key)
    averages = [name for name in AVERAGE_KEYS if name in content and name != key]
    if averages:
        logger.warning(
            "%s holds averaged weights under %r, which are not used. To use them, save them in a file under 'model'.",
            path,
            averages[0],
        )
    kept = {} if key is None else {name: value for name, value in content.items() if name != key}
    return {**kept, "model": {name: value for name, value in weights.items() if is_tensor(value)}}


def _is_model(value: Any) -> bool:
    return isinstance(value, dict) and any(map(is_tensor, value.values()))


def is_tensor(value: Any) -> bool:
    """Return whether a value is a torch tensor or a NumPy array."""
    return isinstance(value, (torch.Tensor, np.ndarray))
