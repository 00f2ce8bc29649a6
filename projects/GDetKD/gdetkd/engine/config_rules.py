"""Check the numbers and names of a config before anything is built."""

import math
from typing import Any, Callable, List, NamedTuple, Sequence

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detectron2.utils.registry import Registry

from .._compat import has_compiled_ops
from ..backbones.config import added_levels, node_of, wrong_values
from ..config import student_architecture
from ..dotted_keys import get_key
from ..errors import GDetKDError, similar
from ..teacher.torchvision_file import PREFIX as TORCHVISION
from .evaluators import wrong_implementation
from .trackers import TRACKERS, missing_packages

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


class Rule(NamedTuple):
    """Hold a key, a test of its value, and a description of valid values."""

    key: str
    holds: Callable[[Any], bool]
    wanted: str


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: _is_finite(value) and value >= least


def _each_at_least(least: int) -> Callable[[Any], bool]:
    return lambda values: all(_is_finite(value) and value >= least for value in _as_tuple(values))


def _as_tuple(values: Any) -> Sequence[Any]:
    return values if isinstance(values, (tuple, list)) else (values,)


def _is_rising(values: Sequence[Any]) -> bool:
    return all(map(_is_finite, values)) and list(values) == sorted(set(values)) and all(value > 0 for value in values)


RULES = (
    Rule("SOLVER.IMS_PER_BATCH", _at_least(1), "1 or more images a step"),
    Rule("SOLVER.MAX_ITER", _at_least(1), "1 or more iterations"),
    Rule("SOLVER.CHECKPOINT_PERIOD", _at_least(1), "1 or more iterations between two checkpoints"),
    Rule("SOLVER.BASE_LR", lambda value: _is_finite(value) and value > 0, "a positive learning rate"),
    Rule("SOLVER.GAMMA", lambda value: _is_finite(value) and value > 0, "a positive factor"),
    Rule("SOLVER.STEPS", _is_rising, "positive iteration numbers in increasing order"),
    Rule("SOLVER.WARMUP_ITERS", _at_least(0), "0 or more iterations"),
    Rule("SOLVER.WEIGHT_DECAY", _at_least(0), "0 or more"),
    Rule("TEST.EVAL_PERIOD", _at_least(-1), "the iterations between two evaluations, or 0 to evaluate only at the end"),
    Rule("TEST.PATIENCE", _at_least(0), "the number of evaluations without a rise of the AP, or 0 for no limit"),
    Rule("TEST.DETECTIONS_PER_IMAGE", lambda value: _at_least(1)(value) or value == -1, "1 or more, or -1 for all"),
    Rule("LOG.WRITERS", lambda names: set(names) <= set(TRACKERS), f"some of {tuple(TRACKERS)}, or ()"),
    Rule("LOG.PROJECT", bool, "the name of a project"),
    Rule("DATALOADER.NUM_WORKERS", _at_least(0), "0 or more processes"),
    Rule("DISTILL.TEACHER.CACHE_MB", _at_least(0), "0 or more megabytes"),
    Rule("DISTILL.TEACHER.SCALE", lambda value: _is_finite(value) and value > 0, "a positive factor"),
    Rule("INPUT.MIN_SIZE_TRAIN", _each_at_least(0), "a size in pixels, or 0 for no resizing"),
    Rule("INPUT.MAX_SIZE_TRAIN", _at_least(1), "1 or more pixels"),
    Rule("INPUT.MIN_SIZE_TEST", _at_least(0), "a size in pixels, or 0 for no resizing"),
    Rule("INPUT.MAX_SIZE_TEST", _at_least(1), "1 or more pixels"),
    Rule("INPUT.MAX_BAD_FRACTION", lambda value: _is_finite(value) and 0 <= value <= 1, "a share from 0 to 1"),
    Rule("DISTILL.UNLABELED.FRACTION", lambda value: _is_finite(value) and 0 < value < 1, "between 0 and 1"),
    Rule("DISTILL.UNLABELED.WEIGHT", _at_least(0), "0 or more"),
    Rule("DISTILL.UNTIL", lambda value: _is_finite(value) and 0 < value <= 1, "a share above 0 and up to 1"),
    Rule("DISTILL.WEIGHTS", lambda value: value in ("fixed", "auto"), '"fixed" or "auto"'),
    Rule("DISTILL.AUTO.PERIOD", _at_least(1), "1 or more iterations between two measurements"),
    Rule("DISTILL.AUTO.MOMENTUM", lambda value: _is_finite(value) and 0 <= value < 1, "0 or more and below 1"),
    Rule("DISTILL.WARMUP_ITERS", _at_least(0), "0 or more iterations"),
    Rule("DISTILL.SKIP_NONFINITE", _at_least(0), "0 or more steps"),
)


