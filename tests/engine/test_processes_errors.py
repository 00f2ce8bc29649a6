"""An error on one of two processes, in a loss or on its disk, leaves no rank waiting and the parameters equal."""

import gdetkd  # noqa: F401, I001  first, in the spawned processes too
import errno
import os
import time

import pytest
import torch
from detectron2.utils import comm
from test_processes import have_equal_parameters, one_after_the_other, run_in_processes, train_rank

from gdetkd import DistillTrainer
from gdetkd.engine.checkpoint import DurableCheckpointer
from gdetkd.engine.guard import NonFiniteError
from gdetkd.errors import GDetKDError
from gdetkd.losses import DistillLoss


class _Spoiled(DistillTrainer):
    """The last rank's CKD term is not a number in the second step."""

    def run_step(self):
        if self.iter == 1 and comm.get_rank() == comm.get_world_size() - 1:
            loss = self.distiller.losses["CKD"]
            compute = loss.compute
            loss.compute = lambda *outputs: compute(*outputs) * float("nan")
            super().run_step()
            loss.compute = compute
        else:
            super().run_step()


class _SlowlySaved(_Spoiled):
    def __init__(self, cfg):
        super().__init__(cfg)
        save = self.checkpointer.save_aside
        self.checkpointer.save_aside = lambda *args, **kwargs: (time.sleep(1), save(*args, **kwargs))


def _train_spoiled(rank, cfg):
    if cfg.DISTILL.SKIP_NONFINITE:
        return train_rank(rank, cfg, _Spoiled)
    with pytest.raises(NonFiniteError) as error:
        train_rank(rank, cfg, _SlowlySaved)
    return str(error.value), os.path.exists(os.path.join(cfg.OUTPUT_DIR, "nonfinite_0000001.pth"))


class _BrokenOff(DistillTrainer):
    """The last rank's forward pass breaks off in the second step: in the student, or in a loss after the first."""

    place = "student.proposal_generator.rpn_head.anchor_deltas"

    def run_step(self):
        if self.iter != 1 or comm.get_rank() != comm.get_world_size() - 1:
            return super().run_step()
        module = self.distiller.get_submodule(self.place)
        if isinstance(module, DistillLoss):
            module.compute = _breaks_off
            super().run_step()
            del module.compute
        else:
            handle = module.register_forward_hook(lambda module, inputs, output: output * float("nan"))
            super().run_step()
            handle.remove()


class _BrokenOffInALoss(_BrokenOff):
    place = "losses.SGFI"


class _WithSpare(DistillTrainer):
    """No loss reads a parameter of the student."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        model.student.spare = torch.nn.Parameter(torch.zeros(1))
        return model


def _train_with_spare(rank, cfg):
    with pytest.raises(GDetKDError) as error:
        train_rank(rank, cfg, _WithSpare)
    return str(error.value)


def _breaks_off(student, teacher):
    raise FloatingPointError("found in a loss")


def _train_broken_off(rank, cfg, in_a_loss):
    trainer_class = _BrokenOffInALoss if in_a_loss else _BrokenOff
    if cfg.DISTILL.SKIP_NONFINITE:
        return train_rank(rank, cfg, trainer_class)
    with pytest.raises(NonFiniteError) as error:
        train_rank(rank, cfg, trainer_class)
    return str(error.value)


def _evaluate_on_a_full_disk(rank, cfg):
    """The main process can first not convert the set's annotations, and then not write what was found."""
    from detectron2.evaluation import coco_evaluation

    from gdetkd.engine import evaluators  # here, for each process has a module of its own

    calls, written_whole = iter(range(10)), evaluators.written_whole
    convert = coco_evaluation.convert_to_coco_json

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(DistillTrainer):
        @classmethod
        def test(cls, *args):
            call = next(calls)
            if rank == 0:
                coco_evaluation.convert_to_coco_json = full if call == 0 else convert
                evaluators.written_whole = full if call == 1 else written_whole
            results.append(super().test(*args))
            return results[-1]

    results = []
    train_rank(rank, cfg, Full)
    return results


def _resume(rank, folder):
    """The iteration of the checkpoint that each process resumes from, or why none does."""
    try:
        checkpointer = DurableCheckpointer(torch.nn.Linear(1, 1), folder, save_to_disk=rank == 0)
        return checkpointer.resume_or_load("", resume=True)["iteration"]
    except GDetKDError as e:
        return str(e)


def _resume_with_an_old_look(rank, folder):
    """The other process still sees the folder as it was when the main one had written but the first."""
    look = DurableCheckpointer._candidates_seen_here
    if rank == 1:
        DurableCheckpointer._candidates_seen_here = lambda self: [os.path.join(folder, "model_0000001.pth")]
    try:
        return _resume(rank, folder)
    finally:
        DurableCheckpointer._candidates_seen_here = look


