"""Describe a training on one screen before it starts, and name its problems: `train_net.py --check`."""

import functools
import logging
import math
from itertools import islice
from typing import Any, Dict, List, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from ..backbones import find_bottom_up
from ..data.catalog import load_dataset
from ..data.content import same_files
from ..data.train_loader import images_per_process
from ..data.unlabeled import unlabeled_per_batch
from ..errors import GDetKDError, some
from ..losses.classes import match_classes, other_names
from ..structures import DetectorSpec
from .cache_advice import cache_advice
from .config_doubts import config_doubts
from .dataset_checks import files_of, warn_of_shared_images
from .forward_guard import BROKEN
from .gradients import describe_unreached, find_unreached
from .preprocessing import preprocessing_of
from .step_costs import StepCost, TermCost, backward, measure_steps, measure_terms
from .teacher_check import judge_teacher
from .trainer import DistillTrainer
from .unlabeled_checks import UnlabeledReport

logger = logging.getLogger(__name__)

BATCHES = 4


class Check:
    """Build everything as training would, and look at it. Nothing is saved.

    Args:
        cfg: the config of the run.
        images: number of images that the teacher is evaluated on.
        processes: number of processes of the training. The check stands for one of them.

    Attributes:
        problems: reasons not to start, with remedies.
        unknown: parts that could not be checked, with reasons.

    Raises:
        GDetKDError: the run could not be built at all.
    """

    def __init__(self, cfg: CfgNode, images: int = 50, processes: int = 1) -> None:
        self.problems: List[str] = []
        self.unknown: List[str] = []
        self._images = images
        self._processes = processes
        self._cfg = _config_of_one_process(cfg, processes)
        self._trainer = DistillTrainer(self._cfg)
        self.problems += config_doubts(self._cfg)
        self._trainer.resume_or_load(resume=False)
        self._student = self._trainer.student
        self._distiller = self._trainer.distiller
        self._teacher = self._trainer.teacher

    def run(self, warnings: Sequence[str] = ()) -> str:
        """Return the screen. Afterwards `problems` is complete.

        Args:
            warnings: the warnings that were logged meanwhile. They are read at the end, so the list may grow.
        """
        parts = [self._data(), self._detectors(), self._weights()]
        if self._teacher is not None:
            parts += [self._classes(), self._teacher_score()]
        if self._cfg.DATASETS.UNLABELED:
            parts.append(self._unlabeled())
        self._start_weights()
        terms = measure_terms(self._trainer.model.train(), self._student, self._batches, self._cfg.SOLVER.AMP.ENABLED)
        if BROKEN in terms:
            reason = self._trainer.guarded_model.failure or "values that are not finite"
            self.problems.append(
                f"A training step fails ({reason}). Check that MODEL.WEIGHTS and the images and boxes are finite."
            )
        else:
            self._judge_reach()
            parts += [self._terms(terms), self._costs()]
        unsaid = [warning for warning in warnings if warning not in self.problems]
        if unsaid:
            parts.append(f"WARNINGS: {len(unsaid)}\n{_numbered(unsaid)}")
        return "\n\n".join([*parts, self._verdict()])

    def _data(self) -> str:
        rows, files = [], {}
        for name in dict.fromkeys([*self._cfg.DATASETS.TRAIN, *self._cfg.DATASETS.TEST]):
            dicts, classes = load_dataset(name), MetadataCatalog.get(name).get("thing_classes") or ()
            annotations = sum(len(image.get("annotations", ())) for image in dicts)
            rows.append([name, len(dicts), annotations, len(classes), some(classes, 5)])
            files[name] = files_of(dicts)
        train, test = (sum(map(files.get, names), []) for names in (self._cfg.DATASETS.TRAIN, self._cfg.DATASETS.TEST))
        if not set(train) & set(test):  # otherwise a warning is logged already
            warn_of_shared_images(same_files(test, train), len(test))
        return tabulate(rows, ["dataset", "images", "objects", "classes", ""])

    def _detectors(self) -> str:
        columns = {"student": _describe(self._student, self._trainer.student_spec, self._cfg.INPUT.FORMAT)}
        if self._teacher is not None:
            described = _describe(self._teacher.model, self._teacher.adapter.spec, self._teacher.file.input_format)
            scale = self._cfg.DISTILL.TEACHER.SCALE
            described["images"] += f", {scale:g} times as large" if scale != 1 else ""
            columns = {"teacher": described, **columns}
        rows = [[key, *(column[key] for column in columns.values())] for key in columns["student"]]
        return tabulate(rows, ["", *columns], disable_numparse=True)

    def _weights(self) -> str:
        lines = []
        if self._teacher is not None:
            loaded, sha256 = self._teacher.file.weights, self._teacher.sha256[:12]
            lines.append(f"Teacher's weights: {loaded}, all of its tensors, SHA-256 {sha256}.")
        checkpointer, path = self._trainer.checkpointer, self._cfg.MODEL.WEIGHTS
        total = len(self._student.state_dict())
        left = total - len(checkpointer.unloaded)
        pretrained = len(checkpointer.pretrained)
        source = f"{path}, {left - pretrained} of {total} tensors" if path else "none, from scratch"
        if pretrained:
            source += f"; backbone: {find_bottom_up(self._student).weights}, {pretrained} tensors"
        lines.append(f"Student's weights: {source}.")
        self.problems += self._trainer.start_problems()
        return "\n".join(lines)

    def _classes(self) -> str:
        student, teacher = self._trainer.student_spec, self._teacher.spec
        if student is None or student.class_names is None or teacher.class_names is None:
            return "Classes: the names are not known on both sides. They are taken to be the same in the same order."
        try:
            other_names(self._cfg, student.class_names, teacher.class_names)
        except GDetKDError as e:
            self.problems.append(str(e))
            return "Classes: DISTILL.CLASS_MAP cannot be followed."
        try:
            classes = match_classes("the check", self._cfg, student, teacher)
        except GDetKDError:
            return "Classes: student and teacher have none in common. SGFI and CKD need none."
        if classes.student is None:
            return f"Classes: the same {student.num_classes} in the same order."
        shared = [student.class_names[index] for index in classes.student]
        alone = [name for name in student.class_names if name not in shared]
        return (
            f"Classes: {len(shared)} of the student's {student.num_classes} are among the {teacher.num_classes} of the "
            f"teacher: {some(shared)}. The student alone has: {some(alone) or 'none'}."
        )

    def _teacher_score(self) -> str:
        dataset = (self._cfg.DATASETS.TEST or self._cfg.DATASETS.TRAIN)[0]
        try:
            text, problems = judge_teacher(self._cfg, self._teacher, dataset, self._images)
        except GDetKDError as e:
            self.unknown.append(f"how good the teacher is, so a wrong teacher would not be noticed. {e}")
            return "The teacher was not evaluated."
        self.problems += problems
        return text

    def _unlabeled(self) -> str:
        report, node = UnlabeledReport(self._cfg), self._cfg.DISTILL.UNLABELED
        images = self._cfg.SOLVER.IMS_PER_BATCH
        unlabeled = unlabeled_per_batch(self._cfg, images)
        for warning in report.warnings:  # logged warnings come to the end of the screen
            logger.warning(warning)
        lines = [
            f"{report.images} images without labels, {unlabeled} of {images} in a step of a process, weight "
            f"{node.WEIGHT:g}. "
            f"{report.doubtful} doubtful boxes are ignored. Samples to look at: {', '.join(report.pages) or 'none'}.",
            tabulate(report.rows, ["class", "objects", "teacher's boxes", "precision", "recall"], floatfmt=".2f"),
        ]
        return "\n".join(lines)

    @functools.cached_property
    def _batches(self) -> List[Any]:
        return list(islice(iter(self._trainer.data_loader), BATCHES))

    def _start_weights(self) -> None:
        """Set weights that follow from gradients, as the first steps of a training do."""
        schedule = self._trainer.schedule
        for batch in self._batches if schedule.is_auto else ():
            with EventStorage(0), torch.autocast("cuda", enabled=self._cfg.SOLVER.AMP.ENABLED):
                self._trainer.model.train()(batch)
            schedule.follow(schedule.take_gradients())

    def _judge_reach(self) -> None:
        """Check that a loss reaches every parameter of the student, which several processes need."""
        if self._processes == 1:
            return
        model = self._trainer.model.train()
        backward(model, self._batches[0], self._cfg.SOLVER.AMP.ENABLED)
        if names := find_unreached(self._student):
            self.problems.append(describe_unreached(names))
        model.zero_grad(set_to_none=True)

    def _terms(self, terms: Dict[str, TermCost]) -> str:
        schedule = self._trainer.schedule
        for name, term in terms.items():
            self._judge_term(name, term, name in schedule.terms)
        rows = []
        for name, term in terms.items():
            weight = self._weight(name) if name in schedule.terms else ""
            rows.append([name, weight, f"{term.weighted:.4g}", f"{term.gradient:.4g}"])
        headers = ["loss", "weight", "value, weighted", "gradient it sends to the student (norm)"]
        return tabulate(rows, headers, disable_numparse=True)

    def _weight(self, term: str) -> str:
        schedule = self._trainer.schedule
        return f"{schedule.full_weight(term):.3g} (auto)" if schedule.is_auto else f"{schedule.full_weight(term):g}"

    def _judge_term(self, name: str, term: TermCost, is_distillation: bool) -> None:
        if not (math.isfinite(term.weighted) and math.isfinite(term.gradient)):
            self.problems.append(
                f"{name} is {term.weighted} and its gradient {term.gradient}. Check that the student's starting "
                "weights, the teacher's weights and the data are finite."
            )
        elif is_distillation and term.gradient == 0:
            is_auto = self._trainer.schedule.is_auto
            key, rounding = ("SHARE", ", or its gradient is only rounding") if is_auto else ("WEIGHT", "")
            self.problems.append(
                f"{name} sends no gradient to the student: its {key} is 0, {BATCHES} batches had no region for it"
                f"{rounding}. Raise {key}, check the data, or remove the loss from DISTILL.LOSSES."
            )

    def _costs(self) -> str:
        cfg, batches = self._cfg, self._batches
        if self._distiller is not None:
            self._distiller.fill_buffers()
        models = {"plain": self._student, "step": self._trainer.model.train()}
        has_cache = self._teacher is not None and self._teacher.cache is not None
        if has_cache:
            self._teacher.cache = None  # it holds the views of these batches, unlike in a training
        plain, step = measure_steps(models, batches, cfg.SOLVER.AMP.ENABLED).values()
        share = cfg.DISTILL.UNTIL if self._trainer.schedule.terms else 1.0
        hours = (plain.seconds + share * (step.seconds - plain.seconds)) * cfg.SOLVER.MAX_ITER / 3600
        end = f"{hours:.1f} h" if hours >= 2 else f"{60 * hours:.0f} min"
        lines = [
            f"A step of {cfg.SOLVER.IMS_PER_BATCH} images: {_cost(step)}; of the student alone: {_cost(plain)}.",
            f"{cfg.SOLVER.MAX_ITER} iterations take {end}, without loading data and evaluating.",
        ]
        if share < 1:
            lines.append(f"After {share:.0%} of them the student trains alone (DISTILL.UNTIL).")
        if has_cache:
            lines.append(
                "These steps run the teacher's backbone. Steps on views that DISTILL.TEACHER.CACHE_MB keeps are faster."
            )
        if self._distiller is not None and self._distiller.losses:
            images = self._trainer.data_loader.description["images"]
            lines.append(cache_advice(cfg, self._distiller, batches, images))
        return "\n".join(line for line in lines if line)

    def _verdict(self) -> str:
        unknown = "".join(f"\nNot checked: {part}" for part in self.unknown)
        if not self.problems:
            return f"No problem found in what could be checked.{unknown}" if unknown else "No problem found."
        return f"PROBLEMS: {len(self.problems)}\n{_numbered(self.problems)}{unknown}"


