"""TEST.PATIENCE ends a training whose AP no longer rises, at the same iteration on all processes and after a resume."""

import gdetkd  # noqa: F401, I001  imported first, also in the spawned processes
import json
import logging
import math
import os
import signal

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from test_collectives import Recorder
from test_processes import run_in_processes
from test_trainer import train

from gdetkd import DistillTrainer
from gdetkd.data import register_datasets
from gdetkd.engine.stopping import EXIT_STOPPED
from gdetkd.errors import GDetKDError
from gdetkd.metrics_file import MetricsFile, iterations_run
from gdetkd.safe_load import read_weights

NAN = float("nan")
# The best AP is that after four iterations. With PATIENCE 2 the training ends after eight.
APS = {2: 10.0, 4: 12.0, 6: 12.0, 8: 11.0, 10: 50.0, 12: 60.0}


def scripted(aps):
    """Return a trainer whose AP depends on the iteration alone. `made` holds the iterations of the evaluations."""

    class Scripted(DistillTrainer):
        made = []

        def test(self, cfg, model, evaluators=None):
            iterations = min(self.iter + 1, self.max_iter)
            self.made.append(iterations)
            if not comm.is_main_process():
                return {}
            return {"bbox": {"AP": aps[iterations], "AP50": 1.0, "AP75": 1.0}} if iterations in aps else {}

    return Scripted


@pytest.fixture
def patient_cfg(distill_cfg, tmp_path):
    """Return a function that makes the config of a run of 12 iterations, evaluated after every second one."""

    def make(folder="whole", **changes):
        (tmp_path / folder).mkdir(exist_ok=True)
        keys = {"SOLVER.MAX_ITER": 12, "DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 2, "TEST.PATIENCE": 2}
        keys.update({"DISTILL.LOSSES": ("SGFI",), "SOLVER.CHECKPOINT_PERIOD": 4, "INPUT.MIN_SIZE_TRAIN": (48, 64)})
        return distill_cfg({**keys, "OUTPUT_DIR": str(tmp_path / folder), **changes})

    return make


def weights(cfg, name="model_final.pth"):
    return read_weights(os.path.join(cfg.OUTPUT_DIR, name))


def are_equal(first, second):
    return all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())


def test_a_training_ends_as_at_the_regular_end(patient_cfg, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="gdetkd")
    cfg, trainer_class = patient_cfg(), scripted(APS)
    trainer, steps = train(trainer_class, cfg)
    assert list(steps) == list(range(8)) and trainer_class.made == [2, 4, 6, 8]
    assert (
        "the training ends after 8 of 12 iterations, because bbox/AP has not risen for 2 evaluations. The best AP is "
        "12.00, after 4 iterations." in caplog.text
    )
    assert weights(cfg)["iteration"] == weights(cfg)["trainer"]["iteration"] == 7
    assert weights(cfg, "model_best.pth")["record"]["metric"] == 12.0
    assert (tmp_path / "whole" / "last_checkpoint").read_text() == "model_final.pth"
    assert trainer.iter == trainer.max_iter == 8 and trainer._last_eval_results["bbox"]["AP"] == 11.0
    assert iterations_run(tmp_path / "whole", 12) == 8
    last = MetricsFile(tmp_path / "whole", 12).curve()[-1]
    assert (last.iteration, last.metrics["AP"]) == (8, 11.0)


def test_patience_changes_nothing_before_the_end(patient_cfg):
    _, patient = train(scripted(APS), patient_cfg())
    _, plain = train(scripted(APS), patient_cfg("plain", **{"TEST.PATIENCE": 0}))
    assert list(plain) == list(range(12)) and patient == {iteration: plain[iteration] for iteration in range(8)}


@pytest.mark.parametrize(
    "aps, end",
    [
        ({2: NAN, 4: NAN, 6: 5.0}, 4),
        ({2: NAN, 4: 3.0, 6: NAN, 8: math.inf, 10: 9.0}, 8),
        ({2: 3.0}, 6),  # later evaluations give no AP
        ({2: 1.0, 4: 0.5, 6: 2.0, 8: 0.0, 10: 3.0, 12: 0.0}, 12),
    ],
)
def test_an_evaluation_without_an_ap_is_no_rise(patient_cfg, aps, end):
    _, steps = train(scripted(aps), patient_cfg())
    assert len(steps) == end


# The checkpoint after iteration 4 or 8 lacks the evaluation after it, because it is written before.
@pytest.mark.parametrize("resume_from", [4, 8])
@pytest.mark.parametrize("note", [0, 4, 8, 10])
def test_a_resumed_run_ends_at_the_same_iteration(patient_cfg, tmp_path, resume_from, note):
    """`note` is the evaluation that the killed run noted last. A later one belongs to a checkpoint that was lost."""
    whole, steps = train(scripted(APS), patient_cfg())
    cfg = patient_cfg("killed")
    train(scripted(APS), patient_cfg("killed", **{"TEST.PATIENCE": 3}), stop_at=resume_from + 1)
    (tmp_path / "killed" / "last_checkpoint").write_text(f"model_{resume_from - 1:07d}.pth")
    (tmp_path / "killed" / "last_evaluation").write_text(str(note))
    os.remove(tmp_path / "killed" / "model_final.pth")
    trainer_class = scripted(APS)
    resumed, resumed_steps = train(trainer_class, cfg, resume=True)
    assert resumed_steps == {iteration: steps[iteration] for iteration in range(resume_from, 8)}
    assert trainer_class.made == list(range(resume_from, 9, 2))
    assert are_equal(weights(cfg), weights(whole.cfg)) and weights(cfg)["iteration"] == 7
    first, second = (weights(run.cfg)["trainer"]["hooks"]["Patience"] for run in (whole, resumed))
    assert first == second and iterations_run(tmp_path / "killed", 12) == 8


