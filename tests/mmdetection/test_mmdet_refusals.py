"""A detector that Detectron2 cannot reproduce is refused, with the setting or the tensor that is the reason."""

import pytest
import torch

from gdetkd.errors import GDetKDError
from gdetkd.mmdetection.checkpoint import MMDetCheckpoint
from gdetkd.mmdetection.config_text import read_config_text
from gdetkd.mmdetection.convert import convert_checkpoint
from mmdet_configs import config_2x, config_3x, fcos, mask_head, retinanet, two_stage
from mmdet_reference import Detector

MODELS = {
    "FasterRCNN": two_stage("FasterRCNN"),
    "MaskRCNN": two_stage("MaskRCNN"),
    "CascadeRCNN": two_stage("CascadeRCNN"),
    "RetinaNet": retinanet(),
    "FCOS": fcos(),
}
GONE = object()


def changed(settings, path, value):
    """Return settings in which the value at a dotted path is another, or is gone."""
    name, _, rest = path.partition(".")
    copy = list(settings) if isinstance(settings, list) else dict(settings)
    key = int(name) if isinstance(settings, list) else name
    if value is GONE and not rest:
        del copy[key]
    else:
        copy[key] = changed(copy.get(key, {}) if isinstance(copy, dict) else copy[key], rest, value) if rest else value
    return copy


def checkpoint(model, tensors={}, text=config_2x, classes=None):
    return MMDetCheckpoint("x.pth", tensors, read_config_text(text(model), "the config"), classes)


