"""Log a training to an experiment tracker: Weights & Biases or MLflow (LOG.WRITERS)."""

import importlib
import logging
import os
import re
import time
from typing import Any, Callable, ClassVar, Dict, List, Optional

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from ..dotted_keys import flat_config
from ..errors import first_line
from ..files import write_or_log

logger = logging.getLogger(__name__)

# Number of iterations whose median is logged for a value that fluctuates, as Detectron2's own writers do.
WINDOW = 20
# Seconds without another try after the tracker could not be reached. MLflow alone retries a call for minutes.
PAUSE = 600.0
# MLflow takes so many parameters in one call, and so many characters of a value.
MLFLOW_PARAMETERS, MLFLOW_CHARACTERS = 100, 250


class Tracker(EventWriter):
    """Log the config and the latest scalars of Detectron2's storage, the AP among them, to an experiment tracker.

    The tracker's run starts with the first write. OUTPUT_DIR keeps the id of the run, so that a resumed training
    continues the same run. Only the main process may have this writer.

    If the tracker cannot be reached, the training goes on. One warning is logged, and the writer tries again after a
    pause. The values in between are missing in the tracker.

    Args:
        cfg: config of the training.
        trainer: the trainer, which knows whether the training is resumed and whether it is complete.

    Attributes:
        package: name of the Python package of the tracker.
    """

    package: ClassVar[str]

    def __init__(self, cfg: CfgNode, trainer: Any) -> None:
        self._cfg = cfg
        self._trainer = trainer
        self._module = importlib.import_module(self.package)
        self._id_file = os.path.join(cfg.OUTPUT_DIR, f"{self.package}_run_id")
        self._is_started = False
        self._lacks_config = True
        self._is_continued = False
        self._last_write = -1
        self._next_try = 0.0
        self._has_warned = False

    @property
    def name(self) -> str:
        """Return the name of the tracker's run."""
        return self._cfg.LOG.NAME or os.path.basename(os.path.abspath(self._cfg.OUTPUT_DIR))

    def write(self) -> None:
        """Log the scalars that are newer than the last write."""
        if time.monotonic() >= self._next_try:
            self._try(self._write)

    def close(self) -> None:
        """Log what the last writes could not log, and end the tracker's run."""
        self._try(self._write)
        if self._is_started:
            self._try(lambda: self.finish(self._trainer.iter >= self._trainer.max_iter))

    def _write(self) -> None:
        if not self._is_started:
            kept = self._kept_id()
            run_id = self.start(kept)
            self._is_started, self._is_continued = True, kept is not None
            self._keep_id(run_id)
        if self._lacks_config:
            self.log_config(self._is_continued)
            self._lacks_config = False
        new: Dict[int, Dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(WINDOW).items():
            if iteration > self._last_write:
                new.setdefault(iteration, {})[name] = value
        for iteration in sorted(new):
            self.log(new[iteration], iteration)
            self._last_write = iteration

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as e:  # the packages' errors of the network have no common base class
            self._next_try = time.monotonic() + PAUSE
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "Could not log to %s (%s: %s). The training goes on, and metrics.json has all values. The next try "
                    "is in %d minutes, or at the end. Check the network and your login.",
                    self.package,
                    type(e).__name__,
                    first_line(e),
                    PAUSE // 60,
                )

    def _kept_id(self) -> Optional[str]:
        """Return the id of the run to continue. A new training does not continue the run of an earlier training."""
        if self._trainer.start_iter == 0 or not os.path.exists(self._id_file):
            return None
        with open(self._id_file) as file:
            return file.read().strip()

    def _keep_id(self, run_id: str) -> None:
        write_or_log(self._id_file, run_id, "--resume will start a new run.")

    def start(self, run_id: Optional[str]) -> str:
        """Start a run, or continue the run with the given id. Return the id of the run."""
        raise NotImplementedError

    def log_config(self, is_continued: bool) -> None:
        """Log the config of the training. `is_continued` tells whether the run already has one."""
        raise NotImplementedError

    def log(self, scalars: Dict[str, float], iteration: int) -> None:
        """Log scalars by name, which belong to an iteration."""
        raise NotImplementedError

    def finish(self, is_complete: bool) -> None:
        """End the run. `is_complete` is False if the training failed or was stopped."""
        raise NotImplementedError


class WandbWriter(Tracker):
    """Log to Weights & Biases. Environment variables such as WANDB_MODE and WANDB_ENTITY have their usual effect."""

    package = "wandb"

    def start(self, run_id: Optional[str]) -> str:
        self._run = self._module.init(
            project=self._cfg.LOG.PROJECT, name=self.name, id=run_id, resume="allow", dir=self._cfg.OUTPUT_DIR
        )
        # W&B's own step must not decrease, but a resumed training may repeat iterations.
        self._run.define_metric("*", step_metric="iteration")
        return self._run.id

    def log_config(self, is_continued: bool) -> None:
        self._run.config.update(flat_config(self._cfg.dump()), allow_val_change=True)

    def log(self, scalars: Dict[str, float], iteration: int) -> None:
        self._run.log({**scalars, "iteration": iteration})

    def finish(self, is_complete: bool) -> None:
        self._run.finish(exit_code=0 if is_complete else 1)


class MlflowWriter(Tracker):
    """Log to MLflow. Environment variables such as MLFLOW_TRACKING_URI have their usual effect."""

    package = "mlflow"

    def start(self, run_id: Optional[str]) -> str:
        self._module.set_experiment(self._cfg.LOG.PROJECT)
        run = self._module.start_run(run_id=run_id) if run_id else self._module.start_run(run_name=self.name)
        return run.info.run_id

    def log_config(self, is_continued: bool) -> None:
        self._module.log_text(self._cfg.dump(), "config.yaml")
        if is_continued:
            return  # MLflow refuses a parameter that has changed
        flat = flat_config(self._cfg.dump())
        parameters = [(key, str(value)[:MLFLOW_CHARACTERS]) for key, value in flat.items()]
        for first in range(0, len(parameters), MLFLOW_PARAMETERS):
            self._module.log_params(dict(parameters[first : first + MLFLOW_PARAMETERS]))

    def log(self, scalars: Dict[str, float], iteration: int) -> None:
        # MLflow refuses other characters. The name of a class may have them.
        valid = {re.sub(r"[^\w\-./: ]", "_", name): value for name, value in scalars.items()}
        self._module.log_metrics(valid, step=iteration)

    def finish(self, is_complete: bool) -> None:
        self._module.end_run("FINISHED" if is_complete else "KILLED")


# The trackers, by their names in LOG.WRITERS.
TRACKERS = {tracker.package: tracker for tracker in (WandbWriter, MlflowWriter)}


def missing_packages(cfg: CfgNode) -> List[str]:
    """Return which packages LOG.WRITERS needs and cannot import, with what to do. No other package is imported."""
    missing = []
    for name in [name for name in cfg.LOG.WRITERS if name in TRACKERS]:
        try:
            importlib.import_module(name)
        except ImportError as e:
            missing.append(
                f"LOG.WRITERS names {name!r}, but that package cannot be imported ({first_line(e)}): install it with "
                f"pip install {name}, or remove it from LOG.WRITERS"
            )
    return missing


def build_trackers(cfg: CfgNode, trainer: Any) -> List[EventWriter]:
    """Build the writers that LOG.WRITERS names. Only the main process may call this."""
    return [TRACKERS[name](cfg, trainer) for name in cfg.LOG.WRITERS]
