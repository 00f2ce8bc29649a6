"""Check that all processes have the same detectors. Machines may hold different files under the same name."""

import hashlib

import torch
from detectron2.utils import comm
from torch import nn

from ..errors import GDetKDError
from ..teacher import FrozenTeacher


def check_same_teacher(teacher: FrozenTeacher) -> None:
    """Check that all processes have the same teacher.

    Raises:
        GDetKDError: the processes have loaded different weights of the teacher.
    """
    _require_equal(teacher.sha256, f"of the teacher ({teacher.file.weights!r})")


def check_same_student(student: nn.Module, weights: str) -> None:
    """Check that all processes start from the same student.

    Args:
        weights: the file that the student has loaded, for the message.

    Raises:
        GDetKDError: the processes start from different students.
    """
    if comm.get_world_size() > 1:
        _require_equal(_digest(student), f"of the student (MODEL.WEIGHTS {weights!r}, or the file of its backbone)")


def _require_equal(digest: str, name: str) -> None:
    found = comm.all_gather(digest)
    others = [rank for rank, other in enumerate(found) if other != found[0]]
    if others:
        raise GDetKDError(f"Ranks 0 and {others[0]} have different weights {name}. Copy the same file to all machines.")


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
