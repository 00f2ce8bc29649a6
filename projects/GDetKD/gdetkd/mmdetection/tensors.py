"""Give mmdetection's tensors Detectron2's names, and its anchors Detectron2's order."""

import re
from typing import Any, Callable, Dict, Iterable, List, Mapping, Match, Optional, Tuple, Union

import torch

from ..errors import GDetKDError, some
from .keys import anchor_shapes
from .rules import kind_of

PAIR = r"(weight|bias)"
NORM = r"(weight|bias|running_mean|running_var)"
# A pattern of mmdetection's names, and Detectron2's name, in which \1 and so on stand for the pattern's groups.
Rename = Tuple[str, Union[str, Callable[[Match], str]]]
STEM = "backbone.bottom_up.stem.conv1"


def _stage(match: Match) -> str:
    return f"backbone.bottom_up.res{int(match[1]) + 1}.{match[2]}"


RESNET: List[Rename] = [
    (r"backbone\.conv1\.weight", f"{STEM}.weight"),
    (rf"backbone\.bn1\.{NORM}", rf"{STEM}.norm.\1"),
    (r"backbone\.layer(\d)\.(\d+)\.conv(\d)\.weight", lambda m: f"{_stage(m)}.conv{m[3]}.weight"),
    (rf"backbone\.layer(\d)\.(\d+)\.bn(\d)\.{NORM}", lambda m: f"{_stage(m)}.conv{m[3]}.norm.{m[4]}"),
    (r"backbone\.layer(\d)\.(\d+)\.downsample\.0\.weight", lambda m: f"{_stage(m)}.shortcut.weight"),
    (rf"backbone\.layer(\d)\.(\d+)\.downsample\.1\.{NORM}", lambda m: f"{_stage(m)}.shortcut.norm.{m[3]}"),
]
RPN: List[Rename] = [
    (rf"rpn_head\.rpn_conv\.{PAIR}", r"proposal_generator.rpn_head.conv.\1"),
    (rf"rpn_head\.rpn_cls\.{PAIR}", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (rf"rpn_head\.rpn_reg\.{PAIR}", r"proposal_generator.rpn_head.anchor_deltas.\1"),
]
# The number of a cascade's stage, with a point before it, is the first group.
ROI_HEADS: List[Rename] = [
    (
        rf"roi_head\.bbox_head(\.\d)?\.shared_fcs\.(\d)\.{PAIR}",
        lambda m: f"roi_heads.box_head{m[1] or ''}.fc{int(m[2]) + 1}.{m[3]}",
    ),
    (rf"roi_head\.bbox_head(\.\d)?\.fc_cls\.{PAIR}", r"roi_heads.box_predictor\1.cls_score.\2"),
    (rf"roi_head\.bbox_head(\.\d)?\.fc_reg\.{PAIR}", r"roi_heads.box_predictor\1.bbox_pred.\2"),
    (
        rf"roi_head\.mask_head\.convs\.(\d+)\.conv\.{PAIR}",
        lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}.{m[2]}",
    ),
    (rf"roi_head\.mask_head\.upsample\.{PAIR}", r"roi_heads.mask_head.deconv.\1"),
    (rf"roi_head\.mask_head\.conv_logits\.{PAIR}", r"roi_heads.mask_head.predictor.\1"),
]
RETINANET: List[Rename] = [
    (rf"bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.{PAIR}", lambda m: _tower(m[1], 2 * int(m[2]), m[3])),
    (rf"bbox_head\.retina_cls\.{PAIR}", r"head.cls_score.\1"),
    (rf"bbox_head\.retina_reg\.{PAIR}", r"head.bbox_pred.\1"),
]
# Checkpoints of early 2.x say fcos_cls, fcos_reg and fcos_centerness.
FCOS: List[Rename] = [
    (rf"bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.{PAIR}", lambda m: _tower(m[1], 3 * int(m[2]), m[3])),
    (rf"bbox_head\.(cls|reg)_convs\.(\d+)\.gn\.{PAIR}", lambda m: _tower(m[1], 3 * int(m[2]) + 1, m[3])),
    (rf"bbox_head\.(?:conv|fcos)_cls\.{PAIR}", r"head.cls_score.\1"),
    (rf"bbox_head\.(?:conv|fcos)_reg\.{PAIR}", r"head.bbox_pred.\1"),
    (rf"bbox_head\.(?:conv|fcos)_centerness\.{PAIR}", r"head.ctrness.\1"),
    (r"bbox_head\.scales\.(\d+)\.scale", r"head.level_scales.\1"),
]
HEADS = {"RetinaNet": RETINANET, "FCOS": FCOS}


def _tower(kind: str, index: int, name: str) -> str:
    """Return the name in a tower of Detectron2, which numbers convolutions, norms and activations in one row."""
    return f"head.{'cls' if kind == 'cls' else 'bbox'}_subnet.{index}.{name}"


