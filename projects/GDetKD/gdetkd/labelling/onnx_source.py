"""Boxes of an ONNX model, such as `tools/export.py` writes, run by onnxruntime."""

from dataclasses import dataclass, replace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils import comm

from ..errors import GDetKDError, first_line
from ..safe_load import sha256_of_file
from .images import ImageFile
from .source import LARGEST_RELATIVE, Detections, Source, own_part

# Names of the outputs, by what they hold.
OUTPUT_NAMES = {"boxes": ("boxes",), "scores": ("scores",), "classes": ("classes", "labels")}
# Number of images after which boxes are checked to be in pixels.
TRIED = 20
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True)
class OnnxModel:
    """Describe an ONNX model with one image as input, (3, H, W) or (1, 3, H, W).

    Its outputs are boxes (N, 4) xyxy in pixels of the input, scores (N,) from 0 to 1 and classes (N,) counted from 0.
    Outputs may have a batch dimension of 1 in front.

    Attributes:
        file: path of the model.
        outputs: names of the outputs for boxes, scores and classes. Empty: they are found by their usual names.
        size: (height, width) in pixels to which images are resized without keeping their shape. None: the fixed size of
            the model, or the test size of the config if the model takes any size.
        input_format: "RGB" or "BGR". Empty: INPUT.FORMAT of the config.
        scale: factor of the pixel values, which are 0 to 255 before.
        classes: names of the classes. Empty: the student's classes.
    """

    file: str
    outputs: Sequence[str] = ()
    size: Optional[Tuple[int, int]] = None
    input_format: str = ""
    scale: float = 1.0
    classes: Sequence[str] = ()


class OnnxSource(Source):
    """Run an ONNX model.

    Args:
        cfg: the config of the student, which gives the channel order and the test size.
        model: the model.
        student: the student's class names.

    Raises:
        GDetKDError: onnxruntime is missing, or the model cannot be read, or it has other inputs or outputs.
    """

    kind = "onnx"

    def __init__(self, cfg: CfgNode, model: OnnxModel, student: Tuple[str, ...]) -> None:
        self.class_names = tuple(model.classes) or student
        self.num_classes = len(self.class_names)
        self._model = model
        self._format = model.input_format or cfg.INPUT.FORMAT
        self._session = _open(model.file, cfg.MODEL.DEVICE)
        self._sha256 = sha256_of_file(model.file)
        self._input, shape = _image_input(self._session, model.file)
        if DTYPES[self._input.type] is np.uint8 and model.scale != 1:
            raise GDetKDError(f"{model.file!r} takes bytes from 0 to 255, so leave out --onnx-scale {model.scale:g}.")
        self._has_batch = len(shape) == 4
        self._outputs = _find_outputs(model, [output.name for output in self._session.get_outputs()])
        fixed = [side for side in shape[-2:] if isinstance(side, int) and side > 0]
        size = model.size or (tuple(fixed) if len(fixed) == 2 else None)
        if model.size and len(fixed) == 2 and tuple(fixed) != tuple(model.size):
            raise GDetKDError(
                f"--onnx-size is {model.size[0]} {model.size[1]}, but {model.file!r} takes images of height {fixed[0]} "
                f"and width {fixed[1]} only. Leave out --onnx-size."
            )
        self._size = size
        self._resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)

    def origin(self) -> Dict[str, str]:
        return {"file": self._model.file, "sha256": self._sha256}

    def settings(self) -> Dict[str, Any]:
        size = list(self._size) if self._size else [self._resize.short_edge_length, self._resize.max_size]
        return {
            "model's SHA-256": self._sha256,
            "outputs": self._outputs,
            "size": str(size),
            "channel order": self._format,
            "scale": self._model.scale,
        }

    def detect(self, images: Sequence[ImageFile]) -> Iterator[Tuple[ImageFile, Detections]]:
        own, largest = own_part(images), 0.0
        for number, image in enumerate(own, 1):
            pixels, factors = self._pixels(image.path)
            try:
                outputs = self._session.run(self._outputs, {self._input.name: pixels})
            except Exception as e:  # onnxruntime's errors have no common class but this
                raise GDetKDError(
                    f"{self._model.file!r} fails on {image.name!r} ({first_line(e)}). Check --onnx-size, and that the "
                    "model takes one image."
                ) from e
            found = _read_outputs(self._model.file, self._outputs, outputs, self.num_classes)
            largest = max([largest, *found.boxes.flatten().tolist()])
            if number >= min(TRIED, len(own)) and 0 < largest <= LARGEST_RELATIVE:
                raise GDetKDError(
                    f"{self._model.file!r} found no box of more than a pixel on {number} images, so its boxes seem "
                    "relative. Export the model with boxes in pixels of its input."
                )
            yield image, replace(found, boxes=found.boxes * torch.from_numpy(factors))

    def _pixels(self, path: str) -> Tuple[np.ndarray, np.ndarray]:
        """Return the model's input, and (4,) factors from its pixels to pixels of the file."""
        pixels = utils.read_image(path, self._format)
        height, width = pixels.shape[:2]
        if self._size is None:
            resize = self._resize.get_transform(pixels)
        else:
            resize = T.ResizeTransform(height, width, *self._size)
        resized = resize.apply_image(pixels)
        factors = np.array([width / resized.shape[1], height / resized.shape[0]] * 2)
        dtype = DTYPES[self._input.type]
        values = resized.transpose(2, 0, 1)
        if self._model.scale != 1:
            values = values * self._model.scale
        values = np.ascontiguousarray(values, dtype=dtype)
        return (values[None] if self._has_batch else values), factors


