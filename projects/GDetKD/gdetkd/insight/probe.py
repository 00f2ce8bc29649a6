"""Show labelled images, the probe, to the teacher and to students, and collect embeddings and detections.

Shapes: N objects on all images, L levels of the student, D the width of an embedding.
"""

import logging
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.evaluation import inference_context
from detectron2.structures import Instances
from torch import nn

from ..data.catalog import load_dataset
from ..data.task_labels import objects_of
from ..data.teacher_view import TEACHER_IMAGE, at_scale
from ..detectors import DetectorAdapter
from ..distiller import GDetKD
from ..engine.sample_score import evenly_spread
from ..engine.teacher_evaluation import renumbered, teachers_classes_in
from ..errors import GDetKDError
from ..structures import DetectorOutputs, Regions
from ..teacher import FrozenTeacher
from .detections import MatchedDetections, best_threshold, match_objects
from .measures import class_correlation

logger = logging.getLogger(__name__)

# Images in one forward pass.
BATCH = 4


@dataclass
class Probe:
    """Hold the labelled images.

    Attributes:
        dataset: name of the registered dataset that holds the images.
        inputs: the images and objects as in Detectron2's training batches, at the student's test size. "crowds" holds
            the crowds of an image.
        scales: (N,) for each object, the height of its image in `inputs` over the height in the file.
        class_names: the dataset's class names, in order.
        teachers_classes: for each class of the teacher, the index of that class in the dataset, or None if the dataset
            lacks it. None if the teacher has the dataset's classes in the same order.
    """

    dataset: str
    inputs: List[Dict[str, Any]]
    scales: torch.Tensor
    class_names: Tuple[str, ...]
    teachers_classes: Optional[List[Optional[int]]] = None

    @property
    def has_teachers_classes(self) -> bool:
        """Return whether the dataset has at least one class of the teacher."""
        return self.teachers_classes is None or any(index is not None for index in self.teachers_classes)

    @property
    def classes(self) -> torch.Tensor:
        """Return (N,): the class of each object."""
        return torch.cat([inputs["instances"].gt_classes for inputs in self.inputs])

    @property
    def areas(self) -> torch.Tensor:
        """Return (N,): the area of each box in pixels of its file."""
        return torch.cat([inputs["instances"].gt_boxes.area() for inputs in self.inputs]) / self.scales**2

    @property
    def shown_classes(self) -> torch.Tensor:
        """Return (S,): the classes that have objects, in order."""
        return self.classes.unique()

    def correlate(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the `class_correlation` (S, S) of the shown classes.

        Args:
            embeddings: (N, D)
        """
        shown, places = self.classes.unique(return_inverse=True)
        return class_correlation(embeddings, places, len(shown)) if len(shown) else embeddings.new_zeros(0, 0)

    def batches(self) -> Iterator[List[Dict[str, Any]]]:
        for start in range(0, len(self.inputs), BATCH):
            yield self.inputs[start : start + BATCH]


def load_probe(cfg: CfgNode, teacher: FrozenTeacher) -> Probe:
    """Load DISTILL.INSIGHT.IMAGES images with objects, evenly spread over the first dataset of DATASETS.TEST.

    Raises:
        GDetKDError: DATASETS.TEST is empty, or the dataset has no labelled image or no class names.
    """
    if not cfg.DATASETS.TEST:
        raise GDetKDError(
            "DISTILL.INSIGHT.PERIOD needs images of DATASETS.TEST, which is empty. Name a dataset there, or set "
            "DISTILL.INSIGHT.PERIOD to 0."
        )
    name = cfg.DATASETS.TEST[0]
    labelled = [sample for sample in load_dataset(name) if objects_of(sample)]
    if not labelled:
        raise GDetKDError(
            f"DISTILL.INSIGHT.PERIOD needs labelled images, and {name!r} in DATASETS.TEST has none. Set "
            "DISTILL.INSIGHT.PERIOD to 0, or name a labelled dataset first."
        )
    names = MetadataCatalog.get(name).get("thing_classes")
    if not names:
        raise GDetKDError(
            f"DISTILL.INSIGHT.PERIOD shows objects by class, and the dataset {name!r} has no class names. Set them "
            f"with MetadataCatalog.get({name!r}).set(thing_classes=[...]), or set DISTILL.INSIGHT.PERIOD to 0."
        )
    inputs = [_read_labelled(sample, cfg) for sample in evenly_spread(labelled, max(1, cfg.DISTILL.INSIGHT.IMAGES))]
    scales = [image["image"].shape[1] / image["height"] for image in inputs for _ in range(len(image["instances"]))]
    return Probe(name, inputs, torch.tensor(scales), tuple(names), _teachers_classes(cfg, teacher, name))


def _teachers_classes(cfg: CfgNode, teacher: FrozenTeacher, dataset: str) -> Optional[List[Optional[int]]]:
    try:
        return teachers_classes_in(cfg, teacher, dataset)
    except GDetKDError as e:
        # SGFI and CKD can distil between any classes, so the training goes on.
        logger.warning("The page will not show the teacher's detections. %s", e)
        return [None] * teacher.spec.num_classes


def read_at_test_size(file_name: str, cfg: CfgNode) -> Dict[str, Any]:
    """Read an image as Detectron2 shows it to a detector at test time.

    Args:
        cfg: the detector's config, which sets the channel order and the size.

    Returns:
        the input of a Detectron2 model with "image" (3, H, W) and the file's "height" and "width", so that the model
        predicts in pixels of the file.
    """
    return {"file_name": file_name, **_at_test_size(utils.read_image(file_name, cfg.INPUT.FORMAT), cfg)[0]}


def _at_test_size(pixels: np.ndarray, cfg: CfgNode) -> Tuple[Dict[str, Any], T.Transform]:
    """Return the input of a Detectron2 model for an image, and the transform that resized it."""
    height, width = pixels.shape[:2]
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST).get_transform(pixels)
    image = torch.as_tensor(resize.apply_image(pixels).transpose(2, 0, 1).copy())
    return {"image": image, "height": height, "width": width}, resize


def _read_labelled(sample: Dict[str, Any], cfg: CfgNode) -> Dict[str, Any]:
    pixels = utils.read_image(sample["file_name"], cfg.INPUT.FORMAT)
    inputs, resize = _at_test_size(pixels, cfg)
    size = tuple(inputs["image"].shape[1:])
    if cfg.DISTILL.TEACHER.SCALE != 1:
        inputs[TEACHER_IMAGE] = at_scale(pixels, cfg.DISTILL.TEACHER.SCALE, size)
    crowds = [annotation for annotation in sample["annotations"] if annotation.get("iscrowd", 0)]
    return {
        **inputs,
        "instances": _instances(objects_of(sample), resize, size),
        "crowds": _instances(crowds, resize, size),
    }


def _instances(annotations: List[Dict[str, Any]], resize: T.Transform, size: Tuple[int, int]) -> Instances:
    """Return the boxes and classes of annotations in pixels of the resized image, without empty boxes."""
    keys = ("bbox", "bbox_mode", "category_id")
    boxes = [{key: annotation[key] for key in keys} for annotation in annotations]
    resized = [utils.transform_instance_annotations(box, [resize], size) for box in boxes]
    instances = utils.annotations_to_instances(resized, size)
    return instances[instances.gt_boxes.nonempty()]


@dataclass
class Look:
    """Hold what the teacher and the student compute inside the ground-truth boxes of the probe.

    Attributes:
        student, teacher: (N, D_S), (N, D_T) embeddings.
        alpha: (N, L) how much a loss that chooses among levels attends to each level; None if there is no such loss.
        levels: (N,) the teacher's level of each object; None if `alpha` is None.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    alpha: Optional[torch.Tensor]
    levels: Optional[torch.Tensor]


def look_at_objects(distiller: GDetKD, probe: Probe) -> Look:
    """Show the probe to the teacher and to the student in eval mode."""
    loss = distiller.level_chooser
    parts: List[List[torch.Tensor]] = []
    with inference_context(distiller.student), torch.no_grad():
        for batch in probe.batches():
            regions = _object_regions(batch, distiller.device)
            needs = {"embeddings", *(("pooled", "levels") if loss is not None else ())}
            teacher = distiller.teacher.look(batch, regions, needs)
            student = look_with_student(distiller.adapter, batch, regions)
            part = [student.embeddings, teacher.embeddings]
            if loss is not None:
                part += [loss.level_attention(student, teacher), teacher.levels]
            parts.append([tensor.cpu() for tensor in part])
    whole = [torch.cat(tensors) for tensors in zip(*parts)]
    return Look(*whole) if loss is not None else Look(*whole, None, None)


def look_with_student(adapter: DetectorAdapter, batch: List[Dict[str, Any]], regions: Regions) -> DetectorOutputs:
    """Return a student's pyramid of a batch, and the embeddings of given regions."""
    images = adapter.model.preprocess_image([{"image": inputs["image"]} for inputs in batch]).tensor
    return adapter.look(adapter.extract(images), regions, {"embeddings"})


def embed_objects(adapter: DetectorAdapter, probe: Probe) -> torch.Tensor:
    """Return (N, D): a plain student's embeddings of the probe's objects."""
    with inference_context(adapter.model), torch.no_grad():
        device = next(adapter.model.parameters()).device
        outputs = [look_with_student(adapter, batch, _object_regions(batch, device)) for batch in probe.batches()]
        return torch.cat([output.embeddings.cpu() for output in outputs])


def _object_regions(batch: List[Dict[str, Any]], device: torch.device) -> Regions:
    return Regions([inputs["instances"].gt_boxes.to(device) for inputs in batch])


def match_student(model: nn.Module, probe: Probe) -> List[MatchedDetections]:
    """Return a student's detections on each image, from the score threshold of the best F1 on."""
    with inference_context(model), torch.no_grad():
        outputs = [output for batch in probe.batches() for output in model(_without_labels(batch))]
    return _match(outputs, probe)


def match_teacher(teacher: FrozenTeacher, probe: Probe) -> List[MatchedDetections]:
    """Return the teacher's detections on each image, from the score threshold of the best F1 on.

    Detections of classes that the dataset lacks are left out. The classes have the dataset's numbers.
    """
    outputs = [output for batch in probe.batches() for output in teacher.detect(_without_labels(batch))]
    if probe.teachers_classes is not None:
        outputs = [{"instances": renumbered(output["instances"], probe.teachers_classes)} for output in outputs]
    return _match(outputs, probe)


def _without_labels(batch: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Return the images without objects, sized so that a model predicts in pixels of the inputs, not of the files."""
    images = [{key: inputs[key] for key in ("image", TEACHER_IMAGE) if key in inputs} for inputs in batch]
    return [{**image, "height": image["image"].shape[1], "width": image["image"].shape[2]} for image in images]


def _match(outputs: List[Dict[str, Any]], probe: Probe) -> List[MatchedDetections]:
    detections = []
    for output, inputs in zip(outputs, probe.inputs):
        predicted, objects, crowds = output["instances"].to("cpu"), inputs["instances"], inputs["crowds"]
        detections.append(
            match_objects(
                predicted.pred_boxes.tensor,
                predicted.scores,
                predicted.pred_classes,
                objects.gt_boxes.tensor,
                objects.gt_classes,
                crowds.gt_boxes.tensor,
                crowds.gt_classes,
            )
        )
    threshold = best_threshold(detections, len(probe.classes))
    return [matched.above(threshold) for matched in detections]
