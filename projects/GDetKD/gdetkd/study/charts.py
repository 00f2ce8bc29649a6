"""Draw the figures of a comparison's report as SVG."""

from typing import Dict, List, Optional, Sequence

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ..figures.style import MARKERS, METHOD, PALETTE, PLAIN, STYLE, TEACHER, as_svg, finish_legend
from .comparison import Comparison
from .methods import BASELINE, CONFIGURED
from .run import Run
from .summary import Row, mean_curve


def styles(methods: Sequence[str]) -> Dict[str, Dict[str, str]]:
    """Return the color and marker of each method. The baseline is grey, the configured method is red."""
    fixed = {BASELINE: {"color": PLAIN, "marker": "o"}, CONFIGURED: {"color": METHOD, "marker": "o"}}
    added = [method for method in methods if method not in fixed]
    drawn = {
        method: {"color": PALETTE[place % len(PALETTE)], "marker": MARKERS[place % len(MARKERS)]}
        for place, method in enumerate(added)
    }
    return {**fixed, **drawn}


def draw_scores(comparison: Comparison, rows: Sequence[Row], teacher_ap: Optional[float]) -> str:
    """Draw the AP of each method on one schedule: mean, standard error, every seed, and the baseline at equal time."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.6, 1.1 + 0.42 * len(rows)))
        style = styles([row.method for row in rows])
        for place, row in enumerate(rows):
            mean, error = row.metrics["AP"]
            axis.barh(
                place, mean, 0.62, color=style[row.method]["color"], alpha=0.85, xerr=error, ecolor="#333333", capsize=3
            )
            seeds = [run.metrics_file.last()["AP"] for run in comparison.runs[row.method, row.schedule]]
            axis.plot(seeds, [place] * len(seeds), "o", color="white", markeredgecolor="#333333", markersize=4)
            axis.annotate(
                f"{mean:.1f}",
                (max([*seeds, mean + (error or 0), row.equal_time_ap[0] if row.equal_time_ap else 0]), place),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                weight="bold",
            )
            if row.equal_time_ap is not None:
                at = row.equal_time_ap[0]
                axis.plot([at, at], [place - 0.4, place + 0.4], color="black", linewidth=1.6, linestyle=(0, (2, 1.2)))
        _draw_reference(axis, rows[0].metrics["AP"][0], PLAIN, "none")
        if teacher_ap is not None:
            _draw_reference(axis, teacher_ap, TEACHER, f"teacher {teacher_ap:.1f}")
        axis.set_yticks(range(len(rows)), [row.method for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel("box AP, percent")
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.25)
        return as_svg(figure)


def _draw_reference(axis: Axes, value: float, color: str, label: str) -> None:
    axis.axvline(value, color=color, linestyle="--", linewidth=1.2, zorder=0.5)
    axis.text(value, 1.01, label, color=color, transform=axis.get_xaxis_transform(), ha="center", va="bottom")


def draw_curves(comparison: Comparison, rows: Sequence[Row], teacher_ap: Optional[float]) -> str:
    """Draw the AP of each method on one schedule over training time, as a mean over seeds."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.6, 4.4))
        style = styles([row.method for row in rows])
        for row in rows:
            key = (row.method, row.schedule)
            seconds, ap = mean_curve(comparison.runs[key], comparison.step_seconds(row.method))
            strong = row.method in (BASELINE, CONFIGURED)
            axis.plot(
                [0, *seconds],
                [0, *ap],
                **style[row.method],
                markersize=5,
                linewidth=2.4 if strong else 1.5,
                label=row.method,
                zorder=3 if strong else 2,
            )
        for runs in longer_baselines(comparison, rows):
            seconds, ap = mean_curve(runs, comparison.step_seconds(BASELINE))
            axis.plot([0, *seconds], [0, *ap], ":", **style[BASELINE], markersize=4, linewidth=1.5, zorder=1)
        if teacher_ap is not None:
            axis.axhline(teacher_ap, color=TEACHER, linestyle="--", linewidth=1.2, label="teacher")
        axis.set(xlabel="training time without evaluations, seconds", ylabel="box AP, percent")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        finish_legend(axis)
        return as_svg(figure)


def longer_baselines(comparison: Comparison, rows: Sequence[Row]) -> List[List[Run]]:
    """Return the longer baselines, trained for the time of a method. Methods with similar costs share a baseline."""
    shown = {comparison.runs[row.method, row.schedule][0].folder for row in rows}
    longer = {}
    for row in rows:
        runs = comparison.equal_time_runs.get((row.method, row.schedule), [])
        if runs and runs[0].folder not in shown:
            longer[runs[0].folder] = runs
    return list(longer.values())


def draw_costs(rows: Sequence[Row]) -> str:
    """Draw each method's gain over the time of a step. Filled marks are at equal iterations, hollow at equal time."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.6, 4.0))
        style = styles([row.method for row in rows])
        for row in (row for row in rows if row.gain is not None):
            marker = {**style[row.method], "markersize": 8}
            axis.errorbar(row.step_time, row.gain[0], yerr=row.gain[1], capsize=3, label=row.method, ls="", **marker)
            if row.equal_time_gain is not None:
                axis.plot(row.step_time, row.equal_time_gain[0], fillstyle="none", ls="", **marker)
                ends = [row.gain[0], row.equal_time_gain[0]]
                axis.plot([row.step_time] * 2, ends, color=style[row.method]["color"], alpha=0.4, linewidth=1)
        axis.axhline(0, color="#333333", linewidth=0.8)
        axis.set(xlabel="time of a training step, relative to the student alone", ylabel="gain in AP, points")
        axis.margins(x=0.08)
        axis.grid(alpha=0.25)
        finish_legend(axis)
        return as_svg(figure)


def draw_schedules(rows: Sequence[Row]) -> str:
    """Draw the AP of each method over the length of the schedule.

    A gain that shrinks on longer schedules is only faster convergence.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.6, 4.0))
        by_method: Dict[str, List[Row]] = {}
        for row in sorted(rows, key=lambda row: row.schedule):
            by_method.setdefault(row.method, []).append(row)
        style = styles(list(by_method))
        for method, method_rows in by_method.items():
            axis.errorbar(
                [row.schedule for row in method_rows],
                [row.metrics["AP"][0] for row in method_rows],
                yerr=None if method_rows[0].metrics["AP"][1] is None else [row.metrics["AP"][1] for row in method_rows],
                **style[method],
                capsize=3,
                linewidth=2.4 if method in (BASELINE, CONFIGURED) else 1.5,
                label=method,
            )
        schedules = sorted({row.schedule for row in rows})
        axis.set_xscale("log")
        axis.set_xticks(schedules, [f"{schedule:g}x" for schedule in schedules], minor=False)
        axis.xaxis.minorticks_off()
        axis.set(xlabel="length of the schedule", ylabel="box AP, percent")
        axis.grid(alpha=0.25)
        finish_legend(axis)
        return as_svg(figure)
