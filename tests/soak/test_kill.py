"""A training that is killed again and again ends like an uninterrupted run, bit for bit."""

import random
import time

import pytest
import slow_disk
import torch
from detectron2.data import MetadataCatalog

from conftest import ALL_LOSSES
from gdetkd.safe_load import read_weights
from programs import PROCESSES

TIMEOUT_SECONDS = 600


@pytest.fixture
def start(distill_cfg, tmp_path):
    """Return a function that starts a process that trains into a folder. Kill the processes at the end of the test."""
    started = []

    def start(iterations, workers, folder):
        keys = {
            "DISTILL.LOSSES": ALL_LOSSES,
            "DATASETS.REGISTER": [dict(MetadataCatalog.get("tiny").gdetkd_entry)],
            "DATASETS.TEST": ("tiny",),
            "TEST.EVAL_PERIOD": 6,
            "SOLVER.BASE_LR": 1e-5,  # keeps the run finite, although the outputs of an untrained teacher are large
            "SOLVER.MAX_ITER": iterations,
            "SOLVER.STEPS": (iterations // 2,),
            "SOLVER.CHECKPOINT_PERIOD": 2,
            "INPUT.MIN_SIZE_TRAIN": (48, 64),
            "DATALOADER.NUM_WORKERS": workers,
        }
        path = tmp_path / "distill.yaml"
        if not path.exists():
            path.write_text(distill_cfg(keys).dump())
        folder.mkdir(exist_ok=True)
        process = PROCESSES.Process(target=slow_disk.train, args=(str(path), str(folder)))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def lines(folder):
    path = folder / "losses.txt"
    return path.read_text().splitlines() if path.exists() else []


def wait_until(process, holds):
    end = time.monotonic() + TIMEOUT_SECONDS
    while process.is_alive() and not holds():
        assert time.monotonic() < end, "the training does not continue"
        time.sleep(0.001)


def partial_files(folder):
    """Return the partial files with the time of their last change. A kill may leave a file that the next kill finds."""
    found = set()
    for path in folder.glob("*.partial"):
        try:
            found.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:  # it was renamed after the listing
            continue
    return found


def kill_at_random(process, folder, rng):
    """Kill a process while it writes a file, or at a random moment of a few iterations. Return which it was."""
    before, iterations = len(lines(folder)), rng.randint(0, 4)
    is_writing, left = rng.random() < 0.5, partial_files(folder)
    wait_until(process, lambda: len(lines(folder)) >= before + iterations)
    if is_writing:
        wait_until(process, lambda: partial_files(folder) - left)
    else:
        time.sleep(rng.uniform(0, 0.4))
    assert process.is_alive(), (folder / "stdout.txt").read_text()[-3000:]
    process.kill()
    process.join()
    return "writing" if partial_files(folder) - left else "elsewhere"


def final(folder):
    """Return every tensor and number of a run's last and best checkpoint, and the last loss."""
    flat = {}

    def flatten(value, name):
        if isinstance(value, dict):
            for key in value:
                flatten(value[key], f"{name}/{key}")
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                flatten(item, f"{name}/{index}")
        else:
            flat[name] = value

    flatten(read_weights(str(folder / "model_final.pth")), "final")
    flatten(read_weights(str(folder / "model_best.pth")), "best")
    time_and_place = ("/config", "Stopwatch/seconds")
    flat = {name: value for name, value in flat.items() if not name.endswith(time_and_place)}
    return {**flat, "loss": lines(folder)[-1]}


def finish(process, folder):
    process.join(TIMEOUT_SECONDS)
    assert process.exitcode == 0, (folder / "stdout.txt").read_text()[-3000:]


def check_kills(start, tmp_path, kills, iterations, workers, seed=0):
    whole, folder, rng = tmp_path / "whole", tmp_path / "killed", random.Random(seed)
    finish(start(iterations, workers, whole), whole)
    where = [kill_at_random(start(iterations, workers, folder), folder, rng) for _ in range(kills)]
    finish(start(iterations, workers, folder), folder)
    expected, found = final(whole), final(folder)
    assert set(found) == set(expected) and any("optimizer" in name for name in expected)
    for name, value in expected.items():
        same = torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name]
        assert same, name
    # An iteration that was repeated has the uninterrupted run's loss both times. A kill between a checkpoint and the
    # line of its iteration's loss leaves the line out.
    assert set(lines(folder)) <= set(lines(whole)) and len(lines(folder)) > iterations - kills
    assert not list(folder.glob("*.partial"))
    print(f"{kills} kills, of them {where.count('writing')} while a file was being written")
    return where


def test_two_kills(start, tmp_path):
    # With this seed, both kills wait for a file that is being written.
    assert "writing" in check_kills(start, tmp_path, kills=2, iterations=14, workers=0, seed=16)


@pytest.mark.soak
def test_twenty_kills(start, tmp_path):
    where = check_kills(start, tmp_path, kills=20, iterations=140, workers=1)
    assert "writing" in where and "elsewhere" in where
