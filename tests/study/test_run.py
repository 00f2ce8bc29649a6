"""Test how runs of train_net.py are started and read, and the quickstart, which consists of such runs."""

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from gdetkd.config_file import load_config
from gdetkd.errors import GDetKDError
from gdetkd.insight.run import read_terms
from gdetkd.metrics_file import MetricsFile
from gdetkd.study.executors import LocalExecutor
from gdetkd.study.folder import claim_folder, fingerprint
from gdetkd.study.jobs import run_all
from gdetkd.study.run import PLAIN, Run, stretched
from gdetkd.study.step_time import StepTime

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "quickstart" / "faster_rcnn-faster_rcnn.yaml")


def load_quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "tools" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def finished(folder, ap, iterations, seconds):
    folder.mkdir()
    lines = [{"iteration": 19, "train_seconds": 1.0, "total_loss": 3.0}]
    metrics = {"bbox/AP": ap, "bbox/AP50": ap + 20, "bbox/AP75": ap + 5}
    lines.append({"iteration": iterations - 1, "train_seconds": seconds, "total_loss": 2.0})
    lines.append({"iteration": iterations, **metrics})  # Detectron2 writes the last evaluation like this
    (folder / "metrics.json").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"iteration": 9')
    (folder / "model_final.pth").touch()
    run = Run(folder, CONFIG, [], iterations)
    (folder / "fingerprint.txt").write_text(fingerprint(run))
    return run


def test_a_longer_run_is_evaluated_as_often(tmp_path):
    longer = stretched(tmp_path / "longer", finished(tmp_path / "b", 10.0, 100, 20.0), 1.6)
    assert longer.max_iter == 160 and longer.config().TEST.EVAL_PERIOD == 280  # 180 * 1.6, rounded to a multiple of 20


def test_unknown_pair_names_the_known_ones(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(GDetKDError, match="faster_rcnn-faster_rcnn"):
        load_quickstart().find_config("yolo-yolo")


def test_the_quickstart_is_a_comparison_with_one_seed_at_equal_time(tmp_path, monkeypatch, capsys):
    quickstart, drawn, labelled = load_quickstart(), [], []

    def train(comparison, train_net, executor):
        assert train_net.is_file() and executor.jobs == 2
        methods = ["GDetKD", "GDetKD+unlabeled"]
        ratios = zip(methods, (1.4, 1.58))
        comparison.step_times = {method: StepTime(ratio, 1.3, 1.6, 0.25, 1, "cpu") for method, ratio in ratios}
        comparison.add_equal_time()
        (tmp_path / "runs").mkdir()
        runs = [*(comparison.runs[method, 1.0][0] for method in ["none", *methods])]
        (longer,) = comparison.equal_time_runs["GDetKD", 1.0]
        assert comparison.equal_time_runs["GDetKD+unlabeled", 1.0] == [longer]
        for run, ap, factor in zip([*runs, longer], (10.0, 35.0, 45.0, 20.0), (1, 1, 1, 1.6)):
            assert run.max_iter == round(600 * factor) and run.config().SEED == 7
            finished(run.folder, ap, run.max_iter, 1.0)

    monkeypatch.setattr("sys.argv", ["quickstart.py", "--seed", "7", "--output", str(tmp_path)])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        quickstart.Comparison, "prepare", lambda comparison: setattr(comparison.cfg.MODEL, "DEVICE", "cpu")
    )
    monkeypatch.setattr(quickstart.Comparison, "score_teacher", lambda comparison: 60.0)
    monkeypatch.setattr(quickstart.Comparison, "train", train)
    monkeypatch.setattr(quickstart, "draw", lambda *args: drawn.append(args))
    monkeypatch.setattr(quickstart, "make_shapes_for", lambda cfg: None)
    monkeypatch.setattr(quickstart, "label_images", lambda cfg, options: labelled.append(options))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    quickstart.main()
    (options,) = labelled
    assert options.output == tmp_path / "gdetkd_shapes" / "pseudo.json"
    assert options.images == str(tmp_path / "gdetkd_shapes" / "teacher")
    summary = json.loads((tmp_path / "summary.json").read_text())
    baseline, distilled, with_images = summary["rows"]
    assert with_images["AP"] == 45.0 and with_images["equal_time_gain"] == 25.0
    assert summary["teacher_AP"] == 60.0 and (baseline["AP"], distilled["AP"]) == (10.0, 35.0)
    assert (distilled["gain"], distilled["equal_time_gain"], distilled["equal_time_AP"]) == (25.0, 15.0, 20.0)
    assert (distilled["step_time"], distilled["lead_closed"]) == (1.4, 0.5)
    assert drawn[0][0] == tmp_path / "comparison.png"
    printed = capsys.readouterr().out
    assert "+25.0" in printed and "50 %" in printed and "1.58x" in printed and "summary.json" in printed


