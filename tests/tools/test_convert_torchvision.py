"""Test that a converted torchvision ResNet computes the same features, and that other models keep their names."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from conftest import make_cfg
from gdetkd.backbones import load_pretrained
from gdetkd.trained_with import TORCHVISION, other_settings, trained_with
from programs import run_program

TOOL = Path(__file__).parents[2] / "tools" / "convert_torchvision.py"
ARCHITECTURES = {
    "resnet18": {
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    },
    "resnet50": {
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    },
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_equal_those_of_torchvision(architecture, tmp_path):
    torch.manual_seed(0)
    original = torchvision.models.get_model(architecture, weights=None).eval()
    for module in original.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    torch.save(original.state_dict(), tmp_path / "original.pth")
    converting = run_program(TOOL, architecture, tmp_path / "converted.pth", "--input", tmp_path / "original.pth")
    assert converting.returncode == 0, converting.stderr

    cfg = make_cfg(ARCHITECTURES[architecture])
    settings = trained_with(torch.load(tmp_path / "converted.pth")).settings
    cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
    assert [text.split()[0] for text in other_settings(settings, cfg)] == list(TORCHVISION)
    converted = build_model(cfg).eval()
    DetectionCheckpointer(converted).load(str(tmp_path / "converted.pth"))
    image = torch.randn(1, 3, 64, 64)
    features = converted.backbone.bottom_up(image)
    x = original.maxpool(original.relu(original.bn1(original.conv1(image))))
    for index in range(1, 5):
        x = getattr(original, f"layer{index}")(x)
        torch.testing.assert_close(features[f"res{index + 1}"], x, rtol=1e-4, atol=1e-4)


def test_another_file_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    result = run_program(TOOL, "resnet18", tmp_path / "out.pth", "--input", tmp_path / "other.pth")
    assert result.returncode == 1 and "does not hold a torchvision ResNet" in result.stderr
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("architecture, flags", [("mobilenet_v3_small", []), ("resnet18", ["--keep-names"])])
def test_other_models_keep_torchvisions_names(architecture, flags, tmp_path):
    weights = torchvision.models.get_model(architecture, weights=None).state_dict()
    torch.save(weights, tmp_path / "original.pth")
    files = [tmp_path / "out.pth", "--input", tmp_path / "original.pth"]
    converting = run_program(TOOL, architecture, *files, *flags)
    assert converting.returncode == 0, converting.stderr
    assert converting.stdout.rstrip().endswith("for MODEL.TORCHVISION.WEIGHTS")
    cfg = make_cfg({"MODEL.BACKBONE.NAME": "build_torchvision_fpn_backbone", "MODEL.TORCHVISION.NAME": architecture})
    cfg.MODEL.TORCHVISION.WEIGHTS = str(tmp_path / "out.pth")
    detector = build_model(cfg)
    load_pretrained(detector)
    first = next(name for name in weights if name.endswith("weight"))
    assert torch.equal(detector.state_dict()[f"backbone.bottom_up.{first}"], weights[first])


def test_every_tensor_of_the_backbone_is_converted():
    spec = importlib.util.spec_from_file_location("convert_torchvision", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    keys = build_model(make_cfg(ARCHITECTURES["resnet18"])).state_dict()
    backbone = {name for name in keys if name.startswith(tool.PREFIX) and not name.endswith("num_batches_tracked")}
    assert set(tool.convert(torchvision.models.resnet18(weights=None).state_dict())) == backbone
