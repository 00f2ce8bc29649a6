"""Test that torchvision's classifiers work as backbones of all families, with the levels of their architectures."""

from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from steps import (
    assert_exports,
    assert_pyramid_exports,
    assert_reloads,
    backbone_cfg,
    backbone_keys,
    build_shapes,
    save_with_statistics,
    without_gradient,
)
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from gdetkd.backbones import add_backbone_config, load_pretrained
from gdetkd.backbones.blocks import frozen_blocks, probe_blocks
from gdetkd.config_file import load_config
from gdetkd.engine.config_rules import check_values
from gdetkd.engine.preprocessing import other_than_pretrained
from gdetkd.errors import GDetKDError

# By model: the family to test it in, its channels at strides 4 to 32, and the nodes of torchvision that compute them.
MODELS = {
    "mobilenet_v2": ("faster_rcnn", (24, 32, 96, 1280), ("features.3", "features.6", "features.13", "features.18")),
    "mobilenet_v3_large": (
        "retinanet",
        (24, 40, 112, 960),
        ("features.3", "features.6", "features.12", "features.16"),
    ),
    "efficientnet_b0": ("faster_rcnn", (24, 40, 112, 1280), ("features.2", "features.3", "features.5", "features.8")),
    "convnext_tiny": ("retinanet", (96, 192, 384, 768), ("features.2.0", "features.4.0", "features.6.0", "features.7")),
    "regnet_y_400mf": ("fcos", (48, 104, 208, 440), tuple(f"trunk_output.block{number}" for number in range(1, 5))),
    "resnet18": ("retinanet", (64, 128, 256, 512), ("layer1", "layer2", "layer3", "layer4")),
}
CONFIGS = Path(__file__).parents[2] / "configs"
LEVELS = ["res2", "res3", "res4", "res5"]
P2 = [f"backbone.fpn_{part}2.{kind}" for part in ("lateral", "output") for kind in ("weight", "bias")]
SMALL = "mobilenet_v3_small"


def torchvision_cfg(name=SMALL, family="faster_rcnn", changes={}, **node):
    return backbone_cfg("TORCHVISION", name, family, changes, **node)


@pytest.mark.parametrize("name", MODELS)
def test_features_a_step_a_reload_and_an_export(name, tmp_path):
    """The reference of the features is torchvision's own extractor, on nodes that the table names."""
    family, channels, nodes = MODELS[name]
    original = torchvision.models.get_model(name, weights=None).eval()
    save_with_statistics(original, tmp_path / "weights.pth")
    cfg = torchvision_cfg(name, family, NORM="FrozenBN", WEIGHTS=str(tmp_path / "weights.pth"))
    cfg.MODEL.FPN.IN_FEATURES = LEVELS
    check_values(cfg)
    model = build_model(cfg).eval()
    load_pretrained(model)
    bottom_up, image = model.backbone.bottom_up, torch.randn(1, 3, 64, 96)
    shapes = bottom_up.output_shape()
    assert {level: shape.channels for level, shape in shapes.items()} == dict(zip(LEVELS, channels))
    assert [shape.stride for shape in shapes.values()] == [4, 8, 16, 32]
    with torch.no_grad():
        expected = create_feature_extractor(original, dict(zip(nodes, LEVELS)))(image)
        found = bottom_up(image)
    for level in LEVELS:
        torch.testing.assert_close(found[level], expected[level], rtol=1e-4, atol=1e-5)
    # RetinaNet and FCOS do not read p2.
    assert without_gradient(model) == ([] if family == "faster_rcnn" else P2)
    assert_reloads(cfg, model, tmp_path)
    assert_pyramid_exports(model, tmp_path)


def test_the_export_of_a_detector(tmp_path):
    model = build_model(torchvision_cfg("mobilenet_v2"))
    assert without_gradient(model) == []
    assert_exports(model, tmp_path)


def test_tensors_have_torchvisions_names():
    prefix = "backbone.bottom_up."
    names = [name for name in build_shapes(torchvision_cfg()).state_dict() if name.startswith(prefix)]
    original = torchvision.models.get_model(SMALL, weights=None).state_dict()
    assert [name[len(prefix) :] for name in names] == [name for name in original if "classifier" not in name]


