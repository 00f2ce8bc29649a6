"""Read config files and KEY VALUE words safely. Errors name the file, the line and the closest valid key."""

import ast
import os
from contextlib import suppress
from typing import Any, Dict, Iterator, Mapping, Sequence, Tuple

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.config.compat import guess_version

from .config import add_gdetkd_config
from .config_places import Place, places_of_keys
from .dotted_keys import flat_config, get_key, group_of
from .errors import GDetKDError, similar
from .user_modules import import_user_modules

# Keys that Detectron2 leaves without a value.
WITHOUT_VALUE = ("SOLVER.WEIGHT_DECAY_BIAS",)
# Keys that hold a list of names. A single name is accepted as a list of one.
LISTS_OF_NAMES = ("DATASETS.TRAIN", "DATASETS.TEST", "DISTILL.LOSSES", "LOG.WRITERS")


def load_config(config_file: str, opts: Sequence[Any]) -> CfgNode:
    """Return the config of a file with KEY VALUE changes. The user's own modules are imported first: they may add keys.

    Raises:
        GDetKDError: as `import_user_modules`, `merge_config_file` and `merge_words`.
    """
    import_user_modules()
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    merge_config_file(cfg, config_file)
    merge_words(cfg, list(opts))
    return cfg


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """Merge a yaml file and its _BASE_ files into a config, in place. No code in the files is run.

    Raises:
        GDetKDError: a file is missing, empty or no valid yaml, has a tag that makes Python objects, or has a key that
            is unknown or appears twice, or a value of the wrong type.
    """
    if not path:
        raise GDetKDError("No config is given. Name one with --config-file FILE; configs/ has examples.")
    if path.endswith(".py"):
        raise GDetKDError(
            f"The config {path!r} is a LazyConfig, which only a teacher may have (DISTILL.TEACHER.CONFIG_FILE). "
            "Describe the student in a yaml file; configs/ has examples."
        )
    try:
        loaded = cfg.load_yaml_with_base(path, allow_unsafe=False)
        places = places_of_keys(path)
        _merge(cfg, loaded, path, places)
    except yaml.constructor.ConstructorError as e:
        mark = e.problem_mark
        known = " docs/teachers.md names configs for Detectron2's RetinaNets." if "RetinaNet" in str(mark.name) else ""
        raise GDetKDError(
            f"The config {mark.name!r}, line {mark.line + 1}, has a tag that would make a Python object ({e.problem}), "
            f"which could run code. Write plain values: numbers, strings, lists and mappings.{known}"
        ) from e
    except yaml.YAMLError as e:
        raise GDetKDError(f"The config {path!r} or one of its _BASE_ files is not valid YAML. Correct it: {e}") from e
    except RecursionError as e:
        raise GDetKDError(
            f"The config {path!r} includes itself through _BASE_, or its keys are nested too deeply. Correct the file."
        ) from e
    except (TypeError, AttributeError) as e:  # an empty file, a list or a single word raises these
        raise GDetKDError(
            f"The config {path!r} or one of its _BASE_ files is empty, or no mapping of keys to values ({e}). Write "
            "KEY: VALUE."
        ) from e
    except FileNotFoundError as e:
        raise GDetKDError(
            f"The config {path!r} or one of its _BASE_ files is not there ({e}). The current folder is {os.getcwd()}. "
            "Correct the path."
        ) from e
    except (OSError, AssertionError) as e:  # Detectron2 and fvcore assert what they expect of a file
        raise GDetKDError(
            f"The config {path!r} or one of its _BASE_ files cannot be read ({type(e).__name__}: {e}). Check that "
            "these are readable yaml files."
        ) from e