def test_complete_runs_are_not_repeated_and_failed_runs_are_named(tmp_path):
    program = tmp_path / "train_net.py"
    program.write_text("import sys; print('the reason'); sys.exit(1)")
    run_all([finished(tmp_path / "done", 10.0, 100, 20.0)], program, LocalExecutor(2))
    with pytest.raises(GDetKDError, match="the reason"):
        run_all([Run(tmp_path / "new", CONFIG, [], 5)], program, LocalExecutor(2))


@pytest.mark.parametrize("count", [1, 2])
def test_a_teacher_that_changes_while_runs_train_is_noticed(tmp_path, count):
    """The change comes in the first training. So the next training does not start, and no report is written."""
    weights, program = tmp_path / "teacher.pth", tmp_path / "train_net.py"
    weights.write_bytes(b"first")
    program.write_text(
        "import json, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[-1])\n"
        "line = {'iteration': 5, 'bbox/AP': 1, 'bbox/AP50': 1, 'bbox/AP75': 1}\n"
        "(folder / 'metrics.json').write_text(json.dumps(line))\n"
        "(folder / 'model_final.pth').touch()\n"
        f"pathlib.Path({str(weights)!r}).write_bytes(b'second')\n"
    )
    opts = ["DISTILL.TEACHER.WEIGHTS", str(weights)]
    runs = [Run(tmp_path / str(index), CONFIG, opts, 5) for index in range(count)]
    with pytest.raises(GDetKDError, match="holds a run of another config"):
        run_all(runs, program, LocalExecutor(1))
    assert runs[0].is_complete() and not any(run.is_complete() for run in runs[1:])


def test_a_folder_of_another_config_is_refused(tmp_path):
    finished(tmp_path / "done", 10.0, 100, 20.0)
    changed = Run(tmp_path / "done", CONFIG, ["DISTILL.SGFI.WEIGHT", "9.0"], 100)
    with pytest.raises(GDetKDError, match="holds a run of another config. Use that"):
        run_all([changed], tmp_path / "train_net.py", LocalExecutor(2))
    # If Detectron2 has written the config, the message names only the keys that differ.
    as_run = load_config(CONFIG, ["SOLVER.MAX_ITER", 100, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "done")])
    (tmp_path / "done" / "config.yaml").write_text(as_run.dump())
    with pytest.raises(
        GDetKDError, match="another config: DISTILL.SGFI.WEIGHT 6.0 -> 9.0. Use that config again, remove"
    ):
        run_all([changed], tmp_path / "train_net.py", LocalExecutor(2))


def test_keys_that_a_run_does_not_use_do_not_change_its_fingerprint():
    def digest(*opts):
        return fingerprint(Run(Path("any"), CONFIG, list(opts), 100))

    baseline, other_teacher = PLAIN, ["DISTILL.TEACHER.WEIGHTS", "another.pth"]
    assert digest(*baseline) == digest(*baseline, *other_teacher, "DISTILL.SGFI.WEIGHT", "9.0")
    transfer = ["DISTILL.LOSSES", "()", "DISTILL.HEAD_TRANSFER", "True"]
    assert digest(*transfer) == digest(*transfer, "DISTILL.SGFI.WEIGHT", "9.0")
    assert digest(*transfer) != digest(*transfer, *other_teacher)
    sgfi = ["DISTILL.LOSSES", "('SGFI',)", "DISTILL.HEAD_TRANSFER", "False"]
    assert digest(*sgfi) == digest(*sgfi, "DISTILL.CKD.GAMMA", "0.1", "SOLVER.CHECKPOINT_PERIOD", "7")
    for key, value in (("DISTILL.SGFI.WEIGHT", "9.0"), ("DISTILL.REGIONS.NMS_THRESH", "0.5"), ("SEED", "3")):
        assert digest(*sgfi) != digest(*sgfi, key, value)
    assert digest(*baseline) != digest(*sgfi)
    for key, value in (("SOLVER.BASE_LR", "1.0"), ("SEED", "3")):
        assert digest(*baseline) != digest(*baseline, key, value)
    auto = ["DISTILL.WEIGHTS", "auto"]
    assert digest(*baseline) == digest(*baseline, *auto)
    assert digest(*sgfi) == digest(*sgfi, "DISTILL.SGFI.SHARE", "9.0", "DISTILL.AUTO.PERIOD", "7")
    assert digest(*sgfi, *auto) == digest(*sgfi, *auto, "DISTILL.SGFI.WEIGHT", "9.0")
    assert digest(*sgfi, *auto) != digest(*sgfi, *auto, "DISTILL.SGFI.SHARE", "9.0")
    assert digest(*sgfi) != digest(*sgfi, *auto)


