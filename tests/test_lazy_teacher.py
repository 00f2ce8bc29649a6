"""Teachers from LazyConfig files."""

import functools

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.modeling import FPN

from conftest import NUM_CLASSES, make_batch, settle_batch_norm
from gdetkd import DistillTrainer
from gdetkd.engine import evaluate_teacher
from gdetkd.errors import GDetKDError
from gdetkd.teacher import FrozenTeacher, read_teacher_file
from gdetkd.teacher.lazy_file import describe

FILE = """
import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, GeneralizedRCNN, StandardROIHeads
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead

LEVELS = ["p2", "p3", "p4", "p5"]
model = L(GeneralizedRCNN)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="BN"),
            stages=L(ResNet.make_default_stages)(depth=18, norm="BN"),
            out_features=["res2", "res3", "res4", "res5"],
        ),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=12,
        top_block=L(LastLevelMaxPool)(),
    ),
    proposal_generator=L(RPN)(
        in_features=[*LEVELS, "p6"],
        head=L(StandardRPNHead)(in_channels=12, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[8], [16], [32], [48], [64]], aspect_ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64], offset=0.0
        ),
        anchor_matcher=L(Matcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=16,
        positive_fraction=0.5,
        pre_nms_topk=(60, 60),
        post_nms_topk=(30, 30),
        nms_thresh=0.7,
    ),
    roi_heads=L(StandardROIHeads)(
        num_classes=3,
        batch_size_per_image=8,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
        box_in_features=LEVELS,
        box_pooler=L(ROIPooler)(
            output_size=7, scales=(1 / 4, 1 / 8, 1 / 16, 1 / 32), sampling_ratio=2, pooler_type="ROIAlignV2"
        ),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=12, height=7, width=7), conv_dims=[], fc_dims=[16]
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=16),
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes="${..num_classes}",
        ),
    ),
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="RGB",
)
dataloader = dict(
    train=dict(dataset=dict(names="tiny")),
    test=dict(
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=80, max_size=200)],
            image_format="RGB",
        )
    ),
)
"""


@pytest.fixture
def lazy_teacher(tmp_path):
    """Return a function that writes a LazyConfig file and its weights, and returns the config keys that name them."""

    def make(change=lambda text: text):
        (tmp_path / "teacher.py").write_text(change(FILE))
        torch.manual_seed(7)
        model = instantiate(LazyConfig.load(str(tmp_path / "teacher.py")).model)
        settle_batch_norm(model)
        torch.save({"model": model.state_dict()}, tmp_path / "lazy.pth")
        keys = {"CONFIG_FILE": str(tmp_path / "teacher.py"), "WEIGHTS": str(tmp_path / "lazy.pth")}
        return {f"DISTILL.TEACHER.{name}": value for name, value in keys.items()}

    return make


def test_a_lazy_teacher_teaches_with_all_terms(distill_cfg, lazy_teacher):
    trainer = DistillTrainer(distill_cfg(lazy_teacher()))
    teacher = trainer.distiller.teacher
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    trainer.train()
    assert teacher.spec.channels == 12 and not teacher.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.model.state_dict().items())
    assert all(torch.isfinite(parameter).all() for parameter in trainer.student.parameters())


def test_the_teacher_keeps_its_channel_order(distill_cfg, lazy_teacher):
    teacher = FrozenTeacher(distill_cfg(lazy_teacher()))  # the student's is BGR
    batch = make_batch()
    image = teacher.preprocess(batch).tensor[0, :, :64, :64]
    mean = torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    torch.testing.assert_close(image, batch[0]["image"].flip(0) - mean)


def test_the_dataloader_decides_the_channel_order(distill_cfg, lazy_teacher, caplog):
    keys = lazy_teacher(lambda text: text.replace('image_format="RGB"', 'image_format="BGR"'))
    assert FrozenTeacher(distill_cfg(keys)).file.input_format == "BGR"
    assert "has the channel order BGR in its dataloader and RGB in model.input_format" in caplog.text


def test_class_names_come_from_the_teachers_dataset(distill_cfg, lazy_teacher):
    for _ in range(2):
        assert FrozenTeacher(distill_cfg(lazy_teacher())).spec.class_names == ("class0", "class1", "class2")
        DatasetCatalog.get("tiny")  # in the first round, the dataset is registered, but not read
    unknown = lazy_teacher(lambda text: text.replace('names="tiny"', 'names=("nobody", "knows")'))
    assert FrozenTeacher(distill_cfg(unknown)).spec.class_names is None


def test_the_teacher_is_evaluated_at_its_own_image_size(distill_cfg, lazy_teacher):
    cfg = distill_cfg({**lazy_teacher(), "DATASETS.TEST": ("tiny",)})
    teacher = FrozenTeacher(cfg)
    [sample] = next(iter(teacher.file.test_loader("tiny")))
    assert min(sample["image"].shape[1:]) == 80  # the student's would be 64
    assert "AP" in evaluate_teacher(cfg, teacher)["bbox"]