def _read_outputs(file: str, names: Sequence[str], outputs: Sequence[np.ndarray], num_classes: int) -> Detections:
    """Check a model's outputs, and return its detections with a score above 0, in pixels of the input.

    Args:
        file: the model, for messages.
        names: names of the outputs.
        outputs: boxes (N, 4) or (1, N, 4), scores and classes (N,) or (1, N).

    Raises:
        GDetKDError: shapes, scores, classes or boxes cannot be right.
    """
    whole = [np.asarray(output) for output in outputs]
    boxes, scores, classes = (
        output[0] if output.ndim == ndim + 1 and len(output) == 1 else output for output, ndim in zip(whole, (2, 1, 1))
    )
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not scores.shape == classes.shape == boxes.shape[:1]:
        shapes = ", ".join(f"{name} {output.shape}" for name, output in zip(names, whole))
        raise GDetKDError(
            f"{file!r} returns {shapes}. It must return boxes (N, 4), scores (N,) and classes (N,). Export the model "
            "with non-maximum suppression, or name other outputs with --onnx-outputs."
        )
    if len(scores) and not (scores.min() >= 0 and scores.max() <= 1):  # NaN fails, too
        raise GDetKDError(
            f"{file!r} returns scores from {scores.min():g} to {scores.max():g}, not from 0 to 1. Export the model "
            "with its softmax or sigmoid."
        )
    kept = scores > 0  # a model of fixed N may fill up its outputs with class -1
    boxes, scores, classes = boxes[kept].astype(np.float64), scores[kept].astype(np.float64), classes[kept]
    if len(classes) and not (classes.min() >= 0 and classes.max() < num_classes):
        raise GDetKDError(
            f"{file!r} returns classes from {classes.min():g} to {classes.max():g}, but has {num_classes} class names. "
            "Name its classes with --onnx-classes."
        )
    if not np.isfinite(boxes).all():
        raise GDetKDError(f"{file!r} returns boxes that are not finite. Export the model again.")
    return Detections(*map(torch.from_numpy, (boxes, scores, classes.astype(np.int64))))


def _open(file: str, device: str) -> Any:
    try:
        import onnxruntime
    except ImportError as e:
        raise GDetKDError("--onnx needs the package onnxruntime. Run: pip install onnxruntime") from e
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    providers: List[Any] = ["CPUExecutionProvider"]
    if device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": comm.get_local_rank()}))
    try:
        return onnxruntime.InferenceSession(file, options, providers=providers)
    except Exception as e:  # onnxruntime's errors have no common class but this
        raise GDetKDError(f"--onnx {file!r} cannot be read ({first_line(e)}). Name an ONNX model.") from e


def _image_input(session: Any, file: str) -> Tuple[Any, List[Any]]:
    """Return the input of a model, and its shape: numbers, or names where any size is possible."""
    inputs = session.get_inputs()
    if len(inputs) == 1 and len(inputs[0].shape) in (3, 4) and inputs[0].type in DTYPES:
        shape = list(inputs[0].shape)
        is_one_image = len(shape) == 3 or not isinstance(shape[0], int) or shape[0] == 1
        if is_one_image and (shape[-3] == 3 or not isinstance(shape[-3], int)):
            return inputs[0], shape
    found = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs)
    raise GDetKDError(
        f"--onnx {file!r} has the inputs {found}. It must have one input: an image (3, H, W) or (1, 3, H, W) of floats "
        "or bytes. Export the model again."
    )


def _find_outputs(model: OnnxModel, names: Sequence[str]) -> List[str]:
    """Return the names of the outputs for boxes, scores and classes."""
    if model.outputs:
        unknown = [name for name in model.outputs if name not in names]
        if len(model.outputs) != 3 or unknown:
            raise GDetKDError(
                f"--onnx-outputs is {','.join(model.outputs)}. Give three names: those of boxes, scores and classes. "
                f"{model.file!r} has {', '.join(names)}."
            )
        return list(model.outputs)
    lower = {name.lower(): name for name in names}
    found = [next((lower[name] for name in usual if name in lower), None) for usual in OUTPUT_NAMES.values()]
    if None in found:
        raise GDetKDError(
            f"{model.file!r} has the outputs {', '.join(names)}, of which none is called "
            f"{list(OUTPUT_NAMES)[found.index(None)]}. Name the three with --onnx-outputs BOXES,SCORES,CLASSES."
        )
    return [name for name in found if name is not None]