@pytest.mark.parametrize("key, value", [("PERIOD", "9"), ("IMAGES", "9"), ("BASELINE", "run")])
def test_a_finished_run_is_reused_whatever_it_shows_of_itself(tmp_path, key, value):
    """The keys of DISTILL.INSIGHT do not change a run's result."""
    run = finished(tmp_path / "done", 10.0, 100, 20.0)
    claim_folder(Run(run.folder, CONFIG, [f"DISTILL.INSIGHT.{key}", value], 100))


def test_another_teacher_at_the_same_path_is_another_run(tmp_path):
    weights, folder = tmp_path / "teacher.pth", tmp_path / "done"
    distilled = ["DISTILL.TEACHER.WEIGHTS", str(weights)]
    weights.write_bytes(b"one")
    run, alone = Run(folder, CONFIG, distilled, 100), Run(folder, CONFIG, [*PLAIN, *distilled], 100)
    before, before_alone = fingerprint(run), fingerprint(alone)
    claim_folder(run)
    (folder / "config.yaml").write_text(run.config().dump())
    weights.write_bytes(b"another")
    os.utime(weights, ns=(1, 1))
    assert fingerprint(run) != before and fingerprint(alone) == before_alone
    with pytest.raises(GDetKDError, match="another config: the teacher's weights or config file, or a dataset's JSON"):
        claim_folder(run)


def test_other_labels_at_the_same_path_are_another_run(tmp_path):
    labels = tmp_path / "labels.json"
    labels.write_text("{}")
    entry = {"name": "mine", "kind": "coco", "json": str(labels), "images": str(tmp_path)}
    opts = ["DATASETS.REGISTER", str([entry]), "DATASETS.TEST", "('mine',)"]
    run = Run(tmp_path / "done", CONFIG, opts, 100)
    claim_folder(run)
    (run.folder / "config.yaml").write_text(run.config().dump())
    claim_folder(run)
    labels.write_text('{"images": []}')
    os.utime(labels, ns=(1, 1))
    with pytest.raises(GDetKDError, match="or a dataset's JSON file, have changed"):
        claim_folder(run)


def test_a_teacher_whose_file_has_changed_is_another_run(tmp_path):
    teacher = tmp_path / "teacher.yaml"
    distilled = ["DISTILL.TEACHER.CONFIG_FILE", str(teacher), "DISTILL.TEACHER.WEIGHTS", ""]
    run, alone = Run(tmp_path, CONFIG, distilled, 100), Run(tmp_path, CONFIG, [*PLAIN, *distilled], 100)
    found = set()
    for content in (
        "MODEL: {WEIGHTS: one.pth}",
        "MODEL: {WEIGHTS: https://there/one.pth}",
        "MODEL: {WEIGHTS: one.pth}\nINPUT: {FORMAT: RGB}",
    ):
        teacher.write_text(content)
        found.add((fingerprint(run), fingerprint(alone)))
    assert len(found) == 3 and len({digest_alone for _, digest_alone in found}) == 1


def test_trainings_end_if_another_training_fails(tmp_path):
    program = tmp_path / "train_net.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "folder = pathlib.Path(sys.argv[-1])\n"
        "def stop(*_):\n"
        "    (folder / 'stopped').touch()\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "(folder / 'started').touch()\n"
        "while folder.name == 'two' or not (folder.parent / 'two' / 'started').exists():\n"
        "    time.sleep(0.05)\n"
    )
    with pytest.raises(GDetKDError, match="The run in .*one failed"):
        run_all([Run(tmp_path / name, CONFIG, [], 5) for name in ("one", "two")], program, LocalExecutor(2))
    assert (tmp_path / "two" / "stopped").exists() and not (tmp_path / "one" / "stopped").exists()


