"""Test how the time of a step is measured, and that the measurement leaves no files. No test checks durations."""

import json
import os
from pathlib import Path

import pytest
import torch

from conftest import WIDER
from gdetkd.engine.step_costs import time_in_rounds
from gdetkd.errors import GDetKDError
from gdetkd.losses.embedding_queue import EmbeddingQueue
from gdetkd.study.executors import LocalExecutor
from gdetkd.study.run import PLAIN, Run
from gdetkd.study.step_time import StepTime, _Stepper, kept_step_time, measure, measure_pair
from gdetkd.teacher.feature_cache import FeatureCache

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pair(distill_cfg, tiny_dataset, tmp_path):
    """Return the runs of a baseline and a distillation, with a config file that another process can read."""
    entry = {"name": "tiny2", "kind": "coco", "json": str(tiny_dataset / "tiny.json"), "images": str(tiny_dataset)}
    keys = {"DATASETS.REGISTER": [entry], "DATASETS.TRAIN": ("tiny2",), "DISTILL.INSIGHT.PERIOD": 1}
    cfg = distill_cfg({**keys, "DISTILL.LOSSES": ("SGFI", "CKD")}, teacher=WIDER)
    path = tmp_path / "pair.yaml"
    path.write_text(cfg.dump())
    runs = tmp_path / "runs"
    return Run(runs / "none", str(path), [*PLAIN, "SEED", "0"], 4), Run(runs / "GDetKD", str(path), ["SEED", "0"], 4)


@pytest.fixture
def executor(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "projects" / "GDetKD"), prepend=os.pathsep)
    return LocalExecutor(jobs=1)


def test_both_train_in_turn_on_the_same_batches(pair, monkeypatch):
    seen, weights = [], {}

    def spied(steps, rounds, warm_up):
        for name, step in steps.items():

            def note(module, inputs, name=name):
                seen.append((name, [(sample["file_name"], sample["image"].sum().item()) for sample in inputs[0]]))

            student = step.__self__.student
            student.register_forward_pre_hook(note)
            weights[name] = next(student.parameters()), next(student.parameters()).detach().clone()
        return time_in_rounds(steps, rounds, warm_up)

    monkeypatch.setattr("gdetkd.study.step_time.time_in_rounds", spied)
    found = measure_pair(*(run.config() for run in pair), rounds=2, warm_up=1)
    assert [name for name, _ in seen] == ["baseline", "method"] * 3
    batches = {name: [batch for other, batch in seen if other == name] for name in ("baseline", "method")}
    assert batches["baseline"] == batches["method"] and batches["method"][0] != batches["method"][1]
    # The optimizers took their steps.
    assert all(not torch.equal(weight, before) for weight, before in weights.values()) and len(weights) == 2
    assert (found.threads, found.device) == (torch.get_num_threads(), "cpu")


def test_the_passes_that_fill_the_cache_are_spread_over_the_run(pair, monkeypatch):
    for run in pair:
        run.opts += ["DISTILL.TEACHER.CACHE_MB", 100]
    seen = []
    monkeypatch.setattr(
        "gdetkd.study.step_time.time_in_rounds",
        lambda works, rounds, warm_up: (
            seen.append(works["method"].__self__.distiller.teacher.cache.misses),
            {"baseline": [2.0] * 5, "method": [3.0] * 5},
        )[1],
    )
    times = iter(range(100))
    monkeypatch.setattr("gdetkd.study.step_time.now", lambda: float(next(times)))
    found = measure_pair(*(run.config() for run in pair))
    assert 0 < seen[0] <= 8  # 4 iterations of 2 images
    assert 1.5 < found.ratio <= 1.5 + 4 / (2 * 4)  # each pass takes a second, and a plain step two


