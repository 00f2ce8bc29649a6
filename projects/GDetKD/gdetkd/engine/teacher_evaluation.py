"""Evaluate the teacher on the student's datasets, with the teacher's own preprocessing."""

import logging
import os
from typing import Any, Dict, List, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Instances
from detectron2.utils import comm

from ..data import register_test_sets
from ..data.catalog import load_dataset
from ..data.class_names import as_student_names, class_names
from ..errors import GDetKDError, some
from ..losses.classes import positions_of_others
from ..random_state import random_state
from ..teacher import FrozenTeacher
from .class_checks import check_classes
from .dataset_checks import check_test_sets
from .evaluators import build_evaluator

logger = logging.getLogger(__name__)


def evaluate_teacher(cfg: CfgNode, teacher: Optional[FrozenTeacher] = None) -> Dict[str, Any]:
    """Register and check the student's DATASETS.TEST, and evaluate the teacher on it as `evaluate_on_test_sets` does.

    Args:
        cfg: the config of the distillation.
        teacher: built from `cfg` if it is not given.

    Raises:
        GDetKDError: a dataset is wrong, or has none of the teacher's classes.
    """
    register_test_sets(cfg)
    check_test_sets(cfg, needed=True)
    return evaluate_on_test_sets(cfg, teacher or FrozenTeacher(cfg))


def evaluate_on_test_sets(cfg: CfgNode, teacher: FrozenTeacher) -> Dict[str, Any]:
    """Evaluate the teacher on DATASETS.TEST, which is checked already, with the teacher's own preprocessing.

    Its classes are found by name among the classes of the dataset. DISTILL.CLASS_MAP counts.

    Returns:
        metrics in percent as Detectron2 gives them, by task. Several datasets give one such dict each, by name.

    Raises:
        GDetKDError: a dataset has none of the teacher's classes.
    """
    logger.info("Evaluating the teacher.")
    folder = os.path.join(cfg.OUTPUT_DIR, "teacher")
    results = {name: evaluate_on(cfg, teacher, name, folder) for name in cfg.DATASETS.TEST}
    if comm.is_main_process():
        for result in results.values():
            print_csv_format(result)
    return results if len(results) != 1 else next(iter(results.values()))


def evaluate_on(
    cfg: CfgNode, teacher: FrozenTeacher, dataset: str, folder: str, loader: Optional[Any] = None
) -> Dict[str, Any]:
    """Evaluate the teacher on one registered dataset.

    Args:
        folder: folder of the detections.
        loader: gives the images of the dataset. By default they are those of the teacher's own evaluation.
    """
    cfg_with_folder = cfg.clone()
    cfg_with_folder.defrost()
    cfg_with_folder.OUTPUT_DIR = folder
    classes = teachers_classes_in(cfg, teacher, dataset)
    # A dataset of boxes has no masks and keypoints to compare with. It has some if the student predicts some.
    tasks = None if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON else ("bbox",)
    evaluator = build_evaluator(cfg_with_folder, dataset, tasks)
    if classes is not None:
        evaluator = _Renumbered(evaluator, classes)
    with random_state((0,)):
        return inference_on_dataset(teacher.model, loader or teacher.file.test_loader(dataset), evaluator)


def teachers_classes_in(cfg: CfgNode, teacher: FrozenTeacher, dataset: str) -> Optional[List[Optional[int]]]:
    """Find the teacher's classes among the classes of a dataset, by name.

    Returns:
        the index in the dataset for each class of the teacher, or None for a class that the dataset lacks. None
        instead of the list: the dataset has the same classes in the same order.

    Raises:
        GDetKDError: the dataset has none of the teacher's classes.
    """
    load_dataset(dataset)
    names, teacher_names = MetadataCatalog.get(dataset).get("thing_classes"), teacher.spec.class_names
    if names is None or teacher_names is None:
        check_classes([dataset], teacher.spec.num_classes, "teacher")
        return None
    if list(names) == list(teacher_names):
        return None
    classes = positions_of_others(cfg, tuple(_in_common_spelling(cfg, names, teacher_names)), teacher_names)
    if all(index is None for index in classes):
        raise GDetKDError(
            f"The teacher cannot be evaluated on {dataset!r}: its classes ({some(teacher_names)}) and those of the "
            f"dataset ({some(names)}) have no name in common. Map names of the same meaning in DISTILL.CLASS_MAP."
        )
    return classes


def _in_common_spelling(cfg: CfgNode, names: Sequence[str], teacher_names: Sequence[str]) -> Sequence[str]:
    """Return a dataset's class names as the student spells them, if more of the teacher's names are among those."""
    if not cfg.DISTILL.CLASS_MAP and set(teacher_names) <= set(names):
        return names
    students = as_student_names(names, class_names(cfg))
    is_closer = len(set(students) & set(teacher_names)) > len(set(names) & set(teacher_names))
    return students if cfg.DISTILL.CLASS_MAP or is_closer else names


def renumbered(instances: Instances, classes: Sequence[Optional[int]]) -> Instances:
    """Move detections to the CPU, and give them the dataset's class numbers. Leave out classes that it lacks.

    Args:
        instances: the teacher's detections, with `pred_classes`.
        classes: the list that `teachers_classes_in` returned.
    """
    instances = instances.to("cpu")
    numbers = torch.tensor([-1 if index is None else index for index in classes])[instances.pred_classes]
    instances.pred_classes = numbers
    return instances[numbers >= 0]


class _Renumbered(DatasetEvaluator):
    """Pass detections on to another evaluator with the dataset's class numbers."""

    def __init__(self, evaluator: DatasetEvaluator, classes: List[Optional[int]]) -> None:
        self._evaluator = evaluator
        self._classes = classes

    def reset(self) -> None:
        self._evaluator.reset()

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> None:
        changed = [{"instances": renumbered(output["instances"], self._classes)} for output in outputs]
        self._evaluator.process(inputs, changed)

    def evaluate(self) -> Any:
        return self._evaluator.evaluate()


class TeacherScore(HookBase):
    """Log the teacher's metrics at the start, and beside the metrics of the student. It must run before the writers."""

    def __init__(self) -> None:
        self._metrics: Dict[str, float] = {}

    def set(self, metrics: Dict[str, Any]) -> None:
        """Set what `evaluate_on_test_sets` returned. A resumed run has the metrics from its checkpoint."""
        # An evaluator may return NumPy's numbers, which torch's safe loader refuses.
        self._metrics = {f"teacher/{name}": float(value) for name, value in flatten_results_dict(metrics).items()}

    def before_train(self) -> None:
        self.trainer.storage.put_scalars(smoothing_hint=False, **self._metrics)

    def after_step(self) -> None:
        period = self.trainer.cfg.TEST.EVAL_PERIOD
        if period > 0 and (self.trainer.iter + 1) % period == 0:
            self.trainer.storage.put_scalars(smoothing_hint=False, **self._metrics)

    def state_dict(self) -> Dict[str, Any]:
        return {"metrics": self._metrics}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._metrics = state["metrics"]
