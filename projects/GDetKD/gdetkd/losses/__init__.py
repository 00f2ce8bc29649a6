from .build import DISTILL_LOSS_REGISTRY, DistillLoss, build_losses
from .ckd import CKD, contrastive_distillation
from .class_aware_localization import (
    REG,
    class_aware_localization,
    confidence_weighted_localization,
    probability_weighted_localization,
)
from .crosskd import CROSSKD, cross_classification, cross_localization
from .cwd import CWD, channel_wise_distillation
from .fgd import FGD, attention_imitation, focal_imitation
from .fgfi import FGFI, fine_grained_imitation
from .fitnet import FITNET, whole_map_imitation
from .gt_mask import GTMASK, ground_truth_mask_imitation
from .mgd import MGD, masked_generation
from .pkd import PKD, pearson_imitation
from .roi_imitation import ROIFI, roi_imitation
from .sgfi import SGFI, level_attention, semantic_guided_imitation
from .soft_classification import CLS, soft_binary_classification, soft_classification

__all__ = [
    "CKD",
    "CLS",
    "CROSSKD",
    "CWD",
    "DISTILL_LOSS_REGISTRY",
    "DistillLoss",
    "FGD",
    "FGFI",
    "FITNET",
    "GTMASK",
    "MGD",
    "PKD",
    "REG",
    "ROIFI",
    "SGFI",
    "attention_imitation",
    "build_losses",
    "channel_wise_distillation",
    "class_aware_localization",
    "confidence_weighted_localization",
    "contrastive_distillation",
    "cross_classification",
    "cross_localization",
    "fine_grained_imitation",
    "focal_imitation",
    "ground_truth_mask_imitation",
    "level_attention",
    "masked_generation",
    "pearson_imitation",
    "probability_weighted_localization",
    "roi_imitation",
    "semantic_guided_imitation",
    "soft_binary_classification",
    "soft_classification",
    "whole_map_imitation",
]
