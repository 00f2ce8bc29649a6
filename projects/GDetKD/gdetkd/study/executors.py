"""Start the trainings of a comparison on this machine. `cluster.py` starts them as jobs of SLURM."""

import os
import subprocess
from pathlib import Path
from typing import Callable, Dict, List, Optional, Protocol

import torch


class Process(Protocol):
    """Stand for a program that was started, as `subprocess.Popen` does."""

    def poll(self) -> Optional[int]:
        """Return the program's exit code, or None while it runs."""

    def terminate(self) -> None:
        """Ask the program to save and to end."""

    def wait(self) -> Optional[int]:
        """Wait until the program has ended, if a successor would disturb it."""


class Executor(Protocol):
    """Start programs.

    Attributes:
        jobs: how many programs may run at once.
        machine: what the programs run on. None: this machine.
    """

    jobs: int
    machine: Optional[str]

    def start(self, command: List[str], log: Path, place: int, progress: Callable[[], str]) -> Process:
        """Start a program.

        Args:
            command: the program and its arguments.
            log: file to which the program's output is appended.
            place: 0 to `jobs` - 1. Programs that run at once have different places.
            progress: returns a text that changes when the program has saved something to resume from.
        """


class LocalExecutor:
    """Start programs as processes of this machine, each with its share of the cores, and a GPU if there are several."""

    machine: Optional[str] = None

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def start(self, command: List[str], log: Path, place: int, progress: Callable[[], str]) -> Process:
        with open(log, "a") as file:
            # In a new session the training does not get the terminal's Ctrl-C. It gets SIGTERM, and saves.
            return subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=run_environment(self.jobs, place),
                start_new_session=True,
            )


def usable_cores() -> int:
    """Return how many cores this process may use. A container or SLURM can give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_environment(jobs: int, place: int = 0) -> Dict[str, str]:
    """Return the environment variables of the training at one of the `jobs` places: its threads and its GPU."""
    # A value that the user set wins. Otherwise the trainings share the usable cores.
    environment = {"OMP_NUM_THREADS": str(max(1, usable_cores() // jobs)), **os.environ}
    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else list(map(str, range(count)))
        environment["CUDA_VISIBLE_DEVICES"] = gpus[place % count]
    return environment