REFUSED = [
    ("FasterRCNN", "type", "SparseRCNN", "x.pth' is a SparseRCNN. Only a FasterRCNN, .* or FCOS of mmdetection"),
    ("FasterRCNN", "type", GONE, "is a model without a type"),
    ("FasterRCNN", "backbone", GONE, "lacks model.backbone, which is needed"),
    ("FasterRCNN", "backbone", "ResNet", "has another value than settings for .* model.backbone"),
    ("FasterRCNN", "backbone.type", "ResNeSt", "model.backbone.type = 'ResNeSt'. Only 'ResNet' or 'ResNeXt' can be"),
    ("FasterRCNN", "backbone.depth", GONE, "lacks model.backbone.depth. Only 18, 34, 50, 101 or 152"),
    ("FasterRCNN", "backbone.new_trick", 3, "model.backbone.new_trick = 3. This setting is not known.*--config"),
    ("FasterRCNN", "backbone.style", "mine", "model.backbone.style = 'mine'. Only 'pytorch' or 'caffe'"),
    ("FasterRCNN", "backbone.dcn", {"type": "DCN"}, "model.backbone.dcn = .*deformable convolutions"),
    ("FasterRCNN", "backbone.deep_stem", True, "model.backbone.deep_stem = True. Only False"),
    ("FasterRCNN", "backbone.avg_down", True, "avg_down"),
    ("FasterRCNN", "backbone.plugins", [{"cfg": {}}], "plugins"),
    ("FasterRCNN", "backbone.conv_cfg", {"type": "ConvWS"}, "conv_cfg"),
    ("FasterRCNN", "backbone.dilations", (1, 1, 1, 2), "dilations = .*Only .1, 1, 1, 1. can be"),
    ("FasterRCNN", "backbone.strides", (1, 2, 2, 1), "strides"),
    ("FasterRCNN", "backbone.norm_cfg.type", "GN", "model.backbone.norm_cfg.type = 'GN'. Only 'BN' or 'SyncBN'"),
    ("FasterRCNN", "backbone.norm_cfg.eps", 1e-3, "model.backbone.norm_cfg.eps = 0.001. Only 1e-05"),
    ("FasterRCNN", "neck.type", "PAFPN", "model.neck.type = 'PAFPN'"),
    ("FasterRCNN", "neck.num_outs", 4, "model.neck.num_outs = 4. Only 5"),
    ("FasterRCNN", "neck.norm_cfg", {"type": "BN"}, "model.neck.norm_cfg"),
    ("FasterRCNN", "neck.act_cfg", {"type": "ReLU"}, "model.neck.act_cfg"),
    ("FasterRCNN", "neck.start_level", 1, "model.neck.start_level = 1. Only 0"),
    ("FasterRCNN", "neck.add_extra_convs", "on_input", "model.neck.add_extra_convs"),
    ("FasterRCNN", "neck.upsample_cfg", {"mode": "bilinear"}, "model.neck.upsample_cfg.mode"),
    ("FasterRCNN", "rpn_head.type", "GARPNHead", "model.rpn_head.type"),
    ("FasterRCNN", "rpn_head.num_convs", 2, "model.rpn_head.num_convs"),
    ("FasterRCNN", "rpn_head.anchor_generator.type", "LegacyAnchorGenerator", "anchor_generator.type"),
    ("FasterRCNN", "rpn_head.anchor_generator.center_offset", 0.5, "center_offset = 0.5. Only 0.0.*1.x"),
    ("FasterRCNN", "rpn_head.anchor_generator.scale_major", False, "scale_major"),
    ("FasterRCNN", "rpn_head.anchor_generator.strides", [4, 8, 16, 32], "strides = .*Only .4, 8, 16, 32, 64."),
    ("FasterRCNN", "rpn_head.anchor_generator.scales", GONE, "has neither scales nor octave_base_scale"),
    (
        "FasterRCNN",
        "rpn_head.bbox_coder.target_means",
        [0.1, 0, 0, 0],
        "model.rpn_head.bbox_coder.target_means.*no mean",
    ),
    ("FasterRCNN", "rpn_head.bbox_coder.target_stds", "none", "describes no detector that Detectron2 can build"),
    ("FasterRCNN", "roi_head.type", "DoubleHeadRoIHead", "model.roi_head.type"),
    ("FasterRCNN", "roi_head.bbox_roi_extractor.type", "GenericRoIExtractor", "bbox_roi_extractor.type"),
    ("FasterRCNN", "roi_head.bbox_roi_extractor.finest_scale", 28, "finest_scale = 28. Only 56"),
    ("FasterRCNN", "roi_head.bbox_roi_extractor.featmap_strides", [16], "featmap_strides"),
    ("FasterRCNN", "roi_head.bbox_roi_extractor.roi_layer.type", "RoIPool", "roi_layer.type = 'RoIPool'"),
    ("FasterRCNN", "roi_head.bbox_roi_extractor.roi_layer.aligned", False, "roi_layer.aligned = False. Only True"),
    ("FasterRCNN", "roi_head.bbox_head.type", "Shared4Conv1FCBBoxHead", "bbox_head.type"),
    ("FasterRCNN", "roi_head.bbox_head.num_classes", GONE, "lacks model.roi_head.bbox_head.num_classes. It is needed"),
    ("FasterRCNN", "roi_head.bbox_head.with_avg_pool", True, "with_avg_pool"),
    (
        "FasterRCNN",
        "roi_head.bbox_head.loss_cls.use_sigmoid",
        True,
        "bbox_head.loss_cls.use_sigmoid = True. Only False",
    ),
    ("FasterRCNN", "roi_head.bbox_head.loss_cls.type", "SeesawLoss", "bbox_head.loss_cls.type"),
    ("FasterRCNN", "roi_head.bbox_head.cls_predictor_cfg", {"type": "NormedLinear"}, "cls_predictor_cfg.type"),
    ("MaskRCNN", "roi_head.mask_head.upsample_cfg", {"type": "carafe"}, "mask_head.upsample_cfg.type"),
    ("MaskRCNN", "roi_head.mask_head.predictor_cfg", {"type": "NormedConv2d"}, "mask_head.predictor_cfg.type"),
    ("CascadeRCNN", "roi_head.num_stages", 2, "model.roi_head.num_stages = 2. Only 3"),
    (
        "CascadeRCNN",
        "roi_head.bbox_head.1.reg_class_agnostic",
        False,
        r"bbox_head\[1\].reg_class_agnostic.*one box for all",
    ),
    ("CascadeRCNN", "roi_head.bbox_head.2.bbox_coder.type", "TBLRBBoxCoder", r"bbox_head\[2\].bbox_coder.type"),
    ("CascadeRCNN", "roi_head.mask_head", [mask_head(8, 5)] * 3, "mask head for each stage.*--drop-masks"),
    ("RetinaNet", "bbox_head.type", "RetinaSepBNHead", "model.bbox_head.type"),
    ("RetinaNet", "bbox_head.norm_cfg", {"type": "BN"}, "model.bbox_head.norm_cfg"),
    ("RetinaNet", "bbox_head.loss_cls.use_sigmoid", False, "model.bbox_head.loss_cls.use_sigmoid = False. Only True"),
    ("RetinaNet", "neck.add_extra_convs", "on_lateral", "model.neck.add_extra_convs = 'on_lateral'. Only"),
    (
        "RetinaNet",
        "neck.add_extra_convs",
        "on_output",
        "add_extra_convs 'on_output' with relu_before_extra_convs False",
    ),
    ("FCOS", "bbox_head.centerness_on_reg", False, "centerness_on_reg = False. Only True.*from the box tower"),
    ("FCOS", "bbox_head.centerness_on_reg", GONE, "lacks model.bbox_head.centerness_on_reg"),
    ("FCOS", "bbox_head.norm_on_bbox", GONE, "lacks model.bbox_head.norm_on_bbox. Only True.*logarithms"),
    ("FCOS", "bbox_head.dcn_on_last_conv", True, "dcn_on_last_conv"),
    ("FCOS", "bbox_head.norm_cfg", {"type": "BN"}, "model.bbox_head.norm_cfg.type = 'BN'. Only 'GN'"),
    ("FCOS", "bbox_head.norm_cfg", {"type": "GN", "num_groups": 16}, "norm_cfg.num_groups = 16. Only 32"),
    ("FCOS", "bbox_head.strides", [4, 8, 16, 32, 64], "model.bbox_head.strides"),
]


