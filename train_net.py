#!/usr/bin/env python
"""Distil, train or evaluate a detector.

python train_net.py --config-file FILE [--num-gpus N] [--resume | --overwrite] [KEY VALUE ...]
python train_net.py --config-file FILE --check | --eval-only | --eval-teacher [KEY VALUE ...]
torchrun --nproc-per-node N train_net.py --config-file FILE ...

On SIGTERM a training saves its state and ends with exit code 75. --resume continues it.
"""

from argparse import ArgumentParser, Namespace
from typing import Any

import gdetkd  # noqa: F401  imported first, because it prepares the import of Detectron2
from gdetkd.engine import commands
from gdetkd.engine.launch import run_everywhere
from gdetkd.engine.setup import read_config
from gdetkd.program import explained_errors

from detectron2.engine import default_argument_parser  # isort: skip


def parser() -> ArgumentParser:
    parser = default_argument_parser(__doc__)
    parser.add_argument("--eval-teacher", action="store_true", help="evaluate the teacher alone on DATASETS.TEST")
    parser.add_argument("--overwrite", action="store_true", help="start again even if OUTPUT_DIR holds checkpoints")
    parser.add_argument("--check", action="store_true", help="report what a training would do, without training")
    parser.add_argument(
        "--check-images", type=int, default=50, help="number of images on which --check evaluates the teacher"
    )
    parser.add_argument(
        "--timeout", type=float, default=30, help="minutes that a process waits for the other processes"
    )
    return parser


def main(args: Namespace) -> Any:
    cfg = read_config(args, trains=not (args.eval_only or args.eval_teacher))
    if args.check:
        return commands.check(cfg, args)
    if args.eval_teacher:
        return commands.evaluate_the_teacher(cfg, args)
    return commands.evaluate(cfg, args) if args.eval_only else commands.train(cfg, args)


if __name__ == "__main__":
    with explained_errors():
        run_everywhere(main, parser().parse_args())
