"""The recipes for COCO, VOC and BDD100K build the published architectures, and the model zoo's weights fit them."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from gdetkd import add_gdetkd_config
from gdetkd.config import plain_config
from gdetkd.trained_with import TrainedWith

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "configs" / "COCO-Detection"
FILES = sorted(RECIPES.glob("*.yaml"))
BACKBONES = {
    "R_18": "resnet18",
    "R_50": "resnet50",
    "R_101": "resnet101",
    "X_101_64x4d": "resnext101_64x4d",
    "X_101": "resnext101_32x8d",
}
LAST_CHANNELS = {"R_18": 512, "R_50": 2048, "R_101": 2048, "X_101": 2048}
# Blocks of each stage of a ResNet (He et al., table 1).
BLOCKS = {"R_50": (3, 4, 6, 3), "R_101": (3, 4, 23, 3), "X_101": (3, 4, 23, 3)}


def load(path):
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


def build_without_weights(cfg):
    """Build a config's detector on the "meta" device, with shapes but without memory."""
    cfg = plain_config(cfg).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def family_and_backbone(path):
    """Return the family and backbone in a file's name: ("faster_rcnn", "R_50") for "teacher-faster_rcnn_R_50"."""
    name = path.stem.split("-")[-1]
    backbone = next(backbone for backbone in BACKBONES if backbone in name)
    return name.split(f"_{backbone}")[0], backbone


def torchvision_count(family, backbone):
    """Return the number of parameters of torchvision's detector with the same architecture and 80 classes."""
    make = partial(resnet_fpn_backbone, backbone_name=BACKBONES[backbone], weights=None, trainable_layers=5)
    make = partial(make, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    with torch.device("meta"):
        if family == "faster_rcnn":
            # Detectron2 has no deltas for background. So it lacks four rows of 1,024 weights and a bias.
            return count(FasterRCNN(make(), num_classes=81)) - 4 * 1025
        if family == "mask_rcnn":
            # Detectron2 has no mask for background either.
            return count(MaskRCNN(make(), num_classes=81)) - 4 * 1025 - 257
        levels = {"returned_layers": [2, 3, 4]}
        if family == "retinanet":
            return count(RetinaNet(make(extra_blocks=LastLevelP6P7(LAST_CHANNELS[backbone], 256), **levels), 80))
        if family == "fcos":
            return count(FCOS(make(extra_blocks=LastLevelP6P7(256, 256), **levels), 80))
    raise AssertionError(f"torchvision has no counterpart of {family}")


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("path", [p for p in FILES if "cascade" not in p.stem.split("-")[-1]], ids=lambda p: p.stem)
def test_parameters_are_those_of_the_published_architecture(path):
    family, backbone = ("faster_rcnn", "R_50") if path.stem.startswith("Base") else family_and_backbone(path)
    family = {"Base-FCOS": "fcos", "Base-RetinaNet": "retinanet"}.get(path.stem, family)
    assert count(build_without_weights(load(path))) == torchvision_count(family, backbone)


def test_numbers_of_parameters_that_docs_state():
    teachers = ("faster_rcnn_R_101", "mask_rcnn_R_50", "cascade_mask_rcnn_R_50")
    names = ["faster_rcnn_R_50_1x", *(f"teacher-{teacher}" for teacher in teachers)]
    millions = {name: count(build_without_weights(load(RECIPES / f"{name}.yaml"))) / 1e6 for name in names}
    assert millions["faster_rcnn_R_50_1x"] == pytest.approx(41.7, abs=0.05)
    assert millions["teacher-faster_rcnn_R_101"] == pytest.approx(60.6, abs=0.05)
    assert millions["teacher-mask_rcnn_R_50"] == pytest.approx(44.3, abs=0.05)
    # A cascade has two more box heads (12544 x 1024, 1024 x 1024) and predictors, and four class-agnostic deltas
    # instead of 320.
    head, cls, box = 12545 * 1024 + 1025 * 1024, 1025 * 81, 1025 * 4
    two_more = 2 * (head + cls + box) - 1025 * (320 - 4)
    assert millions["teacher-cascade_mask_rcnn_R_50"] == pytest.approx(
        millions["teacher-mask_rcnn_R_50"] + two_more / 1e6, abs=1e-6
    )


def resnet_names(blocks):
    norm = ("weight", "bias", "running_mean", "running_var")

    def layer(name):
        return [f"{name}.weight", *(f"{name}.norm.{part}" for part in norm)]

    names = layer("stem.conv1")
    for stage, number in enumerate(blocks, start=2):
        names += layer(f"res{stage}.0.shortcut")
        for block in range(number):
            for conv in (1, 2, 3):
                names += layer(f"res{stage}.{block}.conv{conv}")
    return [f"backbone.bottom_up.{name}" for name in names]


def both(*names):
    return [f"{name}.{part}" for name in names for part in ("weight", "bias")]


def zoo_names(family, backbone):
    """Return the names of the tensors in the zoo's weights of a detector, without anchors, which are computed."""
    first = 3 if family == "retinanet" else 2
    names = resnet_names(BLOCKS[backbone])
    names += both(*(f"backbone.fpn_{kind}{level}" for kind in ("lateral", "output") for level in range(first, 6)))
    if family == "retinanet":
        towers = [f"head.{tower}.{index}" for tower in ("cls_subnet", "bbox_subnet") for index in (0, 2, 4, 6)]
        return names + both(
            "backbone.top_block.p6", "backbone.top_block.p7", *towers, "head.cls_score", "head.bbox_pred"
        )
    names += both(*(f"proposal_generator.rpn_head.{part}" for part in ("conv", "objectness_logits", "anchor_deltas")))
    for stage in (".0", ".1", ".2") if "cascade" in family else ("",):
        names += both(*(f"roi_heads.box_head{stage}.{part}" for part in ("fc1", "fc2")))
        names += both(*(f"roi_heads.box_predictor{stage}.{part}" for part in ("cls_score", "bbox_pred")))
    if "mask" in family:
        parts = ("mask_fcn1", "mask_fcn2", "mask_fcn3", "mask_fcn4", "deconv", "predictor")
        names += both(*(f"roi_heads.mask_head.{part}" for part in parts))
    return names


ZOO = [path for path in FILES if path.stem.startswith("teacher-") and "InstaBoost" not in path.stem]


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_the_zoos_weights_have_every_tensor_of_the_teacher(path):
    expected = set(build_without_weights(load(path)).state_dict())
    assert expected == set(zoo_names(*family_and_backbone(path)))


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_weights_of_the_zoo_are_in_detectron2s_list(path):
    """The weights have the family and backbone of the config: "faster_rcnn_R_50_FPN_3x" for faster_rcnn and R_50."""
    from detectron2.model_zoo.model_zoo import _ModelZooUrls

    folder, name, number, file = load(path).MODEL.WEIGHTS.replace("detectron2://", "").split("/")
    assert _ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX[f"{folder}/{name}"] == f"{number}/{file}"
    assert name.startswith("_".join(family_and_backbone(path)))


FOLDERS = {"COCO-Detection": "COCO", "PascalVOC-Detection": "VOC", "BDD100K-Detection": "BDD100K"}
RECIPE_FILES = [path for folder in FOLDERS for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))]
PAIRS = [path for path in RECIPE_FILES if "-" in path.stem and not path.stem.startswith(("teacher-", "Base-"))]
TERMS = {"SGFI": ("SGFI",), "CKD": ("CKD",), "SGFI_CKD": ("SGFI", "CKD")}


