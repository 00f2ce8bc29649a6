"""Read and compare configs by dotted keys, such as SOLVER.MAX_ITER."""

from typing import Any, Dict, Mapping

import yaml
from detectron2.config import CfgNode


def get_key(cfg: CfgNode, key: str) -> Any:
    """Return the value of a dotted key. Raise KeyError if the config has no such key."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            raise KeyError(key)
        node = node[part]
    return node


def group_of(loaded: Dict[str, Any], key: str) -> Dict[str, Any]:
    """Return the mapping in a loaded yaml file that may hold a dotted key. It is empty if the file has none."""
    for part in key.split(".")[:-1]:
        loaded = loaded.get(part)
        if not isinstance(loaded, dict):
            return {}
    return loaded


def flat_config(dump: str) -> Dict[str, Any]:
    """Return a config's YAML dump as a flat dictionary {"SOLVER.MAX_ITER": 100, ...}."""
    return _flat(yaml.safe_load(dump), "")


def _flat(node: Mapping[str, Any], prefix: str) -> Dict[str, Any]:
    flat: Dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def nested_config(flat: Mapping[str, Any]) -> Dict[str, Any]:
    """Return a flat dictionary {"SOLVER.MAX_ITER": 100, ...} as nested dictionaries, as a YAML file has them."""
    nested: Dict[str, Any] = {}
    for key, value in flat.items():
        *parts, name = key.split(".")
        node = nested
        for part in parts:
            node = node.setdefault(part, {})
        node[name] = value
    return nested


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> Dict[str, str]:
    """Describe the differences between two flat configs, by key, for example "SOLVER.MAX_ITER 100 -> 200"."""
    pairs = {key: (before.get(key, "absent"), now.get(key, "absent")) for key in sorted({*before, *now})}
    return {key: f"{key} {a!r} -> {b!r}" for key, (a, b) in pairs.items() if a != b}
