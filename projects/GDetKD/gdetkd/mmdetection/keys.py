"""Say in Detectron2's config keys what mmdetection's settings say. The settings have been checked before."""

from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..data.class_names import names_of_dataset
from ..errors import GDetKDError
from .config_text import Unreadable
from .rules import kind_of, short

# Datasets of Detectron2 whose class names a checkpoint may have.
DATASETS = ("coco_2017_train", "voc_2007_trainval")
# Backbones of dense detectors, by the map that makes p6, and by whether a ReLU lies between p6 and p7.
DENSE_BACKBONES = {
    ("on_input", True): "build_retinanet_resnet_fpn_backbone",
    ("on_input", False): "build_mmdet_retinanet_resnet_fpn_backbone",
    ("on_output", True): "build_fcos_resnet_fpn_backbone",
}
BASIC_BLOCKS = (18, 34)
# mmdetection's defaults, where Detectron2 has no default or another one.
WIDTH = 64
# Detections of an image if there is no limit. Detectron2's dense detectors do not know -1.
ALL_DETECTIONS = 10000
FC_WIDTH, MASK_WIDTH, NUM_CONVS = 1024, 256, 4


def detectron2_keys(config: Mapping[str, Any], classes: Optional[Sequence[str]]) -> Dict[str, Any]:
    """Return the keys of a Detectron2 config for a detector, by dotted name.

    Args:
        config: values of mmdetection's config, by name.
        classes: names of the detector's classes in order, or None.
    """
    model = config["model"]
    keys = {**_images(config), **_resnet(model["backbone"])}
    keys["MODEL.FPN.OUT_CHANNELS"] = model["neck"]["out_channels"]
    keys.update(_two_stage(model) if "roi_head" in model else _dense(model))
    detections = _most_detections(config)
    if detections is not None:
        keys["TEST.DETECTIONS_PER_IMAGE"] = detections
    dataset = next((name for name in DATASETS if classes and tuple(classes) == names_of_dataset(name)), None)
    if dataset:
        keys["DATASETS.TRAIN"] = [dataset]
    return keys


def _most_detections(config: Mapping[str, Any]) -> Optional[int]:
    """Return how many detections of an image are kept, or None if the config does not say it."""
    # mmdetection 2.0 to 2.2 has test_cfg outside of the model.
    settings = config["model"].get("test_cfg") or config.get("test_cfg")
    settings = settings.get("rcnn", settings) if isinstance(settings, dict) else {}
    number = settings.get("max_per_img") if isinstance(settings, dict) else None
    if not isinstance(number, int) or isinstance(number, bool):
        return None
    return number if number > 0 else ALL_DETECTIONS


def anchor_shapes(generator: Mapping[str, Any]) -> Tuple[List[float], List[float]]:
    """Return the scales of the anchors of a location, in strides, and their ratios of height to width."""
    scales = generator.get("scales")
    if scales is None:
        base, count = generator.get("octave_base_scale"), generator.get("scales_per_octave")
        if base is None or not count:
            raise GDetKDError(
                f"The anchor generator {short(generator)} has neither scales nor octave_base_scale with "
                "scales_per_octave. Choose a complete config."
            )
        scales = [base * 2 ** (index / count) for index in range(count)]
    return [float(scale) for scale in scales], [float(ratio) for ratio in generator["ratios"]]


def _images(config: Mapping[str, Any]) -> Dict[str, Any]:
    settings = config["model"].get("data_preprocessor")  # of 3.x
    if settings:
        is_rgb = settings.get("bgr_to_rgb", False)
    else:
        settings = _normalization(config.get("data"))
        is_rgb = settings.get("to_rgb", True)
    keys = {
        "INPUT.FORMAT": "RGB" if is_rgb else "BGR",
        "MODEL.PIXEL_MEAN": [float(value) for value in settings["mean"]],
        "MODEL.PIXEL_STD": [float(value) for value in settings["std"]],
    }
    for each in parts_of_kind(config, "LoadImageFromFile"):
        if each.get("channel_order", "bgr") != "bgr" or each.get("color_type", "color") != "color":
            raise GDetKDError(
                f"The config loads images by {short(each)}. Only images in colour as BGR can be converted."
            )
    sizes = {size for size in map(_size, _test_sizes(config)) if size}
    if len(sizes) == 1:
        keys["INPUT.MIN_SIZE_TEST"], keys["INPUT.MAX_SIZE_TEST"] = sizes.pop()
    return keys


