"""Detectron2's default training, with a teacher."""

import logging
import weakref
from functools import partial
from typing import Any, Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import plain_config
from ..data import ResumableLoader, build_train_loader, register_datasets
from ..data.class_names import class_names
from ..data.train_loader import images_per_process, outlive_warning
from ..distiller import GDetKD
from ..errors import GDetKDError
from ..random_state import random_state
from ..structures import DetectorSpec
from ..teacher import transfer_heads
from .config_rules import check_values
from .evaluators import DiskTolerant, build_evaluator
from .extensions import EXTENSIONS
from .forward_guard import ForwardGuard
from .guard import GuardedAMPTrainer, GuardedTrainer, StepGuard
from .hook_order import order_hooks
from .hooks import RandomState, TolerantWriter
from .loss_scalars import LossScalars
from .optimizer import build_optimizer, exempt_from_decay
from .preflight import check_architecture, check_datasets, check_student, check_student_classes
from .resume import DistillState, RunRecord, warn_of_other_data
from .schedule import LossSchedule
from .stopping import Interruptible, LeaveAtTheEnd, LeftEarly, StopRequest
from .student_weights import StudentCheckpointer
from .teacher_score import evaluate_teacher

logger = logging.getLogger(__name__)


class DistillTrainer(DefaultTrainer):
    """Trains the student of a `GDetKD` model, or any plain Detectron2 detector.

    A checkpoint's `model` is the plain student; what distillation learns beside it lies under `distill`. A run that is
    resumed gives the losses, bit for bit on a CPU, that it would have given uninterrupted.

    Raises:
        GDetKDError: a data set, the teacher, or how they fit together is wrong.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # Not DefaultTrainer's: that saves the whole model, puts a CPU model on a GPU under DDP, and in v0.6 leaves the
        # optimizer out of the checkpoint.
        super(DefaultTrainer, self).__init__()
        check_values(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_values(cfg)  # scaling rounds
        images_per_process(cfg, comm.get_world_size())
        check_architecture(cfg)
        register_datasets(cfg)
        check_datasets(cfg)
        check_student_classes(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        model = self.build_model(cfg)
        self.student: nn.Module = model.student if isinstance(model, GDetKD) else model
        self.distiller: Optional[GDetKD] = model if isinstance(model, GDetKD) else None
        # Without losses any detector can be trained.
        teacher = None if self.distiller is None else self.distiller.teacher
        self.student_spec: Optional[DetectorSpec] = check_student(cfg, self.student, teacher)
        optimizer = self.build_optimizer(cfg, model)
        if self.distiller is not None:
            exempt_from_decay(optimizer, [p for loss in self.distiller.losses.values() for p in loss.undecayed()])
        data_loader = self.build_train_loader(cfg)
        self.schedule = LossSchedule(cfg)
        self.guarded_model = ForwardGuard(model, self.student, self.schedule.terms)
        model = _distributed(self.guarded_model)
        self.schedule.attach(model)
        trainer_class = GuardedAMPTrainer if cfg.SOLVER.AMP.ENABLED else GuardedTrainer
        self._trainer = trainer_class(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # Loaded in this order: what is under `distill` can say what differs, the optimizer's state cannot.
        beside: Dict[str, Any] = {"run": RunRecord(cfg, class_names(cfg))}
        if self.distiller and self.distiller.teacher:
            beside["distill"] = DistillState(self.distiller)
        self.checkpointer = StudentCheckpointer(self.student, cfg.OUTPUT_DIR, **beside, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._request = StopRequest()
        self.register_hooks(self.build_hooks())
        self._trainer.guard, self._trainer.schedule = self._guard, self.schedule
        self._guard.attach(self.guarded_model)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Detectron2's rule (SOLVER.REFERENCE_WORLD_SIZE), and the warm-up of the terms by the factor of MAX_ITER.

        Raises:
            GDetKDError: SOLVER.IMS_PER_BATCH does not divide by SOLVER.REFERENCE_WORLD_SIZE.
        """
        images, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference and images % reference:
            raise GDetKDError(
                f"SOLVER.IMS_PER_BATCH {images} is the batch of SOLVER.REFERENCE_WORLD_SIZE {reference} processes and "
                f"does not divide by them. Give a multiple of {reference}, from which that of other "
                "numbers of processes follows, or set SOLVER.REFERENCE_WORLD_SIZE to 0."
            )
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is not cfg:
            scaled.defrost()
            nodes = [node for node in scaled.DISTILL.values() if isinstance(node, CfgNode) and "WARMUP_ITERS" in node]
            for node in [scaled.DISTILL, *nodes]:
                node.WARMUP_ITERS = round(node.WARMUP_ITERS * cfg.SOLVER.REFERENCE_WORLD_SIZE / num_workers)
            scaled.freeze()
        return scaled

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's, or AdamW where SOLVER.OPTIMIZER says so."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """A `ResumableLoader`; any iterable of batches does where resuming need not be exact."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build Detectron2's loader, whose workers ignore a SIGTERM to all processes, as those of training do."""
        loader = super().build_test_loader(cfg, dataset_name)
        loader.worker_init_fn = outlive_warning
        return loader

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """COCO's metrics for every data set, and VOC's for Detectron2's VOC sets."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Optional[List[DatasetEvaluator]] = None) -> Dict:
        """Detectron2's evaluation; it leaves the random state of training alone."""
        with random_state((0,)):
            return super().test(cfg, model, evaluators)

    def _evaluate(self) -> Dict:
        request = self._request
        if request.has_left:
            return {}  # Detectron2 also evaluates when the last iteration is left
        evaluators = [
            Interruptible(DiskTolerant(partial(self.build_evaluator, self.cfg, name), name), request)
            for name in self.cfg.DATASETS.TEST
        ]
        training = self.model.training
        try:
            self._last_eval_results = self.test(self.cfg, self.model, evaluators)
        except LeftEarly:
            request.agree()  # the other processes call it after their last image
            request.has_left = True
            self.model.train(training)
            return {}
        return self._last_eval_results

    def build_writers(self) -> List[EventWriter]:
        """Detectron2's, which a full disk does not end the training through."""
        return [TolerantWriter(writer) for writer in super().build_writers()]

    def build_hooks(self) -> List[HookBase]:
        """Return Detectron2's hooks with ours among them."""
        random_state = RandomState(self.cfg.SOLVER.CHECKPOINT_PERIOD)
        self._guard = StepGuard(self.cfg.DISTILL.SKIP_NONFINITE, random_state, self._request)
        hooks = order_hooks(super().build_hooks(), self, self._request, random_state, self._evaluate)
        extra = [hooks_of(self) for hooks_of in EXTENSIONS]
        for hook in [hook for hooks_to_add in extra for hook in hooks_to_add.before_writers]:
            hooks = _before_writers(hooks, hook)
        if self.distiller is not None:
            hooks = _before_writers(hooks, LossScalars(self.distiller.losses))
        last = [hook for hooks_to_add in extra for hook in hooks_to_add.last]
        return [*hooks, *last, self._guard, LeaveAtTheEnd(self._request)]

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes, or loads MODEL.WEIGHTS into the student and then the teacher's heads where they are asked for."""
        super().resume_or_load(resume)
        if self.start_iter > 0:
            if isinstance(self.data_loader, ResumableLoader):
                self.data_loader.start_iter = self.start_iter
            return
        self.checkpointer.warn_of_backbone(self.cfg.MODEL.WEIGHTS)
        if self.cfg.DISTILL.HEAD_TRANSFER and self.distiller is not None:
            transfer_heads(self.distiller.teacher.model, self.student)

    def train(self) -> Any:
        if self.cfg.DISTILL.EVAL_TEACHER and self.distiller is not None and self.start_iter == 0:
            self.register_hooks([_TeacherScore(evaluate_teacher(self.cfg, self.distiller.teacher))])
        with self._request.listening():
            results = super().train()
        if "model_final" in self.checkpointer.failed:
            raise GDetKDError(
                f"The training is done, but model_final.pth could not be written. Make room in {self.cfg.OUTPUT_DIR} "
                "and go on with --resume."
            )
        return results

    def state_dict(self) -> Dict[str, Any]:
        state = super().state_dict()
        state["_trainer"] = self._trainer.state_dict()
        if isinstance(self.data_loader, ResumableLoader):
            state["data_seed"] = self.data_loader.seed
            state["data"] = self.data_loader.description
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        try:
            super().load_state_dict(state_dict)
            # v0.6 leaves the optimizer out; later versions have loaded it by now, which is done again without harm.
            self._trainer.load_state_dict(state_dict["_trainer"])
        except ValueError as e:  # the optimizer's
            raise GDetKDError(
                f"This run was started with other groups of parameters ({e}). SOLVER.WEIGHT_DECAY, WEIGHT_DECAY_NORM, "
                "WEIGHT_DECAY_BIAS and BIAS_LR_FACTOR decide about them, and so does the version of GDetKD. Resume "
                "with the config and the version that started the run, or use a new OUTPUT_DIR."
            ) from e
        if "data_seed" in state_dict and isinstance(self.data_loader, ResumableLoader):
            self.data_loader.seed = state_dict["data_seed"]
        if "data" in state_dict and isinstance(self.data_loader, ResumableLoader):
            warn_of_other_data(state_dict["data"], self.data_loader.description)


