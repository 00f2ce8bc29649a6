"""Test the writers for Weights & Biases and MLflow, with modules that stand for the two packages."""

import math
import sys
import types

import pytest
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils import comm
from test_trainer import train

from gdetkd import DistillTrainer, files
from gdetkd.engine import trackers
from gdetkd.engine.config_rules import check_values
from gdetkd.errors import GDetKDError


class Offline(Exception):
    """Stand for an error of the network, whose class only the package knows."""


class FakeWandb(types.ModuleType):
    """Stand for wandb.

    Attributes:
        runs: the runs by id, with all their values.
        starts: the arguments of each `init`.
        is_online: whether calls succeed.
    """

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.starts, self.is_online = {}, [], True

    def check(self):
        if not self.is_online:
            raise Offline("no route to host")

    def init(self, **arguments):
        self.check()
        self.starts.append(arguments)
        run_id = arguments["id"] or f"id{len(self.runs)}"
        return self.runs.setdefault(run_id, WandbRun(run_id, self))


class WandbRun:
    def __init__(self, run_id, module):
        self.id, self.module, self.values, self.settings, self.exit_codes = run_id, module, [], {}, []
        self.config = types.SimpleNamespace(update=self.update)

    def update(self, values, allow_val_change):
        self.settings.update(values)

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "iteration")

    def log(self, values):
        self.module.check()
        self.values.append(values)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


class FakeMlflow(types.ModuleType):
    """Stand for mlflow, with the limits that it puts on parameters and on names."""

    def __init__(self):
        super().__init__("mlflow")
        self.runs, self.active, self.experiment, self.is_online = {}, None, None, True

    def set_experiment(self, name):
        if not self.is_online:
            raise Offline("no route to host")
        self.experiment = name

    def start_run(self, run_id=None, run_name=None):
        assert self.active is None, "a run is already active"
        run_id = run_id or f"id{len(self.runs)}"
        new = {"name": run_name, "parameters": {}, "values": [], "texts": [], "status": None}
        self.active = self.runs.setdefault(run_id, new)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def log_text(self, text, name):
        self.active["texts"].append(name)

    def log_params(self, parameters):
        assert len(parameters) <= 100 and all(len(value) <= 250 for value in parameters.values())
        self.active["parameters"].update(parameters)

    def log_metrics(self, values, step):
        assert not any("(" in name for name in values)
        self.active["values"].append({**values, "iteration": step})

    def end_run(self, status):
        self.active["status"], self.active = status, None


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch):
    module = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


class Evaluated(DistillTrainer):
    """Have a fixed AP, and a class whose name MLflow does not take."""

    def test(self, cfg, model, evaluators=None):
        return {"bbox": {"AP": 12.5, "AP-dog (small)": 3.0}}


@pytest.fixture
def logged_cfg(distill_cfg):
    def make(*writers, **changes):
        keys = {"LOG.WRITERS": writers, "LOG.PROJECT": "pets", "DATASETS.TEST": ("tiny",), "SOLVER.MAX_ITER": 2}
        return distill_cfg({**keys, "DISTILL.LOSSES": ("SGFI",), **changes})

    return make


def test_wandb_gets_the_config_the_losses_and_the_ap(logged_cfg, wandb):
    cfg = logged_cfg("wandb")
    train(Evaluated, cfg)
    (run,) = wandb.runs.values()
    assert wandb.starts[0]["project"] == "pets" and wandb.starts[0]["name"] == "run"
    assert run.settings["DISTILL.SGFI.WEIGHT"] == cfg.DISTILL.SGFI.WEIGHT and run.exit_codes == [0]
    assert [values["iteration"] for values in run.values] == [1, 2]
    assert math.isfinite(run.values[0]["total_loss"]) and run.values[1]["bbox/AP"] == 12.5


def test_mlflow_gets_the_config_the_losses_and_the_ap(logged_cfg, mlflow):
    train(Evaluated, logged_cfg("mlflow", **{"LOG.NAME": "first try"}))
    (run,) = mlflow.runs.values()
    assert mlflow.experiment == "pets" and run["name"] == "first try" and run["status"] == "FINISHED"
    assert run["parameters"]["SOLVER.MAX_ITER"] == "2" and run["texts"] == ["config.yaml"]
    assert "total_loss" in run["values"][0] and run["values"][1]["bbox/AP"] == 12.5
    assert run["values"][1]["bbox/AP-dog _small_"] == 3.0


