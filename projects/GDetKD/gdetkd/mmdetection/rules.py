"""Rules for the settings of an mmdetection config, and the check of a config against them."""

from dataclasses import dataclass, replace
from typing import Any, Dict, Iterable, Mapping, Tuple

from ..errors import GDetKDError

# Why Detectron2 cannot do otherwise, by the name of the setting.
REASONS = {
    "centerness_on_reg": "Detectron2's FCOS predicts the centerness from the box tower.",
    "norm_on_bbox": "Detectron2's FCOS predicts distances in strides, not their logarithms in pixels.",
    "target_means": "Detectron2's box deltas have no mean.",
    "reg_class_agnostic": "Detectron2's cascades predict one box for all classes.",
    "mask_head": "mmdetection's cascades have a mask head for each stage, Detectron2's have one. No loss distils "
    "masks. To leave them out, add --drop-masks.",
    "mask_roi_extractor": "To leave masks out, add --drop-masks.",
    "dcn": "Detectron2's deformable convolutions have other weights.",
    "center_offset": "mmdetection 1.x has such anchors.",
}


@dataclass(frozen=True)
class Only:
    """List the values that a setting may have.

    Attributes:
        values: the values, or none if every value can be converted.
        is_required: whether the setting must be there, because mmdetection's default cannot be converted.
    """

    values: Tuple[Any, ...] = ()
    is_required: bool = False


@dataclass(frozen=True)
class Part:
    """List the settings of a part of a detector.

    Attributes:
        settings: an `Only` or a `Part` by the setting's name.
        may_lack: whether the part can be missing.
        stages: the number of such parts in a row. All stages of a cascade may also share one.
    """

    settings: Mapping[str, Any]
    may_lack: bool = False
    stages: int = 1

    def changed(self, free: str = "", stages: int = 1, **settings: Any) -> "Part":
        """Return this part with further settings. `free` names settings that may have any value."""
        return replace(self, settings={**self.settings, **_any(free), **settings}, stages=stages)


def part(*free: str, may_lack: bool = False, **settings: Any) -> Part:
    """Describe a part.

    Args:
        free: names of settings, separated by spaces, that may have any value: they matter in training alone, the shapes
            of the tensors confirm them, or the conversion reads them.
        may_lack: whether the part can be missing.
        settings: an `Only` or a `Part` by the name of the setting.
    """
    return Part({**_any(" ".join(free)), **settings}, may_lack)


def _any(names: str) -> Dict[str, Only]:
    return {name: Only() for name in names.split()}


def only(*values: Any) -> Only:
    """Describe a setting that has one of these values or is missing."""
    return Only(values)


def required(*values: Any) -> Only:
    """Describe a setting that must be there and has one of these values."""
    return Only(values, is_required=True)


def given() -> Only:
    """Describe a setting that must be there and may have any value."""
    return Only(is_required=True)


def kind_of(settings: Mapping[str, Any]) -> str:
    """Return the type of a part, without the module that newer configs put before it."""
    return str(settings.get("type", "")).rpartition(".")[2]


def check_part(settings: Any, rules: Part, path: str) -> None:
    """Check the settings of a part of a detector.

    Args:
        settings: the settings, for example `model` of a config.
        rules: what the settings may be.
        path: the part's name, for messages.

    Raises:
        GDetKDError: a setting is unknown, is missing, or has a value that cannot be converted.
    """
    if settings is None and rules.may_lack:
        return
    if isinstance(settings, tuple) and len(settings) == rules.stages > 1:
        for stage, stage_settings in enumerate(settings):
            check_part(stage_settings, replace(rules, stages=1), f"{path}[{stage}]")
        return
    if not isinstance(settings, dict):
        found = "lacks" if settings is None else f"has another value than settings for ({short(settings)})"
        raise GDetKDError(f"The config {found} {path}, which is needed. Choose a complete config.")
    if "type" in rules.settings:  # another type has other settings, so its name says more than theirs
        _check_value(settings, "type", rules.settings["type"], f"{path}.type")
    for name in sorted(set(settings) - set(rules.settings)):
        raise GDetKDError(
            f"The config has {path}.{name} = {short(settings[name])}. This setting is not known here, so Detectron2 "
            "may not do the same. If it matters in training alone, remove it from a copy of the config, and name the "
            "copy with --config."
        )
    for name, rule in rules.settings.items():
        if isinstance(rule, Part):
            check_part(settings.get(name), rule, f"{path}.{name}")
        else:
            _check_value(settings, name, rule, f"{path}.{name}")


def _check_value(settings: Mapping[str, Any], name: str, rule: Only, path: str) -> None:
    if name not in settings:
        if not rule.is_required:
            return
        found = f"lacks {path}"
    else:
        value = kind_of(settings) if name == "type" else settings[name]
        if not rule.values or value in rule.values:
            return
        found = f"has {path} = {short(value)}"
    wanted = f"Only {either(map(short, rule.values))} can be converted." if rule.values else "It is needed."
    raise GDetKDError(f"The config {found}. {wanted} {REASONS.get(name, '')}".strip())


def short(value: Any) -> str:
    """Return a value as Python writes it, but at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def either(words: Iterable[str]) -> str:
    """Join words for a message: "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
