"""Config keys of the losses that others published: their authors' values, where they are for detectors.

A sum over channels and cells grows with the image, and the authors' factors are for COCO's (short side 800, 256
channels): smaller images and narrower pyramids want larger ones.
"""

from typing import Dict

from detectron2.config import CfgNode


def add_rival_nodes(cfg: CfgNode) -> None:
    """Adds DISTILL.<loss> of each, in place."""
    # Whole-map imitation. FitNets are classifiers: the weight is ours.
    _add_node(cfg, "FITNET", 1.0)
    # Imitation within ground-truth boxes. The weight is ours: no source gives one.
    _add_node(cfg, "GTMASK", 1.0)
    # RoI imitation on the same level, with RoIAlign samples per bin and axis on the student's pyramid. The weight is
    # ours: no source gives one.
    _add_node(cfg, "ROIFI", 1.0, SAMPLING_RATIO=2)
    # Imitation near objects; psi, the share of an object's largest IoU with an anchor from which on an anchor is near.
    # PER_LEVEL: the largest on the anchor's own level, not on all; the authors have one level. The term is a sum over
    # channels, and the weight is for one map of 512 of a VGG.
    _add_node(cfg, "FGFI", 0.01, IOU_FACTOR=0.5, PER_LEVEL=False)
    # Channel-wise distillation; the temperature of the softmax over locations. MMRazor's, for pyramids of detectors.
    _add_node(cfg, "CWD", 10.0, TEMPERATURE=1.0)
    # Pearson correlation; the weight is the authors' where student or teacher is two-stage, and they take 10 between
    # dense detectors. ALIGN: 1x1 adapters where the pyramids' widths differ, which is an error without; ours.
    _add_node(cfg, "PKD", 6.0, ALIGN=False)

    # The authors' values differ by the student's family; the one that it is of counts.
    _add_node(cfg, "FGD", 1.0)
    # Factors on objects, background, attention and global relation; the temperature of the attentions.
    cfg.DISTILL.FGD.TWO_STAGE = _node(ALPHA=5e-5, BETA=2.5e-5, GAMMA=5e-5, LAMBDA=5e-7, TEMPERATURE=0.5)
    cfg.DISTILL.FGD.ANCHOR_BASED = _node(ALPHA=1e-3, BETA=5e-4, GAMMA=5e-4, LAMBDA=5e-6, TEMPERATURE=0.5)
    cfg.DISTILL.FGD.ANCHOR_FREE = _node(ALPHA=1.6e-3, BETA=8e-4, GAMMA=8e-4, LAMBDA=8e-6, TEMPERATURE=0.8)

    _add_node(cfg, "MGD", 1.0)
    # The factor on the term, and the share of the student's cells that is masked.
    cfg.DISTILL.MGD.TWO_STAGE = _node(ALPHA=5e-7, MASK_RATIO=0.45)
    cfg.DISTILL.MGD.ANCHOR_BASED = _node(ALPHA=2e-5, MASK_RATIO=0.65)
    cfg.DISTILL.MGD.ANCHOR_FREE = _node(ALPHA=2e-5, MASK_RATIO=0.65)

    # Cross-head distillation of dense detectors; the exponent of the difference of scores.
    _add_node(cfg, "CROSSKD", 1.0, BETA=1.0)
    # By the teacher's family: factors on classes and boxes; convolutions of the student's towers before the teacher's.
    cfg.DISTILL.CROSSKD.ANCHOR_BASED = _node(CLS_WEIGHT=1.0, REG_WEIGHT=1.0, SHARED_CONVS=3)
    cfg.DISTILL.CROSSKD.ANCHOR_FREE = _node(CLS_WEIGHT=0.4, REG_WEIGHT=0.75, SHARED_CONVS=2)


def _add_node(cfg: CfgNode, name: str, weight: float, **keys: object) -> None:
    # As of every loss: the factor on the term in the total, and the iterations over which it rises from 0.
    cfg.DISTILL[name] = _node(WEIGHT=weight, WARMUP_ITERS=0, **keys)


def _node(**keys: object) -> CfgNode:
    values: Dict[str, object] = keys
    return CfgNode(values)
