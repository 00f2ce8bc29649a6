"""Convert a checkpoint of mmdetection 2.x or 3.x to a Detectron2 checkpoint and a config."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from ..config import add_gdetkd_config
from ..dotted_keys import nested_config
from ..errors import GDetKDError, first_line, some
from ..files import written_whole
from .checkpoint import MMDetCheckpoint, read_checkpoint
from .keys import detectron2_keys
from .rules import check_part, either, kind_of
from .settings import DETECTORS
from .tensors import convert_tensors


@dataclass(frozen=True)
class Converted:
    """Hold a converted detector.

    Attributes:
        source: the mmdetection checkpoint.
        tensors: weights by Detectron2's names.
        keys: keys of a Detectron2 config, by dotted name.
        classes: class names in order, or None if they are unknown.
    """

    source: str
    tensors: Dict[str, torch.Tensor]
    keys: Dict[str, Any]
    classes: Optional[Tuple[str, ...]]

    def notes(self) -> List[str]:
        """Return what the user has to know or to do, sentence by sentence."""
        notes = []
        if "DATASETS.TRAIN" not in self.keys:
            known = f"DISTILL.TEACHER.CLASSES: {json.dumps(self.classes)}. Put this into the student's config."
            unknown = (
                "The checkpoint does not tell the class names. List them in order in the student's config, "
                "DISTILL.TEACHER.CLASSES."
            )
            notes.append(known if self.classes else unknown)
        if "INPUT.MIN_SIZE_TEST" not in self.keys:
            notes.append("The config tells no size of test images. --eval-teacher takes 800 and at most 1333 pixels.")
        return notes


def convert(path: str, config_file: str = "", drop_masks: bool = False) -> Converted:
    """Convert a checkpoint. The converted tensors are all that the detector of the keys has, by name and shape.

    Args:
        path: an mmdetection checkpoint.
        config_file: the detector's config file of mmdetection, if the one in the checkpoint is missing or unreadable.
        drop_masks: leave out the mask heads.

    Raises:
        UntrustedFileError, DamagedFileError, UnreadableFileError: see `read_weights`.
        GDetKDError: the detector has something that Detectron2 cannot do, or that is not known here.
    """
    return convert_checkpoint(read_checkpoint(path, config_file), drop_masks)


def convert_checkpoint(checkpoint: MMDetCheckpoint, drop_masks: bool = False) -> Converted:
    """Convert a checkpoint that is read already. See `convert`."""
    if drop_masks:
        checkpoint = _without_masks(checkpoint)
    model, path = checkpoint.model, checkpoint.path
    kind = kind_of(model)
    if kind not in DETECTORS:
        raise GDetKDError(
            f"The detector in {path!r} is a {kind or 'model without a type'}. Only a {either(DETECTORS)} of "
            "mmdetection can be converted. Choose another checkpoint, or name the detector's own config with --config."
        )
    check_part(model, DETECTORS[kind], "model")
    try:
        keys = detectron2_keys(checkpoint.config, checkpoint.classes)
        tensors = convert_tensors(checkpoint.tensors, model)
        detector = _build(keys)
    except GDetKDError:
        raise
    except (TypeError, ValueError, LookupError, AssertionError, ArithmeticError, RuntimeError) as e:
        raise GDetKDError(
            f"The mmdetection config of {path!r} describes no detector that Detectron2 can build ({type(e).__name__}: "
            f"{first_line(e)}). Name the detector's own config file with --config."
        ) from e
    _check_fit(detector, tensors)
    _check_number(checkpoint.classes, next(keys[key] for key in keys if key.endswith(".NUM_CLASSES")))
    return Converted(path, tensors, keys, checkpoint.classes)


def _without_masks(checkpoint: MMDetCheckpoint) -> MMDetCheckpoint:
    model = checkpoint.model
    roi_head = model.get("roi_head")
    if not isinstance(roi_head, dict) or "mask_head" not in roi_head:
        raise GDetKDError(f"The detector in {checkpoint.path!r} has no mask head. Leave out --drop-masks.")
    roi_head = {name: value for name, value in roi_head.items() if not name.startswith("mask_")}
    kind = "FasterRCNN" if kind_of(model) == "MaskRCNN" else model.get("type")
    tensors = {name: value for name, value in checkpoint.tensors.items() if not name.startswith("roi_head.mask_head.")}
    config = {**checkpoint.config, "model": {**model, "type": kind, "roi_head": roi_head}}
    return replace(checkpoint, tensors=tensors, config=config)


def _build(keys: Dict[str, Any]) -> torch.nn.Module:
    """Build a detector without memory for its weights, for their names and shapes."""
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(nested_config({**keys, "MODEL.DEVICE": "meta"})))
    with torch.device("meta"):
        return build_model(cfg)


def _check_fit(detector: torch.nn.Module, tensors: Dict[str, torch.Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in detector.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    both = [name for name in wanted if name in found and wanted[name] != found[name]]
    misshapen = [f"{name} {found[name]} for {wanted[name]}" for name in both]
    problems = {"lacks": missing, "also has": extra, "has in other shapes": misshapen}
    if any(problems.values()):
        text = "; ".join(f"it {verb} {some(names)}" for verb, names in problems.items() if names)
        raise GDetKDError(
            f"The checkpoint does not hold the detector that its config describes: {text}. Name the detector's own "
            "config file with --config, or choose another checkpoint."
        )


def _check_number(classes: Optional[Tuple[str, ...]], number: int) -> None:
    if classes is not None and len(classes) != number:
        raise GDetKDError(
            f"The checkpoint names {len(classes)} classes ({some(classes)}), but its config says {number}. Name the "
            "detector's own config file with --config."
        )


def write(converted: Converted, weights: Path) -> Path:
    """Write the weights, and a config beside them that names them. The config's name ends in .yaml.

    Returns:
        path of the config.

    Raises:
        OSError: a file cannot be written.
    """
    config = weights.with_suffix(".yaml")
    weights.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(str(weights), "wb") as file:
        torch.save({"model": converted.tensors}, file)
    nested = nested_config({**converted.keys, "MODEL.WEIGHTS": str(weights), "VERSION": 2})
    comments = [f"Converted from {json.dumps(Path(converted.source).name)} of mmdetection.", *converted.notes()]
    with written_whole(str(config)) as file:
        file.write("".join(f"# {comment}\n" for comment in comments))
        file.write(yaml.safe_dump(nested, default_flow_style=None, width=120))
    return config
