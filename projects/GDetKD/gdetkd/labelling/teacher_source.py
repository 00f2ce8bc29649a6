"""Boxes of the teacher of a config, with the teacher's own preprocessing."""

import hashlib
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..random_state import random_state
from ..teacher import FrozenTeacher
from .images import ImageFile
from .source import Detections, Source

# Name of the dataset that is registered while the teacher looks at images.
NAME = "gdetkd_images_to_label"


class TeacherSource(Source):
    """Run the teacher that DISTILL.TEACHER describes.

    Args:
        cfg: the config of the distillation.

    Raises:
        GDetKDError: the teacher cannot be built or cannot detect, or its weights are missing or do not fit.
    """

    kind = "teacher"

    def __init__(self, cfg: CfgNode) -> None:
        self._teacher = FrozenTeacher(cfg)
        self._teacher.file.check_can_detect()
        self._opts = [str(word) for word in cfg.DISTILL.TEACHER.OPTS]
        self.class_names = self._teacher.spec.class_names
        self.num_classes = self._teacher.spec.num_classes

    def origin(self) -> Dict[str, str]:
        file = self._teacher.file
        return {"config_file": file.path, "weights": file.weights, "sha256": self._teacher.sha256}

    def settings(self) -> Dict[str, Any]:
        file = self._teacher.file
        config = hashlib.sha256(f"{file.content()} {self._opts}".encode()).hexdigest()
        return {
            "teacher's SHA-256": self._teacher.sha256,
            "SHA-256 of the teacher's config": config,
            **{f"teacher's {key}": value for key, value in file.limits().items()},
        }

    def detect(self, images: Sequence[ImageFile]) -> Iterator[Tuple[ImageFile, Detections]]:
        if not images:
            return
        model = self._teacher.model
        with _registered(images), random_state((0,)):
            # Detectron2's loader gives each process its own part of the images.
            for batch in self._teacher.file.test_loader(NAME):
                with torch.no_grad():
                    outputs = model(batch)
                for inputs, output in zip(batch, outputs):
                    found = output["instances"].to("cpu")
                    detections = Detections(found.pred_boxes.tensor, found.scores, found.pred_classes)
                    yield images[inputs["image_id"]], detections


@contextmanager
def _registered(images: Sequence[ImageFile]) -> Iterator[None]:
    samples: List[Dict[str, Any]] = [
        {"file_name": image.path, "image_id": index, "width": image.width, "height": image.height}
        for index, image in enumerate(images)
    ]
    DatasetCatalog.register(NAME, lambda: samples)
    try:
        yield
    finally:
        DatasetCatalog.remove(NAME)
        if NAME in MetadataCatalog.list():
            MetadataCatalog.remove(NAME)
