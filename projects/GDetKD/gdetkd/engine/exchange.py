"""Communicate small flags between the processes of a run, on the CPU."""

from typing import List, Sequence, Tuple

import torch
import torch.distributed as dist
from detectron2.utils import comm

from .._compat.processes import cpu_group, default_store


def on_any_process(flag: bool) -> bool:
    """Return whether any process raises the flag. All processes must call this together."""
    return any_and_mean([flag], [])[0][0]


def any_and_mean(flags: Sequence[bool], values: Sequence[float]) -> Tuple[List[bool], List[float]]:
    """Return each flag, raised where any process raises it, and the mean of each value over the processes.

    All processes must call this together, with as many flags and values. A value that is not finite spoils no flag.
    """
    if comm.get_world_size() == 1:
        return list(flags), list(values)
    together = torch.tensor([*map(float, flags), *values], dtype=torch.float64)
    dist.all_reduce(together, group=cpu_group())
    sums = together.tolist()
    return [total > 0 for total in sums[: len(flags)]], [total / comm.get_world_size() for total in sums[len(flags) :]]


class Notice:
    """Leave a note that the other processes can look for. No process waits for another.

    Args:
        name: the same on every process, and unique to this notice.
    """

    def __init__(self, name: str) -> None:
        self._key = f"gdetkd/{name}"

    def leave(self) -> None:
        if comm.get_world_size() > 1:
            default_store().set(self._key, "1")

    def is_there(self) -> bool:
        """Return whether the note is there."""
        return comm.get_world_size() > 1 and default_store().check([self._key])