def convert_tensors(tensors: Mapping[str, torch.Tensor], model: Mapping[str, Any]) -> Dict[str, torch.Tensor]:
    """Return the tensors of a detector as Detectron2 names and orders them.

    Args:
        tensors: by mmdetection's names.
        model: the detector's settings in mmdetection's config.

    Raises:
        GDetKDError: a tensor has an unknown name, or the anchors have another number than the settings say.
    """
    detector = kind_of(model)
    renames = [*RESNET, *_pyramid(tensors, 3 if detector in HEADS else 2), *HEADS.get(detector, [*RPN, *ROI_HEADS])]
    converted, unknown = {}, []
    for name, tensor in tensors.items():
        if name.endswith(".num_batches_tracked"):
            continue
        new_name = _rename(name, renames)
        if new_name is None:
            unknown.append(name)
        else:
            converted[new_name] = tensor.float() if tensor.is_floating_point() else tensor
    if unknown:
        raise GDetKDError(
            f"{len(unknown)} tensors have names that are unknown in a {detector}: {some(unknown)}. The detector has "
            "parts that are not converted. Choose another checkpoint."
        )
    if detector == "FCOS":
        return _complete_fcos(converted)
    return _reorder_anchors(converted, model)


def _rename(name: str, renames: Iterable[Rename]) -> Optional[str]:
    for pattern, replacement in renames:
        if match := re.fullmatch(pattern, name):
            return replacement(match) if callable(replacement) else match.expand(replacement)
    return None


def _pyramid(tensors: Mapping[str, torch.Tensor], first: int) -> List[Rename]:
    """Return the renames of an FPN whose first level is p2 or p3. Its last convolutions make p6 and p7."""
    laterals = sum(name.startswith("neck.lateral_convs.") and name.endswith(".weight") for name in tensors)

    def output(match: Match) -> str:
        is_extra, level = int(match[1]) >= laterals, int(match[1]) + first
        return f"backbone.{f'top_block.p{level}' if is_extra else f'fpn_output{level}'}.{match[2]}"

    return [
        (
            rf"neck\.lateral_convs\.(\d+)\.conv\.{PAIR}",
            lambda match: f"backbone.fpn_lateral{int(match[1]) + first}.{match[2]}",
        ),
        (rf"neck\.fpn_convs\.(\d+)\.conv\.{PAIR}", output),
    ]


def _complete_fcos(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Join the scales of the levels to one tensor, and give a bias of 0 to convolutions that have none.

    mmdetection leaves out the bias before a norm (conv_bias "auto"). Detectron2 always has one.
    """
    scales = {name: tensor for name, tensor in tensors.items() if name.startswith("head.level_scales.")}
    kept = {name: tensor for name, tensor in tensors.items() if name not in scales}
    if scales:
        ordered = sorted(scales, key=lambda name: int(name.rpartition(".")[2]))
        kept["head.level_scales"] = torch.stack([scales[name].reshape(()) for name in ordered])
    for name, tensor in list(kept.items()):
        if "_subnet." in name and name.endswith(".weight") and tensor.dim() == 4:
            kept.setdefault(name.replace(".weight", ".bias"), tensor.new_zeros(len(tensor)))
    return kept


def _reorder_anchors(tensors: Dict[str, torch.Tensor], model: Mapping[str, Any]) -> Dict[str, torch.Tensor]:
    """Change the order of a location's anchors: mmdetection goes ratio by ratio, Detectron2 size by size."""
    if kind_of(model) == "RetinaNet":
        head, names = model["bbox_head"], ("head.cls_score", "head.bbox_pred")
    else:
        prefix = "proposal_generator.rpn_head"
        head, names = model["rpn_head"], (f"{prefix}.objectness_logits", f"{prefix}.anchor_deltas")
    scales, ratios = map(len, anchor_shapes(head["anchor_generator"]))
    rows = dict(zip(names, (head["num_classes"] if kind_of(model) == "RetinaNet" else 1, 4)))
    reordered = dict(tensors)
    for name, tensor in tensors.items():
        of_an_anchor = rows.get(name.rpartition(".")[0])
        if of_an_anchor is None:
            continue
        if len(tensor) != ratios * scales * of_an_anchor:
            raise GDetKDError(
                f"{name} has {len(tensor)} rows, but {scales} scales and {ratios} ratios of anchors make "
                f"{ratios * scales * of_an_anchor}. Give the config and the checkpoint of the same detector; a softmax "
                "over background in this place is not converted."
            )
        by_ratio = tensor.unflatten(0, (ratios, scales, of_an_anchor))
        reordered[name] = by_ratio.transpose(0, 1).flatten(0, 2).contiguous()
    return reordered