def _numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"  {number}. {line}" for number, line in enumerate(lines, start=1))


def _config_of_one_process(cfg: CfgNode, processes: int) -> CfgNode:
    """Return the config of one of several processes: its share of the images, and the learning rate of all.

    A queue holds the embeddings that all processes gather in a number of steps. It keeps its length and its memory.
    """
    cfg = DistillTrainer.auto_scale_workers(cfg, processes).clone()
    cfg.defrost()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    cfg.SOLVER.IMS_PER_BATCH = images_per_process(cfg, processes)
    for node in cfg.DISTILL.values():
        if isinstance(node, CfgNode) and "QUEUE_STEPS" in node:
            node.QUEUE_STEPS *= processes
    cfg.freeze()
    return cfg


def _describe(model: nn.Module, spec: Optional[DetectorSpec], input_format: str) -> Dict[str, str]:
    """Return a column of the table of detectors."""
    column = {
        "detector": type(model).__name__,
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M",
        "images": str(preprocessing_of(model, input_format) or input_format),
    }
    if spec is not None:
        levels = ", ".join(f"{name} 1/{stride}" for name, stride in spec.strides.items())
        column.update({"pyramid": levels, "channels": str(spec.channels), "classes": str(spec.num_classes)})
    return column


def _cost(step: StepCost) -> str:
    return f"{step.seconds:.3f} s, {step.megabytes:.0f} MB {step.kind}"
