"""How good the teacher is on the student's data, with its own preprocessing or another."""

import copy
import logging
import math
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.structures import Instances
from detectron2.utils import comm

from ..data import register_datasets
from ..data.headers import for_evaluation
from ..errors import GDetKDError, some
from ..losses.classes import other_names
from ..random_state import random_state
from ..teacher import FrozenTeacher
from .evaluators import build_evaluator
from .preflight import check_classes, check_test_sets, load_dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preprocessing:
    """How a detector's images are made from RGB pixels of 0 to 255; mean and std in the order of `input_format`."""

    input_format: str
    mean: Tuple[float, ...]
    std: Tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.input_format}, mean {_numbers(self.mean)}, std {_numbers(self.std)}"


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


# Those that detectors in circulation were trained with.
USUAL = (
    Preprocessing("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),  # Detectron2's and Caffe's
    Preprocessing("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)),  # Detectron2's ResNeXt
    Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # torchvision's
    Preprocessing("RGB", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    Preprocessing("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
)


def with_channels_swapped(own: Preprocessing) -> Preprocessing:
    """RGB for BGR or the other way, with mean and std where they were: what a wrong INPUT.FORMAT would need."""
    return Preprocessing("RGB" if own.input_format == "BGR" else "BGR", own.mean, own.std)


def preprocessing_of(model: Any, input_format: str) -> Optional[Preprocessing]:
    """Of a built detector; None where it makes its images in another way than by a mean and a std."""
    if not (hasattr(model, "pixel_mean") and hasattr(model, "pixel_std")):
        return None
    mean, std = (tuple(round(v, 3) for v in part.flatten().tolist()) for part in (model.pixel_mean, model.pixel_std))
    return Preprocessing(input_format, mean, std)


def evaluate_teacher(cfg: CfgNode, teacher: Optional[FrozenTeacher] = None) -> Dict[str, Any]:
    """Evaluates the teacher on the student's DATASETS.TEST, with the teacher's own image size and preprocessing.

    Its classes are found among the data set's by name, DISTILL.CLASS_MAP included.

    Args:
        cfg: the config of the distillation.
        teacher: built from `cfg` where it is not given.

    Returns:
        metrics in percent as Detectron2 gives them, by task; with several data sets, by data set first.

    Raises:
        GDetKDError: a data set is wrong, or has no class that is the teacher's.
    """
    register_datasets(cfg)
    check_test_sets(cfg, needed=True)
    teacher = teacher or FrozenTeacher(cfg)
    logger.info("Evaluating the teacher.")
    folder = os.path.join(cfg.OUTPUT_DIR, "teacher")
    results = {name: _evaluate(cfg, teacher, name, folder) for name in cfg.DATASETS.TEST}
    if comm.is_main_process():
        for result in results.values():
            print_csv_format(result)
    return results if len(results) != 1 else next(iter(results.values()))


@dataclass(frozen=True)
class SampleScore:
    """
    Attributes:
        ap: COCO's box AP in percent, over the classes that student and teacher both have.
        images: how many there were.
        classes: how many classes.
    """

    ap: float
    images: int
    classes: int


def score_on_sample(
    cfg: CfgNode, teacher: FrozenTeacher, dataset: str, count: int, preprocessing: Optional[Preprocessing] = None
) -> SampleScore:
    """The teacher's AP on images of a registered set, with other preprocessing than its own where it is given.

    Args:
        count: of images, evenly spread over the set.

    Raises:
        GDetKDError: they have no object, or the set no class that is the teacher's or no names of its classes.
    """
    flip = preprocessing is not None and preprocessing.input_format != teacher.file.input_format
    with _sample(dataset, count) as sample, _preprocessing(teacher, preprocessing):
        images = load_dataset(sample)
        if not any(image.get("annotations") for image in images):
            raise GDetKDError(f"None of the {len(images)} images of {dataset!r} that were looked at has an object.")
        with tempfile.TemporaryDirectory() as folder:
            results = _evaluate(cfg, teacher, sample, folder, flip)["bbox"]
    names = MetadataCatalog.get(dataset).thing_classes
    kept = teachers_classes_in(cfg, teacher, dataset)
    both = names if kept is None else [names[index] for index in kept if index is not None]
    # Detectron2 gives a class no AP where there is but one class, or nothing is found; and NaN where the sample has no
    # object of it.
    values = [results.get(f"AP-{name}", results["AP"]) for name in both]
    values = [value for value in values if not math.isnan(value)]
    return SampleScore(sum(values) / max(1, len(values)), len(images), len(both))


def evenly_spread(items: Sequence[Any], count: int) -> List[Any]:
    """`count` of them, or all where there are fewer."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


@contextmanager
def _sample(name: str, count: int) -> Iterator[str]:
    """Images evenly spread over a registered data set, registered inside under another name."""
    dicts = load_dataset(name)  # may set the names of the classes, too
    if not MetadataCatalog.get(name).get("thing_classes"):
        raise GDetKDError(
            f"The data set {name!r} does not name its classes, and Detectron2 evaluates by name: give them with "
            f"MetadataCatalog.get({name!r}).set(thing_classes=[...])."
        )
    chosen = for_evaluation(evenly_spread(dicts, count))
    sample = f"{name}_{len(chosen)}_images"
    DatasetCatalog.register(sample, lambda: copy.deepcopy(chosen))
    # Not the JSON file, against the whole of which Detectron2 would evaluate.
    known = MetadataCatalog.get(name).as_dict()
    kept = {key: known[key] for key in ("thing_classes", "thing_dataset_id_to_contiguous_id") if key in known}
    MetadataCatalog.get(sample).set(**kept, evaluator_type="coco")
    try:
        yield sample
    finally:
        DatasetCatalog.remove(sample)
        MetadataCatalog.remove(sample)


def _evaluate(cfg: CfgNode, teacher: FrozenTeacher, dataset: str, folder: str, flip: bool = False) -> Dict[str, Any]:
    own_folder = cfg.clone()
    own_folder.defrost()
    own_folder.OUTPUT_DIR = folder
    classes = teachers_classes_in(cfg, teacher, dataset)
    # A teacher's masks and keypoints count where the student has some, too: a set of boxes has none to compare with.
    tasks = None if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON else ("bbox",)
    evaluator = build_evaluator(own_folder, dataset, tasks)
    if classes is not None:
        evaluator = _Renumbered(evaluator, classes)
    loader = teacher.file.test_loader(dataset)
    with random_state((0,)):
        return inference_on_dataset(teacher.model, _Flipped(loader) if flip else loader, evaluator)


def teachers_classes_in(cfg: CfgNode, teacher: FrozenTeacher, dataset: str) -> Optional[List[Optional[int]]]:
    """Of each class of the teacher, its index in the data set, or None; None: the same classes in the same order."""
    load_dataset(dataset)
    names, teachers = MetadataCatalog.get(dataset).get("thing_classes"), teacher.spec.class_names
    if names is None or teachers is None:
        check_classes([dataset], teacher.spec.num_classes, "teacher")
        return None
    if list(names) == list(teachers):
        return None
    theirs = {other: own for own, other in other_names(cfg, tuple(names), teachers).items()}
    position = {name: index for index, name in enumerate(names)}
    classes = [position.get(theirs.get(name, name)) for name in teachers]
    if all(index is None for index in classes):
        raise GDetKDError(
            f"The teacher cannot be evaluated on {dataset!r}: none of its classes ({some(teachers)}) is one of that "
            f"set's ({some(names)}). Name those that mean the same in DISTILL.CLASS_MAP."
        )
    return classes


def renumbered(instances: Instances, classes: Sequence[Optional[int]]) -> Instances:
    """On the CPU, the detections of classes that the data set has, under the data set's numbers.

    Args:
        instances: of the teacher, with `pred_classes`.
        classes: of `teachers_classes_in`.
    """
    instances = instances.to("cpu")
    numbers = torch.tensor([-1 if index is None else index for index in classes])[instances.pred_classes]
    instances.pred_classes = numbers
    return instances[numbers >= 0]


class _Renumbered(DatasetEvaluator):
    """Passes on the detections of classes that the data set has, under the data set's numbers."""

    def __init__(self, evaluator: DatasetEvaluator, classes: List[Optional[int]]) -> None:
        self._evaluator = evaluator
        self._classes = classes

    def reset(self) -> None:
        self._evaluator.reset()

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> None:
        theirs = [{"instances": renumbered(output["instances"], self._classes)} for output in outputs]
        self._evaluator.process(inputs, theirs)

    def evaluate(self) -> Any:
        return self._evaluator.evaluate()


class _Flipped:
    """A loader of batches with the channels in the other order."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        for batch in self._loader:
            yield [{**sample, "image": sample["image"].flip(0)} for sample in batch]


@contextmanager
def _preprocessing(teacher: FrozenTeacher, preprocessing: Optional[Preprocessing]) -> Iterator[None]:
    """The teacher's pixel mean and std are those given inside, and as before outside."""
    if preprocessing is None:
        yield
        return
    mean, std = teacher.model.pixel_mean, teacher.model.pixel_std
    before = mean.clone(), std.clone()
    mean.copy_(torch.tensor(preprocessing.mean).view_as(mean))
    std.copy_(torch.tensor(preprocessing.std).view_as(std))
    try:
        yield
    finally:
        mean.copy_(before[0])
        std.copy_(before[1])
