#!/usr/bin/env python
"""Distil, train or evaluate a detector:

python train_net.py --config-file FILE [--num-gpus N] [--resume | --overwrite] [KEY VALUE ...]
python train_net.py --config-file FILE --check | --eval-only | --eval-teacher [KEY VALUE ...]
torchrun --nproc-per-node N train_net.py --config-file FILE ...

SIGTERM saves and ends a training with exit code 75; --resume goes on with it.
"""

from argparse import ArgumentParser, Namespace
from typing import Any

import gdetkd  # noqa: F401  first: it prepares the import of Detectron2
from gdetkd.engine import commands
from gdetkd.engine.launch import run_everywhere
from gdetkd.engine.setup import read_config
from gdetkd.program import explained_errors

from detectron2.engine import default_argument_parser  # isort: skip


def parser() -> ArgumentParser:
    parser = default_argument_parser(__doc__)
    parser.add_argument("--eval-teacher", action="store_true", help="evaluate the teacher alone on DATASETS.TEST")
    parser.add_argument("--overwrite", action="store_true", help="start anew although OUTPUT_DIR holds checkpoints")
    parser.add_argument("--check", action="store_true", help="report what a training would be, and do not train")
    parser.add_argument("--check-images", type=int, default=50, help="how many images --check evaluates the teacher on")
    parser.add_argument("--timeout", type=float, default=30, help="minutes that a process waits for the others")
    return parser


def main(args: Namespace) -> Any:
    cfg = read_config(args)
    if args.check:
        return commands.check(cfg, args)
    if args.eval_teacher:
        return commands.evaluate_the_teacher(cfg, args)
    return commands.evaluate(cfg, args) if args.eval_only else commands.train(cfg, args)


if __name__ == "__main__":
    with explained_errors():
        run_everywhere(main, parser().parse_args())
