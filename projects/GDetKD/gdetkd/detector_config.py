"""Check the parts and the levels that a detector's config names, before the detector is built."""

from typing import List

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detectron2.utils.registry import Registry

from ._compat import has_compiled_ops
from ._compat.retinanet import retinanet_takes_group_norm
from .backbones.config import added_levels, node_of, wrong_values
from .config import student_architecture
from .dotted_keys import get_key
from .errors import similar

# Levels that Detectron2's and GDetKD's pyramids add to those of res2 to res5, by MODEL.BACKBONE.NAME.
TOP_LEVELS = {
    "build_resnet_fpn_backbone": ("p6",),
    "build_retinanet_resnet_fpn_backbone": ("p6", "p7"),
    "build_fcos_resnet_fpn_backbone": ("p6", "p7"),
    "build_mmdet_retinanet_resnet_fpn_backbone": ("p6", "p7"),
}
# Meta-architectures of dense detectors.
DENSE = ("RetinaNet", "FCOS")
# Detectron2 builds this proposal generator without a registry.
PRECOMPUTED = "PrecomputedProposals"
# Proposal generators, anchor generators and box heads that read the keys below.
READERS_OF_ANCHORS = ("RPN", "RRPN")
ANCHOR_GENERATORS = ("DefaultAnchorGenerator", "RotatedAnchorGenerator")
READERS_OF_LEVELS = ("StandardROIHeads", "CascadeROIHeads", "Res5ROIHeads", "RROIHeads")
# The keys in which a meta-architecture names the levels that it reads. Anchors lie on the levels of the first key.
LEVEL_KEYS = {
    "GeneralizedRCNN": ("MODEL.RPN.IN_FEATURES", "MODEL.ROI_HEADS.IN_FEATURES"),
    "RetinaNet": ("MODEL.RETINANET.IN_FEATURES",),
    "FCOS": ("MODEL.FCOS.IN_FEATURES",),
}
# Pooling layers of Detectron2's `ROIPooler`.
POOLERS = ("ROIAlign", "ROIAlignV2", "ROIAlignRotated", "ROIPool")


def needs_proposals(cfg: CfgNode) -> bool:
    """Return whether a detector finds no proposals itself, but reads precomputed ones."""
    return student_architecture(cfg) == "GeneralizedRCNN" and cfg.MODEL.PROPOSAL_GENERATOR.NAME == PRECOMPUTED


def wrong_parts(cfg: CfgNode) -> List[str]:
    """Return what is wrong with the parts and levels of the detector. The list is empty if nothing is wrong."""
    return _unknown_names(cfg) + _unbuildable(cfg) + wrong_values(cfg) + _wrong_levels(cfg)


def _unknown_names(cfg: CfgNode) -> List[str]:
    """Compare the names of parts with Detectron2's registries, whose errors do not name the config's key."""
    is_distilled = cfg.MODEL.META_ARCHITECTURE == "GDetKD"
    architecture = "DISTILL.STUDENT_META_ARCHITECTURE" if is_distilled else "MODEL.META_ARCHITECTURE"
    known = {architecture: _names(META_ARCH_REGISTRY), "MODEL.BACKBONE.NAME": _names(BACKBONE_REGISTRY)}
    if get_key(cfg, architecture) == "GeneralizedRCNN":
        known["MODEL.ROI_HEADS.NAME"] = _names(ROI_HEADS_REGISTRY)
        known["MODEL.PROPOSAL_GENERATOR.NAME"] = [*_names(PROPOSAL_GENERATOR_REGISTRY), PRECOMPUTED]
    wrong = []
    for key, names in known.items():
        name = get_key(cfg, key)
        if name not in names:
            wrong.append(f"{key} is {name!r}, which is not registered (did you mean {similar(str(name), names)}?)")
    return wrong


def _names(registry: Registry) -> List[str]:
    return [name for name, _ in registry]