def _resume_where_one_lacks_it(rank, folder):
    isfile = os.path.isfile
    os.path.isfile = lambda path: isfile(path) and not (rank == 1 and path.endswith("model_0000003.pth"))
    try:
        return _resume(rank, folder)
    finally:
        os.path.isfile = isfile


def test_a_parameter_that_no_loss_reaches_is_named(shared_cfg, tmp_path):
    for message in run_in_processes(_train_with_spare, tmp_path, 2, shared_cfg(2, {"SOLVER.MAX_ITER": 3})):
        assert "No loss reaches 1 parameters of the student (spare)" in message and "FPN.IN_FEATURES" in message


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_or_is_left_out_on_all(shared_cfg, tmp_path):
    stops = shared_cfg(2, {"SOLVER.MAX_ITER": 4})
    goes_on = shared_cfg(2, {"SOLVER.MAX_ITER": 4, "DISTILL.SKIP_NONFINITE": 1})
    calls = [(_train_spoiled, (cfg,)) for cfg in (stops, goes_on)]
    stopped, results = zip(*run_in_processes(one_after_the_other, tmp_path, 2, calls))
    for message, is_saved in stopped:
        assert "loss_distill_ckd is nan (process 1; images " in message
        assert is_saved  # before any process ends, which would make the launcher end the one that writes
    assert have_equal_parameters(results) and all(torch.isfinite(p).all() for p in results[0]["parameters"])
    assert [(result["skipped"], result["changed"]) for result in results] == [(1, True), (1, True)]


def test_a_forward_pass_that_breaks_off_on_one_rank_stops_all_or_is_left_out_on_all(shared_cfg, tmp_path):
    """The others have exchanged CKD's embeddings and SyncBN's statistics by then, and wait in the backward pass."""
    keys = {"SOLVER.MAX_ITER": 4, "DISTILL.LOSSES": ("SGFI", "CKD"), "DISTILL.SKIP_NONFINITE": 1}
    synchronized = {"MODEL.RESNETS.NORM": "naiveSyncBN"}
    calls = [
        (_train_broken_off, (shared_cfg(2, {**keys, "DISTILL.SKIP_NONFINITE": 0}), False)),
        (_train_broken_off, (shared_cfg(2, keys), False)),
        (_train_broken_off, (shared_cfg(2, keys), True)),
        (_train_broken_off, (shared_cfg(2, {**keys, **synchronized}), False)),
    ]
    stopped, *goes_on = zip(*run_in_processes(one_after_the_other, tmp_path, 2, calls))
    for message in stopped:
        assert "the forward pass is not finite (Predicted boxes" in message and "(process 1; images" in message
    for results in goes_on:
        assert have_equal_parameters(results)
        assert [(result["skipped"], result["changed"]) for result in results] == [(1, True), (1, True)]
        assert all(torch.isfinite(p).all() for p in results[0]["parameters"])


def test_an_evaluation_on_a_full_disk_keeps_the_ranks_together(shared_cfg, tmp_path):
    (tiny,) = shared_cfg(2).DATASETS.REGISTER
    converted = {**tiny, "name": "converted", "limit": 4}  # Detectron2 writes its annotations down
    keys = {"DATASETS.REGISTER": [tiny, converted], "DATASETS.TEST": ("converted", "tiny"), "TEST.EVAL_PERIOD": 1}
    cfg = shared_cfg(2, {**keys, "SOLVER.MAX_ITER": 3, "DISTILL.LOSSES": ()})
    results, others = run_in_processes(_evaluate_on_a_full_disk, tmp_path, 2, cfg)
    assert [result["converted"] != {} for result in results] == [False, True, True]
    assert all("AP" in result["tiny"]["bbox"] for result in results) and len(others) == 3
    names = {path.name for path in (tmp_path / "run" / "inference").iterdir()}
    assert names >= {"converted_coco_format.json", "coco_instances_results.json"}


def test_all_ranks_resume_from_the_main_ones_checkpoint_or_none_does(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for iteration in (1, 3):
        DurableCheckpointer(torch.nn.Linear(1, 1), str(folder)).save(f"model_{iteration:07d}", iteration=iteration)
    functions = (_resume, _resume_with_an_old_look, _resume_where_one_lacks_it)
    calls = [(function, (str(folder),)) for function in functions]
    same, with_an_old_look, lacking = zip(*run_in_processes(one_after_the_other, tmp_path, 2, calls))
    assert same == with_an_old_look == (3, 3)
    assert all("model_0000003.pth', but the process of rank 1 does not" in message for message in lacking)
