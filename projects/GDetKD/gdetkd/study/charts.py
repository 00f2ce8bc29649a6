"""The figures of a comparison's report, as SVG."""

from typing import Dict, List, Optional, Sequence

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ..figures.style import MARKERS, METHOD, OTHERS, PLAIN, STYLE, TEACHER, as_svg, finish_legend
from .comparison import Comparison
from .methods import BASELINE, CONFIGURED
from .run import Run
from .summary import Row, mean_curve


def styles(methods: Sequence[str]) -> Dict[str, Dict[str, str]]:
    """Color and marker of each method, the same in every figure; none is grey and the configured one red."""
    fixed = {BASELINE: {"color": PLAIN, "marker": "o"}, CONFIGURED: {"color": METHOD, "marker": "o"}}
    others = [method for method in methods if method not in fixed]
    found = {
        method: {"color": OTHERS[place % len(OTHERS)], "marker": MARKERS[place % len(MARKERS)]}
        for place, method in enumerate(others)
    }
    return {**fixed, **found}


def draw_scores(comparison: Comparison, rows: Sequence[Row], teacher_ap: Optional[float]) -> str:
    """AP of each method on one schedule: mean, standard error, every seed, and the baseline at equal time."""
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
        _reference(axis, rows[0].metrics["AP"][0], PLAIN, "none")
        if teacher_ap is not None:
            _reference(axis, teacher_ap, TEACHER, f"teacher {teacher_ap:.1f}")
        axis.set_yticks(range(len(rows)), [row.method for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel("box AP, percent")
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.25)
        return as_svg(figure)


def _reference(axis: Axes, value: float, color: str, label: str) -> None:
    axis.axvline(value, color=color, linestyle="--", linewidth=1.2, zorder=0.5)
    axis.text(value, 1.01, label, color=color, transform=axis.get_xaxis_transform(), ha="center", va="bottom")


def draw_curves(comparison: Comparison, rows: Sequence[Row], teacher_ap: Optional[float]) -> str:
    """AP over training time, mean over seeds, of each method on one schedule."""
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
    """Return the baselines at equal time, but for the baseline itself. Methods of about one cost share one."""
    shown = {comparison.runs[row.method, row.schedule][0].folder for row in rows}
    found = {}
    for row in rows:
        runs = comparison.equal_time_runs.get((row.method, row.schedule), [])
        if runs and runs[0].folder not in shown:
            found[runs[0].folder] = runs
    return list(found.values())


def draw_costs(rows: Sequence[Row]) -> str:
    """Gain of each method on one schedule over what a step costs, at equal iterations and, hollow, at equal time."""
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
        axis.set(xlabel="time of a training step, the student's alone = 1", ylabel="gain in AP, points")
        axis.margins(x=0.08)
        axis.grid(alpha=0.25)
        finish_legend(axis)
        return as_svg(figure)


def draw_schedules(rows: Sequence[Row]) -> str:
    """AP of each method over the length of the schedule: a gain that shrinks is faster convergence alone."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.6, 4.0))
        by_method: Dict[str, List[Row]] = {}
        for row in sorted(rows, key=lambda row: row.schedule):
            by_method.setdefault(row.method, []).append(row)
        style = styles(list(by_method))
        for method, its in by_method.items():
            axis.errorbar(
                [row.schedule for row in its],
                [row.metrics["AP"][0] for row in its],
                yerr=None if its[0].metrics["AP"][1] is None else [row.metrics["AP"][1] for row in its],
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
