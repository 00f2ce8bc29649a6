"""Test which runs a comparison has, how they are trained, and which runs share a baseline."""

import json
import os
import shutil
import signal
import sys

import pytest
from made_up_runs import CONFIG, RATIOS, ROOT, STEP, finish, finished

from conftest import WIDER, example_in, write_coco
from gdetkd.config_file import load_config
from gdetkd.data.shapes import CLASSES
from gdetkd.engine import DistillTrainer
from gdetkd.errors import GDetKDError
from gdetkd.study.charts import longer_baselines
from gdetkd.study.comparison import Comparison
from gdetkd.study.executors import LocalExecutor
from gdetkd.study.folder import fingerprint
from gdetkd.study.methods import ablation, method_opts
from gdetkd.study.picture import curves_of
from gdetkd.study.run import stretched
from gdetkd.study.step_time import StepTime
from gdetkd.study.summary import summarize
from gdetkd.study.table import as_markdown
from programs import run_program


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
    finish(run, 30.0)
    assert run.is_complete() and run.metrics_file.curve()[-1].iteration == 2000


def test_the_time_of_a_step_is_measured_once_and_kept(tmp_path, monkeypatch):
    measured = []

    def measure(executor, baseline, method, log):
        measured.append((baseline.opts, method.opts, executor.jobs))
        return StepTime(2.0 + len(measured), 1.0, 4.0, STEP, 1, "cpu")

    monkeypatch.setattr("gdetkd.study.step_time.measure", measure)

    def ratio(opts, seeds=(1,), schedules=(1.0,)):
        comparison = Comparison(CONFIG, opts, tmp_path, ["GDetKD"], seeds, schedules)
        comparison.measure_steps(LocalExecutor(3))
        return comparison.step_ratio("GDetKD")

    assert ratio([]) == ratio([], seeds=(4, 5), schedules=(2.0,)) == 3.0
    plain = ["DISTILL.LOSSES", "()", "DISTILL.HEAD_TRANSFER", "False", "SEED", "0"]
    assert measured == [(plain, ["SEED", "0"], 3)]
    assert ratio(["DISTILL.SGFI.WEIGHT", "9.0"]) == 4.0  # another config is measured again
    assert not (tmp_path / "runs").exists()


