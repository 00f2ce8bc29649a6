"""The teacher: built from its own config, loaded completely, and frozen."""

import logging
import os
from typing import Any, Collection, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from detectron2.utils.file_io import PathManager
from torch import nn

from .detectors import build_adapter
from .device import SideStream
from .errors import GDetKDError, first_line, some
from .inference import for_inference, parse_dtype
from .safe_load import DamagedFileError, SafeCheckpointer, sha256_of_file
from .structures import DetectorOutputs, Regions, with_class_names
from .teacher_file import TeacherFile, read_teacher_file

logger = logging.getLogger(__name__)

# Tensors outside of the heads start like this.
NOT_HEADS = ("backbone.", "pixel_")
# Ending of the class frequencies of the detector's own dataset (MODEL.ROI_BOX_HEAD.USE_FED_LOSS). They are not learned.
CLASS_FREQUENCIES = "fed_loss_cls_weights"


class CompleteCheckpointer(SafeCheckpointer):
    """Load weights as Detectron2 does, but raise an error if a tensor stays unloaded. Detectron2 only warns."""

    def load_weights(self, checkpoint: Any) -> Any:
        incompatible = super().load_weights(checkpoint)
        # A BatchNorm's count of batches does not matter in eval mode, and old files lack it.
        missing = [key for key in incompatible.missing_keys if not key.endswith("num_batches_tracked")]
        misshapen = [f"{key} {have} for {want}" for key, have, want in incompatible.incorrect_shapes]
        left = misshapen + sorted(set(missing) - {key for key, _, _ in incompatible.incorrect_shapes})
        if left:
            raise GDetKDError(
                f"The teacher's weights leave {len(left)} of {len(self.model.state_dict())} tensors unloaded "
                f"({some(left)}). Give the config and the weights of the same detector: DISTILL.TEACHER.CONFIG_FILE, "
                "DISTILL.TEACHER.OPTS and DISTILL.TEACHER.WEIGHTS must belong together."
            )
        if incompatible.unexpected_keys:
            logger.warning(
                "The teacher's weights hold tensors that the teacher's config does not use: %s.",
                some(incompatible.unexpected_keys),
            )
        return incompatible


def load_weights(model: nn.Module, path: str) -> str:
    """Load all weights of a teacher.

    Returns:
        SHA-256 of the file, in hexadecimal digits.

    Raises:
        GDetKDError: no file is given, the file is missing, empty or damaged, or a tensor stays unloaded.
    """
    local = _local_file(path)
    try:
        CompleteCheckpointer(model).load(path)
    except DamagedFileError as e:
        raise GDetKDError(
            f"The teacher: {e} Is the file complete ({os.path.getsize(local)} bytes), and a Detectron2 checkpoint?"
        ) from e
    except GDetKDError:
        raise
    except (RuntimeError, OSError, KeyError, TypeError, AttributeError, ValueError) as e:
        raise GDetKDError(
            f"The teacher's weights {path!r} cannot be read ({type(e).__name__}: {first_line(e)}). Is the file "
            f"complete ({os.path.getsize(local)} bytes), and a Detectron2 checkpoint?"
        ) from e
    broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise GDetKDError(
            f"The teacher's weights {path!r} hold values that are not finite ({some(broken)}), so the teacher's "
            "training diverged. Take an earlier checkpoint."
        )
    return sha256_of_file(local)


def _local_file(path: str) -> str:
    """Return the local path of a teacher's weights. Download them first if the path is a URL."""
    if not path:
        raise GDetKDError("The teacher has no weights. Set DISTILL.TEACHER.WEIGHTS.")
    if "://" not in path and not os.path.isfile(path):
        raise GDetKDError(
            f"The teacher's weights {path!r} are not there. The current folder is {os.getcwd()}. Correct "
            "DISTILL.TEACHER.WEIGHTS."
        )
    try:
        local = PathManager.get_local_path(path)
    except OSError as e:
        raise GDetKDError(
            f"The teacher's weights {path!r} cannot be downloaded ({type(e).__name__}: {first_line(e)}). Check the "
            "address and the network, or download the file yourself and name it in DISTILL.TEACHER.WEIGHTS."
        ) from e
    if os.path.getsize(local) == 0:
        raise GDetKDError(f"The teacher's weights {path!r} are an empty file. Copy or download it again.")
    return local


