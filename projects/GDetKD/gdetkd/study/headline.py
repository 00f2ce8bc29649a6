"""Write the sentence that says which method leads, or that the seeds cannot tell the methods apart."""

from typing import List, Optional, Sequence, Tuple

from .comparison import Comparison
from .methods import BASELINE
from .summary import ERRORS, Row, is_told_apart, paired_gain
from .table import at_equal_iterations, with_error


def _rank(comparison: Comparison, rows: Sequence[Row]) -> Tuple[Row, List[Row]]:
    """Return the row with the highest AP, and the rows that cannot be told apart from it."""
    best = max(rows, key=lambda row: row.metrics["AP"][0])
    runs = comparison.runs
    return best, [
        row
        for row in rows
        if row is not best
        and not is_told_apart(paired_gain(runs[best.method, best.schedule], runs[row.method, row.schedule]))
    ]


def find_leader(comparison: Comparison, rows: Sequence[Row]) -> Optional[Row]:
    """Return the row that leads all other rows of its schedule, or None if no row does.

    A row leads if its AP is higher than that of every other row by more than two standard errors of the difference,
    which is paired by seed. With one seed there is no error, so no row leads.
    """
    best, equals = _rank(comparison, rows)
    return best if len(rows) > 1 and not equals else None


def headline(comparison: Comparison, rows: Sequence[Row]) -> str:
    """Return the sentence at the top of the report.

    Args:
        rows: the rows of one schedule, among them the baseline.
    """
    best, equals = _rank(comparison, rows)
    score = with_error(best.metrics["AP"])
    if len(rows) == 1:
        return f"The student alone reaches AP {score}."
    if not equals:
        return f"{best.method} leads with AP {score}{_gains(best)}."
    if best.seeds == 1:
        return (
            "One seed gives no error, so the methods cannot be told apart. The highest AP is "
            f"{score} of {best.method}{_gains(best)}."
        )
    names = ", ".join(row.method for row in equals)
    return (
        f"{best.method} has the highest AP, {score}{_gains(best)}, but cannot be told apart from {names}: the "
        f"difference is not larger than {ERRORS} standard errors."
    )


def _gains(row: Row) -> str:
    if row.method == BASELINE:
        return ", the student alone"
    text = f", {with_error(row.gain, '+')} over the student alone{at_equal_iterations([row])}"
    if row.equal_time_gain is not None:
        text += f" and {with_error(row.equal_time_gain, '+')} at equal time"
        if row.seeds > 1 and not is_told_apart(row.equal_time_gain):
            text += " (not told apart from 0)"
    return text