def test_both_at_once(logged_cfg, wandb, mlflow):
    train(Evaluated, logged_cfg("wandb", "mlflow"))
    assert len(wandb.runs) == len(mlflow.runs) == 1


def test_a_resumed_training_continues_the_run_and_a_new_one_does_not(logged_cfg, wandb, mlflow):
    cfg = logged_cfg("wandb", "mlflow")
    train(Evaluated, cfg)
    cfg.SOLVER.MAX_ITER = 4
    train(Evaluated, cfg, resume=True)
    assert len(wandb.runs) == len(mlflow.runs) == 1
    iterations = [values["iteration"] for values in wandb.runs["id0"].values]
    assert iterations == [values["iteration"] for values in mlflow.runs["id0"]["values"]] == [1, 2, 3, 4]
    assert wandb.runs["id0"].settings["SOLVER.MAX_ITER"] == 4
    assert mlflow.runs["id0"]["parameters"]["SOLVER.MAX_ITER"] == "2"  # it cannot be changed; config.yaml can
    assert mlflow.runs["id0"]["texts"] == ["config.yaml"] * 2
    train(Evaluated, cfg)
    assert len(wandb.runs) == len(mlflow.runs) == 2


def test_a_training_that_fails_is_not_shown_as_complete(logged_cfg, wandb, mlflow):
    class Failing(Evaluated):
        def run_step(self):
            super().run_step()
            if self.iter == 1:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        train(Failing, logged_cfg("wandb", "mlflow"))
    assert wandb.runs["id0"].exit_codes == [1] and mlflow.runs["id0"]["status"] == "KILLED"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_training_goes_on_without_the_network(logged_cfg, request, caplog, name):
    module = request.getfixturevalue(name)
    module.is_online = False
    _, steps = train(Evaluated, logged_cfg(name))
    warnings = [record for record in caplog.records if record.name == trackers.__name__]
    assert len(steps) == 2 and not module.runs and len(warnings) == 1
    assert f"Could not log to {name} (Offline: no route to host). The training goes on" in warnings[0].getMessage()


def test_a_writer_waits_before_it_tries_again_and_logs_what_is_new(logged_cfg, wandb, monkeypatch, caplog):
    clock = [1000.0]
    monkeypatch.setattr(trackers.time, "monotonic", lambda: clock[0])

    class Flaky(Evaluated):
        """The network fails after the second iteration and works again in the third. The pause ends in the fifth."""

        def build_hooks(self):
            hooks = super().build_hooks()
            next(hook for hook in hooks if isinstance(hook, PeriodicWriter))._period = 1
            return hooks

        def run_step(self):
            super().run_step()
            wandb.is_online = self.iter != 1
            clock[0] += trackers.PAUSE / 3

    train(Flaky, logged_cfg("wandb", **{"SOLVER.MAX_ITER": 6}))
    assert [values["iteration"] for values in wandb.runs["id0"].values] == [0, 4, 5, 6]
    assert caplog.text.count("Could not log to wandb") == 1


def test_a_full_disk_does_not_lose_the_run(logged_cfg, wandb, monkeypatch, caplog):
    written_whole = files.written_whole

    def full(path, *args):
        if path.endswith("wandb_run_id"):
            raise OSError(28, "No space left on device")
        return written_whole(path, *args)

    monkeypatch.setattr(files, "written_whole", full)
    train(Evaluated, logged_cfg("wandb"))
    assert len(wandb.runs["id0"].values) == 2 and "No space left on device" in caplog.text


def test_a_missing_package_is_named_before_training(logged_cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(GDetKDError, match=r"names 'mlflow', .* install it with pip install mlflow"):
        DistillTrainer(logged_cfg("mlflow"))
    check_values(logged_cfg())  # a package that is not asked for is not imported


def test_only_the_main_process_logs(logged_cfg, wandb, monkeypatch):
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    train(Evaluated, logged_cfg("wandb"))
    assert not wandb.starts
