"""Test tools/insight.py on the folders of finished runs."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog

from conftest import make_cfg
from gdetkd import DistillTrainer
from gdetkd.errors import GDetKDError
from gdetkd.insight.records import RecordFile
from gdetkd.insight.run import FinishedRun
from programs import run_program

ROOT = Path(__file__).resolve().parents[2]


def show(*args):
    return run_program("tools/insight.py", *args)


@pytest.fixture
def finished(distill_cfg, tmp_path):
    """Return a function that trains for two iterations and returns the run's folder."""

    def make(name, changes):
        keys = {"DATASETS.REGISTER": [dict(MetadataCatalog.get("tiny").gdetkd_entry)], "DATASETS.TEST": ("tiny",)}
        keys.update({"SOLVER.MAX_ITER": 2, "SOLVER.CHECKPOINT_PERIOD": 1, "DISTILL.INSIGHT.IMAGES": 3})
        (tmp_path / name).mkdir()
        cfg = distill_cfg({**keys, "OUTPUT_DIR": str(tmp_path / name), **changes})
        (tmp_path / name / "config.yaml").write_text(cfg.dump())  # as default_setup does
        trainer = DistillTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        return tmp_path / name

    return make


def test_a_run_without_records_is_shown_from_its_checkpoints(finished):
    distilled, alone = finished("distilled", {}), finished("alone", {"DISTILL.LOSSES": ()})
    seen = show(distilled, "--baseline", alone)
    assert seen.returncode == 0, seen.stderr
    page = (distilled / "insight" / "index.html").read_text()
    assert "the baseline finds" in page and "Matching over training" in page and "What pulls" not in page
    assert [record["iterations"] for record in RecordFile(str(distilled)).read()] == [1, 2]
    file = distilled / "insight" / "records.jsonl"
    whole = file.read_text()
    file.write_text(whole[: whole.index("\n") + 20])  # Ctrl-C while it wrote the second
    assert show(distilled).returncode == 0 and file.read_text() == whole

    more = show(distilled, "--images", "6")
    records = RecordFile(str(distilled)).read()
    assert more.returncode == 0, more.stderr
    assert (
        len(records) == 2
        and records[0]["objects"] == records[1]["objects"] > json.loads(whole.split("\n")[0])["objects"]
    )

    refused = show(alone)
    assert refused.returncode != 0 and "without distillation losses" in refused.stderr


def test_a_run_with_another_teacher_at_the_path_is_refused(finished):
    folder = finished("distilled", {"DISTILL.LOSSES": ("CKD",)})
    path = FinishedRun(str(folder)).cfg.DISTILL.TEACHER.WEIGHTS
    weights = torch.load(path)
    torch.save({**weights, "again": True}, path)
    refused = show(folder)
    assert refused.returncode == 1 and "was distilled from another teacher than DISTILL.TEACHER" in refused.stderr
    assert not (folder / "insight" / "index.html").exists()


def test_records_of_the_training_keep_their_images(finished):
    folder = finished("distilled", {"DISTILL.INSIGHT.PERIOD": 2})
    refused = show(folder, "--images", "6")
    assert refused.returncode != 0 and "Leave out --images" in refused.stderr


def test_records_of_a_training_without_gradients_are_kept(finished):
    """No gradient is measured before the first iteration, and after DISTILL.UNTIL."""
    folder = finished("distilled", {"DISTILL.INSIGHT.PERIOD": 2, "DISTILL.UNTIL": 0.5})
    records = RecordFile(str(folder)).read()
    assert [record["gradients"] for record in records] == [None, None]
    refused = show(folder, "--images", "6")
    assert refused.returncode != 0 and "Leave out --images" in refused.stderr
    assert RecordFile(str(folder)).read() == records


def test_a_run_on_fewer_processes_than_its_config_is_for_is_shown_to_its_end(finished):
    folder = finished("distilled", {"SOLVER.REFERENCE_WORLD_SIZE": 2, "SOLVER.IMS_PER_BATCH": 4})
    run = FinishedRun(str(folder))
    assert run.cfg.SOLVER.MAX_ITER == 4
    assert [iterations for iterations, _ in run.checkpoints()] == [2, 4]
    assert run.curve()[0][-1] == 4


def test_a_run_with_a_float16_teacher_is_shown_without_a_gpu(tmp_path):
    cfg = make_cfg({"DISTILL.TEACHER.DTYPE": "float16", "MODEL.DEVICE": "cuda"})
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "model_final.pth").touch()
    shown = FinishedRun(str(tmp_path)).cfg
    on_gpu = torch.cuda.is_available()
    assert shown.DISTILL.TEACHER.DTYPE == ("float16" if on_gpu else "float32")
    assert shown.MODEL.DEVICE == ("cuda" if on_gpu else "cpu")


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(GDetKDError, match="is not the OUTPUT_DIR of a finished run: it has no config.yaml"):
        FinishedRun(str(tmp_path))