def merge_words(cfg: CfgNode, words: Sequence[Any], source: str = "the command line") -> None:
    """Merge KEY VALUE words into a config in place.

    Args:
        words: keys and values in turn, for example ["SOLVER.BASE_LR", "0.01"].
        source: where the words come from, for messages.

    Raises:
        GDetKDError: the number of words is odd, a key is unknown, or a value has the wrong type.
    """
    if len(words) % 2:
        raise GDetKDError(
            f"{source} must give pairs of KEY VALUE, but has {len(words)} words: {' '.join(map(str, words))}. Put a "
            'value with spaces or brackets in quotes, for example SOLVER.STEPS "(60, 80)".'
        )
    for key, value in zip(words[::2], words[1::2]):
        _check_key(cfg, str(key), source)
        _check_has_value(cfg, str(key), None if value == "None" else value, source)
        try:
            if key in LISTS_OF_NAMES:
                value = _as_names(value)
            cfg.merge_from_list([key, value])
        except ValueError as e:
            raise GDetKDError(_wrong_kind(cfg, key, value, source)) from e


def _merge(cfg: CfgNode, loaded: Dict[str, Any], path: str, places: Mapping[str, Place]) -> None:
    for key in LISTS_OF_NAMES:
        group, name = group_of(loaded, key), key.rpartition(".")[2]
        if isinstance(group.get(name), str):
            group[name] = _as_names(group[name])
    node = type(cfg)(loaded)
    if (node.get("VERSION") or guess_version(node, path)) != cfg.VERSION:
        _merge_older(cfg, path)
        return
    for key, value in _flat(loaded):
        _check_key(cfg, key, _where(places, key, path))
        _check_has_value(cfg, key, value, _where(places, key, path))
    before = cfg.clone()
    try:
        cfg.merge_from_other_cfg(node)
    except ValueError as e:
        key, value = next(pair for pair in _flat(loaded) if not _fits(before, *pair))
        raise GDetKDError(_wrong_kind(before, key, value, _where(places, key, path))) from e


def _merge_older(cfg: CfgNode, path: str) -> None:
    """Merge a file of an older version. Detectron2 upgrades it."""
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
    except (KeyError, ValueError) as e:
        raise GDetKDError(
            f"The config {path!r} has no VERSION, but has keys of Detectron2's first version (MODEL.WEIGHT or "
            f"TEST.AUG_ON). It is no valid file of that version ({e}). Set VERSION: 2, or correct these keys."
        ) from e


def _as_names(value: Any) -> Any:
    """Return a list of one name for a name. Any other value is returned as it is, or read as a literal, as by yacs."""
    with suppress(ValueError, SyntaxError):  # a plain name is no literal
        value = ast.literal_eval(value)
    return (value,) if isinstance(value, str) and value else value


def _fits(cfg: CfgNode, key: str, value: Any) -> bool:
    probe = cfg.clone()
    try:
        probe.merge_from_list([key, value])
    except ValueError:
        return False
    return True


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for key, value in node.items():
        if "." in str(key):
            raise GDetKDError(f"The config has the key {key!r}. In a file, keys are nested: SOLVER: {{BASE_LR: 0.1}}.")
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_key(cfg: CfgNode, key: str, source: str) -> None:
    """Raise an error if the config has no such key."""
    with suppress(KeyError):
        get_key(cfg, key)
        return
    if ")" in key or "]" in key or "(" in key:
        raise GDetKDError(
            f"{source}: {key!r} is no config key. Inside {{...}}, YAML splits a value at every comma. Write (160,) as "
            '"(160,)" or [160].'
        )
    known = list(flat_config(cfg.dump()))
    raise GDetKDError(f"{source}: {key!r} is no config key. Did you mean {similar(key, known, count=1)!r}?")


def _check_has_value(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    """Raise an error for a key without a value. yacs would set it to None, which turns most switches off."""
    if value is not None or get_key(cfg, key) is None or key in WITHOUT_VALUE:
        return
    what = "no keys. Add keys below it" if isinstance(get_key(cfg, key), CfgNode) else "no value. Give one"
    raise GDetKDError(f"{source}: {key} has {what}, or remove the line.")


def _wrong_kind(cfg: CfgNode, key: str, value: Any, source: str) -> str:
    default = get_key(cfg, key)
    wanted = (
        "a group of keys"
        if isinstance(default, CfgNode)
        else f"of type {type(default).__name__}, for example {default!r}"
    )
    return f"{source}: {key} is {value!r} (type {type(value).__name__}), but it must be {wanted}."


def _where(places: Mapping[str, Place], key: str, path: str) -> str:
    return f"The config {places[key]}" if key in places else f"The config {path!r}"
