"""mmdetection's files are read without running what they hold, and files that do not tell enough are refused."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from gdetkd.errors import GDetKDError
from gdetkd.mmdetection.checkpoint import read_checkpoint
from gdetkd.safe_load import LeftOut, UntrustedFileError, read_weights
from mmdet_configs import config_2x, two_stage

TEXT = config_2x(two_stage("FasterRCNN"))
TENSORS = {"backbone.conv1.weight": torch.zeros(1)}


def save(path, meta=None, **content):
    torch.save({"state_dict": TENSORS, **({} if meta is None else {"meta": meta}), **content}, path)
    return str(path)


META = {
    "2.x": {"config": TEXT, "CLASSES": ("cat", "dog"), "mmdet_version": "2.0.0+abc", "epoch": 12, "hook_msgs": {}},
    "2.x with files": {"config": f"configs/a.py\n{TEXT}", "CLASSES": ["cat", "dog"], "mmdet_version": "2.0.0"},
    "3.x": {"cfg": TEXT, "dataset_meta": {"classes": ("cat", "dog"), "palette": [(1, 2, 3)]}, "mmengine_version": "1"},
    "3.x beta": {"cfg": TEXT, "dataset_meta": {"CLASSES": ("cat", "dog")}},
}


@pytest.mark.parametrize("kind", META)
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_all_versions(tmp_path, kind, zipped):
    content = {"state_dict": TENSORS, "meta": META[kind]}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(str(tmp_path / "x.pth"))
    assert checkpoint.classes == ("cat", "dog") and checkpoint.model["type"] == "FasterRCNN"
    assert list(checkpoint.tensors) == list(TENSORS)


def test_a_config_file_replaces_the_one_in_the_checkpoint(tmp_path):
    (tmp_path / "own.py").write_text(config_2x(two_stage("MaskRCNN")))
    path = save(tmp_path / "x.pth", META["2.x"])
    assert read_checkpoint(path, str(tmp_path / "own.py")).model["type"] == "MaskRCNN"
    bare = save(tmp_path / "bare.pth")
    assert read_checkpoint(bare, str(tmp_path / "own.py")).classes is None


REFUSED = {
    "1.x": ({"meta": {**META["2.x"], "mmdet_version": "1.2.0"}}, "x.pth' is of mmdetection 1.2.0.*2.0 or later"),
    "0.x": ({"meta": {**META["2.x"], "mmdet_version": "0.6.0"}}, "x.pth' is of mmdetection 0.6.0"),
    "no config": ({"meta": {"CLASSES": ("a",)}}, "x.pth' holds no config.*--config"),
    "no meta": ({}, "x.pth' holds no config.*--config"),
    "meta of another kind": ({"meta": [1]}, "x.pth' holds no config"),
    "no model": ({"meta": {"config": "data = 1"}}, "does not describe the detector: it assigns no `model`.*--config"),
    "a program": (
        {"meta": {"config": "model = make()"}},
        "describe the detector: The config in .*x.pth', line 1 is more than plain values.*--config",
    ),
    "no Python": ({"meta": {"config": "model = ("}}, "The config in .*x.pth' is not valid Python"),
    "no tensors": ({"state_dict": {"a": 1}, "meta": META["2.x"]}, "no tensors under 'state_dict'"),
    "Detectron2's": (
        {"state_dict": None, "model": TENSORS},
        "no tensors under 'state_dict'.*no mmdetection checkpoint",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_refused(tmp_path, name):
    content, match = REFUSED[name]
    with pytest.raises(GDetKDError, match=match):
        read_checkpoint(save(tmp_path / "x.pth", **content))


@pytest.mark.parametrize("names", [None, 3, ("cat", 3)])
def test_unknown_class_names(tmp_path, names):
    assert read_checkpoint(save(tmp_path / "x.pth", {"config": TEXT, "CLASSES": names})).classes is None


def test_a_single_class_name(tmp_path):
    assert read_checkpoint(save(tmp_path / "x.pth", {"config": TEXT, "CLASSES": "cat"})).classes == ("cat",)


MODULE = "mmengine.logging.history_buffer"


class HistoryBuffer:
    """Pickle as mmengine's class does: with functions of the class, for which a pickle asks by `getattr`."""

    statistics = {}

    def __init__(self):
        self.values = np.arange(3.0)

    def mean(self):
        return self.values.mean()

    def __getstate__(self):
        return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}


@pytest.fixture
def log_of_mmengine(monkeypatch):
    """Make a class of the name in mmengine while a file is written, and let there be none when it is read."""
    for name in ("mmengine", "mmengine.logging", MODULE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[MODULE].HistoryBuffer = HistoryBuffer
    monkeypatch.setattr(HistoryBuffer, "__module__", MODULE)
    monkeypatch.setattr(HistoryBuffer.mean, "__module__", MODULE)
    return {"log_scalars": {"train/loss": HistoryBuffer()}}


@pytest.mark.parametrize("zipped", [True, False])
def test_the_log_of_mmengine_is_left_out(tmp_path, log_of_mmengine, monkeypatch, zipped):
    content = {"state_dict": TENSORS, "meta": META["3.x"], "message_hub": log_of_mmengine}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert b"getattr" in (tmp_path / "x.pth").read_bytes()
    monkeypatch.delitem(sys.modules, MODULE)
    with pytest.raises(UntrustedFileError, match="HistoryBuffer"):
        read_weights(str(tmp_path / "x.pth"))
    assert read_checkpoint(str(tmp_path / "x.pth")).classes == ("cat", "dog")
    names = (f"{MODULE}.HistoryBuffer", "builtins.getattr")
    read = read_weights(str(tmp_path / "x.pth"), leave_out=names)["message_hub"]["log_scalars"]["train/loss"]
    assert type(read) is LeftOut and not vars(read)


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_leaving_out_getattr_opens_no_way_in(tmp_path, zipped):
    """A pickle that looks a function up by `getattr` gets an object that does nothing."""
    path, content = str(tmp_path / "x.pth"), {"state_dict": TENSORS, "meta": META["2.x"]}
    imported = {**content, "more": Call(getattr, Call(__import__, "os"), "system")}
    torch.save(imported, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UntrustedFileError, match="__import__.*Nothing of it was run"):
        read_checkpoint(path)
    torch.save({**content, "more": Call(getattr, "text", "join")}, path, _use_new_zipfile_serialization=zipped)
    read_checkpoint(path)
    looked_up = read_weights(path, leave_out=("builtins.getattr",))["more"]
    assert type(looked_up) is LeftOut and not callable(looked_up)
