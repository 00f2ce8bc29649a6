"""Write the rows of a comparison as Markdown, CSV and JSON, with notes that explain the table."""

import csv
import io
import json
from typing import Any, Dict, List, Optional, Sequence

from tabulate import tabulate

from ..metrics_file import METRICS
from .summary import Estimate, Row


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
        "The time of a training step is relative to a step of none. A step includes the loading of its batch. Both "
        "were timed in turn in one process.",
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
    else:
        texts.append("Memory is the peak of a training on the GPU, relative to a training of none.")
    if any(row.ended_early for row in rows):
        texts.append(_early_ends(rows) + ("" if equal else " So some gains are not at equal iterations."))
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
