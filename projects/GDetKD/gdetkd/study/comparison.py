"""List the runs of a comparison of several methods on one config and teacher, and train them."""

import contextlib
import logging
import math
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from tqdm import tqdm

from ..config_file import load_config
from ..data import register_datasets
from ..data.shapes import make_shapes_for
from ..distiller import GDetKD
from ..dotted_keys import flat_config
from ..engine import DistillTrainer, evaluate_teacher
from ..engine.dataset_checks import check_has_ap
from ..engine.preflight import check_student
from ..errors import GDetKDError
from ..files import kept_value
from ..teacher import FrozenTeacher, transfer_heads
from .executors import Executor
from .folder import claim_folder, digests_of_labels
from .jobs import run_all, seed_by_seed
from .methods import BASELINE, CONFIGURED, configured_parts, method_opts
from .run import Run, stretched
from .signals import exit_on_signals
from .step_time import StepTime, kept_step_time

logger = logging.getLogger(__name__)

# If a method's step takes at most this share longer than the baseline's step, no longer baseline is trained.
SAME_TIME = 0.05
# The time of a longer baseline is the method's time, rounded up to a tenth of the baseline's time.
TIME_STEPS = 10
# Keys of the student's config, or beginnings of keys, that affect the teacher's AP. The teacher's own config counts as
# a whole.
KEYS_OF_THE_SCORE = (
    "DATASETS.REGISTER",
    "DATASETS.TEST",
    "DISTILL.CLASS_MAP",
    "DISTILL.TEACHER.CLASSES",
    "MODEL.KEYPOINT_ON",
    "MODEL.MASK_ON",
    "TEST.",
)
# A method, and its schedule as a multiple of the config's iterations.
Key = Tuple[str, float]


def for_one_process(cfg: CfgNode) -> List[str]:
    """Return the KEY VALUE changes that scale a config with SOLVER.REFERENCE_WORLD_SIZE to one process.

    Every run of a comparison is one process.
    """
    scaled = flat_config(DistillTrainer.auto_scale_workers(cfg, 1).dump())
    before = flat_config(cfg.dump())
    return [part for key, value in scaled.items() if value != before[key] for part in (key, str(value))]


