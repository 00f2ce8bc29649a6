"""Write the report of a comparison: a table as Markdown, CSV and JSON, and one HTML page."""

import platform
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import torch

from ..figures.page import Cell, Section, Table, TableRow, render_page
from . import charts
from .comparison import Comparison
from .headline import find_leader, headline
from .methods import BASELINE, CONFIGURED
from .summary import Row, summarize
from .table import as_csv, as_json, as_markdown, at_equal_iterations, cells, headers, notes


def write_report(
    folder: Path, comparison: Comparison, teacher_ap: Optional[float], setting: Dict[str, str]
) -> List[Row]:
    """Write report.md, report.csv, report.json and report.html of a comparison whose runs are complete.

    Args:
        folder: created if it does not exist.
        teacher_ap: percent, on the same dataset; None if it is not known.
        setting: what was compared and on which machine, by a short name; shown at the top.

    Returns:
        the rows of the table.
    """
    rows = summarize(comparison, teacher_ap)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(as_markdown(rows, teacher_ap))
    (folder / "report.csv").write_text(as_csv(rows))
    (folder / "report.json").write_text(as_json(rows, teacher_ap, setting))
    (folder / "report.html").write_text(_page(comparison, rows, teacher_ap, setting))
    return rows


def describe(comparison: Comparison, machine: Optional[str] = None) -> Dict[str, str]:
    """Return what is compared and on which machine, by a short name. The steps must be measured.

    Args:
        machine: what the runs were trained on. None: this machine.
    """
    cfg = comparison.cfg
    limit = "up to " if cfg.TEST.PATIENCE else ""
    device = torch.cuda.get_device_name() if cfg.MODEL.DEVICE != "cpu" else f"{platform.machine()} CPU"
    return {
        "Student": f"{cfg.DISTILL.STUDENT_META_ARCHITECTURE}, {comparison.config_file}",
        "Teacher": cfg.DISTILL.TEACHER.CONFIG_FILE,
        "Data": f"trained on {', '.join(cfg.DATASETS.TRAIN)}, evaluated on {cfg.DATASETS.TEST[0]}",
        "Training": f"{limit}{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images; seeds "
        + ", ".join(map(str, comparison.seeds)),
        "A step of none": f"{comparison.step_seconds(BASELINE):.3f} s",
        "Machine": f"{machine or device}, torch {torch.__version__}",
        "Changes": " ".join(map(str, comparison.opts)) or "none",
    }


def _page(comparison: Comparison, rows: Sequence[Row], teacher_ap: Optional[float], setting: Dict[str, str]) -> str:
    title = f"{len(comparison.methods) - 1} ways to distil one student"
    if len(comparison.methods) == 2:
        title = f"{comparison.methods[1]} against the student alone"
    return render_page(
        title,
        headline(comparison, _main_rows(rows)),
        setting,
        _figures(comparison, rows, teacher_ap),
        _table(rows, find_leader(comparison, _main_rows(rows))),
        notes(rows, teacher_ap),
        "The numbers are in report.csv and report.json beside this page.",
    )


def _main_rows(rows: Sequence[Row]) -> List[Row]:
    """Return the rows of the longest schedule, which is nearest to the plateau."""
    longest = max(row.schedule for row in rows)
    return [row for row in rows if row.schedule == longest]


def _table(rows: Sequence[Row], leader: Optional[Row]) -> Table:
    names, body = headers(rows), []
    for row, texts in zip(rows, cells(rows)):
        kind = {BASELINE: "plain", CONFIGURED: "configured"}.get(row.method, "")
        if row is not rows[0] and row.method == rows[0].method:
            kind += " next"  # the first row of another schedule
        columns = []
        for name, text in zip(names, texts):
            marks = ["best"] if row is leader and name in ("method", "AP") else []
            marks += ["loss"] if name.startswith("gain") and text.startswith("-") else []
            columns.append(Cell(text, " ".join(marks)))
        body.append(TableRow(columns, kind))
    return Table(names, body)


def _figures(comparison: Comparison, rows: Sequence[Row], teacher_ap: Optional[float]) -> List[Section]:
    """Return the figures of the page."""
    main = _main_rows(rows)
    several = len(comparison.schedules) > 1
    where = f" This is the longest schedule, {main[0].schedule:g}x." if several else ""
    at_equal_time = any(row.equal_time_gain is not None for row in main)
    marks = " The dotted marks show the student alone, trained for the time of that method." if at_equal_time else ""
    hollow = " Hollow marks: at equal time." if at_equal_time else ""
    caption = f"Bars show the mean and the standard error, circles the single seeds.{marks}{where}"
    figures = [_section("scores", "Final AP", charts.draw_scores(comparison, main, teacher_ap), caption)]
    if several:
        caption = (
            "The same methods with longer schedules. A gain that shrinks is faster convergence, not a better final AP."
        )
        figures.append(_section("schedules", "AP and the length of the schedule", charts.draw_schedules(rows), caption))
    is_longer = bool(charts.longer_baselines(comparison, main))
    dotted = " Dotted: the student alone, trained for the time of a method." if is_longer else ""
    caption = (
        f"AP at each evaluation, mean over seeds. Time is iterations times the measured time of a step.{dotted}{where}"
    )
    figures.append(
        _section("curves", "AP over training time", charts.draw_curves(comparison, main, teacher_ap), caption)
    )
    if len(main) > 1:
        equal = at_equal_iterations(main)
        caption = f"Gain over the student alone{equal}, with its standard error.{hollow}{where}"
        figures.append(_section("costs", "What a gain costs", charts.draw_costs(main), caption))
    return figures


def _section(name: str, heading: str, svg: str, caption: str) -> Section:
    return Section(name, heading, svg.encode(), caption)