def name(path):
    return f"{FOLDERS[path.parent.name]}/{path.stem}"


@pytest.mark.parametrize("path", PAIRS, ids=name)
def test_pair_builds(path, monkeypatch):
    """Teacher, student and losses fit. Weights are not loaded here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("gdetkd.teacher.frozen.load_weights", lambda model, path: ("0" * 64, TrainedWith()))
    for draw in ("normal_", "uniform_"):  # no value of a weight matters here, and drawing 100 M of them takes seconds
        monkeypatch.setattr(torch.Tensor, draw, lambda self, *_, **__: self)
    cfg = load(path)
    teacher, student = path.stem.split("-")
    # Losses compare the values of a dense detector's anchors, and "meta" tensors have no values.
    cfg.MODEL.DEVICE = "meta" if "rcnn" in student else "cpu"
    with torch.device(cfg.MODEL.DEVICE):
        model = build_model(cfg)
    assert cfg.DISTILL.TEACHER.CONFIG_FILE == f"configs/{path.parent.name}/teacher-{teacher}.yaml"
    assert cfg.OUTPUT_DIR == f"output/{name(path)}"
    same_kind = ("rcnn" in teacher) and ("rcnn" in student)
    terms = next((TERMS[end] for end in ("SGFI_CKD", "SGFI", "CKD") if student.endswith(end)), None)
    assert tuple(model.losses) == (terms or (("SGFI", "CKD", "CLS", "REG") if same_kind else ("SGFI", "CKD")))
    if "CKD" in model.losses:  # ten steps of 16 images of 512 regions, as in the only public configuration
        assert len(model.losses["CKD"].queue.embeddings) == 81920


@pytest.mark.parametrize("path", [path for path in RECIPE_FILES if path not in PAIRS], ids=name)
def test_detector_builds(path):
    cfg = load(path)
    assert cfg.MODEL.META_ARCHITECTURE != "GDetKD" and count(build_without_weights(cfg)) > 1e7
    # If a teacher is trained here, its pairs name the weights that the training writes.
    if path.stem.startswith("teacher-") and "detectron2://ImageNet" in cfg.MODEL.WEIGHTS:
        weights = f"{cfg.OUTPUT_DIR}/model_final.pth"
        pairs = [load(pair) for pair in PAIRS if f"{path.stem}.yaml" in load(pair).DISTILL.TEACHER.CONFIG_FILE]
        pairs = [pair for pair in pairs if pair.DISTILL.TEACHER.CONFIG_FILE.split("/")[1] == path.parent.name]
        assert pairs and all(pair.DISTILL.TEACHER.WEIGHTS == weights for pair in pairs)


def test_the_docs_name_every_recipe():
    """A student alone may be named as the last part of a pair's name."""

    text = (ROOT / "docs" / "recipes.md").read_text()
    files = [path for path in RECIPE_FILES if "Base-" not in path.stem]
    assert not [name(path) for path in files if f"{path.stem}`" not in text]