@pytest.mark.parametrize(
    "teacher, student",
    [("faster_rcnn", "faster_rcnn"), ("faster_rcnn", "retinanet"), ("retinanet", "fcos"), ("fcos", "faster_rcnn")],
)
def test_pairs_learn(pair_cfg, teacher, student):
    """Student and teacher have such a backbone, of different models."""
    model_keys = {
        role: backbone_keys("TORCHVISION", name, family)
        for role, name, family in (
            ("student", SMALL, student),
            ("teacher", "shufflenet_v2_x0_5", teacher),
        )
    }
    del model_keys["student"]["MODEL.META_ARCHITECTURE"]  # it stands under DISTILL
    model = build_model(pair_cfg(f"{teacher}-{student}", model_keys["student"], model_keys["teacher"]))
    if student == "fcos":  # the boxes of an untrained FCOS have no area
        nn.init.ones_(model.student.head.bbox_pred.bias)
    assert without_gradient(model) == []


# By model: the first child of `features`, or of the model, that FREEZE_AT 0 to 5 trains. "" means none.
FIRST_TRAINED = {
    "mobilenet_v2": ("0", "2", "4", "7", "14", ""),  # the strides 2, 4, 8, 16 and 32 end before these
    "convnext_tiny": ("0", "1", "2", "4", "6", ""),  # the stem has stride 4, and features.2.0 is a norm at stride 4
    "densenet121": ("conv0", "pool0", "transition1", "transition2", "transition3", ""),
    "resnet18": ("conv1", "maxpool", "layer2", "layer3", "layer4", ""),  # as Detectron2's; maxpool learns nothing
}


