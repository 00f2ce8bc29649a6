"""Keep a description of the run in its checkpoints, and compare it with the run that resumes."""

import logging
from typing import Any, Dict, Optional, Tuple

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..distiller import GDetKD
from ..dotted_keys import changed_keys, flat_config
from ..errors import GDetKDError, some

logger = logging.getLogger(__name__)

# If such a key changes, the checkpoint's state would go to parameters that it does not belong to.
FIXED = {
    "DISTILL.LOSSES": "other distillation losses",
    "DISTILL.WEIGHTS": "other weights of the losses",
    "DISTILL.STUDENT_META_ARCHITECTURE": "another student",
    "SOLVER.OPTIMIZER": "another optimizer",
    "SOLVER.AMP.ENABLED": "another precision",
}
# The checkpoint's optimizer keeps its values of these keys. STEPS, GAMMA, MAX_ITER and the warm-up follow the config.
KEPT = (
    "SOLVER.BASE_LR",
    "SOLVER.BIAS_LR_FACTOR",
    "SOLVER.MOMENTUM",
    "SOLVER.NESTEROV",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.WEIGHT_DECAY_BIAS",
    "SOLVER.WEIGHT_DECAY_NORM",
)


class RunRecord:
    """Keep the config, the classes and the number of processes of a run.

    Args:
        cfg: config of the run.
        classes: names of the student's classes, in order. None if they are not known.
    """

    def __init__(self, cfg: CfgNode, classes: Optional[Tuple[str, ...]]) -> None:
        self._config: str = cfg.dump()
        self._classes = None if classes is None else list(classes)

    def state_dict(self) -> Dict[str, Any]:
        return {"config": self._config, "classes": self._classes, "processes": comm.get_world_size()}

    def load_state_dict(self, then: Dict[str, Any]) -> None:
        """Log what has changed since the checkpoint was written.

        Raises:
            GDetKDError: the classes, their order, the losses, the student, the optimizer or the precision changed.
        """
        before, now = flat_config(then["config"]), flat_config(self._config)
        for key, what in FIXED.items():
            if before[key] != now[key]:
                raise GDetKDError(_refusal(what, f"{key} {before[key]!r}", repr(now[key])))
        if then["classes"] is not None and self._classes is not None and then["classes"] != self._classes:
            is_order = sorted(then["classes"]) == sorted(self._classes)
            what = "its classes in another order" if is_order else "other classes"
            raise GDetKDError(_refusal(what, some(then["classes"]), some(self._classes)))
        changed = changed_keys(before, now)
        changes = list(changed.values())
        if then["processes"] != comm.get_world_size():
            changes.append(f"number of processes {then['processes']} -> {comm.get_world_size()}")
        if changes:
            logger.warning("These values changed since the checkpoint was written: %s.", "; ".join(changes))
        if kept := [key for key in changed if key in KEPT]:
            logger.warning(
                "These changes have NO EFFECT, because a resumed run keeps its optimizer: %s. To train with the new "
                "values, set MODEL.WEIGHTS to the checkpoint and start without --resume in a new OUTPUT_DIR.",
                ", ".join(kept),
            )


def warn_of_other_data(before: Dict[str, Any], now: Dict[str, Any]) -> None:
    """Warn if the training images changed, by `ResumableLoader.description`. One more image changes the whole order."""
    if before != now:
        logger.warning(
            "The training images changed since the run was started: %d then, %d now%s. The run goes on, but with "
            "another order of images than an uninterrupted run. Check whether files changed or could not be read at "
            "one of the starts. Images that are left out now are named above.",
            before["images"],
            now["images"],
            "" if before["images"] != now["images"] else f", with other {_what_differs(before, now)}",
        )


def _what_differs(before: Dict[str, Any], now: Dict[str, Any]) -> str:
    return "names" if before["sha256"] != now["sha256"] else "labels of DATASETS.UNLABELED"


def _refusal(what: str, before: str, now: str) -> str:
    return (
        f"This run was started with {what}: {before}; now {now}. Resume it with the config and the data that started "
        "it, or use a new OUTPUT_DIR."
    )


class DistillState:
    """Keep under `distill` in a checkpoint: the losses' parameters and queue, and a description of the teacher."""

    def __init__(self, distiller: GDetKD) -> None:
        self._distiller = distiller

    def state_dict(self) -> Dict[str, Any]:
        return {"losses": self._distiller.losses.state_dict(), "teacher": self._distiller.teacher.describe()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load the losses' parameters and queue, and compare the teacher with the teacher of the checkpoint.

        Raises:
            GDetKDError: the teacher's hash or the size of a loss changed.
        """
        now, then = self._distiller.teacher.describe(), state["teacher"]
        if now["sha256"] != then["sha256"]:
            raise GDetKDError(
                f"This run was started with another teacher: {then['weights']!r} (SHA-256 {then['sha256'][:12]}), now "
                f"{now['weights']!r} ({now['sha256'][:12]}). Resume with the first teacher, or use a new OUTPUT_DIR."
            )
        if now["images"] != then["images"]:
            logger.warning(
                "The teacher saw images as %s when the checkpoint was written, and sees them as %s now, so it gives "
                "other targets. If you did not intend that, set its INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD "
                "back.",
                then["images"],
                now["images"],
            )
        if now["weights"] != then["weights"]:
            logger.info(
                "The teacher's file was %s and is now %s. Its weights are the same.", then["weights"], now["weights"]
            )
        try:
            self._distiller.losses.load_state_dict(state["losses"])
        except RuntimeError as e:
            raise GDetKDError(
                f"This run was started with other distillation losses, or with losses of other sizes ({e}). Resume it "
                "with the config that started it, or use a new OUTPUT_DIR."
            ) from e
