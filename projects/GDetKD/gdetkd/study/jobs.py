"""Train several runs at once, each in a program of its own."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Sequence

from tqdm import tqdm

from ..errors import GDetKDError
from ..files import last_line
from .executors import Executor, Process
from .folder import claim_folder
from .run import Run
from .signals import exit_on_signals, starting

POLL_SECONDS = 1.0
# File in the folder of a run that gets the output of its training.
LOG = "stdout.txt"


@dataclass
class Training:
    """Hold a run and the program that trains it."""

    run: Run
    process: Process


def seed_by_seed(runs: Mapping[Any, Sequence[Run]]) -> List[Run]:
    """Order runs seed by seed, so that stopping early leaves complete seeds."""
    return [run for seed in zip(*runs.values()) for run in seed]


def run_all(runs: Iterable[Run], train_net: Path, executor: Executor) -> None:
    """Train the runs that are not complete, with a progress bar.

    If this function ends early, it also ends the trainings. They save their state and resume the next time.

    Args:
        executor: starts the trainings.

    Raises:
        GDetKDError: a folder holds a run of another config, labels or the teacher have changed in the meantime, or a
            run failed. Then the message names the log of the run and gives its last line.
    """
    runs = list({run.folder: run for run in runs}.values())
    for run in runs:
        claim_folder(run)
    waiting = [run for run in runs if not run.is_complete()]
    with (
        exit_on_signals(),
        tqdm(
            total=sum(run.max_iter for run in waiting),
            unit="it",
            mininterval=5,
            desc=_names(waiting),
            disable=not waiting,
        ) as bar,
    ):
        _train(waiting, train_net, executor, bar)
    for run in runs:
        claim_folder(run)  # labels or the teacher may have changed since


def _train(waiting: List[Run], train_net: Path, executor: Executor, bar: tqdm) -> None:
    running: Dict[int, Training] = {}  # by place: 0 to `executor.jobs` - 1
    done = 0
    try:
        while waiting or running:
            for place in [place for place in range(executor.jobs) if place not in running][: len(waiting)]:
                with starting():
                    running[place] = _start(waiting.pop(0), train_net, executor, place)
            time.sleep(POLL_SECONDS)
            for place, training in list(running.items()):
                code = training.process.poll()
                if code is not None:
                    del running[place]
                    _check(training.run, code)
                    done += training.run.max_iter
            bar.update(done + sum(t.run.metrics_file.iterations_done() for t in running.values()) - bar.n)
    finally:
        # A training that stays alive would write to the same folder as its successor.
        for training in running.values():
            training.process.terminate()
        for training in running.values():
            training.process.wait()


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(run.folder.name for run in runs[:3]) + (", ..." if len(runs) > 3 else "")


def _start(run: Run, train_net: Path, executor: Executor, place: int) -> Training:
    claim_folder(run)  # labels or the teacher may have changed since the first run was started
    command, log = run.command(train_net), run.folder / LOG
    return Training(run, executor.start(command, log, place, run.last_checkpoint))


def _check(run: Run, code: int) -> None:
    if code != 0 or not run.is_complete():
        log = run.folder / LOG
        raise GDetKDError(
            f"The run in {run.folder} failed. Correct the cause and start again: complete runs are kept. The log {log} "
            f"ends with: {last_line(log)}"
        )
