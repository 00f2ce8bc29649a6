"""A training process that is killed again and again comes to the uninterrupted run's end, bit for bit."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog

from conftest import ALL_LOSSES
from gdetkd.safe_load import read_weights

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("slow_disk.py")
TIMEOUT_SECONDS = 600


@pytest.fixture
def start(distill_cfg, tmp_path):
    """Starts a process that trains into a folder; the test's end is that of any that is left."""
    started = []

    def start(iterations, workers, folder):
        keys = {
            "DISTILL.LOSSES": ALL_LOSSES,
            "DATASETS.REGISTER": [dict(MetadataCatalog.get("tiny").gdetkd_entry)],
            "DATASETS.TEST": ("tiny",),
            "TEST.EVAL_PERIOD": 6,
            "SOLVER.BASE_LR": 1e-5,  # an untrained teacher is far off, and the run is to stay finite
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
        with open(folder / "stdout.txt", "a") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(SCRIPT), "--config-file", str(path), "--resume"]
                + ["OUTPUT_DIR", str(folder)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
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
    while process.poll() is None and not holds():
        assert time.monotonic() < end, "the training does not go on"
        time.sleep(0.001)


def kill_at_random(process, folder, rng):
    """SIGKILL while a file is being written, or at any moment of a few iterations; says which."""
    before, iterations = len(lines(folder)), rng.randint(0, 4)
    is_writing = rng.random() < 0.5
    wait_until(process, lambda: len(lines(folder)) >= before + iterations)
    if is_writing:
        wait_until(process, lambda: any(folder.glob("*.partial")))
    else:
        time.sleep(rng.uniform(0, 0.4))
    assert process.poll() is None, (folder / "stdout.txt").read_text()[-3000:]
    process.kill()
    process.wait()
    return "writing" if list(folder.glob("*.partial")) else "elsewhere"


def final(folder):
    """All that a run has come to: every tensor and number of its last and best checkpoint, and its last loss."""
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


def check_kills(start, tmp_path, kills, iterations, workers):
    whole = start(iterations, workers, tmp_path / "whole")
    assert whole.wait(TIMEOUT_SECONDS) == 0, (tmp_path / "whole" / "stdout.txt").read_text()[-3000:]
    folder, rng = tmp_path / "killed", random.Random(0)
    folder.mkdir()
    where = [kill_at_random(start(iterations, workers, folder), folder, rng) for _ in range(kills)]
    assert start(iterations, workers, folder).wait(TIMEOUT_SECONDS) == 0, (folder / "stdout.txt").read_text()[-3000:]
    expected, found = final(tmp_path / "whole"), final(folder)
    assert set(found) == set(expected) and any("optimizer" in name for name in expected)
    for name, value in expected.items():
        same = torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name]
        assert same, name
    # Iterations that were taken twice had the same loss both times, and are those of the uninterrupted run.
    assert set(lines(folder)) == set(lines(tmp_path / "whole"))
    assert not list(folder.glob("*.partial"))
    print(f"{kills} kills, of them {where.count('writing')} while a file was being written")
    return where


def test_two_kills(start, tmp_path):
    check_kills(start, tmp_path, kills=2, iterations=14, workers=0)


@pytest.mark.soak
def test_twenty_kills(start, tmp_path):
    where = check_kills(start, tmp_path, kills=20, iterations=140, workers=1)
    assert "writing" in where and "elsewhere" in where
