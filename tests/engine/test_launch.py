"""Test processes that are stopped, that die, or that torchrun starts."""

import gdetkd  # noqa: F401, I001  imported first, also in the spawned processes
import contextlib
import errno
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import HookBase
from detectron2.utils import comm

from gdetkd import DistillTrainer
from gdetkd.engine import checkpoint, launch
from gdetkd.engine.launch import TORCHRUN, run_everywhere, which_ended
from gdetkd.engine.stopping import EXIT_STOPPED
from gdetkd.errors import GDetKDError
from gdetkd.safe_load import read_weights
from programs import PROCESSES, ROOT, TIMEOUT_SECONDS
from test_processes import run_in_processes, spawn


class _Signalled(HookBase):
    """Send a signal to one rank in the third step."""

    def __init__(self, number):
        self.number = number

    def before_step(self):
        if self.trainer.iter == 2 and comm.get_rank() == 1:
            os.kill(os.getpid(), self.number)


def _train_signalled(rank, cfg, number):
    torch.manual_seed(0)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([_Signalled(number)])
    trainer.train()


def wait_for_failure(context):
    """Wait until a process fails, and return the error that says which."""
    with pytest.raises(mp.ProcessExitedException) as error:
        end = time.monotonic() + TIMEOUT_SECONDS
        while not context.join(5):
            assert time.monotonic() < end, "the processes hang"
    return error.value


def test_sigterm_to_one_rank_saves_and_stops_all_ranks(shared_cfg, tmp_path):
    cfg = shared_cfg(2, {"SOLVER.MAX_ITER": 50})
    context = spawn(_train_signalled, tmp_path, 2, cfg, signal.SIGTERM)
    assert wait_for_failure(context).exit_code == EXIT_STOPPED
    assert all(process.exitcode in (EXIT_STOPPED, -signal.SIGTERM) for process in context.processes)
    saved = read_weights(str(tmp_path / "run" / "model_0000002.pth"))
    assert len(saved["trainer"]["hooks"]["RandomState"]["states"]) == 2


def _train_signalled_on_a_full_disk(rank, cfg):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint.written_whole = full
    with pytest.raises(GDetKDError) as error:
        _train_signalled(rank, cfg, signal.SIGTERM)
    return str(error.value)


def test_sigterm_on_a_full_disk_is_an_error_on_all_ranks(shared_cfg, tmp_path):
    messages = run_in_processes(_train_signalled_on_a_full_disk, tmp_path, 2, shared_cfg(2, {"SOLVER.MAX_ITER": 50}))
    assert all("after iteration 2 and could NOT be saved" in message for message in messages)
    assert all("continues from the beginning" in message for message in messages)


def test_a_rank_that_dies_is_named_and_the_other_ranks_are_ended(shared_cfg, tmp_path):
    context = spawn(_train_signalled, tmp_path, 2, shared_cfg(2, {"SOLVER.MAX_ITER": 5000}), signal.SIGKILL)
    error = wait_for_failure(context)
    assert "The process of rank 1 was killed by SIGKILL, and the other processes were ended." in which_ended(error)
    assert "rank 9" in which_ended(error, first_rank=8)
    assert not any(process.is_alive() for process in context.processes)


