"""Run train_net.py as a user does."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from conftest import NUM_CLASSES, make_cfg
from gdetkd.engine import commands
from gdetkd.engine.folder import LOCK
from gdetkd.engine.setup import check_device
from gdetkd.errors import GDetKDError
from programs import ROOT, run_program


@pytest.fixture
def config_file(distill_cfg, tmp_path):
    entry = dict(MetadataCatalog.get("tiny").gdetkd_entry)
    cfg = distill_cfg({"DATASETS.REGISTER": [entry], "DATASETS.TEST": ("tiny",), "SOLVER.MAX_ITER": 2})
    cfg.SOLVER.WARMUP_ITERS = 1  # less than MAX_ITER
    cfg.merge_from_list(["MODEL.DEVICE", "cuda"])  # Detectron2's default
    path = tmp_path / "distill.yaml"
    path.write_text(cfg.dump())
    return str(path)


def test_trains_and_evaluates_without_cuda_and_without_teacher(config_file, tmp_path):
    result = run_program("train_net.py", "--config-file", config_file, "DISTILL.EVAL_TEACHER", "True")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "There is no CUDA device. The run uses the CPU" in result.stderr
    for text in (result.stdout, (tmp_path / "run" / "log.txt").read_text()):
        assert text.count("Evaluating the teacher.") == 1 and "gdetkd.engine.teacher_evaluation" in text
    assert "Evaluating the teacher." not in result.stderr
    weights = str(tmp_path / "run" / "model_final.pth")
    _refuses_classes_in_another_order(config_file, tmp_path)
    (tmp_path / "teacher.pth").unlink()
    # An evaluation needs neither the training images nor mixed precision.
    entries = [dict(MetadataCatalog.get("tiny").gdetkd_entry), {"name": "away", "kind": "images", "images": "away"}]
    keys = ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path / "eval"), "SOLVER.AMP.ENABLED", "True"]
    keys += ["DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "('away',)"]
    result = run_program("train_net.py", "--config-file", config_file, *keys)
    assert result.returncode == 1 and "SOLVER.AMP.ENABLED needs a CUDA device" in result.stderr
    result = run_program("train_net.py", "--config-file", config_file, "--eval-only", *keys)
    assert result.returncode == 0 and "Evaluation results for bbox" in result.stdout, result.stderr[-2000:]
    result = run_program("train_net.py", "--config-file", config_file, "--overwrite")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "are not there" in result.stderr.splitlines()[-1]


def _refuses_classes_in_another_order(config_file, folder):
    entry = dict(MetadataCatalog.get("tiny").gdetkd_entry)
    content = json.loads(Path(entry["json"]).read_text())
    for category in content["categories"]:
        category["id"] = NUM_CLASSES + 1 - category["id"]
    for annotation in content["annotations"]:
        annotation["category_id"] = NUM_CLASSES + 1 - annotation["category_id"]
    (folder / "backwards.json").write_text(json.dumps(content))
    entry.update(name="backwards", json=str(folder / "backwards.json"))
    keys = ["DATASETS.REGISTER", str([entry]), "DATASETS.TRAIN", "()", "DATASETS.TEST", "('backwards',)"]
    for name in ("model_final.pth", "model_best.pth"):
        words = ["--eval-only", "MODEL.WEIGHTS", str(folder / "run" / name), *keys]
        result = run_program("train_net.py", "--config-file", config_file, *words)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert "trained on the classes class0, class1, class2, but the dataset 'backwards' has" in result.stderr


def test_incomplete_weights_are_not_evaluated(config_file, tmp_path):
    config = tmp_path / "run" / "config.yaml"
    config.write_text("of the training")
    torch.save({"model": {"backbone.fpn_output2.bias": torch.zeros(8)}}, tmp_path / "few.pth")
    for weights in ("", str(tmp_path / "few.pth")):
        result = run_program("train_net.py", "--config-file", config_file, "--eval-only", "MODEL.WEIGHTS", weights)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        message = f"The weights {weights!r} leave" if weights else "MODEL.WEIGHTS is empty, which leaves"
        assert message in result.stderr.splitlines()[-1]
    keys = ["MODEL.ROI_HEADS.NUM_CLASSES", "4", "MODEL.WEIGHTS", str(tmp_path / "few.pth")]
    result = run_program("train_net.py", "--config-file", config_file, "--eval-only", *keys)
    assert result.returncode == 1 and "has 3 classes and the student 4" in result.stderr.splitlines()[-1]
    result = run_program("train_net.py", "--config-file", config_file, "--eval-only", "MODEL.LOAD_PROPOSALS", "True")
    assert result.returncode == 1 and "PROPOSAL_FILES_TEST names 0 files" in result.stderr.splitlines()[-1]
    assert config.read_text() == "of the training"  # an evaluation does not overwrite it


def test_only_one_training_at_a_time_uses_a_folder(config_file, tmp_path):
    command = ["train_net.py", "--config-file", config_file]
    config = tmp_path / "run" / "config.yaml"
    config.write_text("of the training")
    with open(tmp_path / "run" / LOCK, "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        result = run_program(*command)
        assert result.returncode == 1 and "Another training is writing to" in result.stderr.splitlines()[-1]
        assert "choose another OUTPUT_DIR" in result.stderr and "Traceback" not in result.stderr
        assert not list((tmp_path / "run").glob("*.pth"))
    result = run_program(*command, "DATASETS.TRAIN", "()")
    assert result.returncode == 1 and config.read_text() == "of the training"
    result = run_program(*command)
    assert config.read_text().startswith("CUDNN_BENCHMARK")
    assert result.returncode == 0 and (tmp_path / "run" / "model_final.pth").exists(), result.stderr[-2000:]


TRY_TO_LOCK = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def test_the_folder_is_reserved_while_a_run_trains(distill_cfg, tmp_path, monkeypatch):
    lock = str(tmp_path / "run" / LOCK)

    def is_reserved():
        return subprocess.run([sys.executable, "-c", TRY_TO_LOCK, lock], stderr=subprocess.DEVNULL).returncode != 0

    class Trainer:
        def __init__(self, cfg):
            pass

        def resume_or_load(self, resume):
            pass

        def train(self):
            return is_reserved()

    monkeypatch.setattr(commands, "DistillTrainer", Trainer)
    monkeypatch.setattr(commands, "start", lambda cfg, args: None)
    assert commands.train(distill_cfg({}), Namespace(resume=False, overwrite=False)) and not is_reserved()


def test_a_finished_training_is_not_overwritten(config_file, tmp_path):
    command = ["train_net.py", "--config-file", config_file]
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "metrics.json").write_text('{"iteration": 98}\n{"iterat')  # of a training that was killed
    result = run_program(*command, "--resume")
    assert result.returncode == 0 and "THE TRAINING STARTS FROM THE BEGINNING" in result.stdout, result.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert lines[0] == {"iteration": 98} and "bbox/AP" in lines[-1]
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    result = run_program(*command)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    message = result.stderr.splitlines()[-1]
    assert "holds checkpoints of another training (model_best.pth, model_final.pth)" in message
    assert "--resume" in message and "--overwrite" in message
    assert all(path.read_bytes() == content for path, content in files.items())
    teacher, final = tmp_path / "run" / "model_teacher.pth", tmp_path / "run" / "model_final.pth"
    shutil.copy(tmp_path / "teacher.pth", teacher)
    for key, weights, message in (
        ("MODEL.WEIGHTS", tmp_path / "nowhere.pth", "are not there"),
        ("MODEL.WEIGHTS", final, "--overwrite would remove"),
        ("DISTILL.TEACHER.WEIGHTS", teacher, "--overwrite would remove"),
    ):
        result = run_program(*command, "--overwrite", key, weights)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert message in result.stderr.splitlines()[-1]
    assert all(path.read_bytes() == files[path] for path in files if path.name != "log.txt") and teacher.exists()
    (tmp_path / "run" / "model_0000001.pth").touch()
    (tmp_path / "run" / "metrics.json").write_text('{"iteration": 99, "total_loss": 1.0}\n')
    (tmp_path / "run" / "insight").mkdir()
    (tmp_path / "run" / "insight" / "records.jsonl").touch()
    result = run_program(*command, "--overwrite")
    # Otherwise --resume could continue from the checkpoint of the old training.
    assert not (tmp_path / "run" / "model_0000001.pth").exists()
    assert '"iteration": 99' not in (tmp_path / "run" / "metrics.json").read_text()
    assert not (tmp_path / "run" / "insight" / "records.jsonl").exists()
    assert result.returncode == 0 and "Starting training from iteration 0" in result.stdout, result.stderr[-2000:]


def test_more_gpus_than_the_machine_has_are_refused(config_file):
    result = run_program("train_net.py", "--config-file", config_file, "--num-gpus", "64")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "--num-gpus is 64" in result.stderr and "leave --num-gpus out" in result.stderr


def test_the_device_must_fit_the_backend_of_the_processes(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    check_device("cpu")
    check_device("cuda:1")
    assert chosen == ["cuda:1"]

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_local_size", lambda: 1)
    for backend, device in (("gloo", "cpu"), ("nccl", "cuda"), ("nccl", "cuda:0")):
        monkeypatch.setattr(torch.distributed, "get_backend", lambda backend=backend: backend)
        check_device(device)
    assert chosen == ["cuda:1"]  # with several processes, each has chosen a device already
    with pytest.raises(GDetKDError, match="MODEL.DEVICE is 'mps'.*cpu, cuda"):
        check_device("mps")
    with pytest.raises(GDetKDError, match="MODEL.DEVICE is cpu.*NCCL.*CUDA_VISIBLE_DEVICES="):
        check_device("cpu")
    with pytest.raises(GDetKDError, match="'cuda:1', but with 2 processes each of them chooses the GPU of its own"):
        check_device("cuda:1")
    monkeypatch.setattr(comm, "get_local_size", lambda: 2)
    with pytest.raises(GDetKDError, match="'cuda:0', but with 2 processes.*Set it to cuda"):
        check_device("cuda:0")


def test_evaluates_the_teacher_alone(config_file):
    result = run_program("train_net.py", "--config-file", config_file, "--eval-teacher")
    assert result.returncode == 0 and "Evaluation results for bbox" in result.stdout, result.stderr[-2000:]
    for flag in ("--eval-teacher", "--eval-only"):
        result = run_program("train_net.py", "--config-file", config_file, flag, "DATASETS.TEST", "()")
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert "DATASETS.TEST is empty" in result.stderr.splitlines()[-1]


def test_check_prints_one_screen_and_logs_to_the_file(config_file, tmp_path):
    result = run_program("train_net.py", "--config-file", config_file, "--check", "MODEL.DEVICE", "cpu")
    assert "d2." not in result.stderr and result.returncode == 1  # the tiny teacher is untrained
    assert len(result.stdout.splitlines()) < 60 and "PROBLEMS: 1" in result.stdout
    assert "Environment info" not in result.stdout
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Environment info" in log and "gdetkd.teacher" in log
    result = run_program("train_net.py", "--config-file", config_file, "--check", "DATASETS.TRAIN", "('other',)")
    assert result.returncode == 1 and result.stdout == ""
    assert "'other' is not registered" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


def test_check_shows_the_warnings(config_file, tmp_path, tiny_dataset):
    content = json.loads((tiny_dataset / "tiny.json").read_text())
    for annotation in content["annotations"]:
        del annotation["area"]
    (tmp_path / "quirky.json").write_text(json.dumps(content))
    entry = {"name": "tiny", "kind": "coco", "json": str(tmp_path / "quirky.json"), "images": str(tiny_dataset)}
    result = run_program("train_net.py", "--config-file", config_file, "--check", "DATASETS.REGISTER", str([entry]))
    assert "WARNINGS: 2" in result.stdout and "tiny: 24 annotations lack an area" in result.stdout, result.stdout
    assert "12 of the 12 images in DATASETS.TEST are also in DATASETS.TRAIN" in result.stdout


def test_an_unknown_error_shows_its_traceback_and_where_to_report_it(config_file, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import runpy, sys\n"
        "import gdetkd\n"
        "from gdetkd.engine import DistillTrainer\n"
        "DistillTrainer.train = lambda self: 1 / 0\n"
        "sys.argv[0] = 'train_net.py'\n"
        "runpy.run_path('train_net.py', run_name='__main__')\n"
    )
    result = run_program(str(broken), "--config-file", config_file)
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr
    assert "please report an issue of GDetKD" in result.stderr.splitlines()[-1]


def test_without_detectron2_the_import_says_how_to_get_it(tmp_path):
    hide = tmp_path / "hide.py"
    hide.write_text(
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'detectron2' else find(name, *a)\n"
        "import gdetkd\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "projects" / "GDetKD")}
    result = subprocess.run([sys.executable, str(hide)], capture_output=True, text=True, env=environment)
    assert result.returncode != 0 and "pip install" in result.stderr and "facebookresearch/detectron2" in result.stderr


def test_every_config_has_only_known_keys():
    for path in (ROOT / "configs").rglob("*.yaml"):
        cfg = make_cfg({})
        os.chdir(ROOT)
        cfg.merge_from_file(str(path))
