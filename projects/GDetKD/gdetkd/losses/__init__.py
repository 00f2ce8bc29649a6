from .build import DISTILL_LOSS_REGISTRY, DistillLoss, build_losses
from .ckd import CKD, contrastive_distillation
from .class_aware_localization import REG, class_aware_localization, confidence_weighted_localization
from .sgfi import SGFI, level_attention, semantic_guided_imitation
from .soft_classification import CLS, soft_binary_classification, soft_classification

__all__ = [
    "CKD",
    "CLS",
    "DISTILL_LOSS_REGISTRY",
    "DistillLoss",
    "REG",
    "SGFI",
    "build_losses",
    "class_aware_localization",
    "confidence_weighted_localization",
    "contrastive_distillation",
    "level_attention",
    "semantic_guided_imitation",
    "soft_binary_classification",
    "soft_classification",
]