def test_a_measurement_ends_if_the_comparison_gets_a_signal(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nkill -TERM $PPID\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        Comparison(CONFIG, [], tmp_path / "out", ["GDetKD"]).measure_steps(LocalExecutor(1))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == before and not list(tmp_path.rglob("*.json"))


def test_the_baseline_alone_is_measured_against_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("gdetkd.study.step_time.measure", lambda *_: StepTime(1.04, 1.0, 1.1, STEP, 1, "cpu"))
    comparison = Comparison(CONFIG, [], tmp_path, [])
    comparison.measure_steps(LocalExecutor(1))
    assert comparison.step_ratio("none") == 1.0 and comparison.step_seconds("none") == STEP


def test_wall_times_of_runs_do_not_affect_results(tmp_path):
    """Give the baseline a long wall time, as on a busy machine, and expect the same results."""

    def results(folder, seconds):
        comparison = finished(folder, equal_time=True)
        before = comparison.equal_time_runs
        for (method, _), runs in comparison.runs.items():
            for run in runs:
                run_ap = run.metrics_file.curve()[-1].metrics["AP"]
                finish(run, run_ap, seconds=seconds[method])
        comparison.add_equal_time()
        iterations = {key: [run.max_iter for run in runs] for key, runs in comparison.equal_time_runs.items()}
        assert iterations == {key: [run.max_iter for run in runs] for key, runs in before.items()}
        return iterations, summarize(comparison, 52.0), curves_of(comparison)

    fair = results(tmp_path / "fair", {"none": 100.0, "PKD": 130.0, "GDetKD": 200.0, "SGFI+CKD": 103.0})
    busy = results(tmp_path / "busy", {"none": 900.0, "PKD": 130.0, "GDetKD": 50.0, "SGFI+CKD": 1.0})
    assert fair == busy


@pytest.mark.parametrize("ratio", [1.06, 1.5, 1.58, 1.601])
def test_the_baseline_at_equal_time_ends_where_the_method_ends(tmp_path, ratio):
    comparison = finished(tmp_path, equal_time=True, methods=("none", "GDetKD"), ratios={"GDetKD": ratio})
    baseline, longer, distilled = curves_of(comparison)
    assert (baseline.label, longer.label, distilled.label) == ("baseline", "baseline, equal time", "distilled")
    later = longer.seconds[-1] - distilled.seconds[-1]
    assert -1e-6 <= later < baseline.seconds[-1] / 10
    assert baseline.seconds[-1] == pytest.approx(500 * STEP)
    assert distilled.seconds[-1] == pytest.approx(500 * STEP * ratio)


def test_the_picture_has_no_curve_at_equal_time_if_it_is_the_baseline_itself(tmp_path):
    comparison = finished(tmp_path, equal_time=True, methods=("none", "GDetKD"), ratios={"GDetKD": 1.04})
    assert [curve.label for curve in curves_of(comparison)] == ["baseline", "distilled"]


def test_methods_of_about_one_cost_share_one_dotted_curve(tmp_path):
    comparison = finished(tmp_path, equal_time=True, ratios={"PKD": 1.41, "GDetKD": 1.49, "SGFI+CKD": 1.03})
    shown = longer_baselines(comparison, summarize(comparison, None))
    assert [[run.folder.name for run in runs] for runs in shown] == [[f"none-x1.5-seed{seed}" for seed in (1, 2, 3)]]


def test_a_teacher_in_half_precision_can_be_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = Comparison(CONFIG, ["DISTILL.TEACHER.DTYPE", "float16"], tmp_path, ["GDetKD"])
    comparison.check_methods()
    monkeypatch.setattr("gdetkd.study.comparison.evaluate_teacher", lambda *args: {"bbox": {"AP": 50.0}})
    comparison.cfg.MODEL.DEVICE = "cpu"  # as on a login node of a cluster
    assert comparison.score_teacher() == 50.0


def test_the_teachers_score_belongs_to_the_labels_and_the_settings(tmp_path, tiny_dataset, monkeypatch):
    monkeypatch.chdir(ROOT)
    labels = tmp_path / "labels.json"
    shutil.copy(tiny_dataset / "tiny.json", labels)
    scores = iter((50.0, 60.0, 70.0))
    monkeypatch.setattr("gdetkd.study.comparison.evaluate_teacher", lambda *args: {"bbox": {"AP": next(scores)}})

    def score(limit):
        entry = {"name": "mine", "kind": "coco", "json": str(labels), "images": str(tiny_dataset), "limit": limit}
        opts = ["DATASETS.REGISTER", str([entry]), "DATASETS.TEST", "('mine',)", "MODEL.DEVICE", "cpu"]
        return Comparison(CONFIG, opts, tmp_path / "out", ["GDetKD"]).score_teacher()

    assert [score(3), score(3), score(4)] == [50.0, 50.0, 60.0]
    labels.write_text(labels.read_text() + " ")
    os.utime(labels, ns=(1, 1))
    assert score(4) == 70.0


@pytest.mark.parametrize(
    "keys,opts,message",
    [
        ({"methods": ["PDK"]}, [], "no method 'PDK'"),
        ({"schedules": (0,)}, [], "positive schedules"),
        ({"seeds": ()}, [], "needs a seed"),
        ({}, ["DATASETS.TEST", "()"], "names 0 datasets.*Name one"),
        ({}, ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "no method has an effect.*GDetKD"),
        (
            {"methods": ["GDetKD"]},
            ["DISTILL.LOSSES", "()", "DISTILL.HEAD_TRANSFER", "False"],
            "DISTILL.LOSSES is empty there",
        ),
        (
            {"methods": ["GDetKD+PKD"]},
            ["DISTILL.LOSSES", "()", "DISTILL.HEAD_TRANSFER", "False"],
            "DISTILL.LOSSES is empty there",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, keys, opts, message):
    with pytest.raises(GDetKDError, match=message):
        Comparison(CONFIG, opts, tmp_path, **{"methods": ["SGFI"], **keys})


@pytest.mark.parametrize("kind", ["coco", "images"])
def test_a_test_set_without_labels_cannot_be_compared_on(tmp_path, kind):
    (tmp_path / "images").mkdir()
    write_coco(tmp_path / "images", 2, name="empty")
    labels = tmp_path / "images" / "empty.json"
    labels.write_text(json.dumps({**json.loads(labels.read_text()), "annotations": []}))
    entry = {"name": f"empty_{kind}", "kind": kind, "images": str(tmp_path / "images")}
    if kind == "coco":
        entry["json"] = str(labels)
    opts = ["DATASETS.REGISTER", str([entry]), "DATASETS.TEST", str((entry["name"],))]
    with pytest.raises(GDetKDError, match=f"'empty_{kind}' in DATASETS.TEST has no annotation, so there is no AP"):
        Comparison(CONFIG, opts, tmp_path / "out", ["SGFI"]).prepare()


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(GDetKDError, match="config 'nowhere.yaml' .* is not there"):
        Comparison("nowhere.yaml", [], tmp_path, [])


def test_a_method_that_cannot_be_built_is_reported_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = Comparison(CONFIG, [], tmp_path, ["SGFI", "CROSSKD"])
    with pytest.raises(GDetKDError, match="method CROSSKD cannot be compared.*not dense"):
        comparison.check_methods()


def test_a_head_of_classes_in_another_order_is_reported_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = Comparison(CONFIG, ["DISTILL.TEACHER.CLASSES", str(CLASSES)], tmp_path, ["GDetKD"])
    monkeypatch.setattr("gdetkd.engine.preflight.class_names", lambda cfg: CLASSES[::-1])
    with pytest.raises(GDetKDError, match="method GDetKD cannot be compared.*HEAD_TRANSFER.*another order"):
        comparison.check_methods()


def test_the_baseline_itself_stands_at_equal_time_where_a_step_costs_no_more(tmp_path):
    comparison = finished(tmp_path, equal_time=True)
    assert comparison.equal_time_runs["SGFI+CKD", 1] == comparison.runs["none", 1]
    assert {run.max_iter for run in comparison.equal_time_runs["GDetKD", 1]} == {1000}
    assert {run.max_iter for run in comparison.equal_time_runs["PKD", 1]} == {650}


def test_steps_of_about_the_same_cost_share_a_baseline_at_equal_time(tmp_path):
    ratios = {**RATIOS, "PKD": 1.41, "GDetKD": 1.49}
    comparison = finished(tmp_path, schedules=(1, 1.5), equal_time=True, ratios=ratios)
    # Both ratios are rounded up to 1.5, which is also the second schedule of the baseline.
    folders = {tmp_path / "runs" / f"none-x1.5-seed{seed}" for seed in (1, 2, 3)}
    for method in ("PKD", "GDetKD"):
        assert {run.folder for run in comparison.equal_time_runs[method, 1]} == folders
    assert {run.max_iter for run in comparison.equal_time_runs["PKD", 1.5]} == {1125}  # 2.25 times 500
    at_equal_time, schedule = comparison.equal_time_runs["PKD", 1][0], comparison.runs["none", 1.5][0]
    assert fingerprint(at_equal_time) == fingerprint(schedule)


def test_compare_trains_reports_and_continues_on_a_tiny_pair(distill_cfg, tiny_dataset, tmp_path):
    entry = {"name": "tiny2", "kind": "coco", "json": str(tiny_dataset / "tiny.json"), "images": str(tiny_dataset)}
    sets = {"DATASETS.REGISTER": [entry], "DATASETS.TRAIN": ("tiny2",), "DATASETS.TEST": ("tiny2",)}
    cfg = distill_cfg({**sets, "DISTILL.LOSSES": ("SGFI",), "SOLVER.MAX_ITER": 2}, teacher=WIDER)
    (tmp_path / "pair.yaml").write_text(cfg.dump())
    command = [ROOT / "tools" / "compare.py", "--config-file", tmp_path / "pair.yaml"]
    command += ["--methods", "none,PEAK", "--seeds", "1", "--jobs", "2", "--output", tmp_path / "out"]
    path = os.pathsep.join([str(ROOT / "projects" / "GDetKD"), os.environ.get("PYTHONPATH", "")])
    (tmp_path / "my_loss.py").write_text(example_in("losses.md"))
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GDETKD_IMPORT": "my_loss.py"}

    def compare():
        done = run_program(*command, environment=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "2 runs, 0 of them complete" in compare()
    kept = (tmp_path / "out" / "step_times" / "PEAK.json").read_text()
    assert json.loads(kept)["value"]["threads"] == 1
    rows = json.loads((tmp_path / "out" / "report" / "report.json").read_text())["rows"]
    assert [(row["method"], row["iterations"]) for row in rows] == [("none", 2), ("PEAK", 2)]
    assert rows[1]["step_time"] == round(json.loads(kept)["value"]["ratio"], 4) and rows[1]["AP"] is not None
    ends = [(tmp_path / "out" / "runs" / f"{method}-seed1" / "model_final.pth") for method in ("none", "PEAK")]
    before = [path.stat().st_mtime for path in ends]
    assert "2 runs, 2 of them complete" in compare()
    assert before == [path.stat().st_mtime for path in ends]
    assert (tmp_path / "out" / "step_times" / "PEAK.json").read_text() == kept


PATIENT = ["TEST.PATIENCE", "2", "TEST.EVAL_PERIOD", "100"]


def patient_comparison(folder, ends, ratio=2.0):
    """Return a comparison of none and GDetKD. Their runs ended early after the given iterations, by method."""
    comparison = Comparison(CONFIG, PATIENT, folder, ["none", "GDetKD"], (1, 2), equal_time=True)
    comparison.step_times = {"GDetKD": StepTime(ratio, ratio, ratio, STEP, 1, "cpu")}
    for (method, _), runs in comparison.runs.items():
        for run, end in zip(runs, ends[method]):
            finish(run, 30.0, end=end)
    return comparison


def test_runs_that_ended_early_are_complete_and_counted_with_their_iterations(tmp_path):
    comparison = patient_comparison(tmp_path, {"none": (200, 400), "GDetKD": (500, 300)})
    runs = [run for runs in comparison.runs.values() for run in runs]
    assert all(run.is_complete() for run in runs) and [run.iterations for run in runs] == [200, 400, 500, 300]
    comparison.add_equal_time()
    for run in comparison.equal_time_runs["GDetKD", 1.0]:
        finish(run, 20.0)
    rows = summarize(comparison, None)
    assert [(row.iterations, row.ended_early) for row in rows] == [(300, 2), (400, 1)]
    assert [row.seconds for row in rows] == [300 * STEP, pytest.approx(400 * STEP * 2)]
    text = as_markdown(rows, None)
    assert "none: 2 of 2, 300 iterations on average; GDetKD: 1 of 2, 400 iterations on average. So some gains" in text
    baseline, longer, _ = curves_of(comparison)
    # The first seed ended after 200 iterations and keeps its AP of 30. The second seed had AP 15 after 201 iterations.
    assert baseline.seconds == [201 * STEP, 400 * STEP] and baseline.ap == [22.5, 30.0]
    assert longer.seconds[-1] == 800 * STEP


def test_equal_time_takes_the_iterations_that_were_run(tmp_path):
    comparison = patient_comparison(tmp_path, {"none": (200, 200), "GDetKD": (300, 200)}, ratio=1.58)
    comparison.add_equal_time()
    # 250 iterations at 1.58 take as long as 395 of the baseline, which is 0.79 of its 500.
    runs = comparison.equal_time_runs["GDetKD", 1.0]
    assert [(run.folder.name, run.max_iter) for run in runs] == [
        (f"none-x0.8-whole-seed{seed}", 400) for seed in (1, 2)
    ]
    assert {run.config().TEST.PATIENCE for run in runs} == {0}
    assert {run.config().TEST.EVAL_PERIOD for run in runs} == {80}


def test_a_baseline_that_was_trained_for_the_same_time_is_the_one_at_equal_time(tmp_path):
    comparison = patient_comparison(tmp_path, {"none": (500, 500), "GDetKD": (300, 200)})
    comparison.add_equal_time()
    assert comparison.equal_time_runs["GDetKD", 1.0] == comparison.runs["none", 1.0]


def test_baselines_at_equal_time_wait_for_the_methods_if_runs_may_end_early(tmp_path, monkeypatch):
    comparison, trained = patient_comparison(tmp_path, {"none": (200, 200), "GDetKD": (500, 500)}), []
    monkeypatch.setattr(Comparison, "measure_steps", lambda *_: None)
    monkeypatch.setattr("gdetkd.study.comparison.claim_folder", lambda run: None)
    monkeypatch.setattr("gdetkd.study.comparison.run_all", lambda runs, *_: trained.append([r.max_iter for r in runs]))
    comparison.train(ROOT / "train_net.py", LocalExecutor(2))
    assert trained == [[500] * 4, [500] * 4 + [1000] * 2]


def test_patience_that_is_off_does_not_change_a_run(tmp_path):
    off, on = (Comparison(CONFIG, opts, tmp_path, []).runs["none", 1][0] for opts in ([], PATIENT[:2]))
    same = Comparison(CONFIG, ["TEST.PATIENCE", "0"], tmp_path, []).runs["none", 1][0]
    assert fingerprint(off) == fingerprint(same) != fingerprint(on)