def check_values(cfg: CfgNode) -> None:
    """Check all values of a config that a training reads.

    Raises:
        GDetKDError: a value is invalid. The message names all invalid values.
    """
    wrong = [
        f"{rule.key} is {get_key(cfg, rule.key)!r} and must be {rule.wanted}"
        for rule in RULES
        if not rule.holds(get_key(cfg, rule.key))
    ]
    wrong += _wrong_weights(cfg) + _wrong_patience(cfg) + _wrong_transfer(cfg)
    _refuse(wrong + missing_packages(cfg) + _wrong_parts(cfg))


def check_parts(cfg: CfgNode) -> None:
    """Check what an evaluation needs, too: names of parts, levels, TEST.COCO_EVAL, and what GDetKD does not support.

    Raises:
        GDetKDError: a value is invalid. The message names all invalid values.
    """
    _refuse(_wrong_parts(cfg))


def _wrong_parts(cfg: CfgNode) -> List[str]:
    return _unknown_names(cfg) + _unsupported(cfg) + wrong_values(cfg) + _wrong_levels(cfg) + wrong_implementation(cfg)


def _refuse(wrong: List[str]) -> None:
    if wrong:
        raise GDetKDError(
            f"The config has invalid values: {'; '.join(wrong)}. Correct them in the file or on the command line."
        )


def _wrong_weights(cfg: CfgNode) -> List[str]:
    known = [name for name in cfg.DISTILL.LOSSES if "WEIGHT" in cfg.DISTILL.get(name, ())]
    return [
        f"DISTILL.{name}.{key} is {cfg.DISTILL[name][key]!r} and must be 0 or more"
        for name in known
        for key in ("WEIGHT", "SHARE")
        if not _at_least(0)(cfg.DISTILL[name][key])
    ]


def _wrong_patience(cfg: CfgNode) -> List[str]:
    """Check that a training with TEST.PATIENCE is evaluated while it runs."""
    patience, wrong = cfg.TEST.PATIENCE, []
    if patience > 0 and not cfg.DATASETS.TEST:
        wrong.append(f"TEST.PATIENCE is {patience}, but DATASETS.TEST is empty: name a dataset to evaluate on")
    if patience > 0 and cfg.TEST.EVAL_PERIOD <= 0:
        wrong.append(
            f"TEST.PATIENCE is {patience}, but TEST.EVAL_PERIOD is {cfg.TEST.EVAL_PERIOD}, so there is no evaluation "
            "before the end: set it to a number of iterations"
        )
    return wrong


def _wrong_transfer(cfg: CfgNode) -> List[str]:
    """Check the teacher of head transfer. torchvision's classification layers have the background first."""
    if not (cfg.DISTILL.HEAD_TRANSFER and cfg.DISTILL.TEACHER.CONFIG_FILE.startswith(TORCHVISION)):
        return []
    return [
        "DISTILL.HEAD_TRANSFER is True, but the classes of a torchvision teacher have another order than Detectron2's: "
        "set it to False"
    ]


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


def _unsupported(cfg: CfgNode) -> List[str]:
    wrong = []
    if cfg.TEST.AUG.ENABLED:
        wrong.append("TEST.AUG.ENABLED is True, but GDetKD does not support test-time augmentation: set it to False")
    if cfg.TEST.DETECTIONS_PER_IMAGE == -1 and student_architecture(cfg) in DENSE:
        wrong.append(
            f"TEST.DETECTIONS_PER_IMAGE is -1, which makes a {student_architecture(cfg)} leave out a detection: set it "
            "to a number"
        )
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE) and not has_compiled_ops():
        wrong.append(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE asks for deformable convolutions, which need Detectron2's compiled "
            "extension: build Detectron2 from source, or set it to [False, False, False, False]"
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
