"""Test that timm's models work as backbones, with Detectron2's FPN or, for a vision transformer, a simple pyramid."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import FPN
from torch import nn

timm = pytest.importorskip("timm")

from steps import (
    SIZES,
    assert_exports,
    assert_pyramid_exports,
    assert_reloads,
    backbone_cfg,
    backbone_keys,
    build_shapes,
    save_with_statistics,
    without_gradient,
)

from gdetkd.backbones import load_pretrained
from gdetkd.backbones.pyramid import SimplePyramid
from gdetkd.engine.config_rules import check_values
from gdetkd.errors import GDetKDError

LEVELS = ["res2", "res3", "res4", "res5"]
TRANSFORMER = "test_vit"  # timm's ViT for tests: 6 blocks of 64 channels, patches of 16 pixels
# By model: the family to test it in, and its channels at strides 4 to 32.
MODELS = {
    "mobilenetv4_conv_small": ("faster_rcnn", (32, 64, 96, 960)),
    "tf_efficientnet_lite0": ("retinanet", (24, 40, 112, 320)),
}


def timm_cfg(name, family="faster_rcnn", changes={}, **node):
    return backbone_cfg("TIMM", name, family, changes, **node)


@pytest.mark.parametrize("name", MODELS)
def test_features_a_step_a_reload_and_an_export(name, tmp_path):
    family, channels = MODELS[name]
    original = timm.create_model(name).eval()
    save_with_statistics(original, tmp_path / "weights.pth")
    cfg = timm_cfg(name, family, NORM="FrozenBN", WEIGHTS=str(tmp_path / "weights.pth"))
    check_values(cfg)
    model = build_model(cfg).eval()
    load_pretrained(model)
    bottom_up, image = model.backbone.bottom_up, torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = original.forward_intermediates(image, intermediates_only=True)[1:]
        found = bottom_up(image)
    levels = LEVELS if family == "faster_rcnn" else LEVELS[1:]
    assert list(found) == levels and isinstance(model.backbone, FPN)
    for level, number, other in list(zip(LEVELS, channels, expected))[-len(levels) :]:
        assert bottom_up.output_shape()[level].channels == number
        torch.testing.assert_close(found[level], other, rtol=1e-3, atol=1e-3)
    assert without_gradient(model) == []
    assert_reloads(cfg, model, tmp_path)
    assert_pyramid_exports(model, tmp_path)


@pytest.mark.parametrize("family, norm", [("faster_rcnn", "LN"), ("retinanet", "")])
def test_a_transformer_gets_a_simple_pyramid(family, norm, tmp_path):
    cfg = timm_cfg(TRANSFORMER, family, {"MODEL.FPN.NORM": norm, "MODEL.FPN.OUT_CHANNELS": 16})
    check_values(cfg)
    model = build_model(cfg)
    assert isinstance(model.backbone, SimplePyramid) and model.backbone.size_divisibility == 32
    shapes, maps = model.backbone.output_shape(), model.backbone(torch.randn(1, 3, 64, 96))
    assert list(shapes) == [f"p{level}" for level in (range(2, 6) if family == "faster_rcnn" else range(3, 8))]
    for level, shape in shapes.items():
        assert shape.stride == 2 ** int(level[1])
        # Above stride 32 the maps of this image are smaller than a pixel, and convolutions round up.
        assert maps[level].shape == (1, 16, -(-64 // shape.stride), -(-96 // shape.stride))
    assert without_gradient(model) == []
    assert_reloads(cfg, model, tmp_path)


def test_the_export_of_a_transformer_takes_all_sizes(tmp_path):
    """160 pixels is the size of its position embedding. Smaller and larger images interpolate it."""
    model = build_model(timm_cfg(TRANSFORMER, changes={"MODEL.FPN.NORM": "LN"}))
    assert_exports(model, tmp_path, [SIZES[0], (160, 160), (96, 224)])


def test_the_levels_of_a_simple_pyramid_have_vitdets_layers():
    backbone = build_shapes(timm_cfg(TRANSFORMER, changes={"MODEL.FPN.NORM": "LN"})).backbone
    found = {name: [type(layer).__name__ for layer in level] for name, level in backbone.levels.items()}
    last = ["Conv2d", "LayerNorm2d", "Conv2d", "LayerNorm2d"]
    assert found == {
        "p2": ["ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d", *last],
        "p3": ["ConvTranspose2d", *last],
        "p4": last,
        "p5": ["MaxPool2d", *last],
    }
    widths = [
        [layer.out_channels for layer in level if hasattr(layer, "out_channels")] for level in backbone.levels.values()
    ]
    assert widths == [[32, 16, 8, 8], [32, 8, 8], [8, 8], [8, 8]]


def test_tensors_have_timms_names():
    prefix = "backbone.bottom_up.model."
    names = [name for name in build_shapes(timm_cfg("test_efficientnet")).state_dict() if name.startswith(prefix)]
    original = timm.create_model("test_efficientnet").state_dict()
    head = ("classifier", "conv_head", "bn2")
    assert [name[len(prefix) :] for name in names] == [name for name in original if not name.startswith(head)]


@pytest.mark.parametrize(
    "student, teacher, family",
    [("test_efficientnet", TRANSFORMER, "faster_rcnn"), (TRANSFORMER, "test_efficientnet", "retinanet")],
)
def test_pairs_learn(pair_cfg, student, teacher, family):
    keys = [backbone_keys("TIMM", name, family) for name in (student, teacher)]
    del keys[0]["MODEL.META_ARCHITECTURE"]  # it stands under DISTILL
    assert without_gradient(build_model(pair_cfg(f"{family}-{family}", *keys))) == []


@pytest.mark.parametrize(
    "name, freeze_at, frozen",
    [
        ("test_efficientnet", 1, {"conv_stem", "blocks.0"}),
        ("test_efficientnet", 2, {"conv_stem", "blocks.0", "blocks.1"}),
        ("test_convnext", 1, {"stem"}),
        (TRANSFORMER, 2, {"cls_token", "pos_embed", "patch_embed"}),
        (TRANSFORMER, 4, {"cls_token", "pos_embed", "patch_embed", *(f"blocks.{index}" for index in range(6))}),
    ],
)
def test_freeze_at(name, freeze_at, frozen):
    model = build_shapes(timm_cfg(name, changes={"MODEL.BACKBONE.FREEZE_AT": freeze_at})).backbone.bottom_up.model
    # A block is a numbered part of `blocks`, or a part of the model by its name.
    part = lambda name: ".".join(name.split(".")[: 1 + name.startswith("blocks.")])  # noqa: E731
    found = {part(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    learned = {part(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found == frozen and not found & learned
    norms = {part(name) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert not norms & {*frozen, "bn1"}


@pytest.mark.parametrize(
    "norm, kind", [("BN", "BatchNormAct2d"), ("FrozenBN", "FrozenBatchNormAct2d"), ("SyncBN", "SyncBatchNormAct")]
)
def test_norm_keeps_the_activation(norm, kind):
    bottom_up = build_shapes(timm_cfg("test_efficientnet", NORM=norm)).backbone.bottom_up
    assert {type(module).__name__ for module in bottom_up.modules() if hasattr(module, "running_mean")} == {kind}
    assert type(bottom_up.model.bn1.act).__name__ == type(timm.create_model("test_efficientnet").bn1.act).__name__


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_frozen_norms_equal_timms_and_keep_half_precision(name):
    """timm's EfficientNets have activations in their norms, and its ResNets have plain BatchNorm layers."""
    torch.manual_seed(0)
    original = timm.create_model(name).eval()
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    state, image = original.state_dict(), torch.randn(1, 3, 64, 96)
    bottom_up = build_model(timm_cfg(name, NORM="FrozenBN")).backbone.bottom_up.eval()
    own = bottom_up.model.state_dict()
    bottom_up.model.load_state_dict({key: state[key] for key in own})
    expected = original.forward_intermediates(image, intermediates_only=True)[-4:]
    for found, wanted in zip(bottom_up(image).values(), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert {found.dtype for found in bottom_up(image).values()} == {torch.bfloat16}


def test_fusions_into_levels_that_are_not_read_are_frozen():
    """HRNet fuses all levels into all others. RetinaNet reads no level of stride 4."""
    model = build_model(timm_cfg("hrnet_w18_small", "retinanet"))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and all("fuse_layers.0" in name or "incre_modules.0" in name for name in frozen)
    assert without_gradient(model) == []


@pytest.mark.parametrize(
    "name, mean", [("vit_tiny_patch16_224", 127.5), ("mobilenetv4_conv_small.e2400_r224_in1k", 123.675)]
)
def test_the_weights_of_a_name_state_their_images(name, mean):
    images = build_shapes(timm_cfg(name)).backbone.bottom_up.preprocessing
    assert images.input_format == "RGB" and images.mean[0] == mean


@pytest.mark.parametrize(
    "name, message",
    [
        ("mobilenet_v4", "MODEL.TIMM.NAME is 'mobilenet_v4', which is no model .*mean mobile"),
        ("hf-hub:someone/model", "which is no model of the library"),
        ("vit_small_patch14_dinov2", "feature maps of stride 14.*powers of two"),
        ("convnext_tiny_in22k_of_nobody", "which is no model"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(name, message):
    with pytest.raises(GDetKDError, match=message):
        build_shapes(timm_cfg(name))


def test_a_level_that_the_model_lacks_is_named():
    with pytest.raises(GDetKDError, match=r"'test_convnext' has no feature map res1, .*are res2 \(stride 4\)"):
        build_shapes(timm_cfg("test_convnext", changes={"MODEL.FPN.IN_FEATURES": ["res1", *LEVELS]}))


def test_a_model_with_a_map_of_an_odd_stride_is_refused_in_words():
    with pytest.raises(GDetKDError, match="'mobilevitv2_050' has no feature map"):
        build_shapes(timm_cfg("mobilevitv2_050"))


def test_a_missing_or_old_timm_is_named(monkeypatch):
    with monkeypatch.context() as old:
        old.setattr(timm, "__version__", "1.0.9")
        with pytest.raises(GDetKDError, match="timm is version 1.0.9, but must be 1.0.22"):
            build_shapes(timm_cfg("test_efficientnet"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GDetKDError, match="timm is not installed. Run: pip install timm"):
        build_shapes(timm_cfg("test_efficientnet"))
