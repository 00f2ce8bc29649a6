"""Test the labels of ONNX models: an exported student, and models whose boxes are known."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import Scene

from conftest import make_cfg, settle_batch_norm
from gdetkd.engine import build_plain_student
from gdetkd.errors import GDetKDError
from gdetkd.insight.probe import read_at_test_size
from gdetkd.labelling.images import ImageFile
from gdetkd.labelling.onnx_source import TRIED, OnnxModel, OnnxSource
from gdetkd.labelling.run import Options, label_images
from programs import ROOT, run_program

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402  after the import may be skipped

NAMES = ("class0", "class1", "class2")
BOXES = np.array([[8, 16, 24, 40], [0, 0, 8, 8], [4, 4, 12, 20]], np.float32)
# Red, green and blue of the image.
COLOR = (51, 102, 153)


@pytest.fixture
def write_model(tmp_path):
    """Return a function that writes a model. Its three scores are the mean values of the three channels."""

    def make(shape=(3, "height", "width"), dtype=TensorProto.FLOAT, factor=1 / 255, boxes=BOXES, classes=(0, 1, 2),
             names=("boxes", "scores", "classes"), inputs=("image",)):  # fmt: skip
        batch = len(shape) == 4
        boxes, classes = np.asarray(boxes, np.float32), np.array(classes)
        values = {"all_boxes": boxes[None] if batch else boxes, "ids": classes[None] if batch else classes}
        values["factor"] = np.float32(factor)
        nodes = [
            helper.make_node("Cast", [inputs[0]], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels"], ["means"], axes=[-2, -1], keepdims=0),
            helper.make_node("Mul", ["means", "factor"], [names[1]]),
            helper.make_node("Identity", ["all_boxes"], [names[0]]),
            helper.make_node("Identity", ["ids"], [names[2]]),
        ]
        graph = helper.make_graph(
            nodes,
            "model",
            [helper.make_tensor_value_info(name, dtype, shape) for name in inputs],
            [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, (1, 1, TensorProto.INT64))],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.save(model, tmp_path / "model.onnx")
        return str(tmp_path / "model.onnx")

    return make


def detect(tmp_path, file, image_size=(80, 64), **options):
    """Return boxes, scores and classes of an image of one colour, of a width and height in pixels."""
    path = tmp_path / "image.png"
    Image.new("RGB", image_size, COLOR).save(path)
    source = OnnxSource(make_cfg({}), OnnxModel(file, **options), NAMES)
    [(_, found)] = source.detect([ImageFile("image.png", str(path), *image_size, path.stat().st_size, 1)])
    return found.boxes.tolist(), found.scores.tolist(), found.classes.tolist()


@pytest.mark.parametrize("channels, expected", [("RGB", [0.2, 0.4, 0.6]), ("BGR", [0.6, 0.4, 0.2]), ("", None)])
def test_channels_are_in_the_order_of_the_model(tmp_path, write_model, channels, expected):
    boxes, scores, classes = detect(tmp_path, write_model(), input_format=channels)
    assert scores == pytest.approx(expected or [0.6, 0.4, 0.2])  # INPUT.FORMAT is BGR
    assert boxes == BOXES.tolist() and classes == [0, 1, 2]


def test_a_model_of_any_size_sees_the_test_size_of_the_config(tmp_path, write_model):
    boxes, _, _ = detect(tmp_path, write_model(), image_size=(160, 128))  # INPUT.MIN_SIZE_TEST is 64
    assert boxes == (BOXES * 2).tolist()


@pytest.mark.parametrize("shape", [(3, "height", "width"), (1, 3, 32, 40), ("batch", 3, "height", "width")])
def test_boxes_are_scaled_back_from_the_size_of_the_input(tmp_path, write_model, shape):
    options = {} if 32 in shape else {"size": (32, 40)}
    boxes, scores, classes = detect(tmp_path, write_model(shape), image_size=(80, 128), **options)
    assert boxes == (BOXES * [2, 4, 2, 4]).tolist()
    assert scores == pytest.approx([0.6, 0.4, 0.2]) and classes == [0, 1, 2]


def test_pixels_are_scaled_and_may_be_bytes(tmp_path, write_model):
    assert detect(tmp_path, write_model(factor=1), scale=1 / 255)[1] == pytest.approx([0.6, 0.4, 0.2], abs=1e-4)
    assert detect(tmp_path, write_model(dtype=TensorProto.UINT8))[1] == pytest.approx([0.6, 0.4, 0.2])
    with pytest.raises(GDetKDError, match="takes bytes from 0 to 255, so leave out --onnx-scale"):
        detect(tmp_path, write_model(dtype=TensorProto.UINT8), scale=0.5)


def test_outputs_of_other_names(tmp_path, write_model):
    assert detect(tmp_path, write_model(names=("Boxes", "scores", "labels")))[2] == [0, 1, 2]
    file = write_model(names=("a", "b", "c"))
    assert detect(tmp_path, file, outputs=("a", "b", "c"))[2] == [0, 1, 2]
    with pytest.raises(GDetKDError, match="has the outputs a, b, c, of which none is called boxes"):
        detect(tmp_path, file)
    with pytest.raises(GDetKDError, match="--onnx-outputs is a,b,d. .* has a, b, c"):
        detect(tmp_path, file, outputs=("a", "b", "d"))


def test_rows_that_fill_up_the_output_are_left_out(tmp_path, write_model):
    Image.new("RGB", (80, 64), (0, 0, 51)).save(tmp_path / "blue.png")
    source = OnnxSource(make_cfg({}), OnnxModel(write_model(classes=(0, -1, -1))), NAMES)
    [(_, found)] = source.detect([ImageFile("blue.png", str(tmp_path / "blue.png"), 80, 64, 1, 1)])
    assert found.classes.tolist() == [0]


def test_relative_boxes_are_found_although_the_first_images_have_none(tmp_path, write_model):
    source = OnnxSource(make_cfg({}), OnnxModel(write_model(boxes=BOXES / 40)), NAMES)
    Image.new("RGB", (80, 64), COLOR).save(tmp_path / "image.png")
    image = ImageFile("image.png", str(tmp_path / "image.png"), 80, 64, 1, 1)
    outputs, empty = source._session.run, [np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)]
    rounds = iter(range(TRIED + 1))

    class Session:
        def run(self, names, inputs):
            return empty if next(rounds) < TRIED else outputs(names, inputs)

    source._session = Session()
    with pytest.raises(GDetKDError, match="its boxes seem relative"):
        list(source.detect([image] * (TRIED + 1)))


def test_models_that_are_refused(tmp_path, write_model):
    cases = [
        ({"factor": 1}, {}, "returns scores from 51 to 153, not from 0 to 1"),
        ({"classes": (1, 2, 3)}, {}, "returns classes from 1 to 3, but has 3 class names"),
        ({"boxes": BOXES * np.nan}, {}, "returns boxes that are not finite"),
        ({"boxes": BOXES / 40}, {}, "its boxes seem relative"),
        ({"shape": (2, 3, 32, 40)}, {}, "has the inputs image"),
        ({"boxes": BOXES[:2]}, {}, r"returns boxes \(2, 4\), scores \(3,\)"),
        ({"inputs": ("image", "size")}, {}, "has the inputs image .*It must have one input"),
        ({"shape": (4, "height", "width")}, {}, "has the inputs image"),
        ({"shape": (3, 32, 40)}, {"size": (64, 64)}, "takes images of height 32 and width 40 only"),
    ]
    for changes, options, message in cases:
        with pytest.raises(GDetKDError, match=message):
            detect(tmp_path, write_model(**changes), **options)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    for name in ("broken.onnx", "none.onnx"):
        with pytest.raises(GDetKDError, match="cannot be read .* Name an ONNX model"):
            detect(tmp_path, str(tmp_path / name))


def test_a_missing_package_is_named(tmp_path, write_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(GDetKDError, match="pip install onnxruntime"):
        detect(tmp_path, write_model())


def test_classes_are_found_by_name(tmp_path, write_model):
    scene = Scene(tmp_path)
    model = OnnxModel(write_model(), classes=("class2", "other", "class0"))
    label_images(make_cfg(scene.keys), Options(scene.output, str(scene.images), min_score=0.3, onnx=model))
    written = scene.read()
    first = [item for item in written["annotations"] if item["image_id"] == 1]
    assert {item["category_id"] for item in first} == {1, 3} and len(first) == 2
    described = written["info"]["gdetkd_labels"]
    assert described["source"] == "onnx" and described["teacher"]["file"].endswith("model.onnx")
    with pytest.raises(GDetKDError, match="no name in common"):
        wrong = OnnxModel(write_model(), classes=("a", "b", "c"))
        label_images(make_cfg(scene.keys), Options(scene.output, str(scene.images), min_score=0.3, onnx=wrong))


def test_an_exported_student_labels_as_in_detectron2(distill_cfg, tmp_path):
    scene = Scene(tmp_path)
    cfg = distill_cfg({**scene.keys, "INPUT.MIN_SIZE_TEST": 96})
    torch.manual_seed(0)
    student = build_plain_student(cfg)
    settle_batch_norm(student)
    torch.save({"model": student.state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "distill.yaml").write_text(cfg.dump())
    common = ["--config-file", tmp_path / "distill.yaml"]
    files = ["--weights", tmp_path / "model_final.pth", "--output", tmp_path / "student.onnx"]
    exported = run_program(ROOT / "tools" / "export.py", *common, *files, "--image-size", 96, 96)
    assert exported.returncode == 0, exported.stderr
    files = ["--images", scene.images, "--output", scene.output, "--onnx", tmp_path / "student.onnx"]
    result = run_program(ROOT / "tools" / "label.py", *common, *files, "--min-score", 0.1)
    assert result.returncode == 0, result.stderr
    written = json.loads(scene.output.read_text())
    for image in written["images"]:
        with torch.no_grad():
            [expected] = student.eval()([read_at_test_size(str(scene.images / image["file_name"]), cfg)])
        scores = expected["instances"].scores
        own = [item for item in written["annotations"] if item["image_id"] == image["id"]]
        assert len(own) == int((scores >= 0.05).sum()) > 5
        best = expected["instances"].pred_boxes.tensor[scores.argmax()].tolist()
        x, y, width, height = own[0]["bbox"]
        assert (x, y, x + width, y + height) == pytest.approx(best, abs=0.1)
        assert own[0]["score"] == pytest.approx(float(scores.max()), abs=1e-3)