def test_opts_change_the_teachers_config(distill_cfg, lazy_teacher):
    keys = lazy_teacher()
    opts = ["model.roi_heads.num_classes", NUM_CLASSES + 1]
    with pytest.raises(GDetKDError, match="unloaded .*same detector"):
        FrozenTeacher(distill_cfg({**keys, "DISTILL.TEACHER.OPTS": opts}))
    with pytest.raises(GDetKDError, match="pairs of a key and a value"):
        FrozenTeacher(distill_cfg({**keys, "DISTILL.TEACHER.OPTS": opts[:1]}))


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.backbone", {"_target_": "os.mkdir", "path": "made"}),
        ("model.roi_heads.box_in_features", ["p2", {"_target_": "os.mkdir", "path": "made"}]),
        ("model.backbone", "${oc.create:{_target_:os.mkdir,path:made}}"),
        ("model._target_", "os.mkdir"),
        ("model[_target_]", "os.mkdir"),
        ("model.backbone[_target_]", "os.mkdir"),
    ],
)
def test_opts_cannot_change_what_the_file_calls(distill_cfg, lazy_teacher, tmp_path, monkeypatch, key, value):
    """A yaml may name a .py file to run. Its options must not run anything else."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GDetKDError, match=r"DISTILL.TEACHER.OPTS: 'model.*into the teacher's .py file"):
        FrozenTeacher(distill_cfg({**lazy_teacher(), "DISTILL.TEACHER.OPTS": [key, value]}))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "change, match",
    [
        (("model = L(", "detector = L("), "defines no `model`"),
        (('    input_format="RGB",\n', ""), None),
        (("dataloader = dict(", "loader = dict("), "no dataloader.test.mapper"),
    ],
)
def test_a_missing_part_of_the_file_is_named(distill_cfg, lazy_teacher, tmp_path, change, match):
    keys = lazy_teacher()
    (tmp_path / "teacher.py").write_text(FILE.replace(*change))
    if match is None:  # the channel order of the dataloader is enough
        assert FrozenTeacher(distill_cfg(keys)).file.input_format == "RGB"
        return
    with pytest.raises(GDetKDError, match=match):
        FrozenTeacher(distill_cfg(keys)).file.test_loader("tiny")


IMPORTING = """
from detectron2.config import LazyCall as L

from .others import model, short_edge


def build_mapper(**kwargs):
    from detectron2.data import DatasetMapper

    return DatasetMapper(**kwargs)


dataloader = dict(test=dict(mapper=L(build_mapper)(is_train=False, augmentations=[short_edge], image_format="RGB")))
"""


def test_a_change_in_a_file_that_the_teachers_file_imports_is_a_change_of_its_content(distill_cfg, tmp_path):
    (tmp_path / "teacher.py").write_text(IMPORTING)
    others = FILE.replace(
        "dataloader = dict(", "short_edge = L(T.ResizeShortestEdge)(short_edge_length=80)\nunused = dict("
    )
    cfg = distill_cfg({"DISTILL.TEACHER.CONFIG_FILE": str(tmp_path / "teacher.py")})

    def content(text):
        (tmp_path / "others.py").write_text(text)
        return read_teacher_file(cfg).content()

    first = content(others)
    assert content(others) == first and " at 0x" not in first
    assert content(others.replace("short_edge_length=80)", "short_edge_length=40)")) != first
    assert content(others.replace("out_channels=12", "out_channels=16")) != first


def test_values_are_described_alike_in_each_process():
    """An address in memory, or the order of a set, differs between processes."""
    items = [f"name{index}" for index in range(50)]
    value = {b"key": set(items), "call": functools.partial(len, object(), {object}), "object": object()}
    text = describe(value)
    assert text == describe({**value, b"key": set(reversed(items))}) and " at 0x" not in text
    names = ", ".join(sorted(map(repr, items)))
    expected = "[builtins.len, [object, {builtins.object}], {}]"
    assert text == f"{{b'key': {{{names}}}, 'call': {expected}, 'object': object}}"
    assert describe(functools.partial(len, "a")) != describe(functools.partial(len, "b"))


def test_an_unknown_channel_order_is_refused(distill_cfg, lazy_teacher, tmp_path):
    keys = lazy_teacher()
    (tmp_path / "teacher.py").write_text(FILE.replace('image_format="RGB",', "").replace('input_format="RGB",', ""))
    with pytest.raises(GDetKDError, match="RGB or BGR.*model.input_format"):
        FrozenTeacher(distill_cfg(keys))
    with_order = {**keys, "DISTILL.TEACHER.OPTS": ["model.input_format", "BGR"]}
    assert FrozenTeacher(distill_cfg(with_order)).file.input_format == "BGR"


def test_a_teacher_with_a_fixed_image_size_refuses_larger_images(distill_cfg, monkeypatch):
    # Detectron2's plain vision transformers have this attribute.
    monkeypatch.setattr(FPN, "padding_constraints", {"square_size": 1024}, raising=False)
    with pytest.raises(GDetKDError, match=r"at most 1024 pixels.*INPUT.MAX_SIZE_TRAIN to 1024 or less"):
        FrozenTeacher(distill_cfg())
    FrozenTeacher(distill_cfg({"INPUT.MAX_SIZE_TRAIN": 1024}))