@pytest.mark.parametrize(
    "detector, path, value, match", REFUSED, ids=lambda part: part if isinstance(part, str) else ""
)
def test_a_setting(detector, path, value, match):
    with pytest.raises(GDetKDError, match=match):
        convert_checkpoint(checkpoint(changed(MODELS[detector], path, value)))


def test_the_settings_above_are_right_otherwise():
    """Test that the missing tensors are then the reason of the refusal."""
    for model in MODELS.values():
        with pytest.raises(GDetKDError, match="does not hold the detector that its config describes: it lacks"):
            convert_checkpoint(checkpoint(model))


@pytest.mark.parametrize(
    "before, after, match",
    [
        ("to_rgb=True), dict(type='Pad'", "to_rgb=False), dict(type='Pad'", "tells 2 ways to normalise images"),
        ("Normalize", "Standardize", "tells 0 ways to normalise images.*--config"),
        ("data = dict(", "data = make(", "tells 0 ways.*line 3 is more than plain values"),
        ("mean=", "average=", "tells 1 ways to normalise images.*mean and std"),
        ("type='LoadImageFromFile'", "type='LoadImageFromFile', channel_order='rgb'", "loads images by .*rgb.*as BGR"),
        ("type='LoadImageFromFile'", "type='LoadImageFromFile', color_type='grayscale'", "loads images by .*grayscale"),
    ],
)
def test_images_that_a_2x_config_treats_otherwise(before, after, match):
    text = config_2x(MODELS["FasterRCNN"])
    assert before in text
    with pytest.raises(GDetKDError, match=match):
        convert_checkpoint(checkpoint(MODELS["FasterRCNN"], text=lambda _: text.replace(before, after)))


