"""Teachers that torchvision builds: DISTILL.TEACHER.CONFIG_FILE "torchvision:fasterrcnn_resnet50_fpn_v2"."""

import inspect
import logging
import os
from pathlib import PurePosixPath
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from torch import nn
from torchvision.models import get_model_builder, get_model_weights, list_models
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.misc import FrozenBatchNorm2d

from ..detectors.torchvision_detector import TorchvisionDetector, classes_among
from ..errors import GDetKDError, some
from .base import TeacherFile

logger = logging.getLogger(__name__)

PREFIX = "torchvision:"
FAMILIES = (FasterRCNN, RetinaNet, FCOS)  # a Mask R-CNN is a FasterRCNN
PLAIN = (bool, int, float, str)
# Key of DISTILL.TEACHER.OPTS for the epsilon of the frozen BatchNorms. torchvision sets it to 0 for the COCO_V1 weights
# of its ResNet-50 without "v2", and its models with other weights have 1e-5.
NORM_EPS = "norm_eps"
OLD_MODELS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn")


class TorchvisionTeacher(TeacherFile):
    """Describe a Faster R-CNN, Mask R-CNN, RetinaNet or FCOS of torchvision.

    DISTILL.TEACHER.WEIGHTS is a file with the model's state dict, or the name of torchvision's weights, such as
    "COCO_V1" or "DEFAULT", which are downloaded once. DISTILL.TEACHER.OPTS holds pairs of an argument of torchvision's
    builder and its value, for example ["num_classes", 7] with the background counted.

    Raises:
        GDetKDError: torchvision has no such detector or weights, or DISTILL.TEACHER.OPTS is invalid.
    """

    input_format = "RGB"

    def __init__(self, cfg: CfgNode) -> None:
        self.path = cfg.DISTILL.TEACHER.CONFIG_FILE
        self._name = self.path[len(PREFIX) :]
        self._device = cfg.MODEL.DEVICE
        self._builder = _builder(self._name)
        self._options = _options(cfg)
        published, given = get_model_weights(self._name), cfg.DISTILL.TEACHER.WEIGHTS
        named, is_file = published.__members__.get(given.rpartition(".")[2]), os.path.isfile(given)
        # A file that was downloaded has the name that it has at torchvision.
        weights = named or next((item for item in published if _file_name(item.url) == _file_name(given)), None)
        if given and weights is None and not is_file and "://" not in given:
            names = ["DEFAULT", *(item.name for item in published)]
            raise GDetKDError(
                f"DISTILL.TEACHER.WEIGHTS is {given!r}. There is no such file, and torchvision has no such weights of "
                f"{self._name}. The current folder is {os.getcwd()}. Give a file, or one of {some(names)}."
            )
        self.weights = given if named is None or is_file else named.url
        is_old = self._name in OLD_MODELS and weights is not None and weights.name == "COCO_V1"
        self._norm_eps: Optional[float] = self._options.pop(NORM_EPS, 0.0 if is_old else None)
        with torch.device("meta"):  # without memory for the parameters
            model = self._build_plain()
        self._num_labels = _num_labels(model)
        # In evaluation torchvision resizes to the last of its sizes.
        self._resize = T.ResizeShortestEdge(model.transform.min_size[-1], model.transform.max_size)
        self._categories = self._find_categories(weights, list(published), bool(cfg.DISTILL.TEACHER.CLASSES))

    def _find_categories(self, weights: Any, published: List[Any], names_are_given: bool) -> Optional[List[str]]:
        if weights is not None and len(weights.meta["categories"]) == self._num_labels:
            return list(weights.meta["categories"])
        coco = [item.meta["categories"] for item in published if len(item.meta["categories"]) == self._num_labels]
        if names_are_given or not coco:
            return None
        logger.warning(
            "The teacher's weights %s are none of torchvision's. They have %d labels, so their classes are taken to be "
            "those of torchvision's COCO weights. If they are not, list them in DISTILL.TEACHER.CLASSES.",
            self.weights,
            self._num_labels,
        )
        return list(coco[0])

    def _build_plain(self) -> nn.Module:
        try:
            model = self._builder(weights=None, weights_backbone=None, **self._options)
        except (TypeError, ValueError) as e:
            raise GDetKDError(
                f"torchvision cannot build {self._name} with DISTILL.TEACHER.OPTS ({e}). Correct the arguments: "
                f"{', '.join(self._options)}."
            ) from e
        if not isinstance(model, FAMILIES):
            raise GDetKDError(_unknown(self._name))
        # torchvision ignores some arguments that it does not know.
        known = [self._builder, GeneralizedRCNNTransform.__init__, *(kind.__init__ for kind in type(model).__mro__)]
        unknown = set(self._options).difference(*(inspect.signature(function).parameters for function in known))
        if unknown:
            raise GDetKDError(
                f"DISTILL.TEACHER.OPTS has {some(sorted(unknown))}, but torchvision's {self._name} has no such "
                "argument. Correct the name."
            )
        return model

    def build(self) -> nn.Module:
        model = self._build_plain()
        if self._norm_eps is not None:
            for module in model.backbone.modules():
                if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)):
                    module.eps = self._norm_eps
        return TorchvisionDetector(model, self._num_labels, self._categories).to(self._device)

    def content(self) -> str:
        return f"{self.path} {sorted(self._options.items())} {NORM_EPS} {self._norm_eps}"

    def class_names(self) -> Optional[Tuple[str, ...]]:
        return None if self._categories is None else classes_among(self._categories)

    def test_loader(self, dataset_name: str) -> Any:
        dicts = get_detection_dataset_dicts(dataset_name, filter_empty=False)
        mapper = DatasetMapper(is_train=False, augmentations=[self._resize], image_format="RGB")
        return build_detection_test_loader(dicts, mapper=mapper)


def _num_labels(model: nn.Module) -> int:
    """Return the number of labels of a detector, with the background."""
    if isinstance(model, FasterRCNN):
        return model.roi_heads.box_predictor.cls_score.out_features
    return model.head.classification_head.num_classes


def _builder(name: str) -> Callable[..., nn.Module]:
    try:
        return get_model_builder(name)
    except ValueError as e:
        raise GDetKDError(_unknown(name)) from e


def _unknown(name: str) -> str:
    families = ("fasterrcnn", "maskrcnn", "retinanet", "fcos")
    known = [model for model in list_models() if model.startswith(families)]
    return (
        f"DISTILL.TEACHER.CONFIG_FILE is {PREFIX + name!r}, but this torchvision has no such Faster R-CNN, Mask R-CNN, "
        f"RetinaNet or FCOS. It has {some(known, len(known))}."
    )


def _file_name(address: str) -> str:
    return PurePosixPath(address).name


def _options(cfg: CfgNode) -> Dict[str, Any]:
    words = list(cfg.DISTILL.TEACHER.OPTS)
    options = dict(zip(words[::2], words[1::2]))
    for key, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if not isinstance(key, str) or key.startswith("weights") or not all(isinstance(item, PLAIN) for item in values):
            raise GDetKDError(
                f"DISTILL.TEACHER.OPTS has {key!r} with the value {value!r}. For a torchvision teacher, give pairs of "
                "an argument of torchvision's builder and a number, a string or a list of them, for example "
                '["num_classes", 7]. The weights belong in DISTILL.TEACHER.WEIGHTS.'
            )
    return options
