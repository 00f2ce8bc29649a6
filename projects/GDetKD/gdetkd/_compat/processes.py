"""Reach the process groups that Detectron2 keeps, and torch's key-value store."""

from contextlib import contextmanager
from typing import Any, Iterator

import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed import distributed_c10d

# Detectron2 v0.6 lacks `comm.create_local_process_group`.
MAKES_LOCAL_GROUP = hasattr(comm, "create_local_process_group")


def default_store() -> Any:
    """Return the key-value store of the default process group. No torch up to 2.15 has a public name for it."""
    return distributed_c10d._get_default_store()


def cpu_group() -> Any:
    """Return the group in which Detectron2 exchanges objects on the CPU. It has no public name in v0.6 and main."""
    return comm._get_global_gloo_group()


@contextmanager
def exchanging_in(group: Any) -> Iterator[None]:
    """Let Detectron2 exchange objects in `group` inside. v0.6 and main make a group that takes no timeout."""
    original = comm._get_global_gloo_group
    comm._get_global_gloo_group = lambda: group
    try:
        yield
    finally:
        comm._get_global_gloo_group = original


def make_local_group(local_size: int) -> None:
    """Make Detectron2's group of the processes on this machine. All processes must call this together.

    Detectron2 main has a function for this. v0.6 has only the variable.

    Args:
        local_size: number of processes on each machine.
    """
    if MAKES_LOCAL_GROUP:
        comm.create_local_process_group(local_size)
        return
    for first in range(0, dist.get_world_size(), local_size):  # every process has to make every group
        ranks = list(range(first, first + local_size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def forget_process_groups() -> None:
    """Make Detectron2 forget the process groups that it keeps. Neither v0.6 nor main has a function for this."""
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    if MAKES_LOCAL_GROUP:
        comm.create_local_process_group.cache_clear()