def test_trainings_end_if_the_comparison_gets_a_signal(tmp_path):
    program = tmp_path / "train_net.py"
    program.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        "    pathlib.Path(sys.argv[-1], 'stopped').touch()\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_all([Run(tmp_path / "one", CONFIG, [], 5)], program, LocalExecutor(2))
    assert (tmp_path / "one" / "stopped").exists() and signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_is_named_twice_is_trained_once(tmp_path):
    program = tmp_path / "train_net.py"
    program.write_text(
        "import json, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[-1])\n"
        "line = json.dumps({'iteration': 5, 'bbox/AP': 1, 'bbox/AP50': 1, 'bbox/AP75': 1})\n"
        "(folder / 'metrics.json').open('a').write(line + '\\n')\n"
        "(folder / 'model_final.pth').touch()\n"
    )
    run_all([Run(tmp_path / "one", CONFIG, [], 5), Run(tmp_path / "one", CONFIG, [], 5)], program, LocalExecutor(2))
    assert len((tmp_path / "one" / "metrics.json").read_text().splitlines()) == 1


def test_a_student_that_finds_nothing_has_no_ap_rather_than_nan(tmp_path):
    nothing = finished(tmp_path / "b", float("nan"), 100, 20.0)
    assert nothing.metrics_file.last()["AP"] == nothing.metrics_file.curve()[-1].metrics["AP"] == 0


@pytest.mark.parametrize("visible, expected", [(None, {"0", "1"}), ("4,7", {"4", "7"})])
def test_each_job_has_its_own_gpu(tmp_path, monkeypatch, visible, expected):
    program = tmp_path / "train_net.py"
    program.write_text(
        "import json, os, pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[-1])\n"
        "(folder / 'gpu.txt').write_text(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))\n"
        "line = json.dumps({'iteration': 5, 'bbox/AP': 1, 'bbox/AP50': 1, 'bbox/AP75': 1})\n"
        "(folder / 'metrics.json').write_text(line)\n"
        "(folder / 'model_final.pth').touch()\n"
        "end = time.time() + 20\n"
        "while folder.name != 'third' and len(list(folder.parent.glob('*/gpu.txt'))) < 2 and time.time() < end:\n"
        "    time.sleep(0.05)\n"
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run_all([Run(tmp_path / name, CONFIG, [], 5) for name in ("one", "two", "third")], program, LocalExecutor(2))
    gpus = {name: (tmp_path / name / "gpu.txt").read_text() for name in ("one", "two", "third")}
    assert {gpus["one"], gpus["two"]} == expected and gpus["third"] in expected


@pytest.mark.parametrize("given, cores, expected", [(None, 4, "2"), (None, 1, "1"), ("3", 4, "3")])
def test_jobs_share_the_cores_that_this_process_may_use(tmp_path, monkeypatch, given, cores, expected):
    """Count only the cores that a container or SLURM gives to the process. A value that the user set wins."""
    program = tmp_path / "train_net.py"
    program.write_text(
        "import json, os, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[-1])\n"
        "(folder / 'threads.txt').write_text(os.environ['OMP_NUM_THREADS'])\n"
        "line = json.dumps({'iteration': 5, 'bbox/AP': 1, 'bbox/AP50': 1, 'bbox/AP75': 1})\n"
        "(folder / 'metrics.json').write_text(line)\n"
        "(folder / 'model_final.pth').touch()\n"
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    run_all([Run(tmp_path / "one", CONFIG, [], 5)], program, LocalExecutor(2))
    assert (tmp_path / "one" / "threads.txt").read_text() == expected


def test_iterations_that_were_repeated_after_a_resume_count_once(tmp_path):
    lines = [
        {"iteration": iteration, "loss_cls": loss, "bbox/AP": ap, "bbox/AP50": ap, "bbox/AP75": ap}
        for iteration, loss, ap in [
            (499, 5.0, 1.0),
            (999, 4.0, 2.0),
            (1499, 3.0, 3.0),
            (999, 4.5, 2.5),
            (1499, 3.5, 3.5),
        ]
    ]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = MetricsFile(tmp_path, 2000).curve()
    assert [(point.iteration, point.metrics["AP"]) for point in curve] == [(500, 1.0), (1000, 2.5), (1500, 3.5)]
    assert read_terms(str(tmp_path)) == {"loss_cls": ([499, 999, 1499], [5.0, 4.5, 3.5])}
