"""Undo what a test changes in its process, so that no test depends on which tests ran before it.

`isolated` is an autouse fixture that does this. `tests/conftest.py` imports it. Each `_keep_*` below is a generator: it
notes a part of the process's state, yields, and restores that part. pytest itself restores the warning filters.
Imported modules stay imported.
"""

import contextlib
import logging
import os
import random
import signal
import sys
import threading
from typing import Any, Callable, Dict, Iterator, List, MutableMapping, Tuple

import gdetkd  # noqa: F401  first: it prepares the import of Detectron2

import detectron2.modeling  # isort: skip
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm, events
from detectron2.utils import logger as detectron2_logger
from fvcore.common.registry import Registry

from gdetkd._compat.processes import forget_process_groups
from gdetkd.data.kinds import DATASET_KIND_REGISTRY
from gdetkd.detectors import DETECTOR_ADAPTER_REGISTRY
from gdetkd.engine.launch import leave_process_groups
from gdetkd.losses.build import DISTILL_LOSS_REGISTRY

SEED = 0
# SIGCHLD is missing, because torch sets its handler once in a process, for the workers of all its data loaders.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)
REGISTRIES = [
    *(registry for registry in vars(detectron2.modeling).values() if isinstance(registry, Registry)),
    DATASET_KIND_REGISTRY,
    DETECTOR_ADAPTER_REGISTRY,
    DISTILL_LOSS_REGISTRY,
]
# pytest changes this variable itself, from phase to phase of a test.
PYTESTS_OWN = "PYTEST_CURRENT_TEST"
# Each pair reads a setting of torch and writes it.
TORCH_SETTINGS: List[Tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.multiprocessing.get_sharing_strategy, torch.multiprocessing.set_sharing_strategy),
]
CUDNN_FLAGS = ("benchmark", "deterministic", "enabled")


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Start each test from the same random numbers, and undo afterwards what it changed in its process."""
    with keeping_state():
        yield


@contextlib.contextmanager
def keeping_state() -> Iterator[None]:
    """Restore the process's state when the body ends, also by an error."""
    seed_all()
    keepers = [keep() for keep in KEEPERS]
    for keeper in keepers:
        next(keeper)
    try:
        yield
    finally:
        for keeper in reversed(keepers):
            next(keeper, None)
        seed_all()  # a module's fixtures are set up between tests, and may draw random numbers


def seed_all() -> None:
    """Seed Python's, NumPy's and torch's global random numbers on the CPU."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.default_generator.manual_seed(SEED)  # torch.manual_seed also queues seeds for GPUs, which takes longer


def _restore(mapping: MutableMapping, before: Dict) -> None:
    """Give a mapping its former content and order, in place."""
    if mapping != before or list(mapping) != list(before):
        mapping.clear()
        mapping.update(before)


def _keep_loggers() -> Iterator[None]:
    """Keep the loggers, and let Detectron2's cached `setup_logger` add its handlers again when it is next called."""
    root, manager = logging.getLogger(), logging.root.manager
    before = {logger: _logger_state(logger) for logger in (root, *_loggers())}
    disabled_up_to, counts = manager.disable, dict(detectron2_logger._LOG_COUNTER)
    times = dict(detectron2_logger._LOG_TIMER)
    yield
    new = (logging.NOTSET, True, False, [], [])
    for logger in (root, *_loggers()):
        state = before.get(logger, new)
        if _logger_state(logger) != state:
            _set_logger(logger, *state)
    if manager.disable != disabled_up_to:
        logging.disable(disabled_up_to)
    detectron2_logger.setup_logger.cache_clear()
    _restore(detectron2_logger._LOG_COUNTER, counts)
    _restore(detectron2_logger._LOG_TIMER, times)


def _loggers() -> List[logging.Logger]:
    return [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]


def _logger_state(logger: logging.Logger) -> Tuple[int, bool, bool, List[Any], List[Any]]:
    return logger.level, logger.propagate, logger.disabled, logger.handlers[:], logger.filters[:]


def _set_logger(
    logger: logging.Logger, level: int, propagate: bool, disabled: bool, handlers: List[Any], filters: List[Any]
) -> None:
    logger.setLevel(level)  # this also clears the levels that the loggers have cached
    logger.propagate, logger.disabled, logger.handlers, logger.filters = propagate, disabled, handlers[:], filters[:]


def _keep_catalogs() -> Iterator[None]:
    """Keep the registered datasets and their metadata, including what tests set on existing metadata."""
    datasets, names = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    attributes = {name: dict(vars(metadata)) for name, metadata in names.items()}
    yield
    _restore(DatasetCatalog.data, datasets)
    _restore(MetadataCatalog.data, names)
    for name, metadata in names.items():
        _restore(vars(metadata), attributes[name])


def _keep_registries() -> Iterator[None]:
    before = [dict(registry._obj_map) for registry in REGISTRIES]
    yield
    for registry, objects in zip(REGISTRIES, before):
        _restore(registry._obj_map, objects)


def _keep_process() -> Iterator[None]:
    """Keep the environment, the current folder, the import path, the arguments and the exception hooks."""
    environment, folder = dict(os.environ), os.getcwd()
    path, arguments, hooks = sys.path[:], sys.argv[:], (sys.excepthook, threading.excepthook)
    yield
    environment[PYTESTS_OWN] = os.environ.get(PYTESTS_OWN, "")
    for name in [name for name in os.environ if name not in environment]:
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    os.chdir(folder)  # do not ask for the current folder first, because it may not exist any more
    sys.path[:], sys.argv[:] = path, arguments
    sys.excepthook, threading.excepthook = hooks


def _keep_signal_handlers() -> Iterator[None]:
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield
    for number, handler in before:
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _keep_torch() -> Iterator[None]:
    cudnn, device = torch.backends.cudnn, torch.get_default_device()
    flags, values = [getattr(cudnn, name) for name in CUDNN_FLAGS], [read() for read, _ in TORCH_SETTINGS]
    yield
    for name, flag in zip(CUDNN_FLAGS, flags):
        setattr(cudnn, name, flag)
    for (read, write), value in zip(TORCH_SETTINGS, values):
        if read() != value:
            write(value)
    if torch.get_default_device() != device:
        torch.set_default_device(device)


def _keep_process_groups() -> Iterator[None]:
    """Keep Detectron2's process groups and event storages; leave a process group that a test initialised."""
    group, storages, initialized = comm._LOCAL_PROCESS_GROUP, events._CURRENT_STORAGE_STACK[:], _has_process_group()
    yield
    if _has_process_group() and not initialized:
        leave_process_groups()
    forget_process_groups()
    comm._LOCAL_PROCESS_GROUP = group
    events._CURRENT_STORAGE_STACK[:] = storages


def _has_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _keep_matplotlib() -> Iterator[None]:
    parameters = dict.copy(matplotlib.rcParams)
    del parameters["backend"]  # importing gdetkd's charts sets it, and that import happens once
    yield
    if plt.get_fignums():
        plt.close("all")
    dict.update(matplotlib.rcParams, parameters)


KEEPERS = (
    _keep_loggers,
    _keep_catalogs,
    _keep_registries,
    _keep_process,
    _keep_signal_handlers,
    _keep_torch,
    _keep_process_groups,
    _keep_matplotlib,
)