def _unbuildable(cfg: CfgNode) -> List[str]:
    """Find values with which Detectron2 fails to build the detector, in errors that do not name the config's key."""
    architecture, wrong = student_architecture(cfg), []
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE) and not has_compiled_ops():
        wrong.append(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE asks for deformable convolutions, which need Detectron2's compiled "
            "extension: build Detectron2 from source, or set it to [False, False, False, False]"
        )
    if architecture == "GeneralizedRCNN":
        wrong += _unbuildable_heads(cfg)
    if architecture == "RetinaNet":
        if cfg.MODEL.RETINANET.NUM_CONVS < 1:
            wrong.append(f"MODEL.RETINANET.NUM_CONVS is {cfg.MODEL.RETINANET.NUM_CONVS} and must be 1 or more")
        if cfg.MODEL.RETINANET.NORM == "GN" and not retinanet_takes_group_norm():
            wrong.append(
                "MODEL.RETINANET.NORM is 'GN', with which this version of Detectron2 cannot build a RetinaNet: set it "
                "to 'BN' or '', or use a newer Detectron2"
            )
    return wrong


def _unbuildable_heads(cfg: CfgNode) -> List[str]:
    wrong = []
    pooler = cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE
    if cfg.MODEL.ROI_HEADS.NAME in READERS_OF_LEVELS and pooler not in POOLERS:
        wrong.append(f"MODEL.ROI_BOX_HEAD.POOLER_TYPE is {pooler!r} and must be one of {', '.join(POOLERS)}")
    if cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads" and not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        wrong.append(
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False, but a Cascade R-CNN regresses boxes for all classes "
            "alike: set it to True"
        )
    return wrong


def _wrong_levels(cfg: CfgNode) -> List[str]:
    """Compare the levels that the heads read with those of the pyramid, and the anchors with the levels.

    Only Detectron2's and GDetKD's parts are checked, because other parts may read other keys.
    """
    keys = _level_keys(cfg)
    wrong = []
    top = added_levels(cfg) if node_of(cfg) else TOP_LEVELS.get(cfg.MODEL.BACKBONE.NAME)
    if top is not None:
        made = [name.replace("res", "p") for name in cfg.MODEL.FPN.IN_FEATURES]
        made += top
        for key in keys:
            lacking = [name for name in get_key(cfg, key) if name not in made]
            if lacking:
                wrong.append(
                    f"{key} names {', '.join(lacking)}, but the pyramid has only {', '.join(made)}: remove the missing "
                    f"levels{_or_another_family(cfg)}"
                )
    has_anchors = keys and keys[0] in ("MODEL.RPN.IN_FEATURES", "MODEL.RETINANET.IN_FEATURES")
    if has_anchors and cfg.MODEL.ANCHOR_GENERATOR.NAME in ANCHOR_GENERATORS:
        wrong += _wrong_anchors(cfg, keys[0], len(get_key(cfg, keys[0])))
    return wrong


def _or_another_family(cfg: CfgNode) -> str:
    """Return a further remedy: the config may name another family than the one that it was written for."""
    architecture = student_architecture(cfg)
    if architecture in DENSE:
        return f", or start from configs/COCO-Detection/Base-{architecture}.yaml"
    if cfg.MODEL.META_ARCHITECTURE != "GDetKD" or architecture != "GeneralizedRCNN":
        return ""
    return ", or set DISTILL.STUDENT_META_ARCHITECTURE if the student is a RetinaNet or FCOS"


def _level_keys(cfg: CfgNode) -> List[str]:
    architecture = student_architecture(cfg)
    keys = list(LEVEL_KEYS.get(architecture, ()))
    if architecture == "GeneralizedRCNN":
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME not in READERS_OF_ANCHORS:
            keys.remove("MODEL.RPN.IN_FEATURES")
        if cfg.MODEL.ROI_HEADS.NAME not in READERS_OF_LEVELS:
            keys.remove("MODEL.ROI_HEADS.IN_FEATURES")
    return keys


def _wrong_anchors(cfg: CfgNode, key: str, levels: int) -> List[str]:
    wrong = []
    for name in ("SIZES", "ASPECT_RATIOS"):
        value = cfg.MODEL.ANCHOR_GENERATOR[name]
        # Detectron2 takes a plain list of numbers for all levels.
        given = len(value) if value and isinstance(value[0], (list, tuple)) else 1
        if not value or given not in (1, levels):
            wrong.append(
                f"MODEL.ANCHOR_GENERATOR.{name} has {given if value else 0} lists, but needs 1 list or {levels} lists, "
                f"one for each level in {key}"
            )
    return wrong