def _normalization(data: Any) -> Dict[str, Any]:
    """Return the settings of Normalize in the pipelines of a 2.x config. All pipelines must have the same."""
    found: List[Dict[str, Any]] = []
    for each in parts_of_kind(data, "Normalize"):
        if each not in found:
            found.append(each)
    if len(found) != 1 or not {"mean", "std"} <= set(found[0]):
        reason = data.place if isinstance(data, Unreadable) else short(found)
        raise GDetKDError(
            f"The config tells {len(found)} ways to normalise images ({reason}). One is needed, with mean and std: "
            "model.data_preprocessor, or Normalize in the pipelines of `data`. Name a complete config with --config."
        )
    return found[0]


def _test_sizes(config: Mapping[str, Any]) -> Iterator[Any]:
    data = config.get("data")
    for pipelines in (config.get("test_dataloader"), data.get("test") if isinstance(data, dict) else None):
        for kind in ("MultiScaleFlipAug", "Resize"):
            for each in parts_of_kind(pipelines, kind):
                yield each.get("img_scale", each.get("scale"))


def _size(scale: Any) -> Optional[Tuple[int, int]]:
    """Return the short and the long side of a test image, or None if the setting is no such pair."""
    is_pair = isinstance(scale, tuple) and len(scale) == 2 and all(isinstance(side, int) for side in scale)
    return (min(scale), max(scale)) if is_pair else None


def parts_of_kind(settings: Any, kind: str) -> Iterator[Dict[str, Any]]:
    """Yield all dictionaries of a type in a config's value, however deep they are."""
    if isinstance(settings, dict):
        if kind_of(settings) == kind:
            yield settings
        settings = tuple(settings.values())
    if isinstance(settings, tuple):
        for value in settings:
            yield from parts_of_kind(value, kind)


def _resnet(backbone: Mapping[str, Any]) -> Dict[str, Any]:
    base = backbone.get("base_channels", WIDTH)
    groups = backbone.get("groups", 1) if kind_of(backbone) == "ResNeXt" else 1
    is_basic = backbone["depth"] in BASIC_BLOCKS
    return {
        "MODEL.RESNETS.DEPTH": backbone["depth"],
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": base if groups == 1 else backbone.get("base_width", 4),
        "MODEL.RESNETS.STEM_OUT_CHANNELS": backbone.get("stem_channels") or base,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": base if is_basic else 4 * base,
        "MODEL.RESNETS.STRIDE_IN_1X1": backbone.get("style", "pytorch") == "caffe",
    }


def _levels(first: int) -> Dict[str, Any]:
    stages = [f"res{level}" for level in range(first, 6)]
    return {"MODEL.RESNETS.OUT_FEATURES": stages, "MODEL.FPN.IN_FEATURES": stages[:]}


def _anchors(generator: Mapping[str, Any]) -> Dict[str, Any]:
    scales, ratios = anchor_shapes(generator)
    sizes = [[stride * scale for scale in scales] for stride in generator["strides"]]
    return {"MODEL.ANCHOR_GENERATOR.SIZES": sizes, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [ratios]}


def _box_weights(coder: Mapping[str, Any]) -> List[float]:
    """Return Detectron2's weights of box deltas: mmdetection divides by standard deviations, Detectron2 multiplies."""
    return [1.0 / std for std in coder["target_stds"]]


def _pooling(extractor: Mapping[str, Any], head: str) -> Dict[str, Any]:
    layer = extractor["roi_layer"]
    return {
        f"MODEL.{head}.POOLER_TYPE": "ROIAlignV2",
        f"MODEL.{head}.POOLER_RESOLUTION": layer.get("output_size", layer.get("out_size")),
        f"MODEL.{head}.POOLER_SAMPLING_RATIO": layer.get("sampling_ratio", layer.get("sample_num", 0)),
    }


