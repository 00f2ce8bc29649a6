"""Measure how long a training step of a method takes, compared with a step of the baseline.

The wall time of a run depends on what else the machine does meanwhile, so the wall times of two runs cannot be
compared. Here the baseline and the method take steps in turn, in one process, so that other work slows both alike. A
step is all that a training run times: loading the batch, forward and backward pass, guard and optimizer.

Both start as a run starts, on the same batches, but as in the later part of a run: every term has its full weight, and
CKD's queue is full. Nothing is written to the folder of a run.

DISTILL.WEIGHTS "auto" measures gradients in one of DISTILL.AUTO.PERIOD steps. The median over the rounds does not show
that time.

One limit: if workers load the batches (DATALOADER.NUM_WORKERS), the workers of one config also load while the other
config takes a step. If the loader is slower than the step, the waiting time of both is then underestimated.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, List, Mapping, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, EventWriter

from ..config_file import load_config
from ..device import images_on_device
from ..engine import DistillTrainer
from ..engine.guard import StepGuard
from ..engine.hooks import RandomState
from ..engine.step_costs import LATE, now, time_in_rounds
from ..errors import GDetKDError
from ..files import kept_value, last_line
from ..program import explained_errors
from .executors import Executor, Process
from .folder import fingerprint
from .run import Run
from .signals import starting

# A round has a step of each config. The warm-up rounds allocate memory, and on a GPU choose algorithms.
WARM_UP, ROUNDS = 5, 30
# Seconds between two looks at a measurement.
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class StepTime:
    """Hold the measured time of a method's step.

    Attributes:
        ratio: time of the method's step over that of the baseline's step, median over the rounds. With
            DISTILL.TEACHER.CACHE_MB it includes the passes of the teacher that fill the cache, spread over the
            iterations of the config.
        low, high: lower and upper quartile of that ratio over the rounds.
        baseline_seconds: time of the baseline's step, median over the rounds.
        threads: threads of the process that measured; the runs have as many.
        device: MODEL.DEVICE of both.
    """

    ratio: float
    low: float
    high: float
    baseline_seconds: float
    threads: int
    device: str


class _Stepper(DistillTrainer):
    """Take the steps of a training run and nothing else: write no metrics, evaluate nothing and save nothing."""

    def __init__(self, cfg: CfgNode, folder: str) -> None:
        cfg = cfg.clone()
        cfg.OUTPUT_DIR = folder  # StepGuard writes a report there if a step is not finite
        cfg.DISTILL.INSIGHT.PERIOD = 0
        super().__init__(cfg)
        self.resume_or_load(resume=False)
        self.iter, self.storage = LATE, EventStorage(LATE)
        if self.distiller is not None:
            self.distiller.fill_buffers()

    def fill_cache(self) -> Tuple[float, int]:
        """Run the teacher on the batches of a run until an epoch brings no new view, or the cache is full.

        Returns:
            the seconds of the passes with new views, and the index of the first batch to time. If the cache is full,
            this is the first batch of the next epoch: the views so far are nearly all in the cache, and those of the
            rest of the epoch are not. Otherwise the index is 0.
        """
        teacher = self.distiller.teacher if self.distiller and self.distiller.losses else None
        if teacher is None or teacher.cache is None:
            return 0.0, 0
        loader, seconds, without_new = self.build_train_loader(self.cfg), 0.0, 0
        epoch = math.ceil(loader.description["images"] / self.cfg.SOLVER.IMS_PER_BATCH)
        distilled = math.ceil(self.cfg.DISTILL.UNTIL * self.cfg.SOLVER.MAX_ITER)
        for index, batch in enumerate(islice(loader, distilled)):
            misses, start = teacher.cache.misses, now()
            batch = images_on_device(teacher.with_cache_keys(batch), self.distiller.device)
            teacher.extract(batch, self.distiller.reads_regions_alone)
            is_new = teacher.cache.misses > misses
            seconds += now() - start if is_new else 0.0
            without_new = 0 if is_new else without_new + 1
            if teacher.cache.is_full:
                return seconds, math.ceil((index + 1) / epoch) * epoch
            if without_new == epoch:
                break
        return seconds, 0

    def build_writers(self) -> List[EventWriter]:
        return []

    def build_hooks(self) -> List[HookBase]:
        return [hook for hook in super().build_hooks() if isinstance(hook, (RandomState, StepGuard))]

    def step(self) -> None:
        with self.storage:
            self.before_step()
            self.run_step()
        self.iter += 1


def measure_pair(baseline: CfgNode, method: CfgNode, rounds: int = ROUNDS, warm_up: int = WARM_UP) -> StepTime:
    """Measure the steps of two configs in turn, in this process.

    Args:
        baseline: config of the student alone.
        method: config of the same student with the method.

    Raises:
        GDetKDError: one of the two cannot be trained.
    """
    with tempfile.TemporaryDirectory() as folder:
        steppers = {"baseline": _Stepper(baseline, folder), "method": _Stepper(method, folder)}
        filling, first_batch = steppers["method"].fill_cache()
        for stepper in steppers.values():
            stepper.data_loader.start_iter = first_batch
        works = {name: stepper.step for name, stepper in steppers.items()}
        seconds = time_in_rounds(works, rounds, warm_up)
    step = statistics.median(seconds["baseline"])
    once = filling / (step * method.SOLVER.MAX_ITER)
    # All measured steps of the method distil. After DISTILL.UNTIL, its steps are taken to last as long as a plain one.
    pairs = zip(seconds["baseline"], seconds["method"])
    ratios = [1 + method.DISTILL.UNTIL * (distilled / plain - 1) for plain, distilled in pairs]
    low, ratio, high = (quartile + once for quartile in statistics.quantiles(ratios, n=4))
    return StepTime(
        round(ratio, 4),
        round(low, 4),
        round(high, 4),
        round(step, 6),
        torch.get_num_threads(),
        baseline.MODEL.DEVICE,
    )


def measure(executor: Executor, baseline: Run, method: Run, log: Path) -> StepTime:
    """Measure the steps of two runs in a process of their own, where the executor trains runs.

    Args:
        executor: starts the measurement.
        log: file for the output of the measurement. The result is written beside it.

    Raises:
        GDetKDError: the measurement fails; the message gives the last line of its log.
    """
    result = log.with_suffix(".result.json")
    result.unlink(missing_ok=True)
    process: Optional[Process] = None
    code: Optional[int] = None
    try:
        with starting():
            process = executor.start(_command(baseline, method, result), log, 0, lambda: "")
        while (code := process.poll()) is None:
            time.sleep(POLL_SECONDS)
    finally:
        if process is not None and code is None:
            process.terminate()
            process.wait()
    _check(code, method, log)
    step_time = StepTime(**json.loads(result.read_text()))
    result.unlink()
    return step_time


def _command(baseline: Run, method: Run, result: Path) -> List[str]:
    request = {"config_file": method.config_file, "baseline": baseline.opts, "method": method.opts}
    return [sys.executable, "-m", __name__, json.dumps(request), str(result)]


def _check(code: int, method: Run, log: Path) -> None:
    if code != 0:
        raise GDetKDError(
            f"The time of a step could not be measured for {method.folder.name}: the process ended with exit code "
            f"{code}. Correct the cause and start again. Its log is {log}, which ends with: {last_line(log)}"
        )


def kept_step_time(path: Path, baseline: Run, method: Run, executor: Executor) -> StepTime:
    """Return the step time that a file keeps, or measure it and write the file.

    A comparison that continues needs the same ratio, because the ratio sets the length of the runs at equal time. So
    the file is used as long as both configs and the teacher are the same, and the measurement runs on the same kind of
    machine.

    Args:
        executor: starts the measurement.
    """
    key = [fingerprint(run) for run in (baseline, method)]
    if executor.machine is not None:
        key.append(executor.machine)
    elif torch.cuda.is_available() and baseline.config().MODEL.DEVICE != "cpu":
        key.append(torch.cuda.get_device_name())
    measured = kept_value(path, key, lambda: asdict(measure(executor, baseline, method, path.with_suffix(".log"))))
    return StepTime(**measured)


def _main(request: Mapping[str, Any], result: Path) -> None:
    configs = [load_config(request["config_file"], request[name]) for name in ("baseline", "method")]
    for cfg in configs:
        if not torch.cuda.is_available():
            cfg.MODEL.DEVICE = "cpu"
    if configs[0].MODEL.DEVICE.startswith("cuda:"):
        torch.cuda.set_device(configs[0].MODEL.DEVICE)  # the clock waits for the current GPU
    # Detectron2 does the same at the start of a training run.
    torch.backends.cudnn.benchmark = configs[0].CUDNN_BENCHMARK
    seed_all_rng(configs[0].SEED)
    result.write_text(json.dumps(asdict(measure_pair(*configs))))


if __name__ == "__main__":
    with explained_errors():
        _main(json.loads(sys.argv[1]), Path(sys.argv[2]))
