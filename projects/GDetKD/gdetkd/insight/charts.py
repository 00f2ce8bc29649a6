"""Draw the charts of the page about one run."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures.style import METHOD, PALETTE, PLAIN, TEACHER, finish_legend

Record = Dict[str, Any]
Curve = Tuple[Sequence[int], Sequence[float]]
# A matrix of at most this many classes shows names and values.
NAMED_CLASSES = 12


def draw_level_matching(record: Record) -> Figure:
    """Draw the mean alpha of each pair of a teacher level and a student level, by object size, at one iteration."""
    sizes = [size for size, matching in record["levels"].items() if sum(matching["objects"])]
    figure, axes = plt.subplots(1, len(sizes), figsize=(1.2 + 2.9 * len(sizes), 3.1), squeeze=False, sharey=False)
    for axis, size in zip(axes[0], sizes):
        matching = record["levels"][size]
        rows = [level for level, count in enumerate(matching["objects"]) if count]
        matrix = np.array([matching["alpha"][level] for level in rows])
        axis.imshow(matrix, vmin=0, vmax=1, cmap="BuPu", aspect="auto")
        for (row, column), value in np.ndenumerate(matrix):
            _write_cell(axis, row, column, f"{value:.2f}", dark=value > 0.6)
        axis.set_xticks(range(len(record["student_levels"])), record["student_levels"])
        labels = [f"{record['teacher_levels'][level]} ({matching['objects'][level]})" for level in rows]
        axis.set_yticks(range(len(rows)), labels)
        axis.set_title(f"{size}, {sum(matching['objects'])} objects" if size != "all" else "all objects", loc="left")
        axis.set_xlabel("student level")
        _hide_frame(axis)
    axes[0][0].set_ylabel("teacher level (objects)")
    figure.tight_layout()
    return figure


def draw_level_history(records: Sequence[Record]) -> Figure:
    """Draw over training the mean alpha of the student levels, for each teacher level that has objects, and tau."""
    last = records[-1]
    levels = [level for level, count in enumerate(last["levels"]["all"]["objects"]) if count]
    figure, axes = plt.subplots(1, len(levels) + 1, figsize=(2.7 * (len(levels) + 1) + 1, 3.0), squeeze=False)
    iterations = [record["iterations"] for record in records]
    for axis, level in zip(axes[0], levels):
        # A record made with fewer images may have no object on a level.
        unknown = [np.nan] * len(last["student_levels"])
        alphas = np.array([record["levels"]["all"]["alpha"][level] or unknown for record in records])
        for place, name in enumerate(last["student_levels"]):
            axis.plot(iterations, alphas[:, place], color=PALETTE[place], label=name, linewidth=1.8)
        axis.set(ylim=(0, 1), xlabel="iterations")
        axis.set_title(f"teacher level {last['teacher_levels'][level]}", loc="left")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("mean alpha")
    finish_legend(axes[0][len(levels) - 1], title="student level")
    axis = axes[0][-1]
    axis.plot(iterations, [record["tau"] for record in records], color=METHOD, linewidth=1.8)
    axis.set(xlabel="iterations", ylim=(0, None))
    axis.set_title("tau", loc="left")
    axis.grid(alpha=0.25)
    figure.tight_layout()
    return figure


def draw_correlation(matrices: Dict[str, List[List[Optional[float]]]], classes: Sequence[str]) -> Figure:
    """Draw the correlation of the classes' mean embeddings: one matrix for each detector, all on one scale."""
    arrays = {name: np.array(matrix, dtype=float) for name, matrix in matrices.items()}  # None becomes NaN
    off_diagonal = [array[~np.eye(len(array), dtype=bool)] for array in arrays.values()]
    known = np.concatenate([*off_diagonal, [0.0, 0.5]])
    least = float(np.nanmin(known))
    size = 3.4 if len(classes) <= NAMED_CLASSES else 4.2
    figure, axes = plt.subplots(1, len(arrays), figsize=(size * len(arrays) + 1.2, size), squeeze=False)
    for axis, (name, array) in zip(axes[0], arrays.items()):
        drawn = axis.imshow(array, vmin=least, vmax=1, cmap="viridis")
        axis.set_title(name, loc="left", color={"teacher": TEACHER, "student": METHOD}.get(name, PLAIN))
        if len(classes) <= NAMED_CLASSES:
            for (row, column), value in np.ndenumerate(array):
                _write_cell(axis, row, column, "–" if np.isnan(value) else f"{value:.2f}", dark=value < (1 + least) / 2)
            axis.set_xticks(range(len(classes)), classes, rotation=40, ha="right")
            axis.set_yticks(range(len(classes)), classes if axis is axes[0][0] else [""] * len(classes))
            for label in [*axis.get_xticklabels(), *axis.get_yticklabels()]:
                label.set_parse_math(False)  # a class name may have dollar signs
        _hide_frame(axis)
    figure.tight_layout()
    figure.colorbar(drawn, ax=list(axes[0]), shrink=0.8, label="correlation")
    return figure