@pytest.mark.parametrize(
    "before, after, match",
    [
        ("DetDataPreprocessor", "MyPreprocessor", "model.data_preprocessor.type"),
        ("pad_size_divisor=32", "pad_size_divisor=1", "model.data_preprocessor.pad_size_divisor = 1. Only 32"),
        ("mean=", "average=", "data_preprocessor.average = .*not known"),
    ],
)
def test_images_that_a_3x_config_treats_otherwise(before, after, match):
    text = config_3x(MODELS["FasterRCNN"])
    assert before in text
    with pytest.raises(GDetKDError, match=match):
        convert_checkpoint(checkpoint(MODELS["FasterRCNN"], text=lambda _: text.replace(before, after)))


def with_tensors(name, change):
    tensors = Detector(MODELS[name]).state_dict()
    change(tensors)
    return checkpoint(MODELS[name], tensors)


CHANGES = {
    "an unknown tensor": (
        "FasterRCNN",
        lambda tensors: tensors.update({"neck.bn.weight": torch.zeros(1)}),
        "1 tensors have names that are unknown in a FasterRCNN: neck.bn.weight",
    ),
    "the tensors of 1.x": (
        "FasterRCNN",
        lambda tensors: tensors.update({"bbox_head.fc_cls.weight": tensors.pop("roi_head.bbox_head.fc_cls.weight")}),
        "unknown in a FasterRCNN: bbox_head.fc_cls.weight",
    ),
    "a missing tensor": (
        "FasterRCNN",
        lambda tensors: tensors.pop("backbone.layer3.5.bn2.running_var"),
        "it lacks backbone.bottom_up.res4.5.conv2.norm.running_var",
    ),
    "a tensor that the config does not have": (
        "FasterRCNN",
        lambda tensors: tensors.update({"roi_head.mask_head.upsample.bias": torch.zeros(8)}),
        "it also has roi_heads.mask_head.deconv.bias",
    ),
    "another number of classes": (
        "FasterRCNN",
        lambda tensors: tensors.update({"roi_head.bbox_head.fc_cls.bias": torch.zeros(9)}),
        r"in other shapes roi_heads.box_predictor.cls_score.bias \(9,\) for \(6,\)",
    ),
    "an RPN with a softmax": (
        "FasterRCNN",
        lambda tensors: tensors.update({"rpn_head.rpn_cls.bias": torch.zeros(6)}),
        "objectness_logits.bias has 6 rows, but 1 scales and 3 ratios of anchors make 3.*softmax",
    ),
    "a RetinaNet with background": (
        "RetinaNet",
        lambda tensors: tensors.update({"bbox_head.retina_cls.bias": torch.zeros(54)}),
        "cls_score.bias has 54 rows, but 3 scales and 3 ratios of anchors make 45",
    ),
    "a missing scale": (
        "FCOS",
        lambda tensors: tensors.pop("bbox_head.scales.4.scale"),
        r"level_scales \(4,\) for \(5,\)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors(name):
    detector, change, match = CHANGES[name]
    with pytest.raises(GDetKDError, match=match):
        convert_checkpoint(with_tensors(detector, change))


def test_another_number_of_class_names():
    detector = Detector(MODELS["RetinaNet"])
    with pytest.raises(GDetKDError, match=r"names 2 classes \(cat, dog\), but its config says 5"):
        convert_checkpoint(checkpoint(MODELS["RetinaNet"], detector.state_dict(), classes=("cat", "dog")))


def test_masks_can_be_left_out():
    """A cascade has three mask heads in mmdetection, and one in Detectron2."""
    roi_head = {**MODELS["CascadeRCNN"]["roi_head"], "mask_head": [mask_head(8, 5)] * 3}
    roi_head["mask_roi_extractor"] = roi_head["bbox_roi_extractor"]
    for model in ({**MODELS["CascadeRCNN"], "roi_head": roi_head}, MODELS["MaskRCNN"]):
        converted = convert_checkpoint(checkpoint(model, Detector(model).state_dict()), drop_masks=True)
        assert converted.keys["MODEL.MASK_ON"] is False and not any("mask" in name for name in converted.tensors)
    with pytest.raises(GDetKDError, match="has no mask head. Leave out --drop-masks"):
        convert_checkpoint(checkpoint(MODELS["FasterRCNN"]), drop_masks=True)
