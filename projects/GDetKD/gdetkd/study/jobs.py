"""Train several runs at once, each in its own process with its share of the cores."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Sequence

import torch
from tqdm import tqdm

from ..errors import GDetKDError
from ..files import last_line
from .folder import claim_folder
from .run import Run
from .signals import exit_on_signals, starting

POLL_SECONDS = 1.0


@dataclass
class Training:
    """A run, and the process that trains it."""

    run: Run
    process: subprocess.Popen


def seed_by_seed(runs: Mapping[Any, Sequence[Run]]) -> List[Run]:
    """Order runs seed by seed, so that stopping early leaves complete seeds."""
    return [run for seed in zip(*runs.values()) for run in seed]


def run_all(runs: Iterable[Run], train_net: Path, jobs: int = 2) -> None:
    """Train the runs that are not complete, with a progress bar.

    `jobs` runs train at once, each on its own GPU if there are several. If this function ends early, it also ends the
    trainings. They save their state and resume the next time.

    Raises:
        GDetKDError: a folder holds a run of another config, or a run failed. Then the message names the log of the run
            and gives its last line.
    """
    runs = list({run.folder: run for run in runs}.values())
    for run in runs:
        claim_folder(run)
    waiting = [run for run in runs if not run.is_complete()]
    with exit_on_signals(), tqdm(
        total=sum(run.max_iter for run in waiting),
        unit="it",
        mininterval=5,
        desc=_names(waiting),
        disable=not waiting,
    ) as bar:
        _train(waiting, train_net, jobs, bar)


def _train(waiting: List[Run], train_net: Path, jobs: int, bar: tqdm) -> None:
    running: Dict[int, Training] = {}  # by place: 0 to `jobs` - 1
    done = 0
    try:
        while waiting or running:
            for place in [place for place in range(jobs) if place not in running][: len(waiting)]:
                with starting():
                    running[place] = _start(waiting.pop(0), train_net, jobs, place)
            time.sleep(POLL_SECONDS)
            for place, training in list(running.items()):
                if training.process.poll() is not None:
                    del running[place]
                    _check(training)
                    done += training.run.max_iter
            bar.update(done + sum(t.run.metrics_file.iterations_done() for t in running.values()) - bar.n)
    finally:
        # A training that stays alive would write to the same folder as its successor.
        for training in running.values():
            training.process.terminate()
        for training in running.values():
            training.process.wait()


def usable_cores() -> int:
    """Return how many cores this process may use. A container or SLURM can give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(run.folder.name for run in runs[:3]) + (", ..." if len(runs) > 3 else "")


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


def _start(run: Run, train_net: Path, jobs: int, place: int) -> Training:
    with open(run.folder / "stdout.txt", "a") as log:
        # In a new session the training does not get the terminal's Ctrl-C. It gets SIGTERM, and saves.
        process = subprocess.Popen(
            run.command(train_net),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=run_environment(jobs, place),
            start_new_session=True,
        )
    return Training(run, process)


def _check(training: Training) -> None:
    run = training.run
    if training.process.returncode != 0 or not run.is_complete():
        log = run.folder / "stdout.txt"
        raise GDetKDError(
            f"The run in {run.folder} failed. Correct the cause and start again: complete runs are kept. The log {log} "
            f"ends with: {last_line(log)}"
        )
