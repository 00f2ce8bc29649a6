"""Summarize the runs of a comparison as rows of numbers."""

import math
import statistics
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

from ..metrics_file import METRICS
from .comparison import Comparison, Key
from .methods import BASELINE
from .run import Run

# A mean over seeds and its standard error. The error of a single seed is None. Without values the estimate is None.
Estimate = Optional[Tuple[float, Optional[float]]]
# A difference is told apart from 0 if it is larger than this many standard errors.
ERRORS = 2


@dataclass(frozen=True)
class Row:
    """Hold the results of a method on a schedule.

    Attributes:
        method: name of the method.
        schedule: multiple of the config's iterations.
        iterations: iterations of a run, as a mean over the seeds. Runs differ if they ended early (TEST.PATIENCE).
        ended_early: number of runs that ended early.
        at_equal_iterations: whether each run was as long as the baseline's run with the same seed.
        seeds: number of seeds.
        metrics: AP, AP50, AP75, APs, APm, APl in percent.
        gain: AP over the baseline with the same schedule and seed; None for the baseline.
        equal_time_gain: AP over the baseline that trained for the same time; None if there is no such baseline.
        equal_time_ap: AP of the baseline that trained for the same time; None if there is no such baseline.
        lead_closed: `gain` as a share of the teacher's lead over the baseline; None if the teacher has no lead.
        seconds: training time of a run without evaluations: iterations times the measured seconds of a step.
        step_time: time of a step over the time of the baseline's step, measured side by side.
        step_time_range: lower and upper quartile of that ratio over the measured steps; None for the baseline.
        step_memory: peak memory over the baseline's peak memory; None if it was not measured.
    """

    method: str
    schedule: float
    iterations: float
    ended_early: int
    at_equal_iterations: bool
    seeds: int
    metrics: Dict[str, Estimate]
    gain: Estimate
    equal_time_gain: Estimate
    equal_time_ap: Estimate
    lead_closed: Optional[float]
    seconds: float
    step_time: float
    step_time_range: Optional[Tuple[float, float]]
    step_memory: Optional[float]


def summarize(comparison: Comparison, teacher_ap: Optional[float]) -> List[Row]:
    """Return a row for each method and schedule. All runs must be complete.

    Args:
        teacher_ap: percent, on the same dataset; None if it is not known.
    """
    return [_row(comparison, key, runs, teacher_ap) for key, runs in comparison.runs.items()]


def _row(comparison: Comparison, key: Key, runs: List[Run], teacher_ap: Optional[float]) -> Row:
    method, schedule = key
    baselines, is_baseline = comparison.runs[BASELINE, schedule], method == BASELINE
    at_equal_time = comparison.equal_time_runs.get(key)
    gain = None if is_baseline else paired_gain(runs, baselines)
    lead = None if teacher_ap is None else teacher_ap - _estimate(baselines, "AP")[0]
    memory = [run.metrics_file.peak_megabytes() for run in runs]
    baseline_memory = [run.metrics_file.peak_megabytes() for run in baselines]
    measured = None not in memory and None not in baseline_memory
    iterations = comparison.iterations(key)
    step_range = None if is_baseline else (comparison.step_times[method].low, comparison.step_times[method].high)
    return Row(
        method=method,
        schedule=schedule,
        iterations=iterations,
        ended_early=sum(run.iterations < run.max_iter for run in runs),
        at_equal_iterations=all(run.iterations == baseline.iterations for run, baseline in zip(runs, baselines)),
        seeds=len(runs),
        metrics={name: _estimate(runs, name) for name in METRICS},
        gain=gain,
        equal_time_gain=paired_gain(runs, at_equal_time) if at_equal_time else None,
        equal_time_ap=_estimate(at_equal_time, "AP") if at_equal_time else None,
        lead_closed=gain[0] / lead if gain is not None and lead is not None and lead > 0 else None,
        seconds=iterations * comparison.step_seconds(method),
        step_time=comparison.step_ratio(method),
        step_time_range=step_range,
        step_memory=statistics.fmean(memory) / statistics.fmean(baseline_memory) if measured else None,
    )


def _estimate(runs: Sequence[Run], metric: str) -> Estimate:
    values = [run.metrics_file.last()[metric] for run in runs]
    return None if None in values else mean_and_error(values)


def paired_gain(runs: Sequence[Run], references: Sequence[Run]) -> Estimate:
    """Return the gain in AP of runs over reference runs, paired by seed.

    Two runs with the same seed have the same initialisation and data order.
    """
    pairs = zip(runs, references)
    return mean_and_error([run.metrics_file.last()["AP"] - ref.metrics_file.last()["AP"] for run, ref in pairs])


def mean_curve(runs: Sequence[Run], step_seconds: float) -> Tuple[List[float], List[float]]:
    """Return the training time in seconds and the AP in percent of each evaluation, as means over the seeds.

    Args:
        step_seconds: the measured seconds of a step. The wall time of a run would depend on the load of the machine.
    """
    curves = [{point.iteration: point.metrics["AP"] for point in run.metrics_file.curve()} for run in runs]
    first = max(map(min, curves))
    iterations = sorted(iteration for iteration in set().union(*curves) if iteration >= first)
    means = [statistics.fmean(_ap_at(curve, iteration) for curve in curves) for iteration in iterations]
    return [step_seconds * iteration for iteration in iterations], means


def _ap_at(curve: Dict[int, float], iteration: int) -> float:
    """Return the AP of the last evaluation up to an iteration. A run that ended early keeps its last AP."""
    return curve[max(evaluated for evaluated in curve if evaluated <= iteration)]


def is_told_apart(difference: Estimate) -> bool:
    """Return whether a paired difference is larger than two of its standard errors. One seed gives no error."""
    if difference is None or difference[1] is None:
        return False
    return abs(difference[0]) > ERRORS * difference[1]


def mean_and_error(values: Sequence[float]) -> Tuple[float, Optional[float]]:
    """Return the mean and its standard error. The error of a single value is None."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error
