"""Test that an exported student gives the same boxes in plain Detectron2, TorchScript and ONNX."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from conftest import plain_keys_of
from gdetkd import DistillTrainer
from gdetkd.config import plain_config
from gdetkd.dotted_keys import flat_config
from gdetkd.errors import GDetKDError
from programs import run_program

TOOLS = Path(__file__).parents[2] / "tools"
SIZES = [(64, 80), (96, 64), (16, 16)]
# A user's script. It also replaces compiled operators and names of Pillow and NumPy that may be missing here.
PLAIN_SCRIPT = """
import importlib.util, json, sys, types
assert importlib.util.find_spec("gdetkd") is None
import PIL.Image
PIL.Image.LINEAR = getattr(PIL.Image, "LINEAR", PIL.Image.BILINEAR)
import numpy
for name in ("bool", "str"):
    vars(numpy).setdefault(name, getattr(__builtins__, name))
sys.modules["detectron2._C"] = types.ModuleType("detectron2._C")
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
import numpy as np

cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
cfg.MODEL.DEVICE = "cpu"
found = DefaultPredictor(cfg)(np.load(sys.argv[2]))["instances"]
print(json.dumps({"boxes": found.pred_boxes.tensor.tolist(), "scores": found.scores.tolist()}))
"""
# All proposals are kept, so each image has another number of them.
PROPOSALS = {"MODEL.RPN.PRE_NMS_TOPK_TEST": 1000, "MODEL.RPN.POST_NMS_TOPK_TEST": 1000}
THRESHOLDS = {"MODEL.RETINANET.SCORE_THRESH_TEST": 0.005, "MODEL.FCOS.SCORE_THRESH_TEST": 0.005}


@pytest.fixture
def trained(pair_cfg, tmp_path):
    """Return a function that distils a tiny student for two steps, and returns the config and the weights."""

    def make(student):
        cfg = pair_cfg(f"faster_rcnn-{student}", {"SOLVER.MAX_ITER": 2, **THRESHOLDS, **PROPOSALS})
        DistillTrainer(cfg).train()
        return cfg, tmp_path / "run" / "model_final.pth"

    return make


def spread_scores(weights):
    """Scale the classifier of a checkpoint.

    An untrained classifier gives all boxes similar scores. Rounding would then decide which box suppresses another.
    """
    checkpoint = torch.load(weights, weights_only=False)
    for name, tensor in checkpoint["model"].items():
        if name.endswith("cls_score.weight"):
            tensor *= 50
    torch.save(checkpoint, weights)


def student_of(cfg, weights):
    model = build_model(plain_config(cfg)).eval()
    DetectionCheckpointer(model).load(str(weights))
    return model


def in_score_order(boxes, scores, classes):
    """Sort by score, then class and box, because an export may order equal scores differently."""
    order = np.lexsort((*np.asarray(boxes).round(2).T, np.asarray(classes), -np.asarray(scores).round(4)))
    return np.asarray(boxes)[order], np.asarray(scores)[order], np.asarray(classes)[order]


def assert_same(found, expected):
    for actual, desired in zip(in_score_order(*found), in_score_order(*expected)):
        np.testing.assert_allclose(actual, desired, rtol=1e-3, atol=1e-2)


def test_plain_detectron2_without_this_package(trained, tmp_path):
    cfg, weights = trained("faster_rcnn")
    cfg.MODEL.DEVICE = "cuda"
    (tmp_path / "distill.yaml").write_text(cfg.dump())
    assert run_tool(tmp_path / "distill.yaml", weights, tmp_path / "plain.yaml").returncode == 0
    # Other versions of Detectron2 lack some keys, so a key with its default value is left out. The device is that of
    # the config, not of the exporting machine.
    written = yaml.safe_load((tmp_path / "plain.yaml").read_text())
    assert written["VERSION"] == 2 and "DEVICE" not in written["MODEL"]
    assert written["MODEL"]["FPN"].keys() == {"IN_FEATURES", "OUT_CHANNELS"}
    assert "REPEAT_THRESHOLD" not in written.get("DATALOADER", {})
    reread = get_cfg()
    reread.merge_from_file(str(tmp_path / "plain.yaml"))
    expected = plain_keys_of(cfg)
    expected.MODEL.WEIGHTS = reread.MODEL.WEIGHTS
    assert flat_config(reread.dump()) == flat_config(expected.dump())
    cfg.MODEL.DEVICE = "cpu"
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    np.save(tmp_path / "image.npy", image)
    (tmp_path / "script.py").write_text(PLAIN_SCRIPT)
    packages = os.pathsep.join(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if "GDetKD" not in p)
    command = [sys.executable, "-W", "ignore", "script.py", "plain.yaml", "image.npy"]
    environment = {**os.environ, "PYTHONPATH": packages}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    printed = json.loads(result.stdout.splitlines()[-1])
    pixels = torch.as_tensor(image.transpose(2, 0, 1).astype(np.float32))
    with torch.no_grad():
        [expected] = student_of(cfg, weights)([{"image": pixels, "height": 64, "width": 80}])
    assert len(printed["boxes"]) > 5
    assert printed["boxes"] == expected["instances"].pred_boxes.tensor.tolist()
    assert printed["scores"] == expected["instances"].scores.tolist()


@pytest.mark.parametrize("student", ["faster_rcnn", "cascade_rcnn", "retinanet", "fcos"])
@pytest.mark.parametrize("ending", ["ts", "onnx"])
def test_exported(trained, student, ending, tmp_path):
    runtime = pytest.importorskip("onnxruntime") if ending == "onnx" else None
    cfg, weights = trained(student)
    spread_scores(weights)
    (tmp_path / "distill.yaml").write_text(cfg.dump())
    output = tmp_path / f"student.{ending}"
    result = run_tool(tmp_path / "distill.yaml", weights, output)
    if student == "cascade_rcnn" and ending == "ts" and result.returncode == 1:  # Detectron2 v0.6
        assert "Export it to ONNX" in result.stderr.splitlines()[-1] and not output.exists()
        return
    assert result.returncode == 0, result.stderr[-2000:]
    detector = student_of(cfg, weights)
    session = runtime.InferenceSession(str(output), providers=["CPUExecutionProvider"]) if runtime else None
    script = None if runtime else torch.jit.load(str(output))
    for seed, size in enumerate(SIZES):  # the first size is the size of the trace
        image = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(seed)).float()
        with torch.no_grad():
            found = session.run(None, {"image": image.numpy()}) if session else [t.numpy() for t in script(image)]
            instances = detector([{"image": image}])[0]["instances"]
        expected = (instances.pred_boxes.tensor.numpy(), instances.scores.numpy(), instances.pred_classes.numpy())
        assert len(expected[0]) > (5 if size != SIZES[-1] else 0)
        assert_same(found, expected)


def run_tool(config_file, weights, output):
    files = ["--config-file", config_file, "--weights", weights, "--output", output]
    return run_program(TOOLS / "export.py", *files, "--image-size", *SIZES[0])


class Doubled(torch.autograd.Function):
    """Define an operation in Python, as the cascades of Detectron2 v0.6 do."""

    @staticmethod
    def forward(ctx, image):
        return image * 2


class UsesDoubled(torch.nn.Module):
    def forward(self, image):
        return Doubled.apply(image)


def test_a_model_that_torchscript_cannot_save_is_refused():
    spec = importlib.util.spec_from_file_location("export", TOOLS / "export.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with pytest.raises(GDetKDError, match="Export it to ONNX"):
        tool._to_torchscript(UsesDoubled(), torch.zeros(3, 4, 4), io.BytesIO())


def test_incomplete_weights_and_unknown_endings_are_refused(trained, tmp_path):
    cfg, weights = trained("faster_rcnn")
    (tmp_path / "distill.yaml").write_text(cfg.dump())
    torch.save({"model": {"backbone.fpn_output2.bias": torch.zeros(8)}}, tmp_path / "few.pth")
    result = run_tool(tmp_path / "distill.yaml", tmp_path / "few.pth", tmp_path / "student.onnx")
    assert result.returncode == 1 and "few.pth' leave" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "student.onnx").exists()
    result = run_tool(tmp_path / "distill.yaml", weights, tmp_path / "student.engine")
    assert result.returncode == 1 and ".ts or .pt (TorchScript), .onnx or .yaml" in result.stderr.splitlines()[-1]


def test_an_output_that_is_an_input_or_a_folder_is_refused(trained, tmp_path):
    cfg, weights = trained("faster_rcnn")
    config, base = tmp_path / "distill.yaml", tmp_path / "base.yaml"
    base.write_text(cfg.dump())
    config.write_text("_BASE_: base.yaml\n")
    (tmp_path / "folder.ts").mkdir()
    before = {path: path.read_bytes() for path in (config, base, weights)}
    for output, reason in [(config, "reads"), (base, "reads"), (tmp_path / "folder.ts", "is a folder")]:
        result = run_tool(config, weights, output)
        assert result.returncode == 1 and reason in result.stderr.splitlines()[-1]
    assert before == {path: path.read_bytes() for path in before}


def test_a_plain_config_is_not_written_for_weights_that_do_not_fit(trained, tmp_path):
    cfg, _ = trained("faster_rcnn")
    (tmp_path / "distill.yaml").write_text(cfg.dump())
    torch.save({"model": {"backbone.fpn_output2.bias": torch.zeros(8)}}, tmp_path / "few.pth")
    for weights in ("few.pth", "nowhere.pth"):
        result = run_tool(tmp_path / "distill.yaml", tmp_path / weights, tmp_path / "plain.yaml")
        assert result.returncode == 1 and weights in result.stderr and not (tmp_path / "plain.yaml").exists()


def test_fcos_is_refused_for_plain_detectron2(trained, tmp_path):
    cfg, weights = trained("fcos")
    (tmp_path / "distill.yaml").write_text(cfg.dump())
    result = run_tool(tmp_path / "distill.yaml", weights, tmp_path / "plain.yaml")
    assert result.returncode == 1 and "docs/deploy.md" in result.stderr.splitlines()[-1]