@pytest.mark.parametrize("name", FIRST_TRAINED)
def test_freeze_at_goes_by_stride(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    blocks, _, _ = probe_blocks(name, model, getattr(model, "features", model))
    blocks = [block for block in blocks if not block.name.startswith(("avgpool", "fc"))]
    names = list(dict.fromkeys(block.name for block in blocks))
    for freeze_at, expected in enumerate(FIRST_TRAINED[name]):
        frozen = frozen_blocks(blocks, freeze_at, 2)
        assert names[: len(frozen)] == frozen
        first = next(iter(names[len(frozen) :]), "").replace("features.", "").partition(".")[0]
        assert first == expected


def trained_blocks(model):
    return {name.split(".")[1] for name, p in model.backbone.bottom_up.named_parameters() if p.requires_grad}


def test_a_frozen_block_computes_the_same_in_training():
    """BatchNorm and dropped paths would change it."""
    model = build_model(torchvision_cfg("efficientnet_b0", changes={"MODEL.BACKBONE.FREEZE_AT": 3}))
    bottom_up, image = model.backbone.bottom_up, torch.randn(2, 3, 64, 64)
    before = {name: tensor.clone() for name, tensor in bottom_up.state_dict().items()}
    fixed, trained = bottom_up.eval()(image), bottom_up.train()(image)
    assert torch.equal(fixed["res3"], trained["res3"]) and not torch.equal(fixed["res4"], trained["res4"])
    assert not trained["res3"].requires_grad and trained["res4"].requires_grad
    changed = {
        name.split(".")[1] for name, tensor in bottom_up.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"4", "5", "6", "7", "8"}


@pytest.mark.parametrize(
    "norm, kind", [("BN", nn.BatchNorm2d), ("FrozenBN", FrozenBatchNorm2d), ("SyncBN", nn.SyncBatchNorm)]
)
def test_norm(norm, kind):
    bottom_up = build_shapes(torchvision_cfg(NORM=norm)).backbone.bottom_up
    kinds = {type(module) for module in bottom_up.modules() if hasattr(module, "running_mean")}
    assert kinds == {kind}
    eps = {module.eps for module in bottom_up.modules() if hasattr(module, "running_mean")}
    assert eps == {0.001}  # MobileNetV3's


def test_fewer_levels_leave_out_the_later_blocks():
    keys = {
        "MODEL.FPN.IN_FEATURES": ["res3", "res4"],
        "MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32]],
    }
    cfg = torchvision_cfg(changes=keys, TOP_BLOCK="LastLevelMaxPool")
    check_values(cfg)
    model = build_model(cfg)
    assert without_gradient(model) == []
    assert {name: shape.stride for name, shape in model.backbone.output_shape().items()} == {
        "p3": 8,
        "p4": 16,
        "p5": 32,
    }
    assert trained_blocks(model) == {str(number) for number in range(9)} and model.backbone.size_divisibility == 16


def test_dense_levels_are_made_from_p5():
    model = build_model(torchvision_cfg(family="retinanet"))
    images = ImageList.from_tensors([torch.randn(3, 60, 90)], model.backbone.size_divisibility)
    maps = model.backbone(images.tensor)
    assert {name: tuple(level.shape[1:]) for name, level in maps.items()} == {
        "p3": (8, 8, 12), "p4": (8, 4, 6), "p5": (8, 2, 3), "p6": (8, 1, 2), "p7": (8, 1, 1),
    }  # fmt: skip
    assert torch.equal(maps["p6"], model.backbone.top_block.p6(maps["p5"]))


def test_plain_detectron2_builds_it_after_one_import():
    plain = get_cfg()
    add_backbone_config(plain)
    plain.merge_from_list(["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.FPN.IN_FEATURES", LEVELS[1:]])
    plain.merge_from_list(["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone"])
    plain.merge_from_list(["MODEL.TORCHVISION.TOP_BLOCK", "LastLevelP6P7"])
    assert build_shapes(plain).backbone.bottom_up.model_name == "mobilenet_v2"


def test_the_config_for_cards_has_the_images_that_its_weights_expect():
    cfg = load_config(str(CONFIGS / "cards" / "mobilenetv2-faster_rcnn.yaml"), ["MODEL.DEVICE", "cpu"])
    check_values(cfg)
    student = build_model(cfg)
    assert other_than_pretrained(student, cfg.INPUT.FORMAT) == ""
    assert sum(parameter.numel() for parameter in student.parameters()) == pytest.approx(2.98e6, rel=0.005)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"MODEL.TORCHVISION.NAME": "mobilenetv2"}, "NAME is 'mobilenetv2', .*mean mobilenet_v2"),
        ({"MODEL.TORCHVISION.NAME": "squeezenet1_1"}, "'squeezenet1_1' has no feature map res2, .*maps are none"),
        ({"MODEL.TORCHVISION.NAME": "swin_t"}, r"'swin_t' has no feature map res3, res4.* res2 \(stride 4\)"),
        ({"MODEL.TORCHVISION.NAME": "googlenet"}, "'googlenet' changes the image"),
        ({"MODEL.TORCHVISION.NAME": "vit_b_16"}, "'vit_b_16' cannot run on an image of 64 x 96 pixels .*height"),
        ({"MODEL.FPN.IN_FEATURES": ["res5", "res6"]}, r"no feature map res6.*res5 \(stride 32\)"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(GDetKDError, match=message):
        build_shapes(torchvision_cfg(changes=changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"MODEL.TORCHVISION.NORM": "GN"}, "TORCHVISION.NORM is 'GN' and must be 'BN' or 'FrozenBN' or 'SyncBN'"),
        ({"MODEL.TORCHVISION.TOP_BLOCK": "p6"}, "TOP_BLOCK is 'p6' and must be '' or 'LastLevelMaxPool'"),
        ({"MODEL.FPN.IN_FEATURES": []}, r"IN_FEATURES is \[\] and must name consecutive levels"),
        ({"MODEL.FPN.IN_FEATURES": ["res2", "res4"]}, "must name consecutive levels"),
        ({"MODEL.FPN.IN_FEATURES": ["p2", "p3"]}, "must name consecutive levels"),
        ({"MODEL.PIXEL_MEAN": [100.0]}, "PIXEL_MEAN has 1 values"),
    ],
)
def test_invalid_values_are_named_before_and_by_the_builder(changes, message):
    cfg = torchvision_cfg(changes=changes)
    with pytest.raises(GDetKDError, match=message):
        check_values(cfg)
    with pytest.raises(GDetKDError, match=message):
        build_model(cfg)


def test_levels_that_the_top_block_does_not_make_are_named():
    with pytest.raises(GDetKDError, match="RETINANET.IN_FEATURES names p7, but the pyramid has only p3, p4, p5, p6"):
        check_values(torchvision_cfg(family="retinanet", TOP_BLOCK="LastLevelMaxPool"))