def draw_correlation_history(records: Sequence[Record], baseline_gap: Optional[float]) -> Figure:
    """Draw over training how far the student's class correlations are from the teacher's."""
    figure, axis = plt.subplots(figsize=(8.6, 3.2))
    points = [(r["iterations"], r["correlation_gap"]) for r in records if r["correlation_gap"] is not None]
    axis.plot(*zip(*points), color=METHOD, linewidth=2, marker="o", markersize=4, label="student")
    if baseline_gap is not None:
        axis.axhline(baseline_gap, color=PLAIN, linestyle="--", label="baseline, after training")
        finish_legend(axis)
    axis.set(xlabel="iterations", ylabel="mean |difference| from the teacher", ylim=(0, None))
    axis.grid(alpha=0.25)
    return figure


def draw_gradients(records: Sequence[Record]) -> Figure:
    """Draw the share of each term in the sum of gradient norms, and the cosine with the student's own losses."""
    records = [record for record in records if record.get("gradients")]
    iterations = [record["iterations"] for record in records]
    names = list(records[-1]["gradients"])
    colors = {name: color for name, color in zip(names, (PLAIN, METHOD, *PALETTE))}
    norms = np.array([[record["gradients"][name]["norm"] for name in names] for record in records])
    shares = (norms / np.maximum(norms.sum(axis=1, keepdims=True), 1e-30)).T
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.6))
    if len(records) == 1:  # an area needs two points
        iterations, shares = [iterations[0], iterations[0] + 1], np.repeat(shares, 2, axis=1)
    left.stackplot(iterations, shares, colors=[colors[name] for name in names], alpha=0.85, linewidth=0)
    left.set(
        xlabel="iterations", ylabel="share of the gradient's norm", ylim=(0, 1), xlim=(iterations[0], iterations[-1])
    )
    for name in names:
        cosines = [record["gradients"][name]["cosine"] for record in records]
        right.plot(
            iterations[: len(cosines)], cosines, color=colors[name], marker="o", markersize=3, label=_term_label(name)
        )
    right.axhline(0, color="#333333", linewidth=0.8)
    right.set(xlabel="iterations", ylabel="cosine with the student's own losses", ylim=(-1.05, 1.05))
    right.grid(alpha=0.25)
    finish_legend(right)
    figure.tight_layout()
    return figure


def draw_terms(terms: Dict[str, Curve]) -> Figure:
    """Draw every weighted loss over training."""
    figure, axis = plt.subplots(figsize=(8.6, 3.8))
    distilled_first = sorted(terms.items(), key=lambda term: "distill" not in term[0])
    for place, (name, (iterations, values)) in enumerate(distilled_first):
        style = {"linewidth": 2, "ls": "-"} if "distill" in name else {"linewidth": 1.1, "ls": "--"}
        axis.plot(iterations, values, color=PALETTE[place % len(PALETTE)], label=_term_label(name), **style)
    axis.set(xlabel="iterations", ylabel="weighted loss", yscale="log")
    axis.grid(alpha=0.25)
    finish_legend(axis)
    return figure


def draw_ap(student: Curve, baseline: Optional[Curve], teacher_ap: Optional[float]) -> Figure:
    """Draw the box AP of the evaluations during training."""
    figure, axis = plt.subplots(figsize=(8.6, 3.8))
    for name, curve, color in (("student", student, METHOD), ("baseline", baseline, PLAIN)):
        if curve is not None and curve[0]:
            axis.plot([0, *curve[0]], [0, *curve[1]], color=color, linewidth=2, marker="o", markersize=4, label=name)
    if teacher_ap is not None:
        axis.axhline(teacher_ap, color=TEACHER, linestyle="--", linewidth=1.2, label=f"teacher {teacher_ap:.1f}")
    axis.set(xlabel="iterations", ylabel="box AP, percent", ylim=(0, None))
    axis.grid(alpha=0.25)
    finish_legend(axis)
    return figure


def _term_label(name: str) -> str:
    if name == "student":
        return "the student's own losses"
    return name[len("loss_distill_") :].upper() if name.startswith("loss_distill_") else name


def _write_cell(axis: Axes, row: int, column: int, text: str, dark: bool) -> None:
    axis.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "#222222")


def _hide_frame(axis: Axes) -> None:
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
