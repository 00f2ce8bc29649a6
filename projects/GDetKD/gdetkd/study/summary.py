"""Summarize the runs of a comparison as rows of numbers, and write the rows as Markdown, CSV and JSON."""

import csv
import io
import json
import math
import statistics
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

from tabulate import tabulate

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
    return Row(
        method,
        schedule,
        iterations,
        sum(run.iterations < run.max_iter for run in runs),
        all(run.iterations == baseline.iterations for run, baseline in zip(runs, baselines)),
        len(runs),
        {name: _estimate(runs, name) for name in METRICS},
        gain,
        paired_gain(runs, at_equal_time) if at_equal_time else None,
        _estimate(at_equal_time, "AP") if at_equal_time else None,
        gain[0] / lead if gain is not None and lead is not None and lead > 0 else None,
        iterations * comparison.step_seconds(method),
        comparison.step_ratio(method),
        None if is_baseline else (comparison.step_times[method].low, comparison.step_times[method].high),
        _mean(memory) / _mean(baseline_memory) if measured else None,
    )


def _mean(values: Any) -> float:
    return mean_and_error(list(values))[0]


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
    # A run that was interrupted may have been evaluated twice after the same iteration.
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


def with_error(estimate: Estimate, sign: str = "") -> str:
    """Return an estimate as text, such as "31.1 ± 0.4". Leave out a missing error; None becomes a dash."""
    if estimate is None:
        return "–"
    mean, error = estimate
    return f"{mean:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")


def headers(rows: Sequence[Row]) -> List[str]:
    """Return the headers of the table that `cells` returns."""
    several = len({row.schedule for row in rows}) > 1
    timed = any(row.equal_time_gain is not None for row in rows)
    return [
        "method",
        *(["schedule"] if several else []),
        *METRICS,
        "gain",
        *(["gain at equal time"] if timed else []),
        "lead closed",
        "time of a step",
        *(["memory"] if any(row.step_memory is not None for row in rows) else []),
    ]


def cells(rows: Sequence[Row]) -> List[List[str]]:
    """Return the texts of the table, row by row."""
    names = headers(rows)
    table = []
    for row in rows:
        texts = {
            "method": row.method,
            "schedule": f"{row.schedule:g}x",
            **{name: with_error(row.metrics[name]) for name in METRICS},
            "gain": with_error(row.gain, "+"),
            "gain at equal time": with_error(row.equal_time_gain, "+"),
            "lead closed": "–" if row.lead_closed is None else f"{100 * row.lead_closed:.0f} %",
            "time of a step": f"{row.step_time:.2f}x",
            "memory": "–" if row.step_memory is None else f"{row.step_memory:.2f}x",
        }
        table.append([texts[name] for name in names])
    return table


def notes(rows: Sequence[Row], teacher_ap: Optional[float]) -> List[str]:
    """Return the notes that explain the table."""
    seeds, equal = rows[0].seeds, at_equal_iterations(rows)
    spread = f"mean ± standard error over {seeds} seeds" if seeds > 1 else "from one seed, so the spread is not known"
    texts = [
        f"AP in percent, {spread}. Gains are over the student alone (none) with the same seeds{equal}. "
        "Time and memory of a training step are relative to a step of none. A step includes the loading of its batch. "
        "Both were timed in turn in one process.",
    ]
    if teacher_ap is None:
        texts.append(
            "The teacher's AP on this dataset is not known, so the share of the lead closed is not known either."
        )
    else:
        texts.append(
            f"The teacher has AP {teacher_ap:.1f}. Lead closed is the gain as a share of the teacher's lead over none."
        )
    if any(row.step_memory is None for row in rows):
        texts.append("Memory was not measured, because its peak is only known on GPUs.")
    if any(row.ended_early for row in rows):
        texts.append(f"{_early_ends(rows)} So some gains are not at equal iterations.")
    if all(row.equal_time_gain is None for row in rows):
        texts.append("A distilled step costs more than a plain step. Use --equal-time to train none for the same time.")
    return texts


def at_equal_iterations(rows: Sequence[Row]) -> str:
    """Return the end of a sentence on gains: " at equal iterations", or nothing if runs of a pair differ in length."""
    return " at equal iterations" if all(row.at_equal_iterations for row in rows) else ""


def _early_ends(rows: Sequence[Row]) -> str:
    """Return which methods have runs that ended early, as a sentence."""
    several = len({row.schedule for row in rows}) > 1
    names = [
        f"{row.method}{f' ({row.schedule:g}x)' if several else ''}: {row.ended_early} of {row.seeds}, "
        f"{row.iterations:.0f} iterations on average"
        for row in rows
        if row.ended_early
    ]
    return f"Runs ended early, because their AP no longer rose (TEST.PATIENCE). {'; '.join(names)}."


def as_markdown(rows: Sequence[Row], teacher_ap: Optional[float]) -> str:
    names = headers(rows)
    align = ["left" if name == "method" else "right" for name in names]
    table = tabulate(cells(rows), names, tablefmt="github", colalign=align, disable_numparse=True)
    return "\n\n".join([table, *notes(rows, teacher_ap)]) + "\n"


def as_records(rows: Sequence[Row]) -> List[Dict[str, Any]]:
    """Return the rows as flat dictionaries for JSON and CSV. A missing number is None."""
    records = []
    for row in rows:
        estimates = {**row.metrics, "gain": row.gain}
        estimates.update({"equal_time_gain": row.equal_time_gain, "equal_time_AP": row.equal_time_ap})
        record = {name: getattr(row, name) for name in ("method", "schedule", "iterations", "ended_early", "seeds")}
        for name, estimate in estimates.items():
            mean, error = estimate or (None, None)
            record.update({name: _rounded(mean), f"{name}_error": _rounded(error)})
        for name in ("lead_closed", "seconds", "step_time", "step_memory"):
            record[name] = _rounded(getattr(row, name))
        record["step_time_low"], record["step_time_high"] = row.step_time_range or (None, None)
        records.append(record)
    return records


def _rounded(value: Optional[float]) -> Optional[float]:
    return None if value is None else round(value, 4)


def as_json(rows: Sequence[Row], teacher_ap: Optional[float], setting: Dict[str, str]) -> str:
    """Return all numbers and the setting of the comparison as JSON."""
    return json.dumps({"setting": setting, "teacher_AP": teacher_ap, "rows": as_records(rows)}, indent=2) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    records, file = as_records(rows), io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def mean_and_error(values: Sequence[float]) -> Tuple[float, Optional[float]]:
    """Return the mean and its standard error. The error of a single value is None."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error
