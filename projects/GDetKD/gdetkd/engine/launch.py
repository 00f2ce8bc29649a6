"""Run a function in every process of a run: in one process, by Detectron2's launcher or under torchrun."""

import functools
import gc
import multiprocessing
import os
import signal
import sys
from argparse import Namespace
from datetime import timedelta
from typing import Any, Callable

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from .._compat.processes import exchanging_in, forget_process_groups, make_local_group
from ..errors import GDetKDError
from ..program import message_in
from .stopping import EXIT_STOPPED

# torchrun gives these variables to each process that it starts.
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def is_under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return set(os.environ) >= TORCHRUN


def run_everywhere(main: Callable[[Namespace], Any], args: Namespace) -> None:
    """Call `main(args)` in as many processes as the arguments or torchrun ask for.

    Args:
        main: the function that each process calls.
        args: arguments of Detectron2's parser, with `check` and `timeout` (minutes).

    Raises:
        GDetKDError: there are fewer GPUs than asked for. Or a process ended too early: then the other processes have
            been ended as well, and the message names the first.
        SystemExit: with EXIT_STOPPED, all processes saved and stopped because of SIGTERM.
    """
    timeout = timedelta(minutes=args.timeout)
    if is_under_torchrun():
        _join_torchrun(args, timeout)
        _run_in_group(timeout, main, args)
        return
    _check_gpus(args)
    processes, machines = (0, 1) if args.check else (args.num_gpus, args.num_machines)  # a check runs in one process
    before = signal.signal(signal.SIGTERM, _pass_on) if processes * machines > 1 else None
    try:
        everywhere = functools.partial(_run_in_group, timeout, main)
        launch(everywhere, processes, machines, args.machine_rank, args.dist_url, (args,), timeout)
    except (ProcessExitedException, ProcessRaisedException) as e:
        if getattr(e, "exit_code", None) == EXIT_STOPPED:
            sys.exit(EXIT_STOPPED)
        raise GDetKDError(which_ended(e, args.machine_rank * processes)) from e
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _run_in_group(timeout: timedelta, main: Callable[[Namespace], Any], args: Namespace) -> None:
    """Call `main(args)`, and leave the process groups if all processes end now.

    After an error this process does not leave the groups. NCCL would wait there for the other processes, which wait
    for this one, and the launcher would not see that this process failed. The same holds for an exit code that this
    process may have chosen alone. All processes end together with EXIT_STOPPED.
    """
    is_stopped = False
    try:
        _exchange_within(timeout, main, args)
    except SystemExit as stop:
        if stop.code != EXIT_STOPPED:
            raise
        is_stopped = True
    # The traceback of a stop holds the trainer, and the trainer holds a group: so leave outside of the handler.
    leave_process_groups()
    if is_stopped:
        sys.exit(EXIT_STOPPED)


def leave_process_groups() -> None:
    """Destroy the process groups of this process and end their threads. All processes must call this function.

    Call this function before a process ends. A thread of gloo needs Python's lock when it releases the tensors of an
    exchange. If Python is ending at that time, the thread aborts the process: "terminate called without an active
    exception", exit code -6. The threads of a group end when nothing refers to the group any more.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    comm.synchronize()  # or a process closes connections that another process still reads from
    # Free the models before the groups. If a model held the last reference to a group, freeing the model would wait
    # for the group's threads and hold Python's lock, which those threads wait for. `destroy_process_group` lets go of
    # the lock.
    forget_process_groups()
    gc.collect()
    dist.destroy_process_group()


def _exchange_within(timeout: timedelta, main: Callable[[Namespace], Any], args: Namespace) -> Any:
    """Call `main(args)`. Detectron2's exchanges on the CPU beside NCCL get the same timeout as all other exchanges."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"):
        return main(args)
    with exchanging_in(dist.new_group(backend="gloo", timeout=timeout)):
        return main(args)


def which_ended(error: Any, first_rank: int = 0) -> str:
    """Return a message that names the process which ended first, and why.

    Args:
        error: exception of torch's launcher.
        first_rank: rank of the first process on this machine.
    """
    rank = first_rank + error.error_index
    if isinstance(error, ProcessRaisedException):
        if message := message_in(str(error)):
            return f"{message} (The process of rank {rank} reports this. The other processes were ended.)"
        return f"The process of rank {rank} failed, and the other processes were ended:\n{error}"
    name = signal.Signals(-error.exit_code).name if error.exit_code < 0 else ""
    how = f"was killed by {name}" if name else f"ended with exit code {error.exit_code}"
    memory = " The system does this to a process when memory runs out." if name == "SIGKILL" else ""
    return f"The process of rank {rank} {how}, and the other processes were ended.{memory} Continue with --resume."


def _pass_on(number: int, frame: Any) -> None:
    """Pass SIGTERM on to the processes that train. They save the run. The process that launched them only waits."""
    for child in multiprocessing.active_children():
        child.terminate()


def _join_torchrun(args: Namespace, timeout: timedelta) -> None:
    if args.check:
        raise GDetKDError("--check needs one process, but torchrun started this one. Start it without torchrun.")
    if args.num_gpus > 1 or args.num_machines > 1:
        raise GDetKDError(
            f"--num-gpus {args.num_gpus} and --num-machines {args.num_machines} have no effect under torchrun, which "
            "starts the processes itself. Leave them out."
        )
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        if local_size > torch.cuda.device_count():
            raise GDetKDError(
                f"torchrun started {local_size} processes on this machine, which has {torch.cuda.device_count()} GPUs. "
                "Give --nproc_per_node the number of GPUs."
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=timeout)
    make_local_group(local_size)


def _check_gpus(args: Namespace) -> None:
    if args.num_gpus > max(1, torch.cuda.device_count()):
        raise GDetKDError(
            f"--num-gpus is {args.num_gpus}, but this machine has {torch.cuda.device_count()} CUDA devices. Give at "
            "most that number, or leave --num-gpus out to train in one process."
        )
