"""Labelled images that teacher and students are shown, and what they make of the objects in them.

Shapes: N objects on all images, L levels of the student, D the width of an embedding.
"""

import logging
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.evaluation import inference_context
from torch import nn

from ..detectors import DetectorAdapter
from ..distiller import GDetKD
from ..engine.preflight import load_dataset
from ..engine.sample_score import evenly_spread
from ..engine.teacher_evaluation import renumbered, teachers_classes_in
from ..errors import GDetKDError
from ..structures import DetectorOutputs, Regions
from ..teacher import FrozenTeacher
from .detections import Found, best_threshold, match_objects

logger = logging.getLogger(__name__)

# Images that are looked at together.
BATCH = 4


@dataclass
class Probe:
    """
    Attributes:
        dataset: the registered set that the images are of.
        inputs: of each image, as Detectron2's training batches have them, at the student's test size.
        scales: (N,) length in pixels of `inputs` over that in the file, of each object's image.
        class_names: of the set, in order.
        teachers_classes: of each class of the teacher, its index among them, or None; None: the same in the same order.
    """

    dataset: str
    inputs: List[Dict[str, Any]]
    scales: torch.Tensor
    class_names: Tuple[str, ...]
    teachers_classes: Optional[List[Optional[int]]] = None

    @property
    def classes(self) -> torch.Tensor:
        """(N,)"""
        return torch.cat([each["instances"].gt_classes for each in self.inputs])

    @property
    def areas(self) -> torch.Tensor:
        """(N,) of the boxes, in pixels of the files."""
        return torch.cat([each["instances"].gt_boxes.area() for each in self.inputs]) / self.scales**2

    def batches(self) -> Iterator[List[Dict[str, Any]]]:
        for start in range(0, len(self.inputs), BATCH):
            yield self.inputs[start : start + BATCH]


def load_probe(cfg: CfgNode, teacher: FrozenTeacher) -> Probe:
    """DISTILL.VIS_IMAGES images that hold an object, evenly spread over the first set of DATASETS.TEST.

    Raises:
        GDetKDError: there is no such set, it has no labelled image, or its classes have no names.
    """
    if not cfg.DATASETS.TEST:
        raise GDetKDError(
            "DISTILL.VIS_PERIOD looks at images of DATASETS.TEST, which is empty: name a set, or set it to 0."
        )
    name = cfg.DATASETS.TEST[0]
    labelled = [each for each in load_dataset(name) if _objects_of(each)]
    if not labelled:
        raise GDetKDError(f"DISTILL.VIS_PERIOD looks at labelled images, and {name!r} has none: set it to 0.")
    names = MetadataCatalog.get(name).get("thing_classes")
    if not names:
        raise GDetKDError(
            f"DISTILL.VIS_PERIOD shows objects by class, and {name!r} does not name its classes: give them with "
            f"MetadataCatalog.get({name!r}).set(thing_classes=[...]), or set it to 0."
        )
    inputs = [_read(each, cfg) for each in evenly_spread(labelled, max(1, cfg.DISTILL.VIS_IMAGES))]
    scales = [each["image"].shape[1] / each["height"] for each in inputs for _ in range(len(each["instances"]))]
    return Probe(name, inputs, torch.tensor(scales), tuple(names), _teachers_classes(cfg, teacher, name))


def _teachers_classes(cfg: CfgNode, teacher: FrozenTeacher, dataset: str) -> Optional[List[Optional[int]]]:
    try:
        return teachers_classes_in(cfg, teacher, dataset)
    except GDetKDError as e:
        # SGFI and CKD distil across any classes, so that this is no reason to end a training.
        logger.warning("The teacher's own detections are not shown. %s", e)
        return [None] * teacher.spec.num_classes