def test_with_a_full_cache_the_measurement_starts_with_an_epoch(pair, monkeypatch):
    """The views so far are in the cache, and those of the rest of the epoch are not."""
    for run in pair:
        run.opts += ["DISTILL.TEACHER.CACHE_MB", 1]
    monkeypatch.setattr("gdetkd.teacher.frozen.FeatureCache", lambda megabytes: FeatureCache(0.03))
    starts = []

    def look(works, rounds, warm_up):
        steppers = [work.__self__ for work in works.values()]
        starts.extend(stepper.data_loader.start_iter for stepper in steppers)
        assert steppers[1].distiller.teacher.cache.is_full
        return time_in_rounds(works, rounds, warm_up)

    monkeypatch.setattr("gdetkd.study.step_time.time_in_rounds", look)
    measure_pair(*(run.config() for run in pair), rounds=2, warm_up=0)
    assert starts == [6, 6]  # an epoch is 12 images, in batches of 2


def test_the_ratio_is_the_median_over_the_rounds(pair, monkeypatch):
    # Other work slows both steps of a round, so the ratio of that round stays.
    seconds = {"baseline": [1.0, 1.0, 10.0, 1.0, 1.0], "method": [1.5, 1.5, 15.0, 9.0, 1.2]}
    monkeypatch.setattr("gdetkd.study.step_time.time_in_rounds", lambda steps, rounds, warm_up: seconds)
    found = measure_pair(*(run.config() for run in pair))
    assert (found.ratio, found.baseline_seconds) == (1.5, 1.0)
    assert found.low <= found.ratio <= found.high and found.high > 1.5


def test_the_queue_is_full_and_the_terms_have_their_weights(pair, tmp_path):
    trainer = _Stepper(pair[1].config(), str(tmp_path))
    (queue,) = [module for module in trainer.model.modules() if isinstance(module, EmbeddingQueue)]
    assert int(queue.filled) == len(queue.embeddings) > 0
    trainer.step()
    schedule = trainer.schedule
    assert all(schedule.weight(term, trainer.iter) == schedule.full_weight(term) for term in schedule.terms)


def test_it_leaves_no_files_in_the_folders_of_runs(pair, tmp_path, monkeypatch):
    configs = [run.config() for run in pair]
    folder = tmp_path / "untouched"
    for cfg in configs:
        cfg.OUTPUT_DIR = str(folder)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    measure_pair(*configs, rounds=2, warm_up=1)
    assert sorted(tmp_path.rglob("*")) == before and not folder.exists()


def test_a_process_of_its_own_measures_with_the_threads_of_the_runs(pair, executor, tmp_path):
    found = measure(executor, *pair, tmp_path / "log.txt")
    assert found.threads == 2 and found.ratio > 0 and found.low <= found.ratio <= found.high
    assert not (tmp_path / "runs").exists()


def test_a_failure_is_named_with_its_log(pair, executor, tmp_path):
    baseline, method = pair
    method.opts += ["DATASETS.TRAIN", "('nowhere',)"]
    with pytest.raises(GDetKDError, match="could not be measured for GDetKD.*log.txt, which ends with: .*'nowhere'"):
        measure(executor, baseline, method, tmp_path / "log.txt")


def test_a_kept_time_belongs_to_its_configs(pair, executor, tmp_path, monkeypatch):
    baseline, method = pair
    answers = [StepTime(ratio, 1.0, 3.0, 0.1, 1, "cpu") for ratio in (1.5, 2.5)]
    monkeypatch.setattr("gdetkd.study.step_time.measure", lambda *args: answers.pop(0))
    path = tmp_path / "step_times" / "GDetKD.json"
    assert kept_step_time(path, baseline, method, executor).ratio == 1.5
    assert kept_step_time(path, baseline, method, executor).ratio == 1.5
    method.opts += ["DISTILL.SGFI.WEIGHT", "9.0"]
    assert kept_step_time(path, baseline, method, executor).ratio == 2.5
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "another device")
    assert kept_step_time(path, baseline, method, executor).ratio == 2.5  # these runs use the CPU
    baseline.opts += ["MODEL.DEVICE", "cuda"]
    with pytest.raises(IndexError, match="pop from empty list"):  # it would be measured again
        kept_step_time(path, baseline, method, executor)
    assert json.loads(path.read_text())["value"]["ratio"] == 2.5
