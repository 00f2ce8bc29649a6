"""The config keys of the backbones, and the checks of their values."""

import re
from typing import Any, Dict, List, Sequence, Tuple

from detectron2.config import CfgNode

from ..errors import GDetKDError, similar, some

# The node of a builder's keys, by MODEL.BACKBONE.NAME.
NODES = {"build_torchvision_fpn_backbone": "TORCHVISION", "build_timm_fpn_backbone": "TIMM"}
# Number of levels that each MODEL.<node>.TOP_BLOCK adds to the pyramid.
TOP_BLOCKS = {"": 0, "LastLevelMaxPool": 1, "LastLevelP6P7": 2}
NORMS = ("BN", "FrozenBN", "SyncBN")
LEVEL = re.compile(r"res([1-9])")


def add_backbone_config(cfg: CfgNode) -> None:
    """Add the keys of the backbones to a Detectron2 config, in place. `add_gdetkd_config` calls this, too.

    MODEL.FPN names the levels and the width of the pyramid, and MODEL.BACKBONE.FREEZE_AT what is frozen, as for
    Detectron2's ResNets. "res2" to "res5" are the feature maps of strides 4 to 32 (docs/backbones.md).
    """
    # A model of torchvision, for MODEL.BACKBONE.NAME "build_torchvision_fpn_backbone". NAME is a name of
    # torchvision.models.list_models(module=torchvision.models).
    _add_node(cfg, "TORCHVISION", "mobilenet_v2")
    # A model of timm, for MODEL.BACKBONE.NAME "build_timm_fpn_backbone" (pip install 'timm>=1.0.22'). NAME is a
    # name of timm.list_models(), or such a name with the tag of its weights ("vit_tiny_patch16_224.augreg_in21k").
    _add_node(cfg, "TIMM", "mobilenetv4_conv_small")


def _add_node(cfg: CfgNode, name: str, model: str) -> None:
    node = cfg.MODEL[name] = CfgNode()
    node.NAME = model
    # The library's file of ImageNet weights of this model, a path on this machine. A training starts the backbone from
    # it, before MODEL.WEIGHTS is loaded. A run that resumes, an evaluation, an export and a teacher do not read it.
    # Empty: random weights.
    node.WEIGHTS = ""
    # What becomes of the model's BatchNorm layers, as MODEL.RESNETS.NORM: "FrozenBN", "BN" or "SyncBN". Other norms,
    # such as LayerNorm, stay.
    node.NORM = "FrozenBN"
    # Levels above the last level of MODEL.FPN.IN_FEATURES, by the name of Detectron2's module:
    # - "LastLevelMaxPool": one level, as in Detectron2's Faster R-CNN (p6 above p5),
    # - "LastLevelP6P7": two levels by convolutions, for RetinaNet and FCOS (p6 and p7, made from p5),
    # - "": none.
    node.TOP_BLOCK = "LastLevelMaxPool"


def node_of(cfg: CfgNode) -> str:
    """Return the name of the node that the config's backbone reads, or "" for a backbone of Detectron2."""
    return NODES.get(cfg.MODEL.BACKBONE.NAME, "")


def added_levels(cfg: CfgNode) -> Tuple[str, ...]:
    """Return the levels that TOP_BLOCK adds to those of MODEL.FPN.IN_FEATURES, for one of these backbones."""
    last = max((int(match[1]) for match in map(LEVEL.fullmatch, cfg.MODEL.FPN.IN_FEATURES) if match), default=0)
    count = TOP_BLOCKS.get(cfg.MODEL[node_of(cfg)].TOP_BLOCK, 0)
    return tuple(f"p{last + number}" for number in range(1, count + 1))


def wrong_values(cfg: CfgNode) -> List[str]:
    """Describe the invalid values among the keys of the config's backbone. Other backbones have none."""
    name = node_of(cfg)
    if not name:
        return []
    node, wrong = cfg.MODEL[name], []
    for key, known in (("NORM", NORMS), ("TOP_BLOCK", tuple(TOP_BLOCKS))):
        if node[key] not in known:
            wrong.append(f"MODEL.{name}.{key} is {node[key]!r} and must be {' or '.join(map(repr, known))}")
    levels = [LEVEL.fullmatch(level) for level in cfg.MODEL.FPN.IN_FEATURES]
    numbers = [int(match[1]) for match in levels if match]
    if not numbers or len(numbers) < len(levels) or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        wrong.append(
            f"MODEL.FPN.IN_FEATURES is {cfg.MODEL.FPN.IN_FEATURES} and must name consecutive levels, for example "
            "['res2', 'res3', 'res4', 'res5'] for strides 4 to 32"
        )
    if len(cfg.MODEL.PIXEL_MEAN) != 3:
        wrong.append(f"MODEL.PIXEL_MEAN has {len(cfg.MODEL.PIXEL_MEAN)} values and must have 3: models read RGB images")
    return wrong


def check_backbone_values(cfg: CfgNode) -> None:
    """
    Raises:
        GDetKDError: a key of the config's backbone has an invalid value.
    """
    if wrong := wrong_values(cfg):
        raise GDetKDError(f"The config has invalid values: {'; '.join(wrong)}. Correct them.")


def check_model_name(key: str, name: str, known: Sequence[str]) -> None:
    """
    Raises:
        GDetKDError: the library has no model of this name.
    """
    if name not in known:
        raise GDetKDError(f"{key} is {name!r}, which is no model of the library. Did you mean {similar(name, known)}?")


def check_levels(key: str, name: str, wanted: Sequence[str], made: Dict[str, Any]) -> None:
    """
    Raises:
        GDetKDError: the model lacks a feature map that MODEL.FPN.IN_FEATURES names.
    """
    lacking = [level for level in wanted if level not in made]
    if lacking:
        raise GDetKDError(
            f"{key} {name!r} has no feature map {some(lacking)}, which MODEL.FPN.IN_FEATURES names. Its feature maps "
            f"are {', '.join(f'{level} (stride {level_stride(level)})' for level in made) or 'none'}. Name these, or "
            "choose another model."
        )


def level_stride(level: str) -> int:
    """Return the stride of a level such as "res4"."""
    return 2 ** int(LEVEL.fullmatch(level)[1])


def level_of(stride: int) -> str:
    """Return the level of a stride: "res4" for 16. It is empty for a stride that is no power of two from 2 to 512."""
    level = f"res{stride.bit_length() - 1}"
    return level if LEVEL.fullmatch(level) and level_stride(level) == stride else ""
