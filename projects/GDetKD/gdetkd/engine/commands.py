"""Train, evaluate the student or the teacher, or check a config: the commands of `train_net.py`."""

import logging
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data import register_test_sets
from ..files import mend_last_line
from .check import Check
from .class_checks import check_class_order, check_trained_order
from .config_rules import check_parts
from .dataset_checks import check_proposals, check_test_sets
from .folder import check_earlier_run, only_training_in, remove_earlier_run, warn_of_a_fresh_start
from .preflight import check_student_classes
from .quiet import quiet
from .setup import kept_config, start, start_without_training
from .student_weights import StudentCheckpointer
from .teacher_evaluation import evaluate_teacher
from .trainer import DistillTrainer, build_plain_student

logger = logging.getLogger(__name__)


def train(cfg: CfgNode, args: Namespace) -> Any:
    """Train, or continue a training. Return the results of the last evaluation."""
    with only_training_in(cfg.OUTPUT_DIR):
        check_earlier_run(cfg.OUTPUT_DIR, args.resume, args.overwrite)
        with kept_config(cfg.OUTPUT_DIR, False):  # if the run is refused, the folder stays unchanged
            start(cfg, args)
            trainer = DistillTrainer(cfg)
            if args.resume:
                warn_of_a_fresh_start(cfg.OUTPUT_DIR, trainer.checkpointer.has_checkpoint())
                if comm.is_main_process():
                    mend_last_line(Path(cfg.OUTPUT_DIR, "metrics.json"))  # Detectron2 appends to it
            trainer.resume_or_load(resume=args.resume)
            if args.overwrite and not args.resume:
                teacher = "" if trainer.teacher is None else trainer.teacher.file.weights
                remove_earlier_run(cfg.OUTPUT_DIR, [cfg.MODEL.WEIGHTS, teacher])
        return trainer.train()


def evaluate(cfg: CfgNode, args: Namespace) -> Any:
    """Evaluate the student on DATASETS.TEST. The weights must set all of its tensors."""
    start_without_training(cfg, args, register_test_sets)
    check_parts(cfg)
    check_test_sets(cfg, needed=True)
    check_proposals(cfg, "TEST")
    check_student_classes(cfg, cfg.DATASETS.TEST)
    check_class_order(cfg.DATASETS.TEST)
    student = build_plain_student(cfg)
    checkpointer = StudentCheckpointer(student, cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    checkpointer.check_whole()
    check_trained_order(cfg.DATASETS.TEST, checkpointer.trained_with.classes)
    for problem in checkpointer.check_settings(cfg):
        logger.warning(problem)
    return DistillTrainer.test(cfg, student)


def evaluate_the_teacher(cfg: CfgNode, args: Namespace) -> Any:
    """Evaluate the teacher alone on DATASETS.TEST."""
    start_without_training(cfg, args, register_test_sets)
    return evaluate_teacher(cfg)


def check(cfg: CfgNode, args: Namespace) -> None:
    """Print one screen, and exit with status 1 if it shows something that would ruin the training."""
    with quiet() as warnings:
        start_without_training(cfg, args)
        checked = Check(cfg, args.check_images, max(1, args.num_gpus) * args.num_machines)
        screen = checked.run(warnings)
    print(f"The full log is {Path(cfg.OUTPUT_DIR, 'log.txt')}.\n\n{screen}")
    if checked.problems:
        sys.exit(1)
