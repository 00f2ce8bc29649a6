"""The faster copy of the teacher's backbone, and its dtype."""

from pathlib import Path

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torchvision.ops import FrozenBatchNorm2d as TorchvisionNorm

from conftest import WIDER, make_batch, make_cfg, settle_batch_norm
from gdetkd.errors import GDetKDError
from gdetkd.inference import fold_norms, for_inference, parse_dtype, settle_statistics
from gdetkd.structures import Regions
from gdetkd.teacher import FrozenTeacher


def backbone(changes={}):
    model = build_model(make_cfg({**WIDER, **changes})).double()
    settle_batch_norm(model)
    for module in model.modules():  # random statistics show a norm that is folded wrongly
        if isinstance(module, (torch.nn.BatchNorm2d, FrozenBatchNorm2d)):
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
            torch.nn.init.uniform_(module.bias, -1.0, 1.0)
            torch.nn.init.uniform_(module.running_mean, -1.0, 1.0)
    return model.backbone.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"MODEL.RESNETS.NORM": "FrozenBN"},
        {"MODEL.FPN.NORM": "BN"},
        {"MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS": 32, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
        | {"MODEL.RESNETS.WIDTH_PER_GROUP": 32},
    ],
)
@torch.no_grad()
def test_same_values_in_double_precision(changes):
    model, images = backbone(changes), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, found = model(images), for_inference(model, torch.float64)(images)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_fixed_norm_of_a_resnet_is_folded():
    model = backbone({"MODEL.FPN.NORM": "BN"})
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert fold_norms(model) == norms > 50
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


@pytest.fixture
def tame_cfg(distill_cfg, tmp_path):
    """Make a config whose untrained teacher has no nearly constant channels, which would magnify rounding."""

    def make(changes={}):
        cfg = distill_cfg(changes)
        weights = torch.load(tmp_path / "teacher.pth", weights_only=True)
        for name, tensor in weights["model"].items():
            if name.endswith("running_var"):
                tensor.clamp_(min=0.1)
        torch.save(weights, tmp_path / "teacher.pth")
        return cfg

    return make


def look(teacher):
    regions = Regions([Boxes(torch.tensor([[4.0, 4, 40, 40]])), Boxes(torch.tensor([[8.0, 2, 30, 44], [0, 0, 9, 9]]))])
    return teacher.look(make_batch(), regions, {"embeddings", "logits", "deltas"})


def relative_difference(found, expected):
    return ((found.float() - expected).abs().mean() / expected.abs().mean()).item()


def test_a_teacher_looks_through_the_copy_and_sees_the_same(tame_cfg):
    teacher = FrozenTeacher(tame_cfg())
    quick = look(teacher)
    assert teacher.adapter.backbone is not teacher.model.backbone
    teacher.adapter.backbone = teacher.model.backbone
    plain = look(teacher)
    for field in ("pooled", "embeddings", "logits", "deltas"):
        assert relative_difference(getattr(quick, field), getattr(plain, field)) < 1e-4


def test_half_precision_is_close(distill_cfg):
    """The teacher is trained, because an untrained detector of fifty layers magnifies any rounding."""
    folder = Path(__file__).parents[1] / "configs" / "quickstart"
    keys = {"DISTILL.TEACHER.CONFIG_FILE": str(folder / "teacher-FasterRCNN.yaml")}
    keys["DISTILL.TEACHER.WEIGHTS"] = str(folder / "teacher-FasterRCNN.pth")
    half, full = (
        FrozenTeacher(distill_cfg({**keys, "DISTILL.TEACHER.DTYPE": "bfloat16"})),
        FrozenTeacher(distill_cfg(keys)),
    )
    assert {parameter.dtype for parameter in half.adapter.backbone.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    found, expected = look(half), look(full)
    for field in ("pooled", "embeddings", "logits"):
        assert 1e-5 < relative_difference(getattr(found, field), getattr(expected, field)) < 0.05


@pytest.mark.parametrize("norm", [TorchvisionNorm, FrozenBatchNorm2d, torch.nn.BatchNorm2d])
@torch.no_grad()
def test_a_small_variance_does_not_become_zero_in_half_precision(norm):
    """A norm that is not folded keeps its statistics, and half precision has no number between 0 and 3e-8."""
    module = torch.nn.Sequential(norm(2, eps=0.0)).eval()
    module[0].running_var.copy_(torch.tensor([1e-9, 0.25]))
    module[0].running_mean.copy_(torch.tensor([1e-4, -1.0]))
    module[0].weight.copy_(torch.tensor([1e-2, 3.0]))
    module[0].bias.copy_(torch.tensor([0.5, -0.5]))
    image = torch.tensor([[1e-3, 2.0], [2e-4, -1.0]]).half().view(2, 2, 1, 1)
    found = for_inference(module, torch.float16)(image)
    torch.testing.assert_close(found.float(), module(image.float()), rtol=1e-2, atol=1e-3)
    exact = module.double()(image.double())
    settle_statistics(module)
    torch.testing.assert_close(module(image.double()), exact)


def test_dtypes():
    assert parse_dtype("", "cpu", amp=False) == torch.float32
    assert parse_dtype("", "cuda", amp=True) == torch.float16
    assert parse_dtype("", "cpu", amp=True) == torch.float32  # a run of a GPU, viewed on a CPU
    assert parse_dtype("bfloat16", "cpu", amp=False) == torch.bfloat16
    with pytest.raises(GDetKDError, match="DISTILL.TEACHER.DTYPE is 'half'"):
        parse_dtype("half", "cpu", amp=False)
    with pytest.raises(GDetKDError, match="float16 needs a CUDA device"):
        parse_dtype("float16", "cpu", amp=False)
