"""The settings of mmdetection's detectors that Detectron2 can reproduce.

A setting that is not listed here is refused, because it may change what the detector computes.
"""

from typing import Tuple

from .rules import Part, given, only, part, required

UNUSED = only(None)
# Settings of any part that matter in training alone.
TRAINING = "init_cfg pretrained train_cfg test_cfg reg_decoded_bbox"
# Strides of the levels that the RPN and the dense heads read, in pixels.
STRIDES = (4, 8, 16, 32, 64)
DENSE_STRIDES = (8, 16, 32, 64, 128)

BATCH_NORM = part("requires_grad momentum", may_lack=True, type=only("BN", "SyncBN"), eps=only(1e-5))
GROUP_NORM = part("requires_grad", may_lack=True, type=only("GN"), num_groups=only(32), eps=only(1e-5))
BACKBONE = part(
    f"{TRAINING} groups base_width base_channels stem_channels",
    "stage_with_dcn norm_eval frozen_stages with_cp zero_init_residual",
    type=required("ResNet", "ResNeXt"),
    depth=required(18, 34, 50, 101, 152),
    in_channels=only(3),
    num_stages=only(4),
    strides=only((1, 2, 2, 2)),
    dilations=only((1, 1, 1, 1)),
    out_indices=only((0, 1, 2, 3)),
    style=only("pytorch", "caffe"),
    deep_stem=only(False),
    avg_down=only(False),
    conv_cfg=UNUSED,
    dcn=UNUSED,
    plugins=UNUSED,
    norm_cfg=BATCH_NORM,
)
NECK = part(
    f"{TRAINING} in_channels no_norm_on_lateral",
    type=required("FPN"),
    out_channels=given(),
    num_outs=required(5),
    start_level=only(0),
    end_level=only(-1),
    add_extra_convs=only(False),
    conv_cfg=UNUSED,
    norm_cfg=UNUSED,
    act_cfg=UNUSED,
    upsample_cfg=part(may_lack=True, mode=only("nearest")),
)
DENSE_NECK = NECK.changed(
    "extra_convs_on_inputs relu_before_extra_convs",
    start_level=required(1),
    add_extra_convs=required(True, "on_input", "on_output"),
)
BOX_CODER = part(
    "ctr_clamp",
    type=required("DeltaXYWHBBoxCoder"),
    target_means=only((0.0, 0.0, 0.0, 0.0)),
    target_stds=given(),
    clip_border=only(True),
    add_ctr_clamp=only(False),
)


def _anchors(strides: Tuple[int, ...]) -> Part:
    return part(
        "scales octave_base_scale scales_per_octave",
        type=required("AnchorGenerator"),
        strides=required(strides),
        ratios=given(),
        base_sizes=UNUSED,
        scale_major=only(True),
        centers=UNUSED,
        center_offset=only(0.0),
    )


