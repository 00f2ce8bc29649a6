#!/usr/bin/env python
"""Distils, trains or evaluates a detector:

python train_net.py --config-file FILE [--num-gpus N] [--resume | --overwrite] [KEY VALUE ...]
python train_net.py --config-file FILE --check | --eval-only | --eval-teacher [KEY VALUE ...]
torchrun --nproc-per-node N train_net.py --config-file FILE ...

SIGTERM saves and ends a training with exit code 75; --resume goes on with it.
"""

import logging
import sys
from argparse import ArgumentParser, Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from gdetkd import DistillTrainer, add_gdetkd_config  # first: it prepares the import of Detectron2

import torch  # isort: skip
import torch.distributed as dist
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from gdetkd.config_file import merge_config_file, merge_words
from gdetkd.data import register_datasets
from gdetkd.engine import build_plain_student, evaluate_teacher
from gdetkd.engine.check import Check
from gdetkd.engine.config_rules import check_parts
from gdetkd.engine.folder import check_earlier_run, only_training_in, remove_earlier_run, warn_of_a_fresh_start
from gdetkd.engine.launch import run_everywhere
from gdetkd.engine.preflight import check_student_classes, check_test_sets
from gdetkd.engine.quiet import quiet
from gdetkd.engine.student_weights import StudentCheckpointer
from gdetkd.errors import GDetKDError
from gdetkd.files import written_whole
from gdetkd.program import explained_errors

logger = logging.getLogger("gdetkd")


def parser() -> ArgumentParser:
    parser = default_argument_parser(__doc__)
    parser.add_argument("--eval-teacher", action="store_true", help="evaluate the teacher alone on DATASETS.TEST")
    parser.add_argument("--overwrite", action="store_true", help="start anew although OUTPUT_DIR holds checkpoints")
    parser.add_argument("--check", action="store_true", help="look at what a training would be, and do not train")
    parser.add_argument("--check-images", type=int, default=50, help="on which --check evaluates the teacher")
    parser.add_argument("--timeout", type=float, default=30, help="minutes that a process waits for the others")
    return parser


def read_config(args: Namespace) -> CfgNode:
    """The config of FILE and of KEY VALUE, with the CPU in place of a GPU that is not there."""
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    merge_config_file(cfg, args.config_file)
    merge_words(cfg, args.opts)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        logging.warning("There is no CUDA device: running on the CPU, which is much slower.")
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        raise GDetKDError("SOLVER.AMP.ENABLED needs a CUDA device. Set it to False, or train on a GPU.")
    _check_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    return cfg


def _check_device(device: str) -> None:
    if not (device == "cpu" or device.startswith("cuda")):
        raise GDetKDError(f"MODEL.DEVICE is {device!r}, which is not supported. Set it to cpu, cuda, or cuda:N.")
    if device == "cpu" and comm.get_world_size() > 1 and dist.get_backend() == "nccl":
        raise GDetKDError(
            "MODEL.DEVICE is cpu, but the processes exchange by NCCL, which knows GPUs alone: hide the GPUs by "
            "CUDA_VISIBLE_DEVICES=, or train on them."
        )
    if device.startswith("cuda:") and comm.get_world_size() == 1:
        torch.cuda.set_device(device)  # or random states would be kept of another GPU than draws


@contextmanager
def kept_config(output_dir: str, in_any_case: bool) -> Iterator[None]:
    """Keeps the config.yaml of an earlier training in the folder, which Detectron2 overwrites at every start.

    Args:
        in_any_case: also where no error ends what is inside.
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


def start(cfg: CfgNode, args: Namespace) -> None:
    """Folder, loggers, seeds and data sets."""
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gdetkd")  # Detectron2 thinks of its own alone
    register_datasets(cfg)


def main(args: Namespace) -> Any:
    cfg = read_config(args)
    if not (args.check or args.eval_teacher or args.eval_only):
        with only_training_in(cfg.OUTPUT_DIR):
            check_earlier_run(cfg.OUTPUT_DIR, args.resume, args.overwrite)
            return train(cfg, args)
    if args.check:
        return check(cfg, args)
    with kept_config(cfg.OUTPUT_DIR, True):
        start(cfg, args)
    return evaluate_teacher(cfg) if args.eval_teacher else evaluate(cfg, args.resume)


def train(cfg: CfgNode, args: Namespace) -> Any:
    with kept_config(cfg.OUTPUT_DIR, False):  # a run that is refused has not been here
        start(cfg, args)
        trainer = DistillTrainer(cfg)
        if args.resume:
            warn_of_a_fresh_start(cfg.OUTPUT_DIR, trainer.checkpointer.has_checkpoint())
        if args.overwrite and not args.resume:
            remove_earlier_run(cfg.OUTPUT_DIR)
        trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def evaluate(cfg: CfgNode, resume: bool) -> Any:
    """The student, whole; a file that leaves some of it as it was initialised would be evaluated as a bad one."""
    check_parts(cfg)
    check_test_sets(cfg, needed=True)
    check_student_classes(cfg, cfg.DATASETS.TEST)
    student = build_plain_student(cfg)
    checkpointer = StudentCheckpointer(student, cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    checkpointer.check_whole()
    return DistillTrainer.test(cfg, student)


def check(cfg: CfgNode, args: Namespace) -> None:
    """Print one screen, and exit with status 1 if it shows something that would ruin the training."""
    with quiet() as warnings:
        with kept_config(cfg.OUTPUT_DIR, True):
            start(cfg, args)
        checked = Check(cfg, args.check_images, max(1, args.num_gpus) * args.num_machines)
        screen = checked.run(warnings)
    print(f"The full log is {Path(cfg.OUTPUT_DIR, 'log.txt')}.\n\n{screen}")
    if checked.problems:
        sys.exit(1)


if __name__ == "__main__":
    with explained_errors():
        run_everywhere(main, parser().parse_args())
