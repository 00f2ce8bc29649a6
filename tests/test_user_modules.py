"""GDETKD_IMPORT imports the user's own modules before a config is made. test_comparison compares such a loss."""

import json
import sys

import pytest
from detectron2.data import MetadataCatalog

from conftest import example_in
from gdetkd.errors import GDetKDError
from gdetkd.user_modules import import_user_modules
from programs import ROOT, run_program


@pytest.fixture(autouse=True)
def kept_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def imported(monkeypatch, names):
    monkeypatch.setenv("GDETKD_IMPORT", names)
    import_user_modules()


def test_files_and_modules_are_imported_once_and_in_order(tmp_path, monkeypatch):
    (tmp_path / "of_users").mkdir()
    (tmp_path / "of_users" / "first_user_module.py").write_text("import sys\nCALLS = []\nCALLS.append('first')\n")
    second = "import first_user_module\nfirst_user_module.CALLS.append('second')\n"
    (tmp_path / "second_user_module.py").write_text(second)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        imported(monkeypatch, "of_users/first_user_module.py, second_user_module,")
    assert sys.modules["first_user_module"].CALLS == ["first", "second"]


def test_nothing_is_imported_without_the_variable(monkeypatch):
    monkeypatch.delenv("GDETKD_IMPORT", raising=False)
    before = list(sys.path)
    import_user_modules()
    imported(monkeypatch, "")
    assert sys.path == before


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent_user_module.py", None, "names the file 'absent_user_module.py', which is not there"),
        ("absent.user_module", None, "names the module 'absent.user_module', which Python does not find"),
        ("needy_user_module.py", "import absent_package", "needs 'absent_package'. Install it"),
        ("broken_user_module.py", "\n1 / 0", r"fails: ZeroDivisionError: .*broken_user_module.py, line 2\)"),
        ("spelt_user_module.py", "def f(:", r"SyntaxError: .*\(spelt_user_module.py, line 1\). Correct it"),
        ("twice_user_module.py", "import re\n\nre.compile('(')", r"twice_user_module.py, line 3\). Correct it"),
        ("a.user_module.py", "", "'a.user_module.py'. Python cannot import a file with a dot in its name. Rename it"),
        ("json.py", "", r"finds another module 'json' \(.*Rename the file"),
    ],
)
def test_an_error_names_the_module_and_the_remedy(tmp_path, monkeypatch, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GDetKDError, match=message):
        imported(monkeypatch, name)


def test_a_training_has_a_loss_and_a_dataset_of_the_user(distill_cfg, tmp_path):
    entry = dict(MetadataCatalog.get("tiny").gdetkd_entry)
    (tmp_path / "own_loss.py").write_text(example_in("losses.md"))
    register = "from detectron2.data.datasets import register_coco_instances\nregister_coco_instances"
    (tmp_path / "own_data.py").write_text(f"{register}('own', {{}}, {entry['json']!r}, {entry['images']!r})\n")
    cfg = distill_cfg({"DATASETS.TRAIN": ("own",), "DATASETS.TEST": (), "SOLVER.MAX_ITER": 1})
    (tmp_path / "pair.yaml").write_text(cfg.dump())
    command = [ROOT / "train_net.py", "--config-file", tmp_path / "pair.yaml", "DISTILL.LOSSES", "('PEAK',)"]
    done = run_program(*command, cwd=tmp_path, environment={"GDETKD_IMPORT": "own_loss.py,own_data"})
    assert done.returncode == 0, done.stderr[-2000:]
    last = (tmp_path / "run" / "metrics.json").read_text().splitlines()[-1]
    assert json.loads(last)["loss_distill_peak"] > 0
    done = run_program(*command, cwd=tmp_path, environment={"GDETKD_IMPORT": "own_los.py"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "names the file 'own_los.py', which is not there" in done.stderr.splitlines()[-1]
