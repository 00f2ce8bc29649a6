"""Test what the report of a comparison says. All runs are made up."""

import csv
import json
import math
import re

import pytest
from made_up_runs import CONFIG, SETTING, STEP, finish, finished, row_of, step_times

from gdetkd.study.comparison import Comparison
from gdetkd.study.headline import find_leader, headline
from gdetkd.study.report import write_report
from gdetkd.study.summary import is_told_apart, mean_and_error, summarize
from gdetkd.study.table import as_markdown


def test_rows(tmp_path):
    rows = summarize(finished(tmp_path, equal_time=True), teacher_ap=52.0)
    assert [row.method for row in rows] == ["none", "PKD", "GDetKD", "SGFI+CKD"]
    none, gdetkd = rows[0], row_of(rows, "GDetKD")
    assert none.gain is None and none.lead_closed is None and none.step_time == 1 and none.step_time_range is None
    assert none.metrics["AP"] == pytest.approx((12.0, 2 / math.sqrt(3)))
    # Paired over seeds: 20, 22 and 21 points. The teacher leads by 40.
    assert gdetkd.gain == pytest.approx((21.0, 1 / math.sqrt(3))) and gdetkd.lead_closed == pytest.approx(21 / 40)
    assert gdetkd.step_time == 2.0 and gdetkd.seconds == pytest.approx(500 * 2 * STEP)
    assert gdetkd.step_time_range == pytest.approx((1.9, 2.1))
    assert gdetkd.equal_time_ap[0] == 21.0 and gdetkd.equal_time_gain[0] == 12.0
    assert gdetkd.metrics["APl"] is None and gdetkd.metrics["APs"][0] == pytest.approx(16.5)
    assert gdetkd.step_memory is None


def test_memory_where_it_was_measured(tmp_path):
    rows = summarize(finished(tmp_path, memory={"none": 100, "PKD": 130, "GDetKD": 150, "SGFI+CKD": 200}), 52.0)
    assert row_of(rows, "GDetKD").step_memory == pytest.approx(1.5)
    assert "not measured" not in as_markdown(rows, 52.0) and "1.30x" in as_markdown(rows, 52.0)


def test_a_teacher_without_a_lead(tmp_path):
    comparison = finished(tmp_path)
    assert row_of(summarize(comparison, 11.0), "GDetKD").lead_closed is None
    assert "not known" in as_markdown(summarize(comparison, None), None)


@pytest.mark.parametrize("ended, equal", [((200, 200), True), ((250, None), False), ((None, 250), False)])
def test_gains_of_runs_that_ended_early(tmp_path, ended, equal):
    """Gains are at equal iterations only if each run is as long as the baseline's run."""
    comparison = Comparison(CONFIG, ["TEST.PATIENCE", "2", "SOLVER.MAX_ITER", "500"], tmp_path, ["GDetKD"], (1, 2))
    comparison.step_times = step_times({"GDetKD": 2.0})
    for (method, _), end in zip(comparison.runs, ended):
        for run, ap in zip(comparison.runs[method, 1.0], (10.0, 11.0) if method == "none" else (30.0, 31.0)):
            finish(run, ap, end=end)
    write_report(tmp_path / "report", comparison, None, SETTING)
    page = (tmp_path / "report" / "report.html").read_text()
    assert ("not at equal iterations" not in page) == equal
    assert ("at equal iterations" in page.replace("not at equal iterations", "")) == equal


def test_a_single_value_has_no_error():
    assert mean_and_error([3.0]) == (3.0, None) and mean_and_error([1.0, 3.0]) == (2.0, 1.0)


def test_report(tmp_path):
    comparison = finished(tmp_path, schedules=(1, 2), equal_time=True)
    write_report(tmp_path / "report", comparison, 52.0, SETTING)
    markdown = (tmp_path / "report" / "report.md").read_text()
    line = next(line for line in markdown.splitlines() if "GDetKD" in line)
    assert "33.0 ± 1.5" in line and "+21.0 ± 0.6" in line and "52 %" in line and "2.00x" in line
    assert "+1.0 ± 0.6" in line  # over none with twice the schedule, which takes the same time
    with open(tmp_path / "report" / "report.csv") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 8 and records[2]["method"] == "GDetKD" and float(records[2]["gain"]) == 21.0
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["teacher_AP"] == 52.0 and content["rows"][2]["lead_closed"] == 0.525
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4 and "a &lt;small&gt; one" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page and "url(" not in page
    # On the longest schedule the configured method has 38, +6 over the baseline.
    assert "GDetKD leads with AP 38.0" in page and "+6.0" in page


