"""Test that files of other programs become files for MODEL.TIMM.WEIGHTS that hold the same tensors."""

import importlib.util
from pathlib import Path

import pytest
import torch

timm = pytest.importorskip("timm")
from safetensors.torch import save_file

from programs import run_program

TOOL = Path(__file__).parents[2] / "tools" / "convert_timm.py"
# A block of EfficientNet-PyTorch with and without the widening convolution; its list of parts is in their order.
WIDENING = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
PARTS_OF_A_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("convert_timm", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lite0_names():
    """Return the names of the tensors in the published file of EfficientNet-Lite0, in their order: 16 blocks."""
    modules = ["_conv_stem", "_bn0"]
    for block in range(16):
        modules += [f"_blocks.{block}.{part}" for part in WIDENING[2 if block == 0 else 0 :]]
    modules += ["_conv_head", "_bn1"]
    names = []
    for module in modules:
        names += [f"{module}.{part}" for part in (PARTS_OF_A_NORM if "_bn" in module else ("weight",))]
    return [*names, "_fc.weight", "_fc.bias"]


def test_a_file_of_efficientnet_pytorch(tool, tmp_path):
    """Both programs list their tensors in the order of computation, so the tensors agree one by one."""
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(own) == len(lite0_names())
    torch.save(dict(zip(lite0_names(), own.values())), tmp_path / "lite0.pth")
    found = tool.load("tf_efficientnet_lite0", tmp_path / "lite0.pth")
    assert list(found) == list(own) and all(torch.equal(found[name], own[name]) for name in own)


def test_a_file_of_efficientnet_pytorch_does_not_fit_a_model_that_pads_otherwise(tool, tmp_path):
    own = timm.create_model("efficientnet_lite0").state_dict()
    torch.save(dict(zip(lite0_names(), own.values())), tmp_path / "lite0.pth")
    with pytest.raises(SystemExit, match="in another way.*Convert the file for tf_efficientnet_lite0"):
        tool.load("efficientnet_lite0", tmp_path / "lite0.pth")


def test_the_hubs_format_and_the_command(tmp_path):
    weights = timm.create_model("test_efficientnet").state_dict()
    save_file(weights, str(tmp_path / "model.safetensors"))
    files = [tmp_path / "a" / "out.pth", "--input", tmp_path / "model.safetensors"]
    converting = run_program(TOOL, "test_efficientnet", *files)
    assert converting.returncode == 0, converting.stderr
    assert converting.stdout.rstrip().endswith("MB, for MODEL.TIMM.WEIGHTS")
    written = torch.load(tmp_path / "a" / "out.pth", weights_only=True)["model"]
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())


def test_a_file_of_another_model_and_unknown_names_are_refused(tool, tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pth")
    with pytest.raises(SystemExit, match="other.pth lacks .* of test_efficientnet, such as conv_stem.weight"):
        tool.load("test_efficientnet", tmp_path / "other.pth")
    with pytest.raises(SystemExit, match="timm has no model 'mobilenet_v4'"):
        tool.load("mobilenet_v4", None)