@dataclass
class Comparison:
    """Compare methods with the same student, teacher, seeds and data order.

    Attributes:
        config_file: config of the configured method, GDetKD. Other methods change DISTILL.LOSSES and HEAD_TRANSFER.
        opts: KEY VALUE changes to the config, for every run.
        output: the folder of all runs.
        methods: the compared methods. The baseline is always among them.
        seeds: the seeds of each method. A seed sets the initialisation and the data order for every method alike.
        schedules: multiples of the config's iterations.
        equal_time: whether the baseline is also trained for the time that each method takes.
        one_longer: whether all methods of a schedule share the baseline that trains as long as the slowest of them. It
            has no effect with TEST.PATIENCE.

    Raises:
        GDetKDError: a method is unknown, a schedule is not positive, or the config does not distil or is not evaluated
            on one dataset.
    """

    config_file: str
    opts: List[str]
    output: Path
    methods: Sequence[str]
    seeds: Sequence[int] = (1, 2, 3)
    schedules: Sequence[float] = (1.0,)
    equal_time: bool = False
    one_longer: bool = False

    def __post_init__(self) -> None:
        self.methods = list(dict.fromkeys([BASELINE, *self.methods]))
        self.schedules = list(dict.fromkeys(self.schedules))
        if not self.seeds or not self.schedules or min(self.schedules) <= 0:
            raise GDetKDError(
                f"A comparison needs a seed and positive schedules, not seeds {list(self.seeds)} and schedules "
                f"{self.schedules}. Give at least one seed and one schedule, such as --seeds 3 --schedules 1."
            )
        self.opts = [*self.opts, *for_one_process(load_config(self.config_file, self.opts))]
        self.cfg = load_config(self.config_file, self.opts)
        _check(self.cfg, self.config_file, self.methods)
        if self.equal_time and self.cfg.TEST.PATIENCE and self.cfg.DISTILL.UNTIL < 1:
            raise GDetKDError(
                "Equal time is unknown if a training may end early (TEST.PATIENCE) and a part of it is cheaper "
                "(DISTILL.UNTIL below 1). Set one of the two to its default, or leave out --equal-time."
            )
        self.runs: Dict[Key, List[Run]] = {
            (method, schedule): [self._run(method, schedule, seed) for seed in self.seeds]
            for schedule in self.schedules
            for method in self.methods
        }
        # The step time of every method except the baseline; see `measure_steps`.
        self.step_times: Dict[str, StepTime] = {}
        # The baseline that trains as long as a method, by the method's key; see `add_equal_time`.
        self.equal_time_runs: Dict[Key, List[Run]] = {}

    def _run(self, method: str, schedule: float, seed: int) -> Run:
        opts = [*self.opts, *method_opts(method, self.cfg), "SEED", str(seed)]
        run = Run(self._folder(method, schedule, seed), self.config_file, opts, self.cfg.SOLVER.MAX_ITER)
        return run if schedule == 1 else stretched(run.folder, run, schedule)

    def _folder(self, name: str, schedule: float, seed: int) -> Path:
        return self.output / "runs" / f"{name}{'' if schedule == 1 else f'-x{schedule:g}'}-seed{seed}"

    def prepare(self) -> None:
        """Draw or register the datasets, check that every method can be trained, and make the output folder.

        Raises:
            GDetKDError: a dataset cannot be read, the test set has no objects, or a method cannot be trained.
        """
        if not torch.cuda.is_available():
            self.cfg.MODEL.DEVICE = "cpu"
        make_shapes_for(self.cfg)
        register_datasets(self.cfg)
        check_has_ap(self.cfg.DATASETS.TEST[0])
        self.check_methods()
        self.output.mkdir(parents=True, exist_ok=True)
        self.cfg.OUTPUT_DIR = str(self.output)

    def check_methods(self) -> None:
        """Build each method's detectors and losses, so that an error shows before hours of training.

        Raises:
            GDetKDError: a method cannot be built; the message names it.
        """
        teacher = None  # shared by all methods, because it may be large
        for method in self.methods:
            cfg = self.runs[method, self.schedules[0]][0].config()
            cfg.MODEL.DEVICE, cfg.DISTILL.TEACHER.DTYPE = "cpu", "float32"  # half precision may need a GPU
            try:
                distiller = GDetKD(cfg, teacher)
                teacher = distiller.teacher or teacher
                check_student(cfg, distiller.student, distiller.teacher)
                if cfg.DISTILL.HEAD_TRANSFER:
                    transfer_heads(teacher.model, distiller.student)
            except GDetKDError as e:
                raise GDetKDError(f"The method {method} cannot be compared. {e}") from e

    def score_teacher(self) -> Optional[float]:
        """Return the teacher's AP in percent, kept in teacher.json of the output folder.

        Return None, and warn with the reason, if the teacher cannot be evaluated on this dataset.
        """
        cfg = self.cfg.clone()
        cfg.DISTILL.TEACHER.DTYPE = "float32"  # this machine may have no GPU, which float16 needs
        teacher = FrozenTeacher(cfg)

        def evaluate() -> float:
            with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
                ap = evaluate_teacher(cfg, teacher)["bbox"]["AP"]
            return 0.0 if math.isnan(ap) else ap  # Detectron2 gives NaN to a detector that finds nothing

        try:
            return kept_value(self.output / "teacher.json", _score_key(cfg, teacher), evaluate)
        except GDetKDError as e:
            logger.warning(
                "The teacher was not evaluated, so the report cannot show the share of its lead closed. %s", e
            )
            return None

    def train(self, train_net: Path, executor: Executor) -> None:
        """Measure the steps, then train the runs that are not complete.

        The runs are trained seed by seed, so that stopping early leaves complete seeds. The baselines at equal time
        come last. With TEST.PATIENCE their length depends on how long the other runs were trained.

        Args:
            executor: starts the measurements and the trainings.

        Raises:
            GDetKDError: a run failed, or a folder holds a run of another config.
        """
        for run in seed_by_seed(self.runs):
            claim_folder(run)  # a wrong folder is reported before the long measurement
        self.measure_steps(executor)
        if self.equal_time and self.cfg.TEST.PATIENCE:
            run_all(seed_by_seed(self.runs), train_net, executor)
        if self.equal_time:
            self.add_equal_time()
        run_all([*seed_by_seed(self.runs), *seed_by_seed(self.equal_time_runs)], train_net, executor)

    def measure_steps(self, executor: Executor) -> None:
        """Measure `step_times`, with the number of threads that a training of the executor has.

        The time of a step does not depend on seed and schedule, so each method is measured once. Only the share of the
        passes that fill DISTILL.TEACHER.CACHE_MB does, and it is that of the config's own schedule. If there is only
        the baseline, it is measured against itself to learn its seconds.
        """
        methods = self.methods[1:] or [BASELINE]
        with exit_on_signals(), tqdm(methods, desc="measuring the time of a step", unit="method") as bar:
            for method in bar:
                bar.set_postfix_str(method)
                kept = self.output / "step_times" / f"{method}.json"
                baseline_run, method_run = (self._run(name, 1, seed=0) for name in (BASELINE, method))
                self.step_times[method] = kept_step_time(kept, baseline_run, method_run, executor)

    def step_ratio(self, method: str) -> float:
        """Return the time of the method's step over the time of the baseline's step."""
        return 1.0 if method == BASELINE else self.step_times[method].ratio

    def step_seconds(self, method: str) -> float:
        """Return the seconds of a step. Training times in charts and tables are iterations times these seconds."""
        seconds = statistics.median(step_time.baseline_seconds for step_time in self.step_times.values())
        return seconds * self.step_ratio(method)

    def iterations(self, key: Key) -> float:
        """Return the iterations of a method's complete runs, as a mean over the seeds."""
        return statistics.fmean(run.iterations for run in self.runs[key])

    def add_equal_time(self) -> None:
        """Set `equal_time_runs` from the measured steps. With TEST.PATIENCE all other runs must be complete."""
        if self.cfg.TEST.PATIENCE:
            self._add_equal_time_after_early_ends()
            return
        slowest = max(map(self.step_ratio, self.methods))
        for method, schedule in self.runs:
            if method == BASELINE:
                continue
            ratio = slowest if self.one_longer else self.step_ratio(method)
            # Rounding lets methods of similar cost share a baseline, also with a schedule of that length.
            longer = round(schedule * math.ceil(ratio * TIME_STEPS - 1e-6) / TIME_STEPS, 6)
            self.equal_time_runs[method, schedule] = (
                self.runs[BASELINE, schedule]
                if ratio <= 1 + SAME_TIME
                else [self._run(BASELINE, longer, seed) for seed in self.seeds]
            )

    def _add_equal_time_after_early_ends(self) -> None:
        """Set `equal_time_runs` from the iterations that the runs were trained for.

        The baselines do not end early, because they must be trained for the whole time.
        """
        for key in [key for key in self.runs if key[0] != BASELINE]:
            baselines = self.runs[BASELINE, key[1]]
            iterations = self.iterations(key) * self.step_ratio(key[0])  # of the baseline, in the same time
            if abs(iterations / self.iterations((BASELINE, key[1])) - 1) <= SAME_TIME:
                self.equal_time_runs[key] = baselines
                continue
            multiple = iterations / self.cfg.SOLVER.MAX_ITER
            longer = round(math.ceil(multiple * TIME_STEPS - 1e-6) / TIME_STEPS, 6)
            self.equal_time_runs[key] = [self._whole_baseline(longer, seed) for seed in self.seeds]

    def _whole_baseline(self, schedule: float, seed: int) -> Run:
        """Return a run of the baseline that does not end early."""
        run = self._run(BASELINE, schedule, seed)
        folder = run.folder.with_name(run.folder.name.replace("-seed", "-whole-seed"))
        return replace(run, folder=folder, opts=[*run.opts, "TEST.PATIENCE", "0"])


