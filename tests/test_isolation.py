"""Each change of global state is undone after a test, so the order of tests does not matter."""

import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.utils import comm, events
from detectron2.utils.logger import log_first_n, setup_logger

from gdetkd.data.folders import resolve
from gdetkd.detectors import DETECTOR_ADAPTER_REGISTRY
from gdetkd.losses.build import DISTILL_LOSS_REGISTRY
from isolation import keeping_state

TESTS = Path(__file__).parent
NAMES = ("detectron2", "gdetkd", "fvcore", "gdetkd.made.by.a.test")


def set_up_loggers():
    for name in NAMES:
        setup_logger(name=name)
    logging.getLogger("gdetkd.engine").disabled = True
    logging.getLogger("gdetkd.teacher").addFilter(lambda record: False)
    logging.disable(logging.ERROR)


def state_of_loggers():
    loggers = [logging.getLogger(name) for name in (*NAMES, "gdetkd.engine", "gdetkd.teacher")]
    states = [(item.level, item.propagate, item.disabled, item.handlers[:], item.filters[:]) for item in loggers]
    return states, logging.root.manager.disable


def change_catalogs():
    DatasetCatalog.register("of_a_test", lambda: [])
    MetadataCatalog.get("of_a_test").set(thing_classes=["cat"])
    DatasetCatalog.remove("coco_2017_val")
    MetadataCatalog.get("tiny").set(color="red")


def state_of_catalogs():
    return DatasetCatalog.list(), MetadataCatalog.list(), MetadataCatalog.get("tiny").as_dict()


def change_registries():
    for registry in (META_ARCH_REGISTRY, BACKBONE_REGISTRY, ROI_HEADS_REGISTRY, DETECTOR_ADAPTER_REGISTRY):
        registry._do_register("OfATest", object)
    DISTILL_LOSS_REGISTRY._obj_map.pop("SGFI")


def state_of_registries():
    registries = (META_ARCH_REGISTRY, BACKBONE_REGISTRY, ROI_HEADS_REGISTRY, DETECTOR_ADAPTER_REGISTRY)
    return [list(registry._obj_map) for registry in (*registries, DISTILL_LOSS_REGISTRY)]


def change_process():
    os.environ.update(OF_A_TEST="1", PATH="nowhere")
    os.environ.pop("HOME", None)
    os.chdir("/")
    sys.path.insert(0, "nowhere")
    sys.argv.append("--of-a-test")
    sys.excepthook = threading.excepthook = print


def state_of_process():
    return dict(os.environ), os.getcwd(), sys.path[:], sys.argv[:], sys.excepthook, threading.excepthook


def change_signal_handlers():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *args: None)


def state_of_signal_handlers():
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


def change_torch():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark


def state_of_torch():
    deterministic = torch.are_deterministic_algorithms_enabled()
    kind = (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads())
    return kind, deterministic, torch.is_grad_enabled(), torch.backends.cudnn.benchmark


def change_process_groups(folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    comm._LOCAL_PROCESS_GROUP = comm._get_global_gloo_group()
    events.EventStorage().__enter__()


def state_of_process_groups():
    cached = comm._get_global_gloo_group.cache_info().currsize
    return torch.distributed.is_initialized(), comm._LOCAL_PROCESS_GROUP, cached, events._CURRENT_STORAGE_STACK[:]


def change_matplotlib():
    matplotlib.rcParams["font.size"] = 99
    plt.figure()


def state_of_matplotlib():
    return matplotlib.rcParams["font.size"], plt.get_fignums()


@pytest.mark.parametrize(
    "change, state",
    [
        (set_up_loggers, state_of_loggers),
        (change_catalogs, state_of_catalogs),
        (change_registries, state_of_registries),
        (change_process, state_of_process),
        (change_signal_handlers, state_of_signal_handlers),
        (change_torch, state_of_torch),
        (change_process_groups, state_of_process_groups),
        (change_matplotlib, state_of_matplotlib),
    ],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("fails", [False, True])
def test_a_change_is_undone(change, state, fails, tmp_path):
    before = state()
    with contextlib.suppress(ZeroDivisionError), keeping_state():
        change(*[tmp_path] if change is change_process_groups else [])
        assert state() != before
        if fails:
            raise ZeroDivisionError
    assert state() == before


def test_detectron2_can_set_up_its_loggers_again():
    """Detectron2 caches `setup_logger`. If the cache is not cleared, a second test gets no handlers."""
    for _ in range(2):
        with keeping_state():
            assert setup_logger(name="gdetkd").handlers and not logging.getLogger("gdetkd").propagate


def test_a_message_that_is_logged_once_is_logged_again_in_the_next_test(caplog):
    for _ in range(2):
        with keeping_state():
            for _ in range(2):
                log_first_n(logging.WARNING, "only once", name="gdetkd")
    assert caplog.messages == ["only once"] * 2


def test_random_numbers_start_from_the_same_seed():
    drawn = []
    for _ in range(2):
        with keeping_state():
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))  # as a module's fixture would
    assert len(set(drawn)) == 1


def test_the_datasets_of_the_checkout_are_not_read():
    """Otherwise a dataset that `make quickstart` generated gives class names to a test that needs unknown names."""
    assert not os.path.exists(resolve("."))


TWO_TESTS = """
import logging
from detectron2.data import DatasetCatalog
from detectron2.utils.logger import setup_logger

def test_that_changes():
    setup_logger(name="gdetkd")
    DatasetCatalog.register("of_a_test", lambda: [])

def test_that_looks():
    assert logging.getLogger("gdetkd").propagate and "of_a_test" not in DatasetCatalog.list()
"""
CHANGES, LOOKS = "test_two.py::test_that_changes", "test_two.py::test_that_looks"


@pytest.mark.parametrize(
    "conftest, order, passed",
    [
        ("from isolation import isolated", (CHANGES, LOOKS), 2),
        ("import gdetkd", (CHANGES, LOOKS), 1),  # without the fixture the second test fails
    ],
)
def test_a_change_of_one_test_does_not_reach_the_next_test(conftest, order, passed, tmp_path):
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_two.py").write_text(TWO_TESTS)
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", *order]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f" {passed} passed" in result.stdout, result.stdout
