"""Train a student with a teacher, as Detectron2's `DefaultTrainer` trains a detector."""

import logging
import weakref
from functools import partial
from typing import Any, Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .._compat.training import BareTrainer
from ..config import plain_config
from ..data import ResumableLoader, build_train_loader, register_datasets
from ..data.class_names import class_names
from ..data.train_loader import images_per_process
from ..data.workers import OutlivingLoader
from ..distiller import GDetKD
from ..errors import GDetKDError
from ..random_state import random_state
from ..structures import DetectorSpec
from ..teacher import FrozenTeacher, transfer_heads, transferable
from .auto_weights import AutoWeights
from .catch_up import EvaluationNote
from .config_doubts import config_doubts
from .config_rules import check_values
from .dataset_checks import check_datasets
from .disk_tolerant import DiskTolerant
from .evaluators import build_evaluator
from .extensions import EXTENSIONS
from .forward_guard import ForwardGuard
from .forward_state import share_statistics
from .guard import StepGuard
from .hook_order import order_hooks
from .hooks import DistilUntil, RandomState, TolerantWriter
from .loss_scalars import LossScalars
from .optimizer import build_optimizer, exempt_from_decay
from .optimizer_step import GuardedAMPTrainer, GuardedTrainer, StepAgreement, UnreachedParameters
from .patience import Patience
from .preflight import check_architecture, check_student, check_student_classes
from .resume import DistillState, RunRecord, warn_of_other_data
from .same_everywhere import check_same_student, check_same_teacher
from .schedule import LossSchedule
from .stopping import Interruptible, LeaveAtTheEnd, LeftEarly, StopRequest
from .student_weights import StudentCheckpointer
from .teacher_evaluation import TeacherScore, evaluate_on_test_sets, teachers_classes_in
from .trackers import build_trackers
from .unlabeled_checks import check_unlabeled, other_teachers

logger = logging.getLogger(__name__)


