"""Load the weights of a teacher completely."""

import logging
import os
from typing import Any, NamedTuple

import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from ..errors import GDetKDError, first_line, some
from ..safe_load import DamagedFileError, SafeCheckpointer, sha256_of_file
from ..trained_with import TrainedWith, trained_with

logger = logging.getLogger(__name__)


class LoadedWeights(NamedTuple):
    """Describe a file of weights.

    Attributes:
        sha256: SHA-256 of the file, in hexadecimal digits.
        trained_with: what the file tells about its training.
    """

    sha256: str
    trained_with: TrainedWith


class CompleteCheckpointer(SafeCheckpointer):
    """Load weights as Detectron2 does, but raise an error if a tensor stays unloaded. Detectron2 only warns.

    Attributes:
        trained_with: see `LoadedWeights`.
    """

    trained_with = TrainedWith()

    def load_weights(self, checkpoint: Any) -> Any:
        self.trained_with = trained_with(checkpoint)
        incompatible = super().load_weights(checkpoint)
        # A BatchNorm's count of batches does not matter in eval mode, and old files lack it.
        missing = [key for key in incompatible.missing_keys if not key.endswith("num_batches_tracked")]
        misshapen = [f"{key} {have} for {want}" for key, have, want in incompatible.incorrect_shapes]
        left = misshapen + sorted(set(missing) - {key for key, _, _ in incompatible.incorrect_shapes})
        if left:
            raise GDetKDError(
                f"The teacher's weights leave {len(left)} of {len(self.model.state_dict())} tensors unloaded "
                f"({some(left)}). Give the config and the weights of the same detector: DISTILL.TEACHER.CONFIG_FILE, "
                "DISTILL.TEACHER.OPTS and DISTILL.TEACHER.WEIGHTS must belong together."
            )
        if incompatible.unexpected_keys:
            logger.warning(
                "The teacher's weights hold tensors that the teacher's config does not use: %s.",
                some(incompatible.unexpected_keys),
            )
        return incompatible


def load_weights(model: nn.Module, path: str) -> LoadedWeights:
    """Load all weights of a teacher.

    Raises:
        GDetKDError: no file is given, the file is missing, empty or damaged, or a tensor stays unloaded.
    """
    local = _local_file(path)
    checkpointer = CompleteCheckpointer(model)
    try:
        checkpointer.load(path)
    except DamagedFileError as e:
        raise GDetKDError(
            f"The teacher: {e} Is the file complete ({os.path.getsize(local)} bytes), and a Detectron2 checkpoint?"
        ) from e
    except GDetKDError:
        raise
    except (RuntimeError, OSError, KeyError, TypeError, AttributeError, ValueError) as e:
        raise GDetKDError(
            f"The teacher's weights {path!r} cannot be read ({type(e).__name__}: {first_line(e)}). Is the file "
            f"complete ({os.path.getsize(local)} bytes), and a Detectron2 checkpoint?"
        ) from e
    broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise GDetKDError(
            f"The teacher's weights {path!r} hold values that are not finite ({some(broken)}), so the teacher's "
            "training diverged. Take an earlier checkpoint."
        )
    return LoadedWeights(sha256_of_file(local), checkpointer.trained_with)


def _local_file(path: str) -> str:
    """Return the local path of a teacher's weights. Download them first if the path is a URL."""
    if not path:
        raise GDetKDError("The teacher has no weights. Set DISTILL.TEACHER.WEIGHTS.")
    if "://" not in path and not os.path.isfile(path):
        raise GDetKDError(
            f"The teacher's weights {path!r} are not there. The current folder is {os.getcwd()}. Correct "
            "DISTILL.TEACHER.WEIGHTS."
        )
    try:
        local = PathManager.get_local_path(path)
    except OSError as e:
        raise GDetKDError(
            f"The teacher's weights {path!r} cannot be downloaded ({type(e).__name__}: {first_line(e)}). Check the "
            "address and the network, or download the file yourself and name it in DISTILL.TEACHER.WEIGHTS."
        ) from e
    if os.path.getsize(local) == 0:
        raise GDetKDError(f"The teacher's weights {path!r} are an empty file. Copy or download it again.")
    return local