def launched(monkeypatch, outcome):
    """Launch two processes whose launcher does `outcome`. Return the arguments of the launcher but for the function."""
    calls = []

    def launcher(main, *args):
        calls.append(args)
        outcome()

    monkeypatch.setattr(launch, "launch", launcher)
    monkeypatch.setattr(launch, "_check_gpus", lambda args: None)
    args = Namespace(timeout=7, num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto", check=False)
    run_everywhere(pytest.fail, args)
    return calls, args


def test_the_launcher_gets_the_processes_and_the_timeout(monkeypatch):
    calls, args = launched(monkeypatch, lambda: None)
    assert calls == [(2, 1, 0, "auto", (args,), timedelta(minutes=7))]


def _ends_with(error):
    def outcome():
        raise error

    return outcome


def test_processes_that_stopped_because_of_sigterm_give_their_exit_code(monkeypatch):
    stopped = mp.ProcessExitedException("", error_index=1, error_pid=0, exit_code=EXIT_STOPPED)
    with pytest.raises(SystemExit) as stop:
        launched(monkeypatch, _ends_with(stopped))
    assert stop.value.code == EXIT_STOPPED


@pytest.mark.parametrize(
    "error, message",
    [
        (mp.ProcessExitedException("", 1, 0, -9), "^The process of rank 1 was killed by SIGKILL, and the other"),
        (
            mp.ProcessRaisedException("...\ngdetkd.errors.GDetKDError: Name a teacher.\n", 1, 0),
            r"^Name a teacher. \(The process of rank 1 reports this. The other processes were ended.\)$",
        ),
    ],
)
def test_a_process_that_fails_is_named_by_the_program_that_launched_it(monkeypatch, error, message):
    with pytest.raises(GDetKDError, match=message):
        launched(monkeypatch, _ends_with(error))


def test_sigterm_to_the_program_that_launched_the_processes_is_passed_on(monkeypatch):
    children = []

    def outcome():
        children.append(PROCESSES.Process(target=time.sleep, args=(TIMEOUT_SECONDS,)))
        children[0].start()
        os.kill(os.getpid(), signal.SIGTERM)
        children[0].join(TIMEOUT_SECONDS / 2)

    before = signal.getsignal(signal.SIGTERM)
    launched(monkeypatch, outcome)
    assert children[0].exitcode == -signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before


def test_the_processes_of_torchrun_have_the_timeout(monkeypatch):
    made = []
    for name, value in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **keys: made.append((backend, keys)))
    monkeypatch.setattr(launch, "make_local_group", lambda size: None)
    launch._join_torchrun(Namespace(check=False, num_gpus=1, num_machines=1), timedelta(minutes=7))
    assert made == [("gloo", {"timeout": timedelta(minutes=7)})]


def _train_or_resume(rank, cfg, seed, resume):
    torch.manual_seed(seed + rank)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return [parameter.detach().clone() for parameter in trainer.distiller.parameters()]