RPN = part(
    f"{TRAINING} in_channels feat_channels loss_cls loss_bbox",
    type=required("RPNHead"),
    num_classes=only(1),
    num_convs=only(1),
    anchor_generator=_anchors(STRIDES),
    bbox_coder=BOX_CODER,
)
# mmdetection 2.0 to 2.2 had the names out_size and sample_num.
ROI_ALIGN = part(
    "output_size out_size sampling_ratio sample_num use_torchvision",
    type=required("RoIAlign"),
    aligned=only(True),
    pool_mode=only("avg"),
)
POOLING = part(
    f"{TRAINING} out_channels",
    type=required("SingleRoIExtractor"),
    roi_layer=ROI_ALIGN,
    featmap_strides=required(STRIDES[:4]),
    finest_scale=only(56),
)
SOFTMAX_LOSS = part(
    "loss_weight class_weight reduction ignore_index avg_non_ignore",
    type=required("CrossEntropyLoss"),
    use_sigmoid=only(False),
    use_mask=only(False),
)
SIGMOID_LOSS = part("gamma alpha loss_weight reduction", type=required("FocalLoss"), use_sigmoid=only(True))
LINEAR = part(may_lack=True, type=only("Linear"))
BOX_HEAD = part(
    f"{TRAINING} in_channels fc_out_channels conv_out_channels roi_feat_size num_shared_fcs loss_bbox",
    type=required("Shared2FCBBoxHead", "ConvFCBBoxHead"),
    num_classes=given(),
    num_shared_convs=only(0),
    num_cls_convs=only(0),
    num_reg_convs=only(0),
    num_cls_fcs=only(0),
    num_reg_fcs=only(0),
    with_avg_pool=only(False),
    with_cls=only(True),
    with_reg=only(True),
    reg_class_agnostic=only(False, True),
    bbox_coder=BOX_CODER,
    conv_cfg=UNUSED,
    norm_cfg=UNUSED,
    cls_predictor_cfg=LINEAR,
    reg_predictor_cfg=LINEAR,
    loss_cls=SOFTMAX_LOSS,
)
MASK_HEAD = part(
    f"{TRAINING} num_convs in_channels conv_out_channels roi_feat_size loss_mask",
    type=required("FCNMaskHead"),
    num_classes=given(),
    conv_kernel_size=only(3),
    class_agnostic=only(False, True),
    upsample_cfg=part(may_lack=True, type=only("deconv"), scale_factor=only(2)),
    conv_cfg=UNUSED,
    norm_cfg=UNUSED,
    predictor_cfg=part(may_lack=True, type=only("Conv")),
)
BOXES = part(
    TRAINING,
    type=required("StandardRoIHead"),
    shared_head=UNUSED,
    bbox_roi_extractor=POOLING,
    bbox_head=BOX_HEAD,
    mask_roi_extractor=UNUSED,
    mask_head=UNUSED,
)
MASKS = BOXES.changed(mask_roi_extractor=POOLING, mask_head=MASK_HEAD)
CASCADE = BOXES.changed(
    "stage_loss_weights",
    type=required("CascadeRoIHead"),
    num_stages=required(3),
    bbox_head=BOX_HEAD.changed(stages=3, reg_class_agnostic=required(True)),
)
DENSE_HEAD = part(
    f"{TRAINING} in_channels feat_channels stacked_convs loss_bbox",
    num_classes=given(),
    conv_cfg=UNUSED,
    loss_cls=SIGMOID_LOSS,
)
RETINA_HEAD = DENSE_HEAD.changed(
    type=required("RetinaHead"),
    norm_cfg=UNUSED,
    anchor_generator=_anchors(DENSE_STRIDES),
    bbox_coder=BOX_CODER,
)
FCOS_HEAD = DENSE_HEAD.changed(
    "conv_bias regress_ranges center_sampling center_sample_radius loss_centerness",
    type=required("FCOSHead"),
    strides=required(DENSE_STRIDES),
    norm_on_bbox=required(True),
    centerness_on_reg=required(True),
    dcn_on_last_conv=only(False),
    norm_cfg=GROUP_NORM,
    bbox_coder=part("clip_border", may_lack=True, type=only("DistancePointBBoxCoder")),
)
PREPROCESSOR = part(
    "bgr_to_rgb batch_augments pad_mask mask_pad_value pad_seg seg_pad_value boxtype2tensor non_blocking",
    may_lack=True,  # mmdetection 2.x normalises images in its pipelines
    type=required("DetDataPreprocessor"),
    mean=given(),
    std=given(),
    rgb_to_bgr=only(False),
    pad_size_divisor=required(32),
    pad_value=only(0),
)
MODEL = part(TRAINING, data_preprocessor=PREPROCESSOR, backbone=BACKBONE)
TWO_STAGE = MODEL.changed(neck=NECK, rpn_head=RPN)
DETECTORS = {
    "FasterRCNN": TWO_STAGE.changed(type=required("FasterRCNN"), roi_head=BOXES),
    "MaskRCNN": TWO_STAGE.changed(type=required("MaskRCNN"), roi_head=MASKS),
    "CascadeRCNN": TWO_STAGE.changed(type=required("CascadeRCNN"), roi_head=CASCADE),
    "RetinaNet": MODEL.changed(type=required("RetinaNet"), neck=DENSE_NECK, bbox_head=RETINA_HEAD),
    "FCOS": MODEL.changed(type=required("FCOS"), neck=DENSE_NECK, bbox_head=FCOS_HEAD),
}
