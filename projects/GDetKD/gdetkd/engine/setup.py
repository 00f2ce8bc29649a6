"""Turn command-line arguments into a config, a folder, loggers and registered datasets."""

import logging
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config_file import load_config
from ..data import register_datasets
from ..errors import GDetKDError
from ..files import written_whole


def read_config(args: Namespace, trains: bool = True) -> CfgNode:
    """Return the config of --config-file and KEY VALUE, on the CPU if there is no GPU.

    Args:
        trains: whether the student is trained. SOLVER.AMP does not matter otherwise.

    Raises:
        GDetKDError: the config or the device is wrong.
    """
    cfg = load_config(args.config_file, args.opts)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        logging.warning("There is no CUDA device. The run uses the CPU, which is much slower.")
    if trains and cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        raise GDetKDError("SOLVER.AMP.ENABLED needs a CUDA device. Set it to False, or train on a GPU.")
    check_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    return cfg


def check_device(device: str) -> None:
    """Check the device of a run, and make a GPU that MODEL.DEVICE names the current one.

    Raises:
        GDetKDError: MODEL.DEVICE is not supported, or does not fit how the processes communicate.
    """
    if not (device == "cpu" or device.startswith("cuda")):
        raise GDetKDError(f"MODEL.DEVICE is {device!r}, which is not supported. Set it to cpu, cuda, or cuda:N.")
    if device == "cpu" and comm.get_world_size() > 1 and dist.get_backend() == "nccl":
        raise GDetKDError(
            "MODEL.DEVICE is cpu, but the processes exchange by NCCL, which needs GPUs. Hide the GPUs by setting "
            "CUDA_VISIBLE_DEVICES=, or train on them."
        )
    if device.startswith("cuda:") and comm.get_world_size() > 1:
        if comm.get_local_size() > 1 or device != "cuda:0":
            raise GDetKDError(
                f"MODEL.DEVICE is {device!r}, but with {comm.get_world_size()} processes each of them chooses the GPU "
                "of its own number. Set it to cuda, and choose GPUs with CUDA_VISIBLE_DEVICES."
            )
    elif device.startswith("cuda:"):
        torch.cuda.set_device(device)  # a checkpoint holds the random state of the current GPU


@contextmanager
def kept_config(output_dir: str, in_any_case: bool) -> Iterator[None]:
    """Keep the config.yaml of an earlier training in the folder. Detectron2 overwrites it at every start.

    Args:
        in_any_case: whether to keep it also if the code inside ends without an error.
    """
    path = Path(output_dir, "config.yaml")
    before = path.read_bytes() if comm.is_main_process() and path.exists() else None
    try:
        yield
    except BaseException:
        in_any_case = True
        raise
    finally:
        if before is not None and in_any_case:
            with written_whole(str(path), "wb") as file:
                file.write(before)


def start(cfg: CfgNode, args: Namespace, register: Callable[[CfgNode], None] = register_datasets) -> None:
    """Make the folder, set up loggers and seeds, and register the datasets."""
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gdetkd")
    register(cfg)


def start_without_training(
    cfg: CfgNode, args: Namespace, register: Callable[[CfgNode], None] = register_datasets
) -> None:
    """Start as `start` does, but keep the config.yaml of a training in the folder."""
    with kept_config(cfg.OUTPUT_DIR, True):
        start(cfg, args, register)
