"""A converted detector is a teacher; the published Mask R-CNN of the headline recipes is converted in full size."""

import re

import pytest
import torch
import yaml
from detectron2.data import MetadataCatalog

from conftest import make_batch, make_cfg
from gdetkd.dotted_keys import flat_config
from gdetkd.mmdetection import convert, write
from gdetkd.mmdetection.checkpoint import MMDetCheckpoint
from gdetkd.mmdetection.config_text import read_config_text
from gdetkd.mmdetection.convert import convert_checkpoint
from gdetkd.structures import Regions
from gdetkd.teacher import FrozenTeacher
from mmdet_configs import CAFFE, RGB, config_2x, config_3x, fcos, retinanet, two_stage
from mmdet_reference import Detector, randomize
from test_recipes import RECIPES, build_without_weights, load

COCO = tuple(MetadataCatalog.get("coco_2017_train").thing_classes)


def published(text=config_2x):
    """Return mmdetection's Mask R-CNN X-101-64x4d, without memory for its tensors."""
    model = two_stage("MaskRCNN", width=256, fc=1024, classes=80, depth=101, base=64, groups=64, base_width=4)
    with torch.device("meta"):
        tensors = Detector(model).state_dict()
    return MMDetCheckpoint("x101.pth", tensors, read_config_text(text(model), "the config"), COCO)


@pytest.mark.parametrize("text", [config_2x, config_3x])
def test_the_published_mask_rcnn_is_whole_and_has_the_recipes_config(text):
    converted = convert_checkpoint(published(text))
    recipe = load(RECIPES / "teacher-mask_rcnn_X_101_64x4d_InstaBoost.yaml")
    expected = flat_config(recipe.dump())
    assert {key: expected[key] for key in converted.keys} == converted.keys
    assert converted.notes() == [] and converted.keys["DATASETS.TRAIN"] == ["coco_2017_train"]
    teacher = build_without_weights(recipe)
    teacher.load_state_dict(converted.tensors)


@pytest.fixture
def teacher_of(tmp_path):
    def make(model, images=RGB, names=COCO[:5], **keys):
        meta = {"config": config_2x(model, images, size=(1000, 600)), "CLASSES": names, "mmdet_version": "2.3.0"}
        tensors = randomize(Detector(model)).state_dict()
        torch.save({"meta": meta, "state_dict": tensors}, tmp_path / "mmdet.pth")
        config = write(convert(str(tmp_path / "mmdet.pth")), tmp_path / "new" / "teacher.pth")
        return FrozenTeacher(make_cfg({"DISTILL.TEACHER.CONFIG_FILE": str(config), **keys})), config

    return make


@pytest.mark.parametrize("images, student_format", [(RGB, "BGR"), (RGB, "RGB"), (CAFFE, "BGR"), (CAFFE, "RGB")])
def test_the_teacher_sees_the_images_that_it_was_trained_on(teacher_of, images, student_format):
    """The student's images become mmdetection's, whatever their channel order is."""
    teacher, _ = teacher_of(two_stage("FasterRCNN"), images, **{"INPUT.FORMAT": student_format})
    batch = make_batch(((64, 96),))
    bgr = batch[0]["image"] if student_format == "BGR" else batch[0]["image"].flip(0)
    pixels = bgr.flip(0) if images["to_rgb"] else bgr
    expected = (pixels - torch.tensor(images["mean"])[:, None, None]) / torch.tensor(images["std"])[:, None, None]
    torch.testing.assert_close(teacher.preprocess(batch).tensor[0], expected)


def test_the_teacher_looks_at_regions(teacher_of):
    teacher, config = teacher_of(two_stage("FasterRCNN"))
    spec = teacher.spec
    assert spec.num_classes == 5 and spec.embedding_dim == 16 and list(spec.strides.values()) == [4, 8, 16, 32]
    assert spec.regression_weights == pytest.approx((10, 10, 5, 5))
    batch = make_batch()
    regions = Regions([inputs["instances"].gt_boxes for inputs in batch])
    seen = teacher.look(batch, regions, ("pooled", "embeddings", "logits", "deltas"))
    assert seen.logits.shape == (6, 6) and seen.deltas.shape == (6, 20) and torch.isfinite(seen.logits).all()
    text = config.read_text()
    keys = yaml.safe_load(text)
    assert (keys["INPUT"]["MIN_SIZE_TEST"], keys["INPUT"]["MAX_SIZE_TEST"]) == (600, 1000)
    assert keys["MODEL"]["WEIGHTS"] == str(config.with_suffix(".pth")) and "TRAIN" not in str(keys.get("DATASETS"))
    assert '# Converted from "mmdet.pth" of mmdetection.' in text and "# DISTILL.TEACHER.CLASSES: [" in text
    assert "&" not in text  # each list is written out


