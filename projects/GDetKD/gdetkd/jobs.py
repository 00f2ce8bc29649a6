"""Runs of train_net.py side by side, each a process of its own with its share of the cores."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Sequence

import torch
from tqdm import tqdm

from .errors import GDetKDError
from .experiments import Run

POLL_SECONDS = 1.0


def seed_by_seed(runs: Mapping[Any, Sequence[Run]]) -> List[Run]:
    """The runs of each method in an order in which what is stopped early has whole seeds."""
    return [run for seed in zip(*runs.values()) for run in seed]


def run_all(runs: Iterable[Run], train_net: Path, jobs: int = 2) -> None:
    """Trains what is not complete yet, `jobs` at once, each on a GPU of its own as far as there are any, with a
    progress bar.

    When it ends early, so do the trainings: they save, and go on where they were when it is called again.

    Raises:
        GDetKDError: a folder holds a run of another config, or a run failed; then the message names its log and gives
            the log's last line.
    """
    runs = list({run.folder: run for run in runs}.values())
    for run in runs:
        run.claim_folder()
    waiting = [run for run in runs if not run.is_complete()]
    running: Dict[int, Run] = {}  # by the place, of `jobs`, that it takes
    total = sum(run.max_iter for run in waiting)
    with exit_on_signals():
        try:
            with tqdm(total=total, unit="it", mininterval=5, desc=_names(waiting), disable=not waiting) as bar:
                done = 0
                while waiting or running:
                    for place in [place for place in range(jobs) if place not in running][: len(waiting)]:
                        running[place] = _start(waiting.pop(0), train_net, jobs, place)
                    time.sleep(POLL_SECONDS)
                    ended = [(place, run) for place, run in running.items() if run.process.poll() is not None]
                    for place, run in ended:
                        del running[place]
                        _check(run)
                        done += run.max_iter
                    bar.update(done + sum(run.iterations_done() for run in running.values()) - bar.n)
        finally:
            # A second training in the folder of one that nobody waits for would spoil both.
            for run in running.values():
                run.process.terminate()
            for run in running.values():
                run.process.wait()


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Raise SystemExit inside on SIGTERM and SIGHUP, so that the processes that were started inside can be ended."""
    # Under nohup a hangup is ignored, and stays so.
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, _end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


def usable_cores() -> int:
    """Return how many cores this process may use: in a container or under SLURM fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(run.folder.name for run in runs[:3]) + (", ..." if len(runs) > 3 else "")


def run_environment(jobs: int, place: int = 0) -> Dict[str, str]:
    """Return the environment variables of the training at one of the `jobs` places: its threads and its GPU."""
    # Keep the user's value. Otherwise the trainings share the cores that this process may use.
    environment = {"OMP_NUM_THREADS": str(max(1, usable_cores() // jobs)), **os.environ}
    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else list(map(str, range(count)))
        environment["CUDA_VISIBLE_DEVICES"] = gpus[place % count]
    return environment


def _start(run: Run, train_net: Path, jobs: int, place: int) -> Run:
    environment = run_environment(jobs, place)
    with open(run.folder / "stdout.txt", "a") as log:
        # In a session of its own, which the terminal's Ctrl-C does not reach: it is ended by SIGTERM, and saves.
        run.process = subprocess.Popen(
            run.command(train_net), stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return run


def _check(run: Run) -> None:
    if run.process.returncode != 0 or not run.is_complete():
        log = run.folder / "stdout.txt"
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise GDetKDError(f"The run in {run.folder} failed; its log is {log}, which ends with: {last}")