def _two_stage(model: Mapping[str, Any]) -> Dict[str, Any]:
    roi_head, rpn = model["roi_head"], model["rpn_head"]
    is_cascade, levels = kind_of(model) == "CascadeRCNN", [f"p{level}" for level in range(2, 7)]
    stages = stages_of(roi_head)
    first = stages[0]
    keys = {
        **_levels(2),
        **_anchors(rpn["anchor_generator"]),
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.MASK_ON": bool(roi_head.get("mask_head")),
        "MODEL.RPN.IN_FEATURES": levels,
        "MODEL.RPN.BBOX_REG_WEIGHTS": _box_weights(rpn["bbox_coder"]),
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,  # for each level, as in mmdetection's and Detectron2's configs
        "MODEL.ROI_HEADS.NAME": "CascadeROIHeads" if is_cascade else "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": levels[:4],
        "MODEL.ROI_HEADS.NUM_CLASSES": first["num_classes"],
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2 if kind_of(first) == "Shared2FCBBoxHead" else first.get("num_shared_fcs", 0),
        "MODEL.ROI_BOX_HEAD.FC_DIM": first.get("fc_out_channels", FC_WIDTH),
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": first.get("reg_class_agnostic", False),
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _box_weights(first["bbox_coder"]),
        **_pooling(roi_head["bbox_roi_extractor"], "ROI_BOX_HEAD"),
    }
    if is_cascade:
        keys["MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS"] = [_box_weights(stage["bbox_coder"]) for stage in stages]
    return {**keys, **_masks(roi_head)}


def stages_of(roi_head: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the settings of the box heads, one for each stage of a cascade."""
    heads = roi_head["bbox_head"]
    return heads if isinstance(heads, tuple) else (heads,) * roi_head.get("num_stages", 1)


def _masks(roi_head: Mapping[str, Any]) -> Dict[str, Any]:
    head = roi_head.get("mask_head")
    if not head:
        return {}
    return {
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": head.get("num_convs", NUM_CONVS),
        "MODEL.ROI_MASK_HEAD.CONV_DIM": head.get("conv_out_channels", MASK_WIDTH),
        "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": head.get("class_agnostic", False),
        **_pooling(roi_head["mask_roi_extractor"], "ROI_MASK_HEAD"),
    }


def _dense(model: Mapping[str, Any]) -> Dict[str, Any]:
    head, name = model["bbox_head"], "RETINANET" if kind_of(model) == "RetinaNet" else "FCOS"
    levels = [f"p{level}" for level in range(3, 8)]
    keys = {
        **_levels(3),
        "MODEL.META_ARCHITECTURE": kind_of(model),
        "MODEL.BACKBONE.NAME": _dense_backbone(model["neck"]),
        f"MODEL.{name}.IN_FEATURES": levels,
        f"MODEL.{name}.NUM_CLASSES": head["num_classes"],
        f"MODEL.{name}.NUM_CONVS": head.get("stacked_convs", NUM_CONVS),
    }
    if name == "FCOS":
        return {**keys, "MODEL.FCOS.NORM": "GN", "MODEL.FCOS.LEVEL_SCALES": True}
    return {
        **keys,
        **_anchors(head["anchor_generator"]),
        "MODEL.RETINANET.BBOX_REG_WEIGHTS": _box_weights(head["bbox_coder"]),
    }


def _dense_backbone(neck: Mapping[str, Any]) -> str:
    source = neck["add_extra_convs"]
    if source is True:
        source = "on_input" if neck.get("extra_convs_on_inputs", True) else "on_output"
    has_relu = bool(neck.get("relu_before_extra_convs", False))
    if (source, has_relu) not in DENSE_BACKBONES:
        raise GDetKDError(
            f"The config makes p6 and p7 by model.neck.add_extra_convs {source!r} with relu_before_extra_convs "
            f"{has_relu}. No pyramid here does so. Choose another checkpoint."
        )
    return DENSE_BACKBONES[source, has_relu]