def test_class_names_cannot_add_a_line_to_the_config(teacher_of):
    names = ("a\nSEED: 7", "b", "c", "d", "e")
    _, config = teacher_of(retinanet(), names=names)
    assert "SEED" not in yaml.safe_load(config.read_text())


@pytest.mark.parametrize("name, count", [("coco_2017_train", 80), ("voc_2007_trainval", 20)])
def test_the_order_of_classes_decides_whether_a_dataset_is_named(name, count):
    names = tuple(MetadataCatalog.get(name).thing_classes)
    model = retinanet(classes=count)
    with torch.device("meta"):
        tensors = Detector(model).state_dict()
    for classes, expected in ((names, [name]), (names[::-1], None), (None, None)):
        checkpoint = MMDetCheckpoint("x.pth", tensors, read_config_text(config_2x(model), "x"), classes)
        converted = convert_checkpoint(checkpoint)
        assert converted.keys.get("DATASETS.TRAIN") == expected
        assert len(converted.notes()) == (expected is None)


@pytest.mark.parametrize(
    "test_cfg, number",
    [
        ("dict(max_per_img=300)", 300),
        ("dict(rpn=dict(max_per_img=1000), rcnn=dict(max_per_img=500))", 500),
        ("dict(max_per_img=-1)", 10000),
        ("dict(rcnn=None)", None),
        ("None", None),
    ],
)
@pytest.mark.parametrize("is_in_model", [True, False])
def test_the_number_of_detections_is_the_teachers(test_cfg, number, is_in_model):
    model = {**retinanet(), "test_cfg": None}
    with torch.device("meta"):
        tensors = Detector(model).state_dict()
    config = read_config_text(config_2x(model), "x")
    settings = read_config_text(f"test_cfg = {test_cfg}", "x")
    config = {**config, "model": {**config["model"], **settings}} if is_in_model else {**config, **settings}
    converted = convert_checkpoint(MMDetCheckpoint("x.pth", tensors, config, None))
    assert converted.keys.get("TEST.DETECTIONS_PER_IMAGE") == number


def test_the_size_of_test_images_may_be_unknown():
    model = retinanet()
    with torch.device("meta"):
        tensors = Detector(model).state_dict()
    config = read_config_text(config_2x(model).replace("img_scale=(1333, 800), transforms", "transforms"), "x")
    assert any(
        "no size of test images" in note
        for note in convert_checkpoint(MMDetCheckpoint("x.pth", tensors, config, None)).notes()
    )


EARLY = {
    "RoIAlign's settings": (two_stage("FasterRCNN"), "output_size=7, sampling_ratio=0", "out_size=7, sample_num=0"),
    "the pyramid's switches": (
        fcos(),
        "add_extra_convs='on_output'",
        "add_extra_convs=True, extra_convs_on_inputs=False",
    ),
    "the first switch alone": (retinanet(), "add_extra_convs='on_input'", "add_extra_convs=True"),
    "FCOS's predictors": (fcos(), "", ""),
}


@pytest.mark.parametrize("name", EARLY)
def test_names_of_early_2x(name):
    model, now, then = EARLY[name]
    assert now in config_2x(model)
    with torch.device("meta"):
        tensors = Detector(model).state_dict()
    early = {re.sub(r"conv_(cls|reg|centerness)", r"fcos_\1", name): tensor for name, tensor in tensors.items()}
    texts = (config_2x(model), tensors), (config_2x(model).replace(now, then), early)
    before, after = (
        convert_checkpoint(MMDetCheckpoint("x.pth", weights, read_config_text(text, "x"), None))
        for text, weights in texts
    )
    assert before.keys == after.keys and list(before.tensors) == list(after.tensors)


def test_the_stages_of_a_cascade_may_share_their_settings():
    model = two_stage("CascadeRCNN")
    with torch.device("meta"):
        tensors = Detector(model).state_dict()
    model["roi_head"]["bbox_head"] = model["roi_head"]["bbox_head"][1]
    config = read_config_text(config_2x(model), "x")
    keys = convert_checkpoint(MMDetCheckpoint("x.pth", tensors, config, None)).keys
    assert keys["MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS"] == [[20.0, 20.0, 10.0, 10.0]] * 3
