"""Runs as jobs of a cluster: a job that is killed or out of time is submitted again.

submitit's local executor runs the jobs. Each test writes a small program in the place of train_net.py.
"""

import os
import signal
import sys
import time

import pytest
from test_run import CONFIG, ROOT

from gdetkd.engine.stopping import EXIT_STOPPED
from gdetkd.errors import GDetKDError
from gdetkd.study import cluster, in_job
from gdetkd.study.cluster import ClusterExecutor, parse_parameters, slurm_executor
from gdetkd.study.executors import LocalExecutor
from gdetkd.study.jobs import run_all
from gdetkd.study.run import Run
from gdetkd.study.step_time import StepTime, kept_step_time, measure
from programs import PROCESSES, run_program

submitit = pytest.importorskip("submitit")

START = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[-1])
starts = folder / "starts.txt"
starts.open("a").write(".")
start = len(starts.read_text())

def finish():
    line = json.dumps({"iteration": 5, "bbox/AP": 1, "bbox/AP50": 1, "bbox/AP75": 1})
    (folder / "metrics.json").write_text(line)
    (folder / "model_final.pth").touch()

def save():
    (folder / "last_checkpoint").write_text(f"model_{start}.pth")

def stop(*_):
    save()
    (folder / "stopped").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that trains a run with a program. Its parameters are those of submitit's local executor."""
    # submitit's local executor cancels a job by SIGINT. A shell lets programs in its background ignore that signal, and
    # the programs that they start, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(submitit.LocalJob, "_results_timeout_s", 0)
    monkeypatch.setattr(in_job, "SECONDS_TO_THE_END", 0.0)
    path = os.pathsep.join([str(ROOT / "projects" / "GDetKD"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)

    def train(body, executor=None, **parameters):
        program = tmp_path / "train_net.py"
        program.write_text(START + body)
        run = Run(tmp_path / "one", CONFIG, [], 5)
        run_all([run], program, executor or make_executor(tmp_path, **parameters))
        return run

    return train


def make_executor(folder, **parameters):
    executor = submitit.LocalExecutor(folder=folder / "jobs")
    executor.update_parameters(**{"timeout_min": 5, **parameters})
    return ClusterExecutor(executor, 2, "a cluster")


def starts(run):
    return len((run.folder / "starts.txt").read_text())


def test_a_run_is_trained_as_a_job(start):
    run = start("print('in the job', os.environ['SUBMITIT_EXECUTOR'], os.environ['OMP_NUM_THREADS']); finish()")
    assert run.is_complete() and starts(run) == 1
    assert (run.folder / "stdout.txt").read_text().startswith("in the job local ")


@pytest.mark.parametrize(
    "end",
    [
        "os.kill(os.getppid(), signal.SIGKILL); save(); sys.exit()",  # the whole job
        "os.kill(os.getpid(), signal.SIGKILL)",  # the training, for example because it needs too much memory
        "os.kill(os.getpid(), signal.SIGTERM)",  # the training is asked to save
    ],
)
def test_a_job_that_is_killed_is_submitted_again(start, end):
    run = start(f"if start == 1:\n    {end}\nfinish()")
    assert run.is_complete() and starts(run) == 2


def test_a_job_whose_time_is_over_saves_and_is_submitted_again(start):
    """submitit sends SIGUSR2 to the job 20 seconds before its time is over, here after about 10 seconds."""
    run = start("if start == 1:\n    time.sleep(60)\nfinish()", timeout_min=0.5, signal_delay_s=20)
    assert run.is_complete() and starts(run) == 2 and (run.folder / "stopped").exists()


def test_jobs_that_end_before_anything_is_saved_are_an_error(start, tmp_path):
    with pytest.raises(GDetKDError, match="3 jobs in a row ended before the program of .*one/stdout.txt saved .*last"):
        start("print('the last words', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    assert len((tmp_path / "one" / "starts.txt").read_text()) == 3


def test_jobs_that_save_may_end_often(start):
    run = start("if start < 5:\n    save()\n    os.kill(os.getpid(), signal.SIGKILL)\nfinish()")
    assert run.is_complete() and starts(run) == 5


def test_a_job_that_saved_is_not_counted_with_those_that_did_not(start):
    run = start("if start == 1:\n    save()\nif start < 4:\n    os.kill(os.getpid(), signal.SIGKILL)\nfinish()")
    assert run.is_complete() and starts(run) == 4


def test_a_training_that_fails_is_named_with_its_last_line(start, tmp_path):
    with pytest.raises(GDetKDError, match="The run in .*one failed.*the reason"):
        start("print('the reason'); sys.exit(1)")
    assert len((tmp_path / "one" / "starts.txt").read_text()) == 1


def test_a_job_that_fails_outside_of_the_training_is_named(start, monkeypatch):
    monkeypatch.setattr(Run, "command", lambda run, train_net: ["/no/such/program"])
    with pytest.raises(GDetKDError, match="The job .* failed. Correct .*no/such/program"):
        start("finish()")


def test_jobs_are_cancelled_if_the_comparison_gets_a_signal(start, tmp_path):
    stop_comparison = f"os.kill({os.getpid()}, signal.SIGTERM)"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        start(f"if start == 1:\n    {stop_comparison}\n    time.sleep(60)\nfinish()")
    assert signal.getsignal(signal.SIGTERM) == before
    wait_for(tmp_path / "one" / "stopped")
    run = start("finish()")
    assert run.is_complete()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent ended")
def test_a_training_saves_if_the_process_of_its_job_is_killed(tmp_path):
    """submitit's local executor does this to a job that it cancels, if the job does not end within a second."""
    program = tmp_path / "train_net.py"
    program.write_text(f"{START}\n(folder / 'started').touch()\ntime.sleep(60)")
    command = [sys.executable, str(program), str(tmp_path)]
    job = PROCESSES.Process(target=in_job.ProgramInJob(command, str(tmp_path / "log.txt"), EXIT_STOPPED))
    job.start()
    wait_for(tmp_path / "started")
    job.kill()
    wait_for(tmp_path / "stopped")


def wait_for(path):
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.1)


def test_the_job_of_a_comparison_that_was_killed_is_used(start, tmp_path, monkeypatch):
    """A new job would find the folder locked by the training of the old one."""
    go, executor = tmp_path / "go", make_executor(tmp_path)
    body = f"while not os.path.exists({str(go)!r}):\n    time.sleep(0.1)\nfinish()"
    (tmp_path / "train_net.py").write_text(START + body)
    run = Run(tmp_path / "one", CONFIG, [], 5)
    run.folder.mkdir()
    first = executor.start(run.command(tmp_path / "train_net.py"), run.folder / "stdout.txt", 0, run.last_checkpoint)
    wait_for(run.folder / "starts.txt")
    # Only a process's parent can ask for its state, so the local executor cannot find a job again. SLURM can.
    found = []
    find = staticmethod(lambda folder, job_id: found.append(job_id) or first._job)
    monkeypatch.setattr(submitit.LocalExecutor, "job_class", find)
    second = executor.start(run.command(tmp_path / "train_net.py"), run.folder / "stdout.txt", 0, run.last_checkpoint)
    go.touch()
    while second.poll() is None:
        time.sleep(0.1)
    assert second.poll() == first.poll() == 0 and starts(run) == 1 and found == [first._job.job_id]


class Preempted:
    """Stand for a job that SLURM has preempted. `job.done` of submitit waits for its repetition."""

    job_id, state = "7", "PREEMPTED"

    def __init__(self):
        self.is_cancelled = False

    def done(self):
        return False

    def cancel(self, check):
        self.is_cancelled = True


def test_a_job_that_stays_preempted_is_submitted_again(tmp_path, monkeypatch):
    clock, jobs = [1000.0], []

    class Executor:
        def submit(self, program):
            jobs.append(Preempted())
            return jobs[-1]

    monkeypatch.setattr(cluster.time, "monotonic", lambda: clock[0])
    process = cluster.ProgramOnCluster(Executor(), ["program"], tmp_path / "log.txt", lambda: "")
    assert process.poll() is None and len(jobs) == 1
    clock[0] += cluster.SECONDS_PREEMPTED
    assert process.poll() is None and len(jobs) == 2 and jobs[0].is_cancelled and not jobs[1].is_cancelled
    jobs[1].state = "RUNNING"
    clock[0] += cluster.SECONDS_PREEMPTED
    assert process.poll() is None and len(jobs) == 2


class Unknown(Preempted):
    """Stand for a job that SLURM's accounting does not know. It has no result."""

    state = "UNKNOWN"

    def __init__(self, folder=None, job_id="7"):
        super().__init__()

    def done(self, force_check=False):
        return False


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Return a function that sets what the program squeue does."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def answer(body):
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "squeue").chmod(0o755)

    return answer


def test_a_job_that_slurm_no_longer_knows_is_submitted_again(tmp_path, monkeypatch, squeue):
    clock, jobs = [1000.0], []

    class Executor:
        folder, job_class = tmp_path, Unknown

        def submit(self, program):
            jobs.append(Unknown())
            return jobs[-1]

    def polls():
        clock[0] += cluster.SECONDS_BETWEEN_QUESTIONS
        assert process.poll() is None
        return len(jobs)

    monkeypatch.setattr(cluster.time, "monotonic", lambda: clock[0])
    squeue("echo 7 gpu RUNNING")
    process = cluster.ProgramOnCluster(Executor(), ["program"], tmp_path / "log.txt", lambda: "")
    assert polls() == polls() == polls() == 1
    squeue("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert polls() == polls() == polls() == 1
    squeue("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert polls() == 1 and polls() == 2 and jobs[0].is_cancelled
    # Another comparison finds the note of the second job, which SLURM has forgotten, too.
    squeue("")
    cluster.ProgramOnCluster(Executor(), ["program"], tmp_path / "log.txt", lambda: "")
    assert len(jobs) == 3


def test_the_time_of_a_step_is_measured_in_a_job(start, tmp_path, monkeypatch):
    program = tmp_path / "measure.py"
    numbers = {"ratio": 1.5, "low": 1.4, "high": 1.6, "baseline_seconds": 0.1, "threads": 1, "device": "cuda"}
    program.write_text(f"import json, sys\njson.dump({numbers!r}, open(sys.argv[-1], 'w'))")
    monkeypatch.setattr("gdetkd.study.step_time._command", lambda *args: [sys.executable, str(program), str(args[-1])])
    runs, executor = [Run(tmp_path / name, CONFIG, [], 5) for name in ("none", "GDetKD")], make_executor(tmp_path)
    path = tmp_path / "GDetKD.json"
    assert kept_step_time(path, *runs, executor) == StepTime(**numbers)
    program.write_text("print('the reason'); raise SystemExit(3)")
    assert kept_step_time(path, *runs, executor) == StepTime(**numbers)
    with pytest.raises(GDetKDError, match="could not be measured for GDetKD: .* exit code 3.*the reason"):
        measure(executor, *runs, tmp_path / "other.log")
    # A time that was measured on this machine says nothing about the cluster.
    with pytest.raises(GDetKDError, match="could not be measured"):
        kept_step_time(path, *runs, LocalExecutor(1))


def test_parameters_are_read_as_python_literals():
    words = ["partition=gpu", "time=60", "gpus_per_node=1", "setup=['module load cuda']", "constraint=a=b"]
    assert parse_parameters(words) == {
        "partition": "gpu",
        "time": 60,
        "gpus_per_node": 1,
        "setup": ["module load cuda"],
        "constraint": "a=b",
    }
    with pytest.raises(GDetKDError, match="--slurm has '8gb'. Give KEY=VALUE"):
        parse_parameters(["8gb"])


# Programs that stand for those of SLURM. A job is a process of this machine, and its id is the id of that process.
SLURM = {
    "sbatch": 'SLURM_JOB_ID= setsid sh -c \'SLURM_JOB_ID=$$ exec sh "$0"\' "$1" >/dev/null 2>&1 &\n'
    'echo "Submitted batch job $!"',
    "srun": 'while [ "${1#--}" != "$1" ]; do case "$1" in --output|--error) shift;; esac; shift; done\nexec "$@"',
    "sacct": "echo 'JobID|State|NodeList'\n"
    'for id; do case "$id" in [0-9]*) if kill -0 "$id" 2>/dev/null; then echo "$id|RUNNING|"; '
    'else echo "$id|FAILED|"; fi;; esac; done',
    "scancel": 'kill -TERM "-$1"',
}


@pytest.fixture
def with_slurm(tmp_path, monkeypatch):
    """Let submitit find programs of SLURM."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in SLURM.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_job_of_slurm_that_is_killed_is_submitted_again(start, tmp_path, with_slurm, monkeypatch):
    monkeypatch.setattr(submitit.SlurmJob, "_results_timeout_s", 0)
    executor = slurm_executor(tmp_path / "jobs", 2, {"time": 5})
    run = start(
        "if start == 1:\n    os.kill(os.getppid(), signal.SIGKILL)\n    sys.exit()\nfinish()", executor=executor
    )
    assert run.is_complete() and starts(run) == 2
    assert "#SBATCH --time=5" in next((tmp_path / "jobs").glob("*.sh")).read_text()


def test_jobs_of_slurm_are_cancelled_if_the_comparison_gets_a_signal(start, tmp_path, with_slurm):
    executor = slurm_executor(tmp_path / "jobs", 2, {"time": 5})
    with pytest.raises(SystemExit):
        start(f"os.kill({os.getpid()}, signal.SIGTERM)\ntime.sleep(60)", executor=executor)
    wait_for(tmp_path / "one" / "stopped")


def test_the_executor_of_slurm_takes_submitits_parameters(tmp_path, with_slurm):
    executor = slurm_executor(tmp_path, 3, {"time": 60, "partition": "gpu", "gpus_per_node": 1})
    assert executor.jobs == 3 and executor.machine == "SLURM (partition=gpu, gpus_per_node=1)"
    assert executor._executor.parameters["time"] == 60 and executor._executor.parameters["job_name"] == "gdetkd"


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"partition": "gpu"}, "--slurm has no time"),
        ({"time": 60, "nodes": 2}, "nodes=2, but each training of a comparison is one process"),
        ({"time": 60, "gpu": 1}, "wrong parameter.*gpu"),
    ],
)
def test_wrong_parameters_are_refused(tmp_path, with_slurm, parameters, message):
    with pytest.raises(GDetKDError, match=message):
        slurm_executor(tmp_path, 3, parameters)


def test_a_machine_without_slurm_and_a_missing_package_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(GDetKDError, match="does not work here.*srun.*--executor local"):
        slurm_executor(tmp_path, 3, {"time": 60})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(GDetKDError, match=r"pip install submitit"):
        slurm_executor(tmp_path, 3, {"time": 60})


@pytest.mark.parametrize(
    "words, message",
    [
        (["--executor", "slurm", "--slurm", "partition=gpu", "SEED", "3"], "--slurm has no time"),
        (["--slurm", "time=60", "SEED", "3"], "--slurm has no effect with --executor local"),
    ],
)
def test_changes_to_the_config_may_follow_the_parameters(tmp_path, words, message):
    path = os.pathsep.join([str(ROOT / "projects" / "GDetKD"), os.environ.get("PYTHONPATH", "")])
    command = [ROOT / "tools" / "compare.py", "--config-file", CONFIG, "--output", tmp_path / "out", *words]
    done = run_program(*command, environment={"PYTHONPATH": path})
    assert done.returncode == 1 and message in done.stderr
