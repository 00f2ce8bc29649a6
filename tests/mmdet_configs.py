"""Configs of mmdetection as its published files have them, with narrow detectors unless a width is given."""

from typing import Any, Dict, Tuple

RGB = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}
CAFFE = {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "to_rgb": False}
# Standard deviations of the box deltas of a cascade's stages. Other detectors have the first.
STDS = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])


def backbone(depth=50, base=4, style="pytorch", **changes):
    kind = {"type": "ResNeXt", "groups": 2, "base_width": 4} if depth == 101 else {"type": "ResNet"}
    return {
        **kind,
        "depth": depth,
        "num_stages": 4,
        "out_indices": (0, 1, 2, 3),
        "frozen_stages": 1,
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "norm_eval": True,
        "style": style,
        **({} if base == 64 else {"base_channels": base}),
        **changes,
    }


def neck(width, depth=50, base=4, **changes):
    channels = [base * 2**stage * (1 if depth == 18 else 4) for stage in range(4)]
    return {"type": "FPN", "in_channels": channels, "out_channels": width, "num_outs": 5, **changes}


def coder(stds):
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0, 0.0, 0.0, 0.0], "target_stds": stds}


def extractor(size, width):
    return {
        "type": "SingleRoIExtractor",
        "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0},
        "out_channels": width,
        "featmap_strides": [4, 8, 16, 32],
    }


def box_head(width, fc, classes, stds=STDS[0], agnostic=False):
    return {
        "type": "Shared2FCBBoxHead",
        "in_channels": width,
        "fc_out_channels": fc,
        "roi_feat_size": 7,
        "num_classes": classes,
        "bbox_coder": coder(stds),
        "reg_class_agnostic": agnostic,
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
        "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
    }


def mask_head(width, classes):
    return {
        "type": "FCNMaskHead",
        "num_convs": 4,
        "in_channels": width,
        "conv_out_channels": width,
        "num_classes": classes,
        "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
    }


def rpn_head(width, scales=(8,)):
    return {
        "type": "RPNHead",
        "in_channels": width,
        "feat_channels": width,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "scales": list(scales),
            "ratios": [0.5, 1.0, 2.0],
            "strides": [4, 8, 16, 32, 64],
        },
        "bbox_coder": coder([1.0, 1.0, 1.0, 1.0]),
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
        "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
    }


def two_stage(kind, width=8, fc=16, classes=5, scales=(8,), **backbone_settings) -> Dict[str, Any]:
    roi_head: Dict[str, Any] = {"type": "StandardRoIHead", "bbox_roi_extractor": extractor(7, width)}
    roi_head["bbox_head"] = box_head(width, fc, classes)
    if kind == "CascadeRCNN":
        roi_head.update({"type": "CascadeRoIHead", "num_stages": 3, "stage_loss_weights": [1, 0.5, 0.25]})
        roi_head["bbox_head"] = [box_head(width, fc, classes, stds, agnostic=True) for stds in STDS]
    if kind == "MaskRCNN":
        roi_head.update({"mask_roi_extractor": extractor(14, width), "mask_head": mask_head(width, classes)})
    settings = {"depth": 50, "base": 4, **backbone_settings}
    return {
        "type": kind,
        "backbone": backbone(**settings),
        "neck": neck(width, settings["depth"], settings["base"]),
        "rpn_head": rpn_head(width, scales),
        "roi_head": roi_head,
        "train_cfg": {"rpn": {"allowed_border": -1}},
        "test_cfg": {"rpn": {"nms_pre": 1000}},
    }


def focal_loss():
    return {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0}


def retinanet(width=8, classes=5, **backbone_settings) -> Dict[str, Any]:
    settings = {"depth": 50, "base": 4, **backbone_settings}
    return {
        "type": "RetinaNet",
        "backbone": backbone(**settings),
        "neck": neck(width, settings["depth"], settings["base"], start_level=1, add_extra_convs="on_input"),
        "bbox_head": {
            "type": "RetinaHead",
            "num_classes": classes,
            "in_channels": width,
            "stacked_convs": 2,
            "feat_channels": width,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "octave_base_scale": 4,
                "scales_per_octave": 3,
                "ratios": [0.5, 1.0, 2.0],
                "strides": [8, 16, 32, 64, 128],
            },
            "bbox_coder": coder([1.0, 1.0, 1.0, 1.0]),
            "loss_cls": focal_loss(),
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
    }


def fcos(width=32, classes=5, conv_bias=True, **backbone_settings) -> Dict[str, Any]:
    settings = {"depth": 50, "base": 4, "style": "caffe", **backbone_settings}
    extra = {"start_level": 1, "add_extra_convs": "on_output", "relu_before_extra_convs": True}
    return {
        "type": "FCOS",
        "backbone": backbone(**settings),
        "neck": neck(width, settings["depth"], settings["base"], **extra),
        "bbox_head": {
            "type": "FCOSHead",
            "num_classes": classes,
            "in_channels": width,
            "stacked_convs": 2,
            "feat_channels": width,
            "strides": [8, 16, 32, 64, 128],
            "loss_cls": focal_loss(),
            "loss_bbox": {"type": "GIoULoss", "loss_weight": 1.0},
            "loss_centerness": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
            "norm_on_bbox": True,
            "centerness_on_reg": True,
            "dcn_on_last_conv": False,
            "center_sampling": True,
            **({"conv_bias": True} if conv_bias else {}),
        },
    }


def as_text(value: Any) -> str:
    """Write a value as mmdetection writes its configs: with dict(...)."""
    if isinstance(value, dict):
        return f"dict({', '.join(f'{name}={as_text(item)}' for name, item in value.items())})"
    if isinstance(value, list):
        return f"[{', '.join(map(as_text, value))}]"
    return repr(value)


def config_2x(model: Dict[str, Any], images: Dict[str, Any] = RGB, size: Tuple[int, int] = (1333, 800)) -> str:
    """Return the text of a config of mmdetection 2.x, with the pipelines in it."""
    normalize = {"type": "Normalize", **images}
    steps = [{"type": "Resize", "keep_ratio": True}, normalize, {"type": "Pad", "size_divisor": 32}]
    test = [{"type": "LoadImageFromFile"}, {"type": "MultiScaleFlipAug", "img_scale": size, "transforms": steps}]
    train = [{"type": "LoadImageFromFile"}, {"type": "Resize", "img_scale": (1333, 800)}, normalize]
    data = {"train": {"type": "CocoDataset", "pipeline": train}, "test": {"type": "CocoDataset", "pipeline": test}}
    return f"model = {as_text(model)}\ndataset_type = 'CocoDataset'\ndata = {as_text(data)}\n"


def config_3x(model: Dict[str, Any], images: Dict[str, Any] = RGB) -> str:
    """Return the text of a config of mmdetection 3.x, where the model normalises the images."""
    preprocessor = {"type": "DetDataPreprocessor", "mean": images["mean"], "std": images["std"]}
    preprocessor.update({"bgr_to_rgb": images["to_rgb"], "pad_size_divisor": 32})
    pipeline = [{"type": "LoadImageFromFile", "backend_args": None}, {"type": "Resize", "scale": (1333, 800)}]
    loader = {"batch_size": 1, "dataset": {"type": "CocoDataset", "pipeline": pipeline}}
    model = as_text({**model, "data_preprocessor": preprocessor})
    return f"default_scope = 'mmdet'\nmodel = {model}\ntest_dataloader = {as_text(loader)}\n"