class DistillTrainer(BareTrainer):
    """Train the student of a `GDetKD` model, or any plain Detectron2 detector.

    A checkpoint holds the plain student under `model`, and the losses' parameters under `distill`. On a CPU a resumed
    run gives, bit for bit, the losses of an uninterrupted run.

    Raises:
        GDetKDError: a dataset or the teacher is wrong, or they do not fit together.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        check_values(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_values(cfg)  # scaling rounds
        self.cfg = cfg
        images_per_process(cfg, comm.get_world_size())
        check_architecture(cfg)
        register_datasets(cfg)
        check_datasets(cfg)
        check_unlabeled(cfg)
        check_student_classes(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        model = self.build_model(cfg)
        for doubt in config_doubts(cfg):
            logger.warning(doubt)
        self.student: nn.Module = model.student if isinstance(model, GDetKD) else model
        self.distiller: Optional[GDetKD] = model if isinstance(model, GDetKD) else None
        self.teacher: Optional[FrozenTeacher] = None if self.distiller is None else self.distiller.teacher
        self.student_spec: Optional[DetectorSpec] = check_student(cfg, self.student, self.teacher)
        if self.teacher is not None:
            self._check_teacher(self.teacher)
        optimizer = self.build_optimizer(cfg, model)
        if self.distiller is not None:
            exempt_from_decay(optimizer, [p for loss in self.distiller.losses.values() for p in loss.undecayed()])
        data_loader = self.build_train_loader(cfg)
        auto = AutoWeights(cfg, self.student) if cfg.DISTILL.WEIGHTS == "auto" and cfg.DISTILL.LOSSES else None
        self.schedule = LossSchedule(cfg, auto)
        self.guarded_model = ForwardGuard(model, self.student)
        model = _distributed(self.guarded_model)
        self.schedule.attach(model)
        trainer_class = GuardedAMPTrainer if cfg.SOLVER.AMP.ENABLED else GuardedTrainer
        step_trainer = trainer_class(model, data_loader, optimizer)
        self.run_steps_with(step_trainer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # They are loaded in this order: `distill` can tell what differs, and the optimizer's state cannot.
        beside: Dict[str, Any] = {"run": RunRecord(cfg, class_names(cfg))}
        if self.teacher is not None:
            beside["distill"] = DistillState(self.distiller)
        if auto is not None:
            beside["weights"] = auto
        self.checkpointer = StudentCheckpointer(self.student, cfg.OUTPUT_DIR, **beside, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self._request = StopRequest()
        self.register_hooks(self.build_hooks())
        self._guard.attach(self.guarded_model)
        take_local = self.distiller.mixture.take_scalars if self.distiller is not None else None
        agreement = StepAgreement(self._guard, self._request, self.schedule, take_local)
        agreement.attach(model)
        step_trainer.register_hooks([UnreachedParameters(self.student), agreement])

    def _check_teacher(self, teacher: FrozenTeacher) -> None:
        check_same_teacher(teacher)
        if self.cfg.DISTILL.EVAL_TEACHER:
            for name in self.cfg.DATASETS.TEST:
                teachers_classes_in(self.cfg, teacher, name)  # raises an error before hours of training
        for warning in other_teachers(self.cfg, teacher.sha256):
            logger.warning(warning)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Scale a config by Detectron2's rule (SOLVER.REFERENCE_WORLD_SIZE), and the warm-up of the losses with it.

        Raises:
            GDetKDError: SOLVER.IMS_PER_BATCH is not a multiple of SOLVER.REFERENCE_WORLD_SIZE.
        """
        images, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference and images % reference:
            raise GDetKDError(
                f"SOLVER.IMS_PER_BATCH is {images}, but SOLVER.REFERENCE_WORLD_SIZE {reference} needs a multiple of "
                f"{reference}. Give a multiple, or set SOLVER.REFERENCE_WORLD_SIZE to 0."
            )
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is not cfg:
            scaled.defrost()
            # Scaled, a period of -1 would be invalid, and 0 would turn the evaluations off.
            period = cfg.TEST.EVAL_PERIOD
            scaled.TEST.EVAL_PERIOD = max(1, scaled.TEST.EVAL_PERIOD) if period > 0 else period
            nodes = [node for node in scaled.DISTILL.values() if isinstance(node, CfgNode) and "WARMUP_ITERS" in node]
            for node in [scaled.DISTILL, *nodes]:
                node.WARMUP_ITERS = round(node.WARMUP_ITERS * cfg.SOLVER.REFERENCE_WORLD_SIZE / num_workers)
            scaled.freeze()
        return scaled

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build Detectron2's optimizer, or AdamW if SOLVER.OPTIMIZER asks for it."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build a `ResumableLoader`. A subclass may return any iterable of batches if resuming need not be exact.

        With DISTILL.TEACHER.CACHE_MB, the loader adds a digest of each image under `teacher_cache_key`. The cache finds
        the teacher's features by it. So code that changes images after this loader must remove the digest.
        """
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build Detectron2's loader. As in training, its workers ignore a SIGTERM that all processes get."""
        return OutlivingLoader(super().build_test_loader(cfg, dataset_name))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Build COCO's metrics, and VOC's metric for Detectron2's VOC datasets."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Optional[List[DatasetEvaluator]] = None) -> Dict:
        """Evaluate as Detectron2 does, and leave the random state of training alone."""
        with random_state((0,)):
            return super().test(cfg, model, evaluators)

    def _evaluate(self) -> Dict:
        request = self._request
        if request.has_left or self._patience.has_just_ended:
            return {}  # Detectron2 also evaluates when the last iteration is left
        evaluators = [
            Interruptible(DiskTolerant(partial(self.build_evaluator, self.cfg, name), name), request)
            for name in self.cfg.DATASETS.TEST
        ]
        training = self.model.training
        share_statistics(self.model)  # otherwise each process would evaluate another student
        try:
            results = self.test(self.cfg, self.model, evaluators)
        except LeftEarly:
            request.agree()  # the other processes call this after their last image
            request.has_left = True
            self.model.train(training)
            return {}
        self.keep_results(results)
        return results

    def build_writers(self) -> List[EventWriter]:
        """Build Detectron2's writers and those of LOG.WRITERS. No error of the disk or network ends the training."""
        trackers = build_trackers(self.cfg, weakref.proxy(self))
        return [*(TolerantWriter(writer) for writer in super().build_writers()), *trackers, self._note]

    def build_hooks(self) -> List[HookBase]:
        """Build Detectron2's hooks and the hooks of GDetKD, in order."""
        random_state = RandomState(self.cfg.SOLVER.CHECKPOINT_PERIOD)
        self._guard = StepGuard(self.cfg.DISTILL.SKIP_NONFINITE, random_state)
        self._patience = Patience(self.cfg, random_state)
        self._note = EvaluationNote(self.cfg.OUTPUT_DIR)
        hooks = super().build_hooks()
        hooks = order_hooks(hooks, self, self._request, random_state, self._evaluate, self._patience, self._note)
        if self.distiller is not None and self.distiller.losses:
            hooks.append(DistilUntil(self.distiller, self.cfg.DISTILL.UNTIL))
        extra = [hooks_of(self) for hooks_of in EXTENSIONS]
        before_writers = [hook for added in extra for hook in added.before_writers]
        if self.distiller is not None:
            before_writers.append(LossScalars(self.distiller, self.schedule))
        if self.cfg.DISTILL.EVAL_TEACHER and self.teacher is not None:
            self._teacher_score = TeacherScore()
            before_writers.append(self._teacher_score)
        place = next((index for index, hook in enumerate(hooks) if isinstance(hook, PeriodicWriter)), len(hooks))
        last = [hook for added in extra for hook in added.last]
        return [*hooks[:place], *before_writers, *hooks[place:], *last, self._guard, LeaveAtTheEnd(self._request)]

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume, or load what the config asks for, in this order.

        - The backbone's ImageNet weights, if it is a backbone of `gdetkd.backbones`.
        - MODEL.WEIGHTS into the student.
        - The teacher's heads.
        """
        self.checkpointer.start_backbone(resume)
        super().resume_or_load(resume)
        if self.start_iter > 0:
            if isinstance(self.data_loader, ResumableLoader):
                self.data_loader.start_iter = self.start_iter
            if self._patience.is_over:
                self._patience.say_that_it_is_over()
                self.max_iter = self.start_iter
            return
        check_same_student(self.student, self.cfg.MODEL.WEIGHTS)
        for problem in self.start_problems():
            logger.warning(problem)
        if self.cfg.DISTILL.HEAD_TRANSFER and self.teacher is not None:
            transfer_heads(self.teacher.model, self.student)

    def start_problems(self) -> List[str]:
        """Return what is wrong with the weights that were loaded to start from."""
        transfers = self.cfg.DISTILL.HEAD_TRANSFER and self.teacher is not None
        replaced = transferable(self.teacher.model, self.student) if transfers else []
        return self.checkpointer.start_problems(self.cfg, replaced)

    def train(self) -> Any:
        if self.cfg.DISTILL.EVAL_TEACHER and self.teacher is not None and self.start_iter == 0:
            self._teacher_score.set(evaluate_on_test_sets(self.cfg, self.teacher))
        with self._request.listening():
            results = super().train()
        if "model_final" in self.checkpointer.failed:
            raise GDetKDError(
                f"The training is done, but model_final.pth could not be written. Make room in {self.cfg.OUTPUT_DIR} "
                "and run again with --resume."
            )
        return results

    def state_dict(self) -> Dict[str, Any]:
        state = super().state_dict()
        if isinstance(self.data_loader, ResumableLoader):
            state["data_seed"] = self.data_loader.seed
            state["data"] = self.data_loader.description
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        try:
            super().load_state_dict(state_dict)
        except GDetKDError:
            raise
        except ValueError as e:  # the optimizer raises it
            raise GDetKDError(
                f"This run was started with other groups of parameters ({e}). They depend on SOLVER.WEIGHT_DECAY, "
                "WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS and BIAS_LR_FACTOR, and on the version of GDetKD. Resume with "
                "the config and the version that started the run, or use a new OUTPUT_DIR."
            ) from e
        if "data_seed" in state_dict and isinstance(self.data_loader, ResumableLoader):
            self.data_loader.seed = state_dict["data_seed"]
        if "data" in state_dict and isinstance(self.data_loader, ResumableLoader):
            warn_of_other_data(state_dict["data"], self.data_loader.description)


def build_plain_student(cfg: CfgNode) -> nn.Module:
    """Build the student alone, for evaluation. This needs no teacher."""
    return build_model(plain_config(cfg))


def _distributed(model: nn.Module) -> nn.Module:
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    return DistributedDataParallel(
        model, device_ids=[comm.get_local_rank()] if on_gpu else None, broadcast_buffers=False
    )
