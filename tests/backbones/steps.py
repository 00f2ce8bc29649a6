"""Steps that the tests of all libraries' backbones share."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from conftest import FAMILIES, make_batch, make_cfg

spec = importlib.util.spec_from_file_location("export", Path(__file__).parents[2] / "tools" / "export.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
SIZES = [(64, 96), (96, 64)]  # the first size is the size of the trace
# Scores of untrained dense detectors are low.
SCORES = {"MODEL.RETINANET.SCORE_THRESH_TEST": 0.001, "MODEL.FCOS.SCORE_THRESH_TEST": 0.001}


def backbone_keys(library, name, family="faster_rcnn", **node):
    """Return the keys of a tiny detector on a model of a library ("TORCHVISION" or "TIMM"), trained from scratch."""
    architecture, keys = FAMILIES[family]
    node = {"NAME": name, "NORM": "BN", "TOP_BLOCK": "LastLevelP6P7" if "retinanet" in str(keys) else "", **node}
    return {
        "MODEL.META_ARCHITECTURE": architecture,
        **keys,
        **SCORES,
        "MODEL.BACKBONE.NAME": f"build_{library.lower()}_fpn_backbone",
        **{f"MODEL.{library}.{key}": value for key, value in node.items()},
    }


def backbone_cfg(library, name, family="faster_rcnn", changes={}, **node):
    return make_cfg({**backbone_keys(library, name, family, **node), **changes})


def save_with_statistics(classifier, path):
    """Save the weights of a classifier, and give its BatchNorm layers random statistics first, in place."""
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    torch.save(classifier.state_dict(), path)


def build_shapes(cfg):
    """Build a detector without memory or computation, to look at its parts."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def without_gradient(model, batch=None):
    """Train a step. Return the names of the trainable parameters that have no gradient, or one that is not finite."""
    with EventStorage():
        losses = model.train()(make_batch() if batch is None else batch)
    sum(losses.values()).backward()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    return [name for name, parameter in trained if parameter.grad is None or not parameter.grad.isfinite().all()]


def assert_reloads(cfg, model, tmp_path):
    """Compare the detections of a detector with those of a new detector that loads its weights from a file."""
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = build_model(cfg).eval()
    again.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    boxes, scores, _ = detect(model, image_of(SIZES[0]))
    boxes_again, scores_again, _ = detect(again, image_of(SIZES[0]))
    assert len(boxes) > 5 and np.array_equal(boxes, boxes_again) and np.array_equal(scores, scores_again)


def assert_exports(model, tmp_path, sizes=SIZES):
    """Compare the scores of a detector with those of its ONNX export, in a runtime that knows no torch."""
    tool.export(model, tmp_path / "student.onnx", *sizes[0])
    session = open_onnx(tmp_path / "student.onnx")
    for size in sizes:
        image = image_of(size)
        boxes, scores, classes = session.run(None, {"image": image.numpy()})
        _, expected, _ = detect(model, image)
        # Rounding decides which of two boxes with similar scores suppresses the other, so the boxes are not compared.
        assert boxes.shape == (len(expected), 4) and len(expected) > 5
        np.testing.assert_allclose(np.sort(scores), np.sort(expected), rtol=1e-3, atol=1e-5)


def assert_pyramid_exports(model, tmp_path, sizes=SIZES):
    """Compare the pyramid with that of its ONNX export. This is the part of a detector that depends on the backbone."""
    path, backbone = tmp_path / "pyramid.onnx", model.eval().backbone
    names = list(backbone.output_shape())
    axes = {name: {2: f"{name}_height", 3: f"{name}_width"} for name in ("image", *names)}
    options = {"opset_version": tool.OPSET, "input_names": ["image"], "output_names": names, "dynamo": False}
    torch.onnx.export(backbone, (image_of(sizes[0])[None],), str(path), dynamic_axes=axes, **options)
    session = open_onnx(path)
    for size in sizes:
        image = image_of(size)[None] / 255
        with torch.no_grad():
            expected = backbone(image)
        for name, found in zip(names, session.run(None, {"image": image.numpy()})):
            np.testing.assert_allclose(found, expected[name].numpy(), rtol=1e-3, atol=1e-4)


def open_onnx(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def detect(model, image):
    with torch.no_grad():
        found = model.eval()([{"image": image}])[0]["instances"]
    return found.pred_boxes.tensor.numpy(), found.scores.numpy(), found.pred_classes.numpy()


def image_of(size):
    return torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0)).float()
