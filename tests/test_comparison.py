"""Which runs a comparison takes, and what its report says of them; the runs are made up, but for one."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import WIDER
from gdetkd.comparison import Comparison, ablation, method_opts
from gdetkd.data.shapes import CLASSES
from gdetkd.engine import DistillTrainer
from gdetkd.errors import GDetKDError
from gdetkd.experiments import kept_time_ratio, load_config, mean_and_error, stretched
from gdetkd.visualization.report import write_report
from gdetkd.visualization.summary import as_markdown, summarize

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "quickstart" / "faster_rcnn-faster_rcnn.yaml")
SETTING = {"Student": "a <small> one", "Machine": "this"}


def finish(run, ap, seconds, memory=None):
    """Makes up what a complete run leaves."""
    run.folder.mkdir(parents=True, exist_ok=True)
    middle, end = run.max_iter // 2, run.max_iter
    lines = []
    for iteration, share in ((middle, 0.5), (end, 1.0)):
        line = {"iteration": iteration - 1, "train_seconds": seconds * share, "total_loss": 1.0}
        lines.append(line if memory is None else {**line, "max_mem": memory * share})
        metrics = {"AP": ap * share, "AP50": ap * share + 20, "AP75": ap * share + 5, "APs": ap / 2, "APm": ap}
        lines.append({"iteration": iteration, **{f"bbox/{k}": v for k, v in metrics.items()}, "bbox/APl": math.nan})
    (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    (run.folder / "model_final.pth").touch()


AP = {"none": (10.0, 12.0, 14.0), "PKD": (15.0, 16.0, 17.0), "GDetKD": (30.0, 34.0, 35.0), "SGFI+CKD": (9.0, 10.0, 8.0)}
SECONDS = {"none": 100.0, "PKD": 130.0, "GDetKD": 200.0, "SGFI+CKD": 103.0}


def finished(folder, schedules=(1.0,), equal_time=False, memory=None, methods=tuple(AP)):
    comparison = Comparison(CONFIG, [], folder, methods, (1, 2, 3), schedules, equal_time)
    for (method, schedule), runs in comparison.runs.items():
        for run, ap in zip(runs, AP[method]):
            # The longer the schedule, the smaller the gain.
            grown = ap + 20 * math.log2(schedule) if method == "none" else ap + 5 * math.log2(schedule)
            finish(run, grown, SECONDS[method] * schedule, None if memory is None else memory[method])
    if equal_time:
        comparison.add_equal_time()
        for runs in comparison.equal_time_runs.values():
            for run, ap in zip(runs, (20.0, 21.0, 22.0)):
                if not run.is_complete():
                    finish(run, ap, 1.0)
    return comparison


def row_of(rows, method, schedule=1.0):
    return next(row for row in rows if (row.method, row.schedule) == (method, schedule))


def test_methods():
    cfg = load_config(CONFIG, ["DISTILL.LOSSES", "('SGFI', 'CKD')", "DISTILL.HEAD_TRANSFER", "False"])
    assert method_opts("none", cfg) == ["DISTILL.LOSSES", "()", "DISTILL.HEAD_TRANSFER", "False"]
    assert method_opts("GDetKD", cfg) == []
    assert method_opts("PKD+CKD", cfg) == ["DISTILL.LOSSES", "('PKD', 'CKD')", "DISTILL.HEAD_TRANSFER", "False"]
    assert method_opts("head_transfer", cfg) == ["DISTILL.LOSSES", "()", "DISTILL.HEAD_TRANSFER", "True"]
    assert method_opts("SGFI+head_transfer", cfg) == ["DISTILL.LOSSES", "('SGFI',)", "DISTILL.HEAD_TRANSFER", "True"]
    joined = ["DISTILL.LOSSES", "('SGFI', 'CKD', 'PKD')", "DISTILL.HEAD_TRANSFER", "False"]
    assert method_opts("GDetKD+PKD", cfg) == joined
    cfg.DISTILL.HEAD_TRANSFER = True
    assert method_opts("GDetKD+PKD", cfg) == [*joined[:-1], "True"]
    for wrong in ("PDK", "SGFI+SGFI", "none+SGFI", "GDetKD+CKD", ""):
        with pytest.raises(GDetKDError, match="no method.*GDetKD.*CROSSKD"):
            method_opts(wrong, cfg)


def test_ablation_is_of_the_configured_components():
    cfg = load_config(CONFIG, ["DISTILL.LOSSES", "('SGFI', 'CKD')"])
    assert ablation(cfg) == ["none", "SGFI", "CKD", "head_transfer", "SGFI+CKD", "GDetKD"]
    cfg = load_config(CONFIG, ["DISTILL.LOSSES", "('SGFI',)", "DISTILL.HEAD_TRANSFER", "False"])
    assert ablation(cfg) == ["none", "SGFI"]
    with pytest.raises(GDetKDError, match="nothing to ablate"):
        ablation(load_config(CONFIG, ["DISTILL.LOSSES", "()", "DISTILL.HEAD_TRANSFER", "False"]))


def test_runs_differ_in_their_method_alone(tmp_path):
    comparison = Comparison(CONFIG, ["SOLVER.MAX_ITER", "40"], tmp_path, ["PKD", "GDetKD"], (1, 2), (1, 2))
    assert list(comparison.runs) == [(m, s) for s in (1, 2) for m in ("none", "PKD", "GDetKD")]
    none, pkd = (comparison.runs[method, 1][1].config() for method in ("none", "PKD"))
    assert none.SEED == pkd.SEED == 2 and none.SOLVER.MAX_ITER == 40
    pkd.DISTILL.LOSSES = ()
    assert none.dump() == pkd.dump()
    assert comparison.runs["GDetKD", 2][0].config().SOLVER.MAX_ITER == 80
    folders = [run.folder for runs in comparison.runs.values() for run in runs]
    assert len(set(folders)) == 12


def test_a_longer_schedule_keeps_its_steps(tmp_path):
    opts = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(300, 400)", "TEST.EVAL_PERIOD", "100"]
    run = Comparison(CONFIG, opts, tmp_path, []).runs["none", 1][0]
    cfg = stretched(tmp_path / "longer", run, 1.5).config()
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD) == ((450, 600), 750, 160)


def test_a_config_for_several_gpus_is_spelled_out_for_one_process(tmp_path):
    opts = ["SOLVER.REFERENCE_WORLD_SIZE", "4", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
    opts += ["SOLVER.STEPS", "(300, 400)", "TEST.EVAL_PERIOD", "100", "DISTILL.SGFI.WARMUP_ITERS", "50"]
    comparison = Comparison(CONFIG, opts, tmp_path, ["GDetKD"])
    run = comparison.runs["GDetKD", 1][0]
    as_trained = DistillTrainer.auto_scale_workers(run.config(), 1)
    plain = load_config(CONFIG, [])
    for cfg in (comparison.cfg, run.config(), as_trained):
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (2000, plain.SOLVER.IMS_PER_BATCH // 4)
        assert (cfg.SOLVER.STEPS, cfg.TEST.EVAL_PERIOD, cfg.DISTILL.SGFI.WARMUP_ITERS) == ((1200, 1600), 400, 200)
    finish(run, 30.0, 100.0)
    assert run.is_complete() and run.result()["iterations"] == 2000


def test_a_kept_ratio_of_times_goes_with_its_runs(tmp_path):
    comparison = finished(tmp_path, equal_time=True, methods=("none", "GDetKD"))
    pairs = comparison.runs["none", 1], comparison.runs["GDetKD", 1]
    kept = tmp_path / "kept.json"
    assert kept_time_ratio(kept, *pairs) == 2.0
    for run in pairs[1]:
        finish(run, 30.0, 300.0)
    assert kept_time_ratio(kept, *pairs) == 2.0  # the same runs: what was trained on it stays
    other = Comparison(CONFIG, ["DISTILL.SGFI.WEIGHT", "9.0"], tmp_path, ["GDetKD"]).runs
    assert kept_time_ratio(kept, other["none", 1], other["GDetKD", 1]) == 3.0


def test_half_precision_of_the_teacher_is_no_reason_against_a_comparison(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    Comparison(CONFIG, ["DISTILL.TEACHER.DTYPE", "float16"], tmp_path, ["GDetKD"]).check_methods()


@pytest.mark.parametrize(
    "keys,opts,message",
    [
        ({"methods": ["PDK"]}, [], "no method 'PDK'"),
        ({"schedules": (0,)}, [], "positive schedules"),
        ({"seeds": ()}, [], "needs a seed"),
        ({}, ["DATASETS.TEST", "()"], "names 0. Name one"),
        ({}, ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "no method has an effect.*GDetKD"),
        ({"methods": ["GDetKD"]}, ["DISTILL.LOSSES", "()", "DISTILL.HEAD_TRANSFER", "False"], "that is nothing"),
        ({"methods": ["GDetKD+PKD"]}, ["DISTILL.LOSSES", "()", "DISTILL.HEAD_TRANSFER", "False"], "that is nothing"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, keys, opts, message):
    with pytest.raises(GDetKDError, match=message):
        Comparison(CONFIG, opts, tmp_path, **{"methods": ["SGFI"], **keys})


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(GDetKDError, match="no config 'nowhere.yaml'"):
        Comparison("nowhere.yaml", [], tmp_path, [])


def test_a_method_that_cannot_be_had_is_found_out_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = Comparison(CONFIG, [], tmp_path, ["SGFI", "CROSSKD"])
    with pytest.raises(GDetKDError, match="method CROSSKD cannot be compared.*not dense"):
        comparison.check_methods()


def test_a_head_of_classes_in_another_order_is_found_out_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = Comparison(CONFIG, ["DISTILL.TEACHER.CLASSES", str(CLASSES)], tmp_path, ["GDetKD"])
    monkeypatch.setattr("gdetkd.engine.preflight.class_names", lambda cfg: CLASSES[::-1])
    with pytest.raises(GDetKDError, match="method GDetKD cannot be compared.*HEAD_TRANSFER.*another order"):
        comparison.check_methods()


def test_rows(tmp_path):
    rows = summarize(finished(tmp_path, equal_time=True), teacher_ap=52.0)
    assert [row.method for row in rows] == ["none", "PKD", "GDetKD", "SGFI+CKD"]
    none, ours = rows[0], row_of(rows, "GDetKD")
    assert none.gain is None and none.lead_closed is None and none.step_time == 1
    assert none.metrics["AP"] == pytest.approx((12.0, 2 / math.sqrt(3)))
    # Paired over seeds: 20, 22 and 21 points. The teacher leads by 40.
    assert ours.gain == pytest.approx((21.0, 1 / math.sqrt(3))) and ours.lead_closed == pytest.approx(21 / 40)
    assert ours.step_time == pytest.approx(2.0) and ours.seconds == 200
    assert ours.equal_time_ap[0] == 21.0 and ours.equal_time_gain[0] == 12.0
    assert ours.metrics["APl"] is None and ours.metrics["APs"][0] == pytest.approx(16.5)
    assert ours.step_memory is None


def test_the_baseline_itself_stands_at_equal_time_where_a_step_costs_no_more(tmp_path):
    comparison = finished(tmp_path, equal_time=True)
    assert comparison.equal_time_runs["SGFI+CKD", 1] == comparison.runs["none", 1]
    assert {run.max_iter for run in comparison.equal_time_runs["GDetKD", 1]} == {1000}
    assert {run.max_iter for run in comparison.equal_time_runs["PKD", 1]} == {650}


def test_steps_of_about_the_same_cost_share_a_baseline_at_equal_time(tmp_path, monkeypatch):
    monkeypatch.setitem(SECONDS, "PKD", 141.0)
    monkeypatch.setitem(SECONDS, "GDetKD", 149.0)
    comparison = finished(tmp_path, schedules=(1, 1.5), equal_time=True)
    # Rounded up to 1.5, so that none has less time than the method, and that is the baseline's other schedule.
    folders = {tmp_path / "runs" / f"none-x1.5-seed{seed}" for seed in (1, 2, 3)}
    for each in (comparison.equal_time_runs["PKD", 1], comparison.equal_time_runs["GDetKD", 1]):
        assert {run.folder for run in each} == folders
    assert {run.max_iter for run in comparison.equal_time_runs["PKD", 1.5]} == {1125}  # 2.25 times 500
    at_equal_time, schedule = comparison.equal_time_runs["PKD", 1][0], comparison.runs["none", 1.5][0]
    assert at_equal_time.fingerprint() == schedule.fingerprint()


def test_memory_where_it_was_measured(tmp_path):
    rows = summarize(finished(tmp_path, memory={"none": 100, "PKD": 130, "GDetKD": 150, "SGFI+CKD": 200}), 52.0)
    assert row_of(rows, "GDetKD").step_memory == pytest.approx(1.5)
    assert "not measured" not in as_markdown(rows, 52.0) and "1.30x" in as_markdown(rows, 52.0)


def test_a_teacher_without_a_lead(tmp_path):
    comparison = finished(tmp_path)
    assert row_of(summarize(comparison, 11.0), "GDetKD").lead_closed is None
    assert "not known" in as_markdown(summarize(comparison, None), None)


def test_a_single_value_has_no_error():
    assert mean_and_error([3.0]) == (3.0, None) and mean_and_error([1.0, 3.0]) == (2.0, 1.0)


def test_report(tmp_path):
    comparison = finished(tmp_path, schedules=(1, 2), equal_time=True)
    write_report(tmp_path / "report", comparison, 52.0, SETTING)
    markdown = (tmp_path / "report" / "report.md").read_text()
    line = next(line for line in markdown.splitlines() if "GDetKD" in line)
    assert "33.0 ± 1.5" in line and "+21.0 ± 0.6" in line and "52 %" in line and "2.00x" in line
    assert "+1.0 ± 0.6" in line  # over none on twice the schedule, which has the time of its steps
    with open(tmp_path / "report" / "report.csv") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 8 and records[2]["method"] == "GDetKD" and float(records[2]["gain"]) == 21.0
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["teacher_AP"] == 52.0 and content["rows"][2]["lead_closed"] == 0.525
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4 and "a &lt;small&gt; one" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page and "url(" not in page
    # On the longest schedule: 38 of the configured method, +6 over a baseline that has caught up.
    assert "GDetKD leads with AP 38.0" in page and "+6.0" in page


def test_a_report_on_one_seed_and_none_alone(tmp_path):
    comparison = Comparison(CONFIG, [], tmp_path, [], (1,))
    finish(comparison.runs["none", 1][0], 10.0, 100.0)
    write_report(tmp_path / "report", comparison, None, SETTING)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "The student alone reaches AP 10.0." in page and "one seed" in page


def test_the_whole_of_it_on_a_tiny_pair(distill_cfg, tiny_dataset, tmp_path):
    entry = {"name": "tiny2", "kind": "coco", "json": str(tiny_dataset / "tiny.json"), "images": str(tiny_dataset)}
    sets = {"DATASETS.REGISTER": [entry], "DATASETS.TRAIN": ("tiny2",), "DATASETS.TEST": ("tiny2",)}
    cfg = distill_cfg({**sets, "DISTILL.LOSSES": ("SGFI",), "SOLVER.MAX_ITER": 2}, teacher=WIDER)
    (tmp_path / "pair.yaml").write_text(cfg.dump())
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), "--config-file", str(tmp_path / "pair.yaml")]
    command += ["--methods", "none,PKD", "--seeds", "1", "--jobs", "2", "--output", str(tmp_path / "out")]
    path = os.pathsep.join([str(ROOT / "projects" / "GDetKD"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}

    def compare():
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "2 runs, 0 of them complete" in compare()
    rows = json.loads((tmp_path / "out" / "report" / "report.json").read_text())["rows"]
    assert [(row["method"], row["iterations"]) for row in rows] == [("none", 2), ("PKD", 2)]
    assert rows[1]["step_time"] > 0 and rows[1]["AP"] is not None
    ends = [(tmp_path / "out" / "runs" / f"{method}-seed1" / "model_final.pth") for method in ("none", "PKD")]
    before = [path.stat().st_mtime for path in ends]
    assert "2 runs, 2 of them complete" in compare()
    assert before == [path.stat().st_mtime for path in ends]