def ranked(folder, scores, seeds):
    """Return a comparison and the rows of its report. `scores` holds the AP of each seed by method."""
    comparison = Comparison(CONFIG, [], folder, list(scores), seeds, equal_time=False)
    comparison.step_times = step_times({name: 1.5 for name in scores if name != "none"})
    for (method, _), runs in comparison.runs.items():
        for run, ap in zip(runs, scores[method]):
            finish(run, ap)
    return comparison, summarize(comparison, None)


def test_a_method_leads_if_the_difference_is_larger_than_two_errors(tmp_path):
    # GDetKD over PKD: 2, 3 and 4 points, so 3 ± 1 / sqrt(3) = 3 ± 0.58.
    scores = {"none": (10.0, 11.0, 12.0), "PKD": (20.0, 21.0, 20.0), "GDetKD": (22.0, 24.0, 24.0)}
    comparison, rows = ranked(tmp_path, scores, (1, 2, 3))
    assert find_leader(comparison, rows).method == "GDetKD"
    assert headline(comparison, rows).startswith("GDetKD leads with AP 23.3 ± 0.7, +12.3 ± 0.3 over the student alone")


def test_methods_within_two_errors_are_not_told_apart(tmp_path):
    # GDetKD over PKD: 0, 3 and 6 points, so 3 ± 3 / sqrt(3) = 3 ± 1.7.
    scores = {"none": (10.0, 11.0, 12.0), "PKD": (22.0, 21.0, 18.0), "GDetKD": (22.0, 24.0, 24.0)}
    comparison, rows = ranked(tmp_path, scores, (1, 2, 3))
    text = headline(comparison, rows)
    assert find_leader(comparison, rows) is None
    assert "leads" not in text and "GDetKD has the highest AP" in text and "cannot be told apart from PKD:" in text
    write_report(tmp_path / "report", comparison, None, SETTING)
    page = (tmp_path / "report" / "report.html").read_text()
    assert text in page.replace("&#x27;", "'") and 'class="best' not in page


def test_one_seed_never_leads(tmp_path):
    comparison, rows = ranked(tmp_path, {"none": (10.0,), "GDetKD": (40.0,)}, (1,))
    assert find_leader(comparison, rows) is None
    assert headline(comparison, rows).startswith("One seed gives no error, so the methods cannot be told apart.")


def test_the_student_alone_can_lead(tmp_path):
    comparison, rows = ranked(tmp_path, {"none": (20.0, 21.0), "PKD": (10.0, 11.1)}, (1, 2))
    assert headline(comparison, rows).startswith("none leads with AP 20.5 ± 0.5, the student alone.")


def test_a_gain_at_equal_time_within_its_error_is_said(tmp_path):
    comparison = finished(tmp_path, equal_time=True, methods=("none", "GDetKD"))
    for run, ap in zip(comparison.equal_time_runs["GDetKD", 1.0], (36.0, 31.0, 31.0)):
        finish(run, ap)
    assert "+0.3 ± 3.2 at equal time (not told apart from 0)" in headline(comparison, summarize(comparison, 52.0))


def test_a_difference_over_two_errors_is_told_apart():
    assert is_told_apart((2.1, 1.0)) and is_told_apart((-2.1, 1.0)) and is_told_apart((1.0, 0.0))
    assert not is_told_apart((2.0, 1.0)) and not is_told_apart((9.0, None)) and not is_told_apart((0.0, 0.0))
    assert not is_told_apart(None)


def test_a_report_on_one_seed_and_none_alone(tmp_path):
    comparison = Comparison(CONFIG, [], tmp_path, [], (1,))
    finish(comparison.runs["none", 1][0], 10.0)
    comparison.step_times = step_times({"none": 1.01})  # the baseline is measured against itself to learn its seconds
    write_report(tmp_path / "report", comparison, None, SETTING)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "The student alone reaches AP 10.0." in page and "one seed" in page