def _objects_of(sample: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Its annotations but for crowds."""
    return [each for each in sample.get("annotations", []) if not each.get("iscrowd", 0)]


def _read(sample: Dict[str, Any], cfg: CfgNode) -> Dict[str, Any]:
    pixels = utils.read_image(sample["file_name"], cfg.INPUT.FORMAT)
    height, width = pixels.shape[:2]
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST).get_transform(pixels)
    pixels = resize.apply_image(pixels)
    boxes = [{key: each[key] for key in ("bbox", "bbox_mode", "category_id")} for each in _objects_of(sample)]
    boxes = [utils.transform_instance_annotations(each, [resize], pixels.shape[:2]) for each in boxes]
    image = torch.as_tensor(pixels.transpose(2, 0, 1).copy())
    instances = utils.annotations_to_instances(boxes, pixels.shape[:2])
    return {
        "file_name": sample["file_name"],
        "image": image,
        "height": height,
        "width": width,
        "instances": instances[instances.gt_boxes.nonempty()],
    }


@dataclass
class Look:
    """What is seen of the probe's objects, within their ground-truth boxes.

    Attributes:
        student, teacher: (N, D_S), (N, D_T) embeddings.
        alpha: (N, L) how much the loss that chooses among levels attends to each; None if there is no such loss.
        levels: (N,) the teacher's level of each object; None if alpha is.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    alpha: Optional[torch.Tensor]
    levels: Optional[torch.Tensor]


def look_at_objects(distiller: GDetKD, probe: Probe) -> Look:
    """Show the probe to teacher and student, the student in eval mode."""
    loss = distiller.level_chooser
    parts: List[List[torch.Tensor]] = []
    with inference_context(distiller.student), torch.no_grad():
        for batch in probe.batches():
            regions = _objects(batch, distiller.device)
            needs = {"embeddings", *(("pooled", "levels") if loss is not None else ())}
            teacher = distiller.teacher.look(batch, regions, needs)
            student = look_at(distiller.adapter, batch, regions)
            part = [student.embeddings, teacher.embeddings]
            if loss is not None:
                part += [loss.level_attention(student, teacher), teacher.levels]
            parts.append([each.cpu() for each in part])
    whole = [torch.cat(each) for each in zip(*parts)]
    return Look(*whole) if loss is not None else Look(*whole, None, None)


def look_at(adapter: DetectorAdapter, batch: List[Dict[str, Any]], regions: Regions) -> DetectorOutputs:
    """A student's pyramid, and its embeddings of given regions."""
    images = adapter.model.preprocess_image([{"image": each["image"]} for each in batch]).tensor
    return adapter.look(images, regions, {"embeddings"})


def embed_objects(adapter: DetectorAdapter, probe: Probe) -> torch.Tensor:
    """(N, D) embeddings of the probe's objects by a plain student."""
    with inference_context(adapter.model), torch.no_grad():
        device = next(adapter.model.parameters()).device
        return torch.cat(
            [look_at(adapter, batch, _objects(batch, device)).embeddings.cpu() for batch in probe.batches()]
        )


def _objects(batch: List[Dict[str, Any]], device: torch.device) -> Regions:
    return Regions([each["instances"].gt_boxes.to(device) for each in batch])


def detect(model: nn.Module, probe: Probe) -> List[Found]:
    """What a detector takes for objects on each image, from the score of its best F1 on."""
    with inference_context(model), torch.no_grad():
        outputs = [output for batch in probe.batches() for output in model(_images(batch))]
    return _judge(outputs, probe)


def detect_by_teacher(teacher: FrozenTeacher, probe: Probe) -> List[Found]:
    """The same of the teacher, of those of its classes that the set has, under the set's numbers."""
    outputs = [output for batch in probe.batches() for output in teacher.detect(_images(batch))]
    if probe.teachers_classes is not None:
        outputs = [{"instances": renumbered(output["instances"], probe.teachers_classes)} for output in outputs]
    return _judge(outputs, probe)


def _images(batch: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Without the objects; and predictions of them in pixels of the inputs, not of the files."""
    images = [each["image"] for each in batch]
    return [{"image": image, "height": image.shape[1], "width": image.shape[2]} for image in images]


def _judge(outputs: List[Dict[str, Any]], probe: Probe) -> List[Found]:
    found = []
    for output, inputs in zip(outputs, probe.inputs):
        seen, objects = output["instances"].to("cpu"), inputs["instances"]
        found.append(
            match_objects(
                *(seen.pred_boxes.tensor, seen.scores, seen.pred_classes),
                *(objects.gt_boxes.tensor, objects.gt_classes),
            )
        )
    threshold = best_threshold(found, len(probe.classes))
    return [each.above(threshold) for each in found]
