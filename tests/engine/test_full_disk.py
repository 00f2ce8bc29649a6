"""A full disk ends no training, and loses neither the best score nor the last checkpoint."""

import errno
import logging
import os

import pytest
from test_checkpoint import files
from test_trainer import train

from gdetkd import DistillTrainer
from gdetkd import files as file_writing
from gdetkd.engine import build_plain_student
from gdetkd.errors import GDetKDError
from gdetkd.safe_load import read_weights


class FullDisk:
    """A file for writing that takes so many bytes and no more."""

    def __init__(self, file, room):
        self._file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.fixture
def disk(monkeypatch):
    """Sets how many bytes each partial file of a checkpoint can take."""
    room = {"bytes": None}

    def limited(path, mode="r", **kwargs):
        file = open(path, mode, **kwargs)
        return file if room["bytes"] is None else FullDisk(file, room["bytes"])

    monkeypatch.setattr(file_writing, "open", limited, raising=False)
    return room


@pytest.mark.parametrize("room", [0, 5000, 100_000])
def test_a_full_disk_fails_the_save_and_not_the_training(distill_cfg, tmp_path, disk, caplog, room):
    cfg = distill_cfg({"SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 1})

    class Filling(DistillTrainer):
        def run_step(self):
            disk["bytes"] = room if self.iter in (1, 2) else None  # the third write has room again
            super().run_step()

    trainer, steps = train(Filling, cfg)
    assert list(steps) == [0, 1, 2, 3]
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2 and trainer.checkpointer.failed == ["model_0000001", "model_0000002"]
    assert all("could NOT be written (No space left on device)" in error for error in errors)
    assert "is model_0000000.pth. Make room in" in errors[1]
    assert [name for name in files(tmp_path / "run") if ".pth" in name] == [
        *("model_0000000.pth", "model_0000003.pth", "model_final.pth"),
    ]
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"


def test_a_last_checkpoint_that_found_no_room_is_an_error_in_the_end(distill_cfg, tmp_path, disk):
    disk["bytes"] = 0
    with pytest.raises(GDetKDError, match="model_final.pth could not be written.*--resume"):
        train(DistillTrainer, distill_cfg({"SOLVER.MAX_ITER": 1}))
    assert not list((tmp_path / "run").glob("*.pth*"))


def test_a_full_disk_does_not_lose_the_best_score(distill_cfg, tmp_path, disk, monkeypatch):
    cfg = distill_cfg({"DISTILL.LOSSES": (), "DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 1, "SOLVER.MAX_ITER": 3})
    scores = iter([10.0, 30.0, 20.0])

    def scored(*args):
        score = next(scores)
        disk["bytes"] = 0 if score == 30.0 else None
        return {"bbox": {"AP": score}}

    monkeypatch.setattr(DistillTrainer, "test", classmethod(scored))

    class Emptied(DistillTrainer):
        def run_step(self):
            disk["bytes"] = None
            super().run_step()

    train(Emptied, cfg)
    assert read_weights(str(tmp_path / "run" / "model_best.pth"))["record"]["metric"] == 20.0


def test_detections_that_the_disk_does_not_take_end_no_training(distill_cfg, tmp_path, disk, caplog):
    """Their metrics are known all the same, and with them the best checkpoint."""
    keys = {"DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 2, "SOLVER.CHECKPOINT_PERIOD": 100}
    cfg = distill_cfg({"DISTILL.LOSSES": (), "SOLVER.MAX_ITER": 3, **keys})

    scores = []

    class Full(DistillTrainer):
        @classmethod
        def test(cls, *args):
            disk["bytes"] = 0
            scores.append(super().test(*args)["bbox"]["AP"])
            disk["bytes"] = None
            return {"bbox": {"AP": 5.0}}

    _, steps = train(Full, cfg)
    assert list(steps) == [0, 1, 2] and len(scores) == 2
    assert caplog.text.count("Could not write the detections on tiny (No space left on device)") == 2
    assert read_weights(str(tmp_path / "run" / "model_best.pth"))["record"]["metric"] == 5.0
    assert not list((tmp_path / "run" / "inference").iterdir())


def test_an_evaluation_alone_ends_with_an_error(distill_cfg, disk):
    cfg = distill_cfg({"DATASETS.TEST": ("tiny",)})
    student = build_plain_student(cfg)
    disk["bytes"] = 0
    with pytest.raises(OSError, match="No space left on device"):
        DistillTrainer.test(cfg, student)


def test_a_score_of_an_earlier_evaluation_is_not_given_to_later_weights(distill_cfg, tmp_path, disk):
    cfg = distill_cfg({"DISTILL.LOSSES": (), "DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 1, "SOLVER.MAX_ITER": 3})
    results = iter([{"bbox": {"AP": 10.0}}, {"bbox": {"AP": 30.0}}, {}])  # the last could not be made

    class Scored(DistillTrainer):
        @classmethod
        def test(cls, *args):
            found = next(results)
            disk["bytes"] = 0 if found == {"bbox": {"AP": 30.0}} else None
            return found

        def run_step(self):
            disk["bytes"] = None
            super().run_step()

    train(Scored, cfg)
    assert read_weights(str(tmp_path / "run" / "model_best.pth"))["record"]["metric"] == 10.0


def test_metrics_that_the_disk_does_not_take_end_no_training(distill_cfg, caplog, monkeypatch):
    from detectron2.utils.events import JSONWriter

    def full(writer):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JSONWriter, "write", full)
    _, steps = train(DistillTrainer, distill_cfg({"SOLVER.MAX_ITER": 2}))
    assert list(steps) == [0, 1] and "Could not write metrics (JSONWriter: No space left" in caplog.text