class FrozenTeacher:
    """Hold the teacher. This is no module, so no checkpoint, optimizer, DDP bucket or `.train()` reaches the teacher.

    Args:
        cfg: the config of the distillation.

    Attributes:
        file: the teacher's config file.
        model: the detector as loaded. `look` uses a faster copy of the backbone.
        adapter: the adapter of the detector.
        spec: the description of the detector, with class names.
        sha256: SHA-256 of the weights file, in hexadecimal digits.

    Raises:
        GDetKDError: config or weights are missing or do not fit each other, the detector has no pyramid, or the
            student's images cannot be converted for it.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.file = read_teacher_file(cfg)
        self._reorder = _needs_reordering(cfg.INPUT.FORMAT, self.file.input_format)
        self.model: nn.Module = self.file.build()
        self.adapter = build_adapter(self.model, "teacher", cfg)
        _check_size(cfg, self.model)
        names = _teachers_classes(cfg, self.file, self.adapter.spec.num_classes)
        self.spec = with_class_names(self.adapter.spec, names)
        config = cfg.DISTILL.TEACHER
        self._device = torch.device(cfg.MODEL.DEVICE)
        self._stream = SideStream(self._device, config.OWN_STREAM)
        self._dtype = parse_dtype(config.DTYPE, cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED)
        self.sha256 = load_weights(self.model, self.file.weights)
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        if self.adapter.backbone is not None:
            self.adapter.backbone = for_inference(self.adapter.backbone, self._dtype)
        logger.info("Teacher: %s, SHA-256 %s", self.file.weights, self.sha256)

    @torch.no_grad()
    def look(
        self,
        batched_inputs: List[Dict[str, Any]],
        regions: Regions,
        needs: Collection[str],
        later_regions: Sequence[Regions] = (),
    ) -> DetectorOutputs:
        """Call `extract` and `look_at`."""
        return self.look_at(self.extract(batched_inputs), regions, needs, later_regions)

    @torch.no_grad()
    def extract(self, batched_inputs: List[Dict[str, Any]]) -> Dict[str, torch.Tensor]:
        """Run the teacher's backbone on a training batch. This depends on nothing that the student computes.

        Args:
            batched_inputs: the student's inputs, in the student's channel order, not normalised.

        Returns:
            the backbone's features by name. On a stream of its own, they are ready only for `look_at`.
        """
        with self._stream:
            images = self.preprocess(batched_inputs).tensor
            images = images.to(self._dtype).contiguous(memory_format=torch.channels_last)
            with self._autocast():
                return self.adapter.extract(images)

    @torch.no_grad()
    def look_at(
        self,
        features: Dict[str, torch.Tensor],
        regions: Optional[Regions],
        needs: Collection[str],
        later_regions: Sequence[Regions] = (),
    ) -> DetectorOutputs:
        """Compute the teacher's features and predictions for the regions of a training batch.

        Args:
            features: what `extract` returned for this batch.
            regions: boxes in pixels of the batch's images.
            needs: fields of `DetectorOutputs` to fill.
            later_regions: boxes of the later stages, if the student is a cascade.
        """
        self._stream.hand_over(features)
        with self._autocast():
            return self.adapter.look(features, regions, needs, later_regions)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=torch.finfo(self._dtype).bits < 32)

    @torch.no_grad()
    def detect(self, batched_inputs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """Return the teacher's predictions, in the teacher's classes, for inputs in the student's channel order."""
        return self.model([{**inputs, "image": self._reordered(inputs["image"])} for inputs in batched_inputs])

    def preprocess(self, batched_inputs: List[Dict[str, Any]]) -> ImageList:
        """Convert images to the teacher's channel order, normalise and pad them as the teacher does."""
        return self.model.preprocess_image([{"image": self._reordered(inputs["image"])} for inputs in batched_inputs])

    def _reordered(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(0) if self._reorder else image

    def describe(self) -> Dict[str, str]:
        """Return what a checkpoint records about the teacher: its weights' path and SHA-256, and its image format."""
        images = self.file.input_format
        for name in ("pixel_mean", "pixel_std"):  # a user's own detector may lack them
            if (part := getattr(self.model, name, None)) is not None:
                images += f", {name} {part.flatten().tolist()}"
        return {"weights": self.file.weights, "sha256": self.sha256, "images": images}


def _teachers_classes(cfg: CfgNode, file: TeacherFile, num_classes: int) -> Optional[Tuple[str, ...]]:
    """Return the names of the teacher's classes: DISTILL.TEACHER.CLASSES, or those of the dataset in its file."""
    given = tuple(cfg.DISTILL.TEACHER.CLASSES)
    if given and len(given) != num_classes:
        raise GDetKDError(
            f"DISTILL.TEACHER.CLASSES has {len(given)} names, but the teacher has {num_classes} classes. List the "
            "names of all classes in order."
        )
    known = file.class_names() or given
    if given and given != known and sorted(given) == sorted(known):
        raise GDetKDError(
            f"DISTILL.TEACHER.CLASSES ({some(given)}) and the dataset in the teacher's config ({some(known)}) have the "
            "same classes in another order. Correct the order, or leave DISTILL.TEACHER.CLASSES empty. If the teacher "
            "was trained on another dataset of that name, register the dataset under another name here."
        )
    return given or known or None


def _check_size(cfg: CfgNode, teacher: nn.Module) -> None:
    """Raise an error if training images may be too large for the teacher.

    A plain vision transformer pads images to a square of a fixed size. It cannot take larger images.
    """
    square = getattr(teacher.backbone, "padding_constraints", {}).get("square_size", 0)
    if 0 < square < cfg.INPUT.MAX_SIZE_TRAIN:
        raise GDetKDError(
            f"The teacher takes images of at most {square} pixels on a side, but INPUT.MAX_SIZE_TRAIN is "
            f"{cfg.INPUT.MAX_SIZE_TRAIN}. Set INPUT.MAX_SIZE_TRAIN to {square} or less."
        )


def _needs_reordering(student_format: str, teacher_format: str) -> bool:
    if student_format == teacher_format:
        return False
    if {student_format, teacher_format} == {"RGB", "BGR"}:
        return True
    raise GDetKDError(
        f"The student reads images as {student_format} and the teacher as {teacher_format} (INPUT.FORMAT). GDetKD "
        "converts only between RGB and BGR. Give both the same format."
    )


def transfer_heads(teacher: nn.Module, student: nn.Module) -> List[str]:
    """Copy the teacher's heads to the student, in place. Tensors are copied if name and shape agree.

    Returns:
        names of the copied tensors.

    Raises:
        GDetKDError: no tensor agrees.
    """
    source = teacher.state_dict()
    copied, skipped = [], []
    for name, tensor in student.state_dict().items():
        if name.startswith(NOT_HEADS) or name.endswith(CLASS_FREQUENCIES):
            continue
        if name in source and source[name].shape == tensor.shape:
            tensor.copy_(source[name])
            copied.append(name)
        else:
            skipped.append(name)
    if not copied:
        raise GDetKDError(
            "DISTILL.HEAD_TRANSFER would transfer nothing: no tensor outside the backbones agrees in name and shape "
            f"(the student has {some(skipped)}). Give the student the teacher's head widths and FPN channels, or set "
            "DISTILL.HEAD_TRANSFER to False."
        )
    logger.info("Head transfer: %d tensors copied from the teacher.", len(copied))
    if skipped:
        logger.warning("Head transfer leaves %d tensors as they were: %s", len(skipped), some(skipped))
    return copied
