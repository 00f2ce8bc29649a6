"""Several methods on one config, with one teacher: which runs that takes, and training them.

A method is "none" (the student alone, the baseline), the name of a loss, "head_transfer", or "GDetKD": what the config
itself asks for. All but the first may be joined by "+": "GDetKD+PKD" is what the config asks for, and PKD.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from detectron2.config import CfgNode

from .config import flat_config
from .distiller import GDetKD
from .engine import DistillTrainer
from .engine.preflight import check_student
from .errors import GDetKDError
from .experiments import PLAIN, Run, kept_time_ratio, load_config, stretched
from .jobs import run_all, seed_by_seed
from .losses import DISTILL_LOSS_REGISTRY
from .teacher import transfer_heads

BASELINE, CONFIGURED, HEAD_TRANSFER = "none", "GDetKD", "head_transfer"
# A method whose steps take as long as the baseline's, but for this share, needs no baseline of its own.
SAME_TIME = 0.05
# Otherwise the baseline has its time, rounded up to a tenth of the baseline's own: never less than the method.
TIME_STEPS = 10
# A method, and how many times the config's iterations.
Key = Tuple[str, float]


def method_opts(method: str, cfg: CfgNode) -> List[str]:
    """KEY VALUE changes that make a config that of a method.

    Args:
        cfg: the config, which says what "GDetKD" is.

    Raises:
        GDetKDError: it names something that is no loss, or the same twice.
    """
    if method == BASELINE:
        return list(PLAIN)
    if method == CONFIGURED:
        return []
    parts = [part for name in method.split("+") for part in (_configured(cfg) if name == CONFIGURED else [name])]
    known = [name for name, _ in DISTILL_LOSS_REGISTRY]
    for part in parts:
        if part not in (*known, HEAD_TRANSFER) or parts.count(part) > 1:
            raise GDetKDError(
                f"There is no method {method!r}: {part!r} is no loss, or stands twice. There are {BASELINE}, "
                f"{CONFIGURED}, {HEAD_TRANSFER}, {', '.join(known)}, and all but the first joined by '+'."
            )
    losses = tuple(part for part in parts if part != HEAD_TRANSFER)
    return ["DISTILL.LOSSES", str(losses), "DISTILL.HEAD_TRANSFER", str(HEAD_TRANSFER in parts)]


def _configured(cfg: CfgNode) -> List[str]:
    """What a config asks for, part by part."""
    return [*cfg.DISTILL.LOSSES, *([HEAD_TRANSFER] if cfg.DISTILL.HEAD_TRANSFER else [])]


def for_one_process(cfg: CfgNode) -> List[str]:
    """KEY VALUE changes that spell out what a config with a SOLVER.REFERENCE_WORLD_SIZE is in one process, which each
    run of a comparison is."""
    scaled = flat_config(DistillTrainer.auto_scale_workers(cfg, 1).dump())
    before = flat_config(cfg.dump())
    return [part for key, value in scaled.items() if value != before[key] for part in (key, str(value))]


def ablation(cfg: CfgNode) -> List[str]:
    """The components of the configured method: each alone, then one after another added, up to the whole of it.

    Raises:
        GDetKDError: the config asks for no component.
    """
    parts = _configured(cfg)
    if not parts:
        raise GDetKDError("There is nothing to ablate: DISTILL.LOSSES is empty and DISTILL.HEAD_TRANSFER is off.")
    joined = ["+".join(parts[:count]) for count in range(2, len(parts))]
    return [BASELINE, *parts, *joined, *([CONFIGURED] if len(parts) > 1 else [])]


@dataclass
class Comparison:
    """
    Attributes:
        config_file: of the configured method, GDetKD; the others change its DISTILL.LOSSES and HEAD_TRANSFER.
        opts: KEY VALUE changes to it, for every run.
        output: the folder of all runs.
        methods: what is compared; the baseline is always among them.
        seeds: of each; a seed has one initialisation and order of the data, whatever the method.
        schedules: multiples of the config's iterations.
        equal_time: whether the baseline is also trained for the time that each method takes.

    Raises:
        GDetKDError: a method is unknown, a schedule is not positive, or the config is not of a distillation that is
            evaluated on one data set.
    """

    config_file: str
    opts: List[str]
    output: Path
    methods: Sequence[str]
    seeds: Sequence[int] = (1, 2, 3)
    schedules: Sequence[float] = (1.0,)
    equal_time: bool = False

    def __post_init__(self) -> None:
        self.methods = list(dict.fromkeys([BASELINE, *self.methods]))
        self.schedules = list(dict.fromkeys(self.schedules))
        if not self.seeds or not self.schedules or min(self.schedules) <= 0:
            raise GDetKDError(
                f"A comparison needs a seed and positive schedules, not {list(self.seeds)} and {self.schedules}."
            )
        self.opts = [*self.opts, *for_one_process(load_config(self.config_file, self.opts))]
        self.cfg = load_config(self.config_file, self.opts)
        _check(self.cfg, self.config_file, self.methods)
        self.runs: Dict[Key, List[Run]] = {
            (method, schedule): [self._run(method, schedule, seed) for seed in self.seeds]
            for schedule in self.schedules
            for method in self.methods
        }
        # The baseline for the time of a method, by the method's key; filled when the times are known.
        self.equal_time_runs: Dict[Key, List[Run]] = {}

    def _run(self, method: str, schedule: float, seed: int) -> Run:
        opts = [*self.opts, *method_opts(method, self.cfg), "SEED", str(seed)]
        run = Run(self._folder(method, schedule, seed), self.config_file, opts, self.cfg.SOLVER.MAX_ITER)
        return run if schedule == 1 else stretched(run.folder, run, schedule)

    def _folder(self, name: str, schedule: float, seed: int) -> Path:
        return self.output / "runs" / f"{name}{'' if schedule == 1 else f'-x{schedule:g}'}-seed{seed}"

    def check_methods(self) -> None:
        """Builds each method's detectors and losses, so that one that cannot be had is not found out after hours.

        Raises:
            GDetKDError: one cannot; the message names it.
        """
        teacher = None  # the same for all, and may be large
        for method in self.methods:
            cfg = self.runs[method, self.schedules[0]][0].config()
            cfg.MODEL.DEVICE, cfg.DISTILL.TEACHER.DTYPE = "cpu", "float32"  # half precision may want a GPU
            try:
                distiller = GDetKD(cfg, teacher)
                teacher = distiller.teacher or teacher
                check_student(cfg, distiller.student, distiller.teacher)
                if cfg.DISTILL.HEAD_TRANSFER:
                    transfer_heads(teacher.model, distiller.student)
            except GDetKDError as e:
                raise GDetKDError(f"The method {method} cannot be compared. {e}") from e

    def train(self, train_net: Path, jobs: int = 2) -> None:
        """Trains what is not complete: seed by seed, so that a comparison that is stopped has whole seeds, and then,
        where it is asked for, the baselines at equal time.

        Raises:
            GDetKDError: a run failed, or a folder holds one of another config.
        """
        run_all(seed_by_seed(self.runs), train_net, jobs)
        if self.equal_time:
            self.add_equal_time()
            run_all(seed_by_seed(self.equal_time_runs), train_net, jobs)

    def add_equal_time(self) -> None:
        """Fills `equal_time_runs`; all other runs are complete."""
        for (method, schedule), runs in self.runs.items():
            if method == BASELINE:
                continue
            baselines = self.runs[BASELINE, schedule]
            kept = self.output / "runs" / f"{method}-x{schedule:g}-time_ratio.json"
            ratio = kept_time_ratio(kept, baselines, runs)
            # Steps of about the same cost share a baseline, and so does a schedule of that length.
            longer = round(schedule * math.ceil(ratio * TIME_STEPS - 1e-6) / TIME_STEPS, 6)
            self.equal_time_runs[method, schedule] = (
                baselines if ratio <= 1 + SAME_TIME else [self._run(BASELINE, longer, seed) for seed in self.seeds]
            )


def _check(cfg: CfgNode, config_file: str, methods: Sequence[str]) -> None:
    if len(cfg.DATASETS.TEST) != 1:
        raise GDetKDError(
            f"A comparison is on one data set; DATASETS.TEST of {config_file} names {len(cfg.DATASETS.TEST)}. Name one."
        )
    if cfg.MODEL.META_ARCHITECTURE != "GDetKD":
        raise GDetKDError(
            f"{config_file} trains a {cfg.MODEL.META_ARCHITECTURE}, on which no method has an effect: set "
            'MODEL.META_ARCHITECTURE to "GDetKD" and name a teacher in DISTILL.TEACHER.'
        )
    if not _configured(cfg) and any(CONFIGURED in method.split("+") for method in methods):
        raise GDetKDError(
            f"{CONFIGURED} is what {config_file} asks for, and that is nothing: name losses in DISTILL.LOSSES, or take "
            f"{CONFIGURED} out of the methods."
        )
