"""Keep the folder of a run for one config and one teacher, and refuse a folder with another run's results."""

import functools
import hashlib
import os
from typing import Any, Dict, List, Sequence

import yaml
from detectron2.config import CfgNode

from ..data.folders import resolve
from ..dotted_keys import changed_keys, flat_config
from ..errors import GDetKDError
from ..files import written_whole
from ..losses import DISTILL_LOSS_REGISTRY
from ..safe_load import sha256_of_file
from ..teacher import read_teacher_file
from .run import Run

# Keys, or beginnings of keys, that do not affect the result of a run. Device and folder are set when the run starts.
WITHOUT_EFFECT = (
    "DISTILL.EVAL_TEACHER",
    "DISTILL.INSIGHT.",
    "LOG.",
    "MODEL.DEVICE",
    "OUTPUT_DIR",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.KEEP_BEST",
)
# File that marks a folder as belonging to a run.
MARK = "fingerprint.txt"


def deciding_keys(dump: str) -> Dict[str, Any]:
    """Return the config keys that affect a run's result, by flat key.

    Weights of losses that the run does not use are left out, so changing one does not invalidate the run.

    Args:
        dump: the config as yaml, before the run starts or as the run wrote it.
    """
    flat = flat_config(dump)
    losses = flat["DISTILL.LOSSES"]
    unused = tuple(f"DISTILL.{name}." for name, _ in DISTILL_LOSS_REGISTRY if name not in losses)
    if not losses:
        unused += ("DISTILL.REGIONS.", "DISTILL.UNTIL", "DISTILL.WARMUP_ITERS")
        if not flat["DISTILL.HEAD_TRANSFER"]:
            unused += ("DISTILL.TEACHER.", "DISTILL.CLASS_MAP")
    unused += tuple(f"DISTILL.{name}" for name in _unread_weights(flat, losses))
    if not flat["DATASETS.UNLABELED"]:
        unused += ("DISTILL.UNLABELED.",)
    return {key: value for key, value in flat.items() if not key.startswith((*WITHOUT_EFFECT, *unused))}


def _unread_weights(flat: Dict[str, Any], losses: Sequence[str]) -> List[str]:
    """Return the keys under DISTILL that DISTILL.WEIGHTS makes meaningless, or beginnings of keys."""
    if flat["DISTILL.WEIGHTS"] == "auto" and losses:
        return [f"{name}.WEIGHT" for name in losses]
    return ["WEIGHTS", "AUTO.", *(f"{name}.SHARE" for name in losses)]


@functools.cache
def _digest(path: str, modified: int) -> str:
    """Return the SHA-256 of a file. It is cached, because all runs of a comparison have the same teacher.

    Args:
        modified: when the file was last modified, so that a changed file is read again.
    """
    return sha256_of_file(path)


def digests_of_labels(cfg: CfgNode, names: Sequence[str]) -> Dict[str, List[str]]:
    """Return the SHA-256 of each JSON file that DATASETS.REGISTER names for the given datasets."""
    digests: Dict[str, List[str]] = {name: [] for name in names}
    for entry in cfg.DATASETS.REGISTER:
        path = resolve(entry["json"]) if entry["name"] in digests and "json" in entry else ""
        if os.path.isfile(path):
            digests[entry["name"]].append(_digest(path, os.stat(path).st_mtime_ns))
    return digests


def fingerprint(run: Run) -> str:
    """Return a digest of what determines a run, except the images and the labels of VOC's and YOLO's layouts.

    This is its config, the teacher's file and weights, and the JSON files of its datasets.

    Raises:
        GDetKDError: the teacher's file does not exist.
    """
    cfg = run.config()
    labels = digests_of_labels(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST, *cfg.DATASETS.UNLABELED])
    keys = {**deciding_keys(cfg.dump()), "labels": labels}
    if "DISTILL.TEACHER.CONFIG_FILE" in keys:
        file = read_teacher_file(cfg)
        keys["teacher"] = file.content()
        keys["weights"] = file.weights
        if os.path.isfile(file.weights):
            keys["weights"] = _digest(file.weights, os.stat(file.weights).st_mtime_ns)
    return hashlib.sha256(yaml.safe_dump(keys).encode()).hexdigest()


def claim_folder(run: Run) -> None:
    """Mark the folder of a run as belonging to it.

    Raises:
        GDetKDError: the folder holds a run of another config, whose results would be taken for those of this run.
    """
    mark, digest = run.folder / MARK, fingerprint(run)
    run.folder.mkdir(parents=True, exist_ok=True)
    found = mark.read_text() if mark.exists() else ""
    if found != digest and (found or run.metrics_file.lines()):
        raise GDetKDError(
            f"{run.folder} holds a run of another config{_differences(run)}. Use that config again, remove the folder, "
            "or choose another --output."
        )
    if found != digest:
        with written_whole(str(mark)) as file:
            file.write(digest)


def _differences(run: Run) -> str:
    """Return how the config in the folder differs from the run's, as ": KEY 1 -> 2"; empty if there is no config."""
    path = run.folder / "config.yaml"
    if not path.exists():
        return ""
    changes = changed_keys(deciding_keys(path.read_text()), deciding_keys(run.config().dump()))
    same = "the teacher's weights or config file, or a dataset's JSON file, have changed"
    return f": {'; '.join(changes.values()) or same}"
