"""Detectron2's FCOS, built from a yaml config. Detectron2 itself builds it from a LazyConfig only."""

from typing import Any, Dict, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, Instances
from torch import nn

from ..structures import full_precision

LOWEST = -100.0


class ScaledFCOSHead(fcos.FCOSHead):
    """Multiply the box predictions of each level by a learned scale, which Detectron2's head lacks.

    Attributes:
        level_scales: (L,), in the order of the levels.
    """

    def __init__(self, *, input_shape: List[ShapeSpec], **kwargs: Any) -> None:
        super().__init__(input_shape=input_shape, **kwargs)
        self.level_scales = nn.Parameter(torch.ones(len(input_shape)))

    def forward(self, features: List[torch.Tensor]) -> Tuple[List[torch.Tensor], ...]:
        logits, deltas, centerness = super().forward(features)
        return logits, [level * scale for level, scale in zip(deltas, self.level_scales)], centerness


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Build Detectron2's FCOS from the keys of MODEL.FCOS, for MODEL.META_ARCHITECTURE "FCOS".

    Its weights have the names and shapes of Detectron2's FCOS. MODEL.FCOS.LEVEL_SCALES adds `head.level_scales`.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        config = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[name] for name in config.IN_FEATURES]
        head = (ScaledFCOSHead if config.LEVEL_SCALES else fcos.FCOSHead)(
            input_shape=shapes,
            num_classes=config.NUM_CLASSES,
            conv_dims=[shapes[0].channels] * config.NUM_CONVS,
            norm=_norm(config.NORM),
            prior_prob=config.PRIOR_PROB,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": config.IN_FEATURES,
            "num_classes": config.NUM_CLASSES,
            "center_sampling_radius": config.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": config.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": config.FOCAL_LOSS_GAMMA,
            "test_score_thresh": config.SCORE_THRESH_TEST,
            "test_topk_candidates": config.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": config.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward_training(
        self, images: Any, features: List[Any], predictions: Sequence[List[Any]], gt_instances: List[Instances]
    ) -> Dict[str, Any]:
        """Compute Detectron2's losses in float32. Its box loss fails on half-precision boxes under autocast."""
        predictions = [[full_precision(level) for level in levels] for levels in predictions]
        return super().forward_training(images, features, predictions, gt_instances)

    def label_anchors(self, anchors: List[Boxes], gt_instances: List[Instances]) -> Tuple[Any, Any]:
        """Label anchors also for an image without objects, on which v0.6 fails.

        Such an image gets an object outside of it, which contains no location.
        """
        return super().label_anchors(anchors, [image if len(image) else _outside(image) for image in gt_instances])

    def losses(
        self, anchors: List[Boxes], pred_logits: List[torch.Tensor], gt_labels: List[torch.Tensor], *predictions: Any
    ) -> Dict[str, torch.Tensor]:
        """Compute Detectron2's losses, without those of locations with the label -1. RetinaNet ignores that label, too.

        Args:
            pred_logits: by level, (B, places, n).
            gt_labels: by image, (places of all levels,).
        """
        is_ignored = torch.stack(gt_labels) < 0
        by_level = is_ignored.split([level.shape[1] for level in pred_logits], dim=1)
        # A background logit that is so low has a loss of 0, and its gradient stays here.
        logits = [level.masked_fill(ignored[..., None], LOWEST) for level, ignored in zip(pred_logits, by_level)]
        labels = [image.where(image >= 0, self.num_classes) for image in gt_labels]
        return super().losses(anchors, logits, labels, *predictions)


def _norm(name: str) -> Any:
    """Return the norm's name, or a function for GroupNorm.

    v0.6's head builds a norm of a single channel to see the norm's type. GroupNorm on current torch refuses that.
    """
    return (lambda channels: get_norm(name, 32 if channels == 1 else channels)) if name == "GN" else name


def _outside(empty: Instances) -> Instances:
    """Return an object outside of an image that has no objects."""
    instances = Instances(empty.image_size)
    instances.gt_boxes = Boxes(empty.gt_boxes.tensor.new_tensor([[-2.0, -2.0, -1.0, -1.0]]))
    instances.gt_classes = empty.gt_classes.new_zeros(1)
    return instances