def test_processes_resume_bit_by_bit(shared_cfg, tmp_path):
    """Each process has a random state of its own, which chooses its proposals."""
    keys = {"SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2, "INPUT.MIN_SIZE_TRAIN": (48, 64)}
    cfg = shared_cfg(2, {**keys, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 4})
    whole = run_in_processes(_train_or_resume, tmp_path, 2, cfg, 0, False)
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    (tmp_path / "meeting").unlink(missing_ok=True)
    resumed = run_in_processes(_train_or_resume, tmp_path, 2, cfg, 7, True)
    for before, after in zip(whole, resumed):
        assert all(torch.equal(a, b) for a, b in zip(before, after))


def torchrun(config_file):
    """Train in two processes. Return the exit code and the output."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*command, "train_net.py", "--config-file", str(config_file)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            process.terminate()  # torchrun then ends the processes that it started
    return process.returncode, output


@pytest.fixture
def config_file(shared_cfg, tmp_path):
    path = tmp_path / "distill.yaml"
    path.write_text(shared_cfg(2, {"SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2}).dump())
    return path


def test_torchrun_trains_in_its_number_of_processes(config_file, tmp_path):
    code, output = torchrun(config_file)
    assert code == 0, output[-3000:]
    saved = read_weights(str(tmp_path / "run" / "model_final.pth"))
    assert len(saved["trainer"]["hooks"]["RandomState"]["states"]) == 2 and saved["run"]["processes"] == 2


@pytest.mark.parametrize(
    "argument, match", [(["--num-gpus", "2"], "Leave them out"), (["--check"], "without torchrun")]
)
def test_flags_that_torchrun_excludes_are_refused(monkeypatch, argument, match):
    for name in TORCHRUN:
        monkeypatch.setenv(name, "1")
    parser = runpy.run_path(str(ROOT / "train_net.py"), run_name="train_net")["parser"]()
    with pytest.raises(GDetKDError, match=match):
        run_everywhere(pytest.fail, parser.parse_args(argument))


@pytest.mark.parametrize(
    "error, destroyed", [(None, 1), (SystemExit(EXIT_STOPPED), 1), (SystemExit(1), 0), (RuntimeError("one"), 0)]
)
def test_a_process_that_fails_alone_does_not_wait_for_other_processes(monkeypatch, tmp_path, error, destroyed):
    """NCCL's `destroy_process_group` waits for all processes, so a process that fails alone must not call it."""
    calls = []
    for name in TORCHRUN:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(launch, "_join_torchrun", lambda args, timeout: None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    destroy = dist.destroy_process_group
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(1) or destroy())

    def main(args):
        if error:
            raise error

    with contextlib.nullcontext() if error is None else pytest.raises(type(error), match=str(error)):
        run_everywhere(main, Namespace(timeout=30))
    assert len(calls) == destroyed and dist.is_initialized() is not bool(destroyed)


# The process compares its threads before and in `main`. The new threads belong to its process groups.
LEAVING = """
import gdetkd  # first
import os, sys
from argparse import Namespace
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel
from gdetkd.engine import launch
from gdetkd.engine.stopping import EXIT_STOPPED

def threads():
    return set(os.listdir("/proc/self/task"))

def launched(main, processes, machines, rank, url, args, timeout):  # as Detectron2 does, but on the CPU
    dist.init_process_group("gloo")
    comm._LOCAL_PROCESS_GROUP = dist.new_group([0])
    main(*args)

class Trainer:
    def __init__(self):
        self.model = DistributedDataParallel(torch.nn.Linear(2, 2))
        self.itself = self

def main(args):
    groups.update(threads() - before)
    trainer = Trainer()
    trainer.model(torch.ones(1, 2)).sum().backward()
    comm.all_gather("what makes Detectron2 cache a group")
    assert comm._get_global_gloo_group() is not None
    sys.setswitchinterval(1000)  # the threads of a group wait for Python's lock from now on
    dist.all_reduce(torch.ones(1000))
    if is_stopped:
        sys.exit(EXIT_STOPPED)

is_launched, is_stopped = (word == "True" for word in sys.argv[1:])
if is_launched:
    launch.is_under_torchrun, launch.launch = lambda: False, launched
before, groups, code = threads(), set(), 0
try:
    launch.run_everywhere(main, Namespace(
        timeout=1, num_gpus=1, num_machines=1, machine_rank=0, dist_url="", check=False
    ))
except SystemExit as stop:
    code = stop.code
print(code, len(groups) > 0, len(groups & threads()), dist.is_initialized(), comm._LOCAL_PROCESS_GROUP)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the threads of a process are in /proc on Linux alone")
@pytest.mark.parametrize("is_stopped", [False, True])
@pytest.mark.parametrize("is_launched", [False, True])
def test_a_process_ends_its_groups_and_their_threads(is_launched, is_stopped):
    """A thread that waits for Python's lock while Python ends would abort the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    env = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEAVING, str(is_launched), str(is_stopped)],
        cwd=ROOT,
        env=env,
        text=True,
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{EXIT_STOPPED if is_stopped else 0} True 0 False None"


def test_the_gloo_group_beside_nccl_has_the_timeout_of_the_run(monkeypatch):
    made = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda **keys: made.append(keys) or "the group")
    timeout, detectron2s = timedelta(minutes=7), comm._get_global_gloo_group
    assert launch._exchange_within(timeout, lambda args: comm._get_global_gloo_group(), Namespace()) == "the group"
    assert made == [{"backend": "gloo", "timeout": timeout}]
    assert comm._get_global_gloo_group is detectron2s  # restored, so that no group outlives the run
