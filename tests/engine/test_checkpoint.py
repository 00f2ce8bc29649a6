"""Checkpoints are whole or not there, and a damaged one is passed over."""

import errno
import os
from pathlib import Path

import pytest
import torch
from detectron2.engine import DefaultTrainer
from test_trainer import train

from conftest import ALL_LOSSES
from gdetkd import DistillTrainer
from gdetkd.engine.catch_up import CatchUp
from gdetkd.engine.checkpoint import DurableCheckpointer
from gdetkd.errors import GDetKDError
from gdetkd.files import written_whole
from gdetkd.metrics_file import MetricsFile
from gdetkd.safe_load import read_weights


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with written_whole(str(path)) as file:
        file.write("first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), written_whole(str(path)) as file:
        file.write("second")
        raise ZeroDivisionError
    assert path.read_text() == "first" and files(tmp_path) == ["file"]


def test_content_and_folder_are_on_the_disk_before_the_old_file_is_gone(tmp_path, monkeypatch):
    """The order that survives a loss of power: content synced, then renamed, then the folder synced."""
    events = []
    sync, replace = os.fsync, os.replace

    def watched_sync(handle):
        events.append("sync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "sync file")
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    DurableCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).save("model_0000001")
    whole = ["sync file", "rename", "sync folder"]
    assert events == 2 * whole  # the checkpoint, and then the file that names it


@pytest.mark.parametrize("number, is_raised", [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders_is_written_to(tmp_path, monkeypatch, number, is_raised):
    sync = os.fsync

    def without_folders(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", without_folders)
    checkpointer = DurableCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000001")
    assert checkpointer.failed == ["model_0000001"] * is_raised
    assert (tmp_path / "last_checkpoint").exists() != is_raised


def interrupted(distill_cfg, **keys):
    """A run with checkpoints after 1, 2, 3 of its 5 iterations, and what it would have come to."""
    cfg = distill_cfg({"SOLVER.MAX_ITER": 5, "SOLVER.CHECKPOINT_PERIOD": 1, "DISTILL.LOSSES": ALL_LOSSES, **keys})
    _, uninterrupted = train(DistillTrainer, cfg)
    folder = Path(cfg.OUTPUT_DIR)
    for name in ("model_final.pth", "model_0000004.pth", "model_0000003.pth"):
        (folder / name).unlink()
    (folder / "last_checkpoint").write_text("model_0000002.pth")
    return cfg, folder, uninterrupted


@pytest.mark.parametrize("damage", ["cut off", "empty", "gone", "not named"])
def test_a_damaged_last_checkpoint_is_passed_over_for_the_one_before(distill_cfg, caplog, damage):
    cfg, folder, uninterrupted = interrupted(distill_cfg)
    last = folder / "model_0000002.pth"
    if damage == "gone":
        last.unlink()
    elif damage == "not named":
        (folder / "last_checkpoint").unlink()
        last.write_bytes(b"PK\x03\x04")
    else:
        last.write_bytes(last.read_bytes()[: 5000 if damage == "cut off" else 0])
    (folder / "model_0000003.pth.partial").write_bytes(b"half")
    _, steps = train(DistillTrainer, cfg, resume=True)
    assert steps == {iteration: uninterrupted[iteration] for iteration in (2, 3, 4)}
    assert "model_0000002.pth' cannot be read" in caplog.text
    assert "resumes from an earlier checkpoint instead" in caplog.text
    assert not list(folder.glob("*.partial"))


def test_an_evaluation_leaves_alone_what_a_training_is_writing(tmp_path):
    """`--eval-only --resume` in the folder of a run that goes on."""
    model = torch.nn.Linear(1, 1)
    DurableCheckpointer(model, str(tmp_path)).save("model_0000001")
    (tmp_path / "model_0000003.pth.partial").write_bytes(b"half")
    DurableCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert (tmp_path / "model_0000003.pth.partial").exists()


def test_no_checkpoint_that_can_be_read(distill_cfg):
    cfg, folder, _ = interrupted(distill_cfg)
    for path in folder.glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(GDetKDError, match="No checkpoint in .*model_0000000.*Remove them to start anew"):
        train(DistillTrainer, cfg, resume=True)


def test_weights_alone_are_not_resumed_from(distill_cfg, tmp_path):
    cfg = distill_cfg()
    torch.save({"model": DistillTrainer(cfg).student.state_dict()}, tmp_path / "run" / "model_0000007.pth")
    with pytest.raises(GDetKDError, match="holds weights alone.*set MODEL.WEIGHTS to this file and leave out --resume"):
        train(DistillTrainer, cfg, resume=True)


def test_an_evaluation_that_a_kill_came_before_is_made_up_for(distill_cfg, tmp_path, monkeypatch):
    """The checkpoint is written before the evaluation of the same iteration: a kill between them lost a best score."""
    keys = {"DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 2, "SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.MAX_ITER": 5}
    cfg = distill_cfg({"DISTILL.LOSSES": (), **keys})
    scores = iter([50.0, 40.0, 30.0, 50.0, 40.0, 30.0])
    monkeypatch.setattr(DistillTrainer, "test", classmethod(lambda *args: {"bbox": {"AP": next(scores)}}))
    train(DistillTrainer, cfg)
    best = read_weights(str(tmp_path / "run" / "model_best.pth"))
    assert best["iteration"] == 1

    def killed(hook):
        raise KeyboardInterrupt

    run = tmp_path / "killed"
    run.mkdir()
    cfg.OUTPUT_DIR = str(run)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("detectron2.engine.hooks.EvalHook._do_eval", killed)
        train(DistillTrainer, cfg)
    assert (run / "last_checkpoint").read_text() == "model_0000001.pth" and not (run / "model_best.pth").exists()
    train(DistillTrainer, cfg, resume=True)
    resumed = read_weights(str(run / "model_best.pth"))
    assert resumed["record"] == best["record"] and resumed["iteration"] == 1
    assert all(torch.equal(tensor, best["model"][name]) for name, tensor in resumed["model"].items())


def test_an_evaluation_that_was_made_is_not_made_again(distill_cfg, monkeypatch):
    keys = {"DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 2, "SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.MAX_ITER": 6}
    cfg, made = distill_cfg({"DISTILL.LOSSES": (), **keys}), []

    def test(*args):
        made.append(1)
        return {"bbox": {"AP": 1.0}}

    monkeypatch.setattr(DistillTrainer, "test", classmethod(test))
    train(DistillTrainer, cfg, stop_at=3)
    count = len(made)
    (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000001.pth")
    trainer, _ = train(DistillTrainer, cfg, resume=True)
    assert len(made) == count + 2 and any(isinstance(hook, CatchUp) for hook in trainer._hooks)


def test_an_evaluation_whose_metrics_were_not_written_is_made_again(distill_cfg, monkeypatch):
    """A kill comes after an evaluation, and before Detectron2 writes metrics at the end of 20 iterations."""
    keys = {"DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 2, "SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.MAX_ITER": 4}
    cfg = distill_cfg({"DISTILL.LOSSES": (), **keys})
    monkeypatch.setattr(DistillTrainer, "test", classmethod(lambda *args: {"bbox": {"AP": 1.0}}))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("detectron2.engine.hooks.PeriodicWriter.after_train", lambda hook: None)
        patch.setattr(DistillTrainer, "before_step", interrupted_at(2))
        train(DistillTrainer, cfg)
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000001.pth"
    train(DistillTrainer, cfg, resume=True)
    evaluated = [line["iteration"] for line in MetricsFile(Path(cfg.OUTPUT_DIR)).evaluations()]
    assert evaluated == [1, 4]  # the last is written one iteration after the end


def interrupted_at(iteration):
    def before_step(trainer):
        if trainer.iter == iteration:
            raise KeyboardInterrupt
        DefaultTrainer.before_step(trainer)

    return before_step


@pytest.mark.parametrize("lost", ["before it was written", "removed", "cut"])
def test_a_final_file_that_is_lost_is_written_on_resume(distill_cfg, lost):
    cfg = distill_cfg({"DISTILL.LOSSES": (), "SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.MAX_ITER": 2})
    train(DistillTrainer, cfg)
    folder = Path(cfg.OUTPUT_DIR)
    final = read_weights(str(folder / "model_final.pth"))
    if lost == "before it was written":
        (folder / "model_final.pth").unlink()
        (folder / "last_checkpoint").write_text("model_0000001.pth")
    elif lost == "removed":
        (folder / "model_final.pth").unlink()
    else:
        (folder / "model_final.pth").write_bytes((folder / "model_final.pth").read_bytes()[:1000])
    train(DistillTrainer, cfg, resume=True)
    written = read_weights(str(folder / "model_final.pth"))
    assert (folder / "last_checkpoint").read_text() == "model_final.pth" and written["iteration"] == final["iteration"]
    assert all(torch.equal(tensor, final["model"][name]) for name, tensor in written["model"].items())


def test_an_error_in_the_last_iteration_is_not_followed_by_an_evaluation(distill_cfg, monkeypatch):
    """Other processes would still be in that iteration, and this one would wait for them."""
    cfg, made = distill_cfg({"DISTILL.LOSSES": (), "DATASETS.TEST": ("tiny",), "SOLVER.MAX_ITER": 2}), []
    monkeypatch.setattr(DistillTrainer, "test", classmethod(lambda *args: made.append(1) or {}))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DistillTrainer, "before_step", interrupted_at(1))
        train(DistillTrainer, cfg)
    assert not made
    train(DistillTrainer, cfg)
    assert made


def test_a_run_that_starts_anew_does_not_believe_an_earlier_runs_note(distill_cfg, tmp_path, monkeypatch):
    keys = {"DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 2, "SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.MAX_ITER": 5}
    cfg = distill_cfg({"DISTILL.LOSSES": (), **keys})
    monkeypatch.setattr(DistillTrainer, "test", classmethod(lambda *args: {"bbox": {"AP": 1.0}}))
    train(DistillTrainer, cfg)
    note = tmp_path / "run" / "last_evaluation"
    assert note.read_text() == "4"
    train(DistillTrainer, cfg, stop_at=1)
    assert not note.exists()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), PermissionError(errno.EACCES, "no"), MemoryError()])
def test_a_checkpoint_that_the_disk_does_not_give_is_not_passed_over(tmp_path, monkeypatch, error):
    """The one before would be taken for no damage: what is there now may be read in a minute."""
    model = torch.nn.Linear(1, 1)
    for iteration in (1, 3):
        DurableCheckpointer(model, str(tmp_path)).save(f"model_{iteration:07d}", iteration=iteration)

    def failing(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch, pytest.raises(GDetKDError, match="model_0000003.pth' cannot be read.*now"):
        patch.setattr(torch, "load", failing)
        DurableCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert DurableCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)["iteration"] == 3
