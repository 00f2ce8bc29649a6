"""The figures of a comparison's report, as SVG."""

import io
from typing import Dict, List, Optional, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from ..comparison import Comparison  # noqa: E402
from ..experiments import Run  # noqa: E402
from ..methods import BASELINE, CONFIGURED  # noqa: E402
from .summary import Row, mean_curve  # noqa: E402

TEACHER, PLAIN, OURS = "#00798c", "#7b818a", "#d1495b"
# Of the other methods, in their order; told apart by markers, too.
OTHERS = (
    *("#3d5a80", "#edae49", "#66a182", "#8d5a97", "#b5651d", "#2e4057"),
    *("#c97b84", "#5c8001", "#e07a1f", "#0081a7", "#a8577e", "#4f772d"),
)
MARKERS = "sD^vP*Xhp<>"
STYLE = {
    "font.size": 10,
    "svg.fonttype": "none",  # text as text: smaller, and it can be searched
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans", "sans-serif"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "svg.hashsalt": "gdetkd",  # the same figure is the same file
}


def styles(methods: Sequence[str]) -> Dict[str, Dict[str, str]]:
    """Color and marker of each method, the same in every figure; none is grey and the configured one red."""
    fixed = {BASELINE: {"color": PLAIN, "marker": "o"}, CONFIGURED: {"color": OURS, "marker": "o"}}
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
            seeds = [run.metrics()["AP"] for run in comparison.runs[row.method, row.schedule]]
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


def finish_legend(axis: Axes, title: str = "") -> None:
    """The legend, on the right of the axis."""
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, title=title or None)


def as_svg(figure: Figure) -> str:
    """The figure's text, and closes it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()


def as_png(figure: Figure) -> bytes:
    """The figure's pixels, and closes it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()
