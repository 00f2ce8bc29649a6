"""Register the datasets that DATASETS.REGISTER lists with Detectron2's catalog."""

import logging
from typing import Any, Callable, Dict, List, Mapping

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import GDetKDError
from .clean import clean_annotations
from .kinds import DatasetKind, dataset_kinds, describe, find_kind
from .mistakes import find_mistakes

logger = logging.getLogger(__name__)

# Errors that a file with unexpected content can cause while it is read.
READ_ERRORS = (
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
    SyntaxError,
    OSError,
)


def register_datasets(cfg: CfgNode) -> None:
    """Register the entries of DATASETS.REGISTER. Registering an entry again changes nothing.

    Raises:
        GDetKDError: an entry is invalid, a file does not exist, or another dataset has the same name.
    """
    for entry in cfg.DATASETS.REGISTER:
        _register(_build_kind(entry, cfg))


def register_test_sets(cfg: CfgNode) -> None:
    """Register the entries of DATASETS.REGISTER. Leave out entries outside of DATASETS.TEST whose files are missing.

    Raises:
        GDetKDError: an entry is invalid, a file of DATASETS.TEST does not exist, or another dataset has the same name.
    """
    for entry in cfg.DATASETS.REGISTER:
        kind = _build_kind(entry, cfg)
        _register(kind, is_needed=kind.name in cfg.DATASETS.TEST)


def _register(kind: DatasetKind, is_needed: bool = True) -> None:
    if kind.name in DatasetCatalog.list():
        if MetadataCatalog.get(kind.name).get("gdetkd_entry") != dict(kind.entry):
            raise GDetKDError(
                f"DATASETS.REGISTER: another dataset has the name {kind.name!r} already. Give this entry another name."
            )
        return
    kind.check_paths()
    try:
        kind.check_files()
    except GDetKDError as e:
        if is_needed:
            raise
        logger.info("%r is not registered, because an evaluation does not need it. %s", kind.name, e)
        return
    metadata = kind.metadata()
    DatasetCatalog.register(kind.name, _make_loader(kind))
    MetadataCatalog.get(kind.name).set(gdetkd_entry=dict(kind.entry), **metadata)


def _build_kind(entry: Any, cfg: CfgNode) -> DatasetKind:
    kind = find_kind(entry) if isinstance(entry, Mapping) else None
    if kind is None or "name" not in entry:
        kinds = ", ".join(sorted(dataset_kinds()))
        raise GDetKDError(f"DATASETS.REGISTER: {entry!r} needs a `name` and a `kind` of {kinds}.")
    name, problems = entry["name"], kind.find_problems(entry)
    if not isinstance(name, str) or not name:
        raise GDetKDError(f"DATASETS.REGISTER: the name {name!r} is no text. Put it into quotes in the yaml file.")
    if problems:
        raise GDetKDError(
            f"DATASETS.REGISTER: {name!r} (kind {entry['kind']}) {', '.join(problems)}. Correct the entry."
        )
    limit = entry.get("limit", 1)
    if not isinstance(limit, int) or limit < 1:
        raise GDetKDError(f"DATASETS.REGISTER: the limit of {name!r} is {limit!r}. Set it to a number of images.")
    return kind(entry, cfg.DATASETS.ALLOW_OUTSIDE, cfg.INPUT.MAX_BAD_FRACTION)


def _make_loader(kind: DatasetKind) -> Callable[[], List[Dict[str, Any]]]:
    """Return the function that loads a dataset for the catalog. Only its first call logs what it found."""
    has_logged = False

    def load() -> List[Dict[str, Any]]:
        nonlocal has_logged
        try:
            dicts, counts = kind.load()
            dicts = dicts[: kind.entry.get("limit")]
            classes = MetadataCatalog.get(kind.name).get("thing_classes") or ()
            mistakes = [] if has_logged else find_mistakes(dicts, classes, kind.name)
            findings = clean_annotations(dicts)
            kind.note_findings(findings)
        except (FileNotFoundError, GDetKDError):
            raise  # names the file itself
        except READ_ERRORS as e:
            raise GDetKDError(
                f"The dataset {kind.name!r} cannot be read from {kind.source!r} ({type(e).__name__}: {e}). Correct "
                "that file or the entry in DATASETS.REGISTER."
            ) from e
        messages = [text for text in (describe(counts), str(findings), *mistakes) if text]
        if messages and not has_logged:
            logger.warning("%s: %s.", kind.name, "; ".join(messages))
        has_logged = True
        return dicts

    return load
