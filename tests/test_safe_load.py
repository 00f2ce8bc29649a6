"""Weights and configs from strangers are read without running code in them."""

import ast
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model

from conftest import make_batch, make_cfg, plain_keys_of
from gdetkd import DistillTrainer
from gdetkd.config import plain_config
from gdetkd.config_file import merge_config_file, merge_words
from gdetkd.engine import build_plain_student
from gdetkd.engine.dataset_checks import check_proposals
from gdetkd.errors import GDetKDError
from gdetkd.safe_load import (
    DamagedFileError,
    SafeCheckpointer,
    UntrustedFileError,
    read_weights,
)
from gdetkd.teacher import FrozenTeacher

ROOT = Path(__file__).resolve().parents[1]


class Payload:
    """Make a file when a loader that trusts everything unpickles this."""

    def __init__(self, target, call=os.system):
        self.target, self.call = target, call

    def __reduce__(self):
        return self.call, (f"touch {self.target}" if self.call is os.system else f"open({str(self.target)!r}, 'w')",)


def write_payload(path, kind, target, call=os.system):
    content = {"model": {"weight": torch.zeros(2)}, "more": Payload(target, call)}
    if kind == "pkl":
        content["model"] = {"weight": np.zeros(2)}
        path.write_bytes(pickle.dumps({**content, "__author__": "nobody", "matching_heuristics": True}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return str(path)


KINDS = [("zip", "x.pth"), ("legacy", "x.pth"), ("pkl", "x.pkl"), ("zip", "x.pyth"), ("zip", "weights.bin")]


@pytest.mark.parametrize("call", [os.system, exec])
@pytest.mark.parametrize("kind, name", KINDS)
def test_a_file_that_runs_code_is_refused_and_its_code_never_runs(tmp_path, kind, name, call):
    path, target = write_payload(tmp_path / name, kind, tmp_path / "pwned", call), tmp_path / "pwned"
    with pytest.raises(UntrustedFileError, match=f"{name}.*(system|exec).*Nothing of it was run.*torch.save"):
        read_weights(path)
    assert not target.exists()
    if kind == "pkl":  # the payload is a real one
        pickle.loads(Path(path).read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.exists()


@pytest.mark.parametrize("kind, name", KINDS[:3])
def test_none_of_the_ways_in_runs_it(distill_cfg, tmp_path, kind, name):
    path, target = write_payload(tmp_path / name, kind, tmp_path / "pwned"), tmp_path / "pwned"
    cfg = distill_cfg({"DISTILL.TEACHER.WEIGHTS": path})
    with pytest.raises(UntrustedFileError):
        FrozenTeacher(cfg)
    cfg = distill_cfg({"MODEL.WEIGHTS": path, "SOLVER.MAX_ITER": 1})
    trainer = DistillTrainer(cfg)
    with pytest.raises(UntrustedFileError):
        trainer.resume_or_load(resume=False)
    (tmp_path / "run" / "last_checkpoint").write_text(os.path.join("..", name))
    with pytest.raises(UntrustedFileError):
        DistillTrainer(cfg).resume_or_load(resume=True)
    with pytest.raises(UntrustedFileError):
        SafeCheckpointer(build_plain_student(cfg)).resume_or_load(path, resume=False)
    assert not target.exists()


@pytest.mark.parametrize("payload", ["nested", "array"])
def test_a_payload_hidden_in_an_array_is_refused(tmp_path, payload):
    hidden = np.array([Payload(tmp_path / "pwned") if payload == "nested" else {"plain"}, 1], dtype=object)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": {"weight": hidden}, "__author__": "nobody"}))
    with pytest.raises(UntrustedFileError, match="system" if payload == "nested" else "array of Python objects"):
        read_weights(str(tmp_path / "x.pkl"))
    assert not (tmp_path / "pwned").exists()


def test_a_codec_is_no_way_to_import_a_module(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"c_codecs\nencode\n(Vabc\nVrot13\ntR.")
    with pytest.raises(UntrustedFileError, match="codec 'rot13'"):
        read_weights(str(tmp_path / "x.pkl"))


def zoo_file(path, cfg, protocol):
    weights = {name: tensor.numpy() for name, tensor in build_model(plain_config(cfg)).state_dict().items()}
    content = {"model": weights, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return weights


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_files_of_the_model_zoo_load(tmp_path, protocol):
    cfg = make_cfg({})
    weights = zoo_file(tmp_path / "zoo.pkl", cfg, protocol)
    model = build_model(cfg)
    SafeCheckpointer(model).load(str(tmp_path / "zoo.pkl"))
    assert all(np.array_equal(tensor.numpy(), weights[name]) for name, tensor in model.state_dict().items())


def test_a_file_that_python_2_wrote_loads(tmp_path):
    """Python 2's NumPy pickled this float32 array with protocol 2. Its strings are bytes."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\n"
        b"U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
        + np.array([1.5, -2.0], np.float32).tobytes()
        + b"tb"
    )
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02}U\x05blobs}U\x07conv1_w" + array + b"ss.")
    assert read_weights(str(tmp_path / "x.pkl"))["blobs"]["conv1_w"].tolist() == [1.5, -2.0]
    loaded = SafeCheckpointer(torch.nn.Linear(1, 1)).read_file(str(tmp_path / "x.pkl"))
    assert loaded["__author__"] == "Caffe2" and list(loaded["model"]) == ["conv1_w"]


def test_plain_containers_and_numbers_load(tmp_path):
    content = {
        "model": OrderedDict(weight=np.float32([[1, 2]])),
        "numbers": [1, 2.5, True, None, "text", b"bytes", (1, {2}, frozenset({3}), bytearray(b"4"))],
        "scalars": [np.float64(0.5), np.int64(3), np.bool_(True)],
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=2))
    loaded = read_weights(str(tmp_path / "x.pkl"))
    assert loaded["numbers"] == content["numbers"] and loaded["scalars"] == content["scalars"]
    torch.save({"model": {"weight": torch.ones(2)}, "scalars": content["scalars"]}, tmp_path / "x.pth")
    assert read_weights(str(tmp_path / "x.pth"))["scalars"] == content["scalars"]


def on_fixed_batches(trainer_class):
    class Trainer(trainer_class):
        @classmethod
        def build_train_loader(cls, cfg):
            return [make_batch(seed=seed) for seed in range(6)]

    return Trainer


def test_checkpoints_that_plain_detectron2_wrote_load(distill_cfg, tmp_path):
    cfg = distill_cfg({"SOLVER.MAX_ITER": 2})
    plain = on_fixed_batches(DefaultTrainer)(plain_keys_of(plain_config(cfg)))
    plain.train()
    cfg.MODEL.WEIGHTS = str(tmp_path / "run" / "model_final.pth")
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert not trainer.checkpointer.unloaded
    saved, loaded = plain.model.state_dict().values(), trainer.student.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(saved, loaded))


@pytest.mark.parametrize(
    "content", [b"", b"hello world" * 10, b"\0" * 5000, b"PK", b"PK\x03\x04" * 100, b"\x80\x02}."[:2]]
)
@pytest.mark.parametrize("name", ["x.pth", "x.pkl"])
def test_files_that_are_no_weights(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"{name}.*cannot be read"):
        read_weights(str(tmp_path / name))


@pytest.mark.parametrize("size", [10, 500, 3000, -100])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_are_cut_off(tmp_path, size, zipped):
    torch.save({"model": {"weight": torch.rand(1000)}}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:size])
    with pytest.raises(DamagedFileError, match="x.pth"):
        read_weights(str(tmp_path / "x.pth"))


def test_files_of_one_tensor(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "x.pth")
    with pytest.raises(DamagedFileError, match="hold a Tensor, not a dictionary"):
        read_weights(str(tmp_path / "x.pth"))


TAGS = ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system", "!!python/tuple [1, 2]"]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("based", [False, True])
def test_a_config_with_a_tag_is_refused_and_named(tmp_path, tag, based):
    target = tmp_path / "pwned"
    (tmp_path / "evil.yaml").write_text(f"SEED: 1\nOUTPUT_DIR: {tag.format(target)}\n")
    (tmp_path / "middle.yaml").write_text("_BASE_: evil.yaml\n")
    (tmp_path / "own.yaml").write_text("_BASE_: middle.yaml\nSEED: 2\n")
    with pytest.raises(GDetKDError, match="evil.yaml', line 2"):
        merge_config_file(make_cfg({}), str(tmp_path / ("own.yaml" if based else "evil.yaml")))
    assert not target.exists()


def test_a_teachers_config_with_a_tag_is_refused(distill_cfg, tmp_path):
    cfg = distill_cfg()
    path = tmp_path / "teacher.yaml"
    path.write_text(path.read_text() + "OUTPUT_DIR: " + TAGS[0].format(tmp_path / "pwned") + "\n")
    with pytest.raises(GDetKDError, match="teacher.yaml"):
        FrozenTeacher(cfg)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "text, match",
    [
        ("_BASE_: own.yaml\n", "includes itself"),
        ("SEED: [1\n", "not valid YAML"),
        ("_BASE_: gone.yaml\n", "not there"),
        *[(text, "is empty, or no mapping") for text in ("", "# SEED: 1\n", "- SEED\n", "SEED\n", "7\n")],
        ("_BASE_: empty.yaml\n", "one of its _BASE_ files is empty"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, text, match):
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(GDetKDError, match=f"own.yaml.*{match}"):
        merge_config_file(make_cfg({}), str(tmp_path / "own.yaml"))
    with pytest.raises(GDetKDError, match="not there"):
        merge_config_file(make_cfg({}), str(tmp_path / "nowhere.yaml"))


def test_values_on_the_command_line_are_no_expressions(tmp_path):
    cfg = make_cfg({})
    text = f"__import__('os').system('touch {tmp_path}/pwned')"
    merge_words(cfg, ["OUTPUT_DIR", text, "DATASETS.TRAIN", text])
    assert cfg.OUTPUT_DIR == text and cfg.DATASETS.TRAIN == (text,) and not (tmp_path / "pwned").exists()


def calls(path):
    """Yield the dotted name and the keyword arguments of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_nothing_here_evaluates_text_or_starts_a_shell():
    files = [ROOT / "train_net.py", *(f for d in ("projects", "tools", "benchmarks") for f in (ROOT / d).rglob("*.py"))]
    forbidden = {
        "eval",
        "exec",
        "os.system",
        "os.popen",
        "pickle.load",
        "pickle.loads",
        "yaml.load",
        "yaml.unsafe_load",
    }
    for path in files:
        for name, keywords in calls(path):
            assert name not in forbidden, (path, name)
            assert name != "torch.load" or keywords["weights_only"] == "True", path
            assert keywords.get("shell", "False") == "False", path
            assert not name.endswith("merge_from_file") or keywords.get("allow_unsafe") == "False", path


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_proposals_that_run_code_are_refused_before_detectron2_reads_them(tmp_path, key):
    path = write_payload(tmp_path / "proposals.pkl", "pkl", tmp_path / "pwned")
    keys = {f"DATASETS.{key}": ("tiny",), f"DATASETS.PROPOSAL_FILES_{key}": (path,)}
    with pytest.raises(UntrustedFileError):
        check_proposals(make_cfg({"MODEL.LOAD_PROPOSALS": True, **keys}), key)
    assert not (tmp_path / "pwned").exists()
