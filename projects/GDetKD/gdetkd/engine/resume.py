"""What a checkpoint keeps of the run that wrote it, and what may not have changed when the run goes on."""

import logging
from typing import Any, Dict, Optional, Tuple

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..config import changed_keys, flat_config
from ..distiller import GDetKD
from ..errors import GDetKDError, some

logger = logging.getLogger(__name__)

# With another value, what the checkpoint holds would be given to parameters that it does not belong to.
FIXED = {
    "DISTILL.LOSSES": "other distillation losses",
    "DISTILL.STUDENT_META_ARCHITECTURE": "another student",
    "SOLVER.OPTIMIZER": "another optimizer",
    "SOLVER.AMP.ENABLED": "another precision",
}
# What the checkpoint's optimizer and schedule bring along. STEPS, GAMMA, MAX_ITER and the warm-up are the config's.
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
    """Config, classes and number of processes.

    Args:
        cfg: the run's.
        classes: the student's, in order; None where they are not known.
    """

    def __init__(self, cfg: CfgNode, classes: Optional[Tuple[str, ...]]) -> None:
        self._config: str = cfg.dump()
        self._classes = None if classes is None else list(classes)

    def state_dict(self) -> Dict[str, Any]:
        return {"config": self._config, "classes": self._classes, "processes": comm.get_world_size()}

    def load_state_dict(self, then: Dict[str, Any]) -> None:
        """Logs what is not as it was.

        Raises:
            GDetKDError: the classes or their order, the losses, the student, the optimizer or the precision are others.
        """
        before, now = flat_config(then["config"]), flat_config(self._config)
        for key, what in FIXED.items():
            if key in before and before[key] != now[key]:
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
            logger.warning("Since the checkpoint was written this has changed: %s.", "; ".join(changes))
        if kept := [key for key in changed if key in KEPT]:
            logger.warning(
                "Of these WITHOUT EFFECT on a run that is resumed, for its optimizer goes on as it was: %s. To train "
                "with others, start from the checkpoint by MODEL.WEIGHTS, without --resume, in a new OUTPUT_DIR.",
                ", ".join(kept),
            )


def warn_of_other_data(before: Dict[str, Any], now: Dict[str, Any]) -> None:
    """Compares what `ResumableLoader.description` was then and is now: by one image more the order is another."""
    if before != now:
        logger.warning(
            "The images to train on are not those that the run was started with: %d then, %d now%s. It goes on, but in "
            "another order of images than uninterrupted. Was an image changed, or could one not be read at one of the "
            "starts? Those that are left out are named above.",
            before["images"],
            now["images"],
            "" if before["images"] != now["images"] else ", of other names",
        )


def _refusal(what: str, before: str, now: str) -> str:
    return (
        f"This run was started with {what}: {before}; now {now}. Resume it with the config and data it was started "
        "with, or start in a new OUTPUT_DIR."
    )


class DistillState:
    """What a checkpoint keeps under `distill`: the losses' parameters and queue, and which teacher it was."""

    def __init__(self, distiller: GDetKD) -> None:
        self._distiller = distiller

    def state_dict(self) -> Dict[str, Any]:
        return {"losses": self._distiller.losses.state_dict(), "teacher": self._distiller.teacher.describe()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """
        Raises:
            GDetKDError: the teacher is another one, by its hash, or a loss has another size.
        """
        now, then = self._distiller.teacher.describe(), state["teacher"]
        if now["sha256"] != then["sha256"]:
            raise GDetKDError(
                f"This run was started with another teacher: {then['weights']!r} (SHA-256 {then['sha256'][:12]}), now "
                f"{now['weights']!r} ({now['sha256'][:12]}). Resume with the first, or start in a new OUTPUT_DIR."
            )
        if now["images"] != then.get("images", now["images"]):  # older checkpoints do not say
            logger.warning(
                "The teacher saw images as %s when the checkpoint was written, and sees them as %s now: it teaches "
                "something else.",
                then["images"],
                now["images"],
            )
        if now["weights"] != then["weights"]:
            logger.info("The teacher was %s and is now %s; it is the same.", then["weights"], now["weights"])
        try:
            self._distiller.losses.load_state_dict(state["losses"])
        except RuntimeError as e:
            raise GDetKDError(
                f"This run was started with other distillation losses, or other sizes of them ({e}). Resume it with "
                "the config it was started with, or start in a new OUTPUT_DIR."
            ) from e