def _score_key(cfg: CfgNode, teacher: FrozenTeacher) -> Dict[str, Any]:
    """Return what the teacher's AP depends on."""
    keys = {key: value for key, value in flat_config(cfg.dump()).items() if key.startswith(KEYS_OF_THE_SCORE)}
    labels = digests_of_labels(cfg, cfg.DATASETS.TEST)
    return {"weights": teacher.sha256, "file": teacher.file.content(), "labels": labels, "config": keys}


def _check(cfg: CfgNode, config_file: str, methods: Sequence[str]) -> None:
    if len(cfg.DATASETS.TEST) != 1:
        raise GDetKDError(
            f"DATASETS.TEST of {config_file} names {len(cfg.DATASETS.TEST)} datasets, but a comparison needs one. "
            "Name one."
        )
    if cfg.MODEL.META_ARCHITECTURE != "GDetKD":
        raise GDetKDError(
            f"{config_file} trains a {cfg.MODEL.META_ARCHITECTURE}, on which no method has an effect. Set "
            'MODEL.META_ARCHITECTURE to "GDetKD" and name a teacher in DISTILL.TEACHER.'
        )
    if not configured_parts(cfg) and any(CONFIGURED in method.split("+") for method in methods):
        raise GDetKDError(
            f"The method {CONFIGURED} takes its losses from {config_file}, but DISTILL.LOSSES is empty there and "
            f"DISTILL.HEAD_TRANSFER is off. Name losses, or remove {CONFIGURED} from the methods."
        )