class SigtermInIteration(HookBase):
    def __init__(self, at):
        self.at = at

    def before_step(self):
        if self.trainer.iter == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("at", [3, 6, 7])
def test_a_stopped_run_ends_at_the_same_iteration(patient_cfg, at):
    whole, _ = train(scripted(APS), patient_cfg())
    cfg = patient_cfg("stopped")
    torch.manual_seed(0)
    trainer = scripted(APS)(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([SigtermInIteration(at)])
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == EXIT_STOPPED and not os.path.exists(os.path.join(cfg.OUTPUT_DIR, "model_final.pth"))
    resumed, steps = train(scripted(APS), cfg, resume=True)
    assert list(steps) == list(range(at + 1, 8)) and weights(cfg)["iteration"] == 7
    first, second = (weights(run.cfg)["trainer"]["hooks"]["Patience"] for run in (whole, resumed))
    assert first == second


def test_a_run_that_ended_early_is_not_trained_further(patient_cfg, tmp_path, caplog):
    cfg = patient_cfg()
    train(scripted(APS), cfg)
    before = (tmp_path / "whole" / "model_final.pth").read_bytes()
    os.remove(tmp_path / "whole" / "ended_early.json")  # as after a kill between the two files
    trainer_class = scripted(APS)
    trainer, steps = train(trainer_class, cfg, resume=True)
    assert not steps and trainer_class.made == [8]  # as for every complete run
    assert "ended early after 8 iterations" in caplog.text and "It is not trained further" in caplog.text
    assert (tmp_path / "whole" / "model_final.pth").read_bytes() == before
    assert MetricsFile(tmp_path / "whole", 12).curve()[-1].iteration == iterations_run(tmp_path / "whole", 12) == 8


@pytest.mark.parametrize("patience, end", [(3, 12), (0, 12)])
def test_more_patience_lets_a_run_go_on(patient_cfg, tmp_path, patience, end):
    train(scripted(APS), patient_cfg())
    _, steps = train(scripted(APS), patient_cfg(**{"TEST.PATIENCE": patience}), resume=True)
    assert list(steps) == list(range(8, end)) and not (tmp_path / "whole" / "ended_early.json").exists()


def test_patience_counts_from_0_on_another_test_set(patient_cfg, tmp_path, tiny_dataset, caplog):
    train(scripted(APS), patient_cfg())
    entry = {"name": "other", "kind": "coco", "json": str(tiny_dataset / "tiny.json"), "images": str(tiny_dataset)}
    changes = {"DATASETS.TEST": ("other",), "DATASETS.REGISTER": [entry]}
    _, steps = train(scripted({10: 5.0, 12: 6.0}), patient_cfg(**changes), resume=True)
    assert list(steps) == list(range(8, 12)) and "TEST.PATIENCE counts from 0" in caplog.text
    best = read_weights(str(tmp_path / "whole" / "model_best.pth"))
    assert (best["record"]["metric"], best["record"]["dataset"]) == (6.0, "other")
    assert "was measured on 'tiny', and DATASETS.TEST names 'other' now. So the next evaluation" in caplog.text


def test_a_new_training_in_the_folder_forgets_the_early_end(patient_cfg, tmp_path):
    train(scripted(APS), patient_cfg())
    train(scripted(APS), patient_cfg(**{"TEST.PATIENCE": 0}))
    assert not (tmp_path / "whole" / "ended_early.json").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"DATASETS.TEST": ()}, "TEST.PATIENCE is 2, but DATASETS.TEST is empty: name"),
        ({"TEST.EVAL_PERIOD": 0}, "TEST.PATIENCE is 2, but TEST.EVAL_PERIOD is 0, .* set it to"),
    ],
)
def test_patience_without_evaluations_is_refused(patient_cfg, changes, message):
    with pytest.raises(GDetKDError, match=message):
        DistillTrainer(patient_cfg(**changes))


def test_patience_with_a_first_test_set_without_labels_is_refused(patient_cfg, tiny_dataset, caplog):
    entries = [{"name": "bare", "kind": "images", "images": str(tiny_dataset)}]
    keys = {"DATASETS.REGISTER": entries, "DATASETS.TEST": ("bare", "tiny")}
    with pytest.raises(GDetKDError, match="is 2, but 'bare', the first .* has no annotation.*Name a dataset with"):
        DistillTrainer(patient_cfg(**keys))
    DistillTrainer(patient_cfg(**keys, **{"TEST.PATIENCE": 0}))
    assert "'bare', the first dataset of DATASETS.TEST, has no annotation and so no AP, so no model_best" in caplog.text


def _train_rank(rank, cfg):
    torch.manual_seed(0)
    register_datasets(cfg)
    records = []
    for resume in (False, True):
        with Recorder() as recorder:
            trainer = scripted(APS)(cfg)
            trainer.resume_or_load(resume=resume)
            trainer.train()
        records.append((trainer.start_iter, trainer.iter, recorder.record))
    return records


def test_all_processes_end_together(shared_cfg, tmp_path):
    keys = {"SOLVER.MAX_ITER": 12, "DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 2, "TEST.PATIENCE": 2}
    cfg = shared_cfg(2, {**keys, "DISTILL.LOSSES": ("SGFI",)})
    first, second = run_in_processes(_train_rank, tmp_path, 2, cfg)
    assert first == second and [run[:2] for run in first] == [(0, 8), (8, 9)]
    assert json.loads((tmp_path / "run" / "ended_early.json").read_text()) == {"iterations": 8}