def build_plain_student(cfg: CfgNode) -> nn.Module:
    """The student alone, for evaluation: it needs no teacher."""
    return build_model(plain_config(cfg))


def _before_writers(hooks: List[Optional[HookBase]], hook: HookBase) -> List[Optional[HookBase]]:
    writers = [i for i, each in enumerate(hooks) if isinstance(each, PeriodicWriter)]
    place = writers[0] if writers else len(hooks)
    return [*hooks[:place], hook, *hooks[place:]]


def _distributed(model: nn.Module) -> nn.Module:
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    return DistributedDataParallel(
        model, device_ids=[comm.get_local_rank()] if on_gpu else None, broadcast_buffers=False
    )


class _TeacherScore(HookBase):
    """Keeps the teacher's metrics in the logs, beside the student's."""

    def __init__(self, metrics: Dict[str, float]) -> None:
        self._metrics = {f"teacher/{name}": value for name, value in flatten_results_dict(metrics).items()}

    def before_train(self) -> None:
        self.trainer.storage.put_scalars(smoothing_hint=False, **self._metrics)

    def after_step(self) -> None:
        period = self.trainer.cfg.TEST.EVAL_PERIOD
        if period > 0 and (self.trainer.iter + 1) % period == 0:
            self.trainer.storage.put_scalars(smoothing_hint=False, **self._metrics)
