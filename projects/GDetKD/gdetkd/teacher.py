"""The teacher: built from its own config, loaded completely or not at all, and frozen."""

import logging
import os
from typing import Any, Collection, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from detectron2.utils.file_io import PathManager
from torch import nn

from .detectors import build_adapter
from .errors import GDetKDError, some
from .inference import for_inference, parse_dtype
from .safe_load import DamagedFileError, SafeCheckpointer, sha256_of_file
from .structures import DetectorOutputs, Regions, with_class_names
from .teacher_file import TeacherFile, read_teacher_file

logger = logging.getLogger(__name__)

# Parts of a detector that are not its heads.
NOT_HEADS = ("backbone.", "pixel_")
# How often each class occurs in the detector's own dataset (MODEL.ROI_BOX_HEAD.USE_FED_LOSS); it is not learned.
CLASS_FREQUENCIES = "fed_loss_cls_weights"


class CompleteCheckpointer(SafeCheckpointer):
    """Loads weights as Detectron2 does, but refuses what it would only warn of: a model not wholly loaded."""

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        # The count of batches that a BatchNorm has seen plays no part in eval mode, and old files lack it.
        missing = [key for key in incompatible.missing_keys if not key.endswith("num_batches_tracked")]
        misshapen = [f"{key} {have} for {want}" for key, have, want in incompatible.incorrect_shapes]
        left = misshapen + sorted(set(missing) - {key for key, _, _ in incompatible.incorrect_shapes})
        if left:
            raise GDetKDError(
                f"The teacher's weights leave {len(left)} of its {len(self.model.state_dict())} tensors unloaded "
                f"({some(left)}). Do the file and DISTILL.TEACHER.CONFIG_FILE belong together?"
            )
        if incompatible.unexpected_keys:
            logger.warning(
                "The teacher's weights hold tensors that its config has no place for: %s.",
                some(incompatible.unexpected_keys),
            )
        return incompatible


def load_weights(model: nn.Module, path: str) -> str:
    """Loads all of a teacher's weights.

    Returns:
        the file's SHA-256, in hexadecimal.

    Raises:
        GDetKDError: no file is given, it is missing, empty or damaged, or it leaves a tensor unloaded.
    """
    if not path:
        raise GDetKDError("The teacher has no weights: give DISTILL.TEACHER.WEIGHTS.")
    if "://" not in path and not os.path.isfile(path):
        raise GDetKDError(f"The teacher's weights {path!r} are not there, seen from {os.getcwd()}.")
    local = PathManager.get_local_path(path)
    if os.path.getsize(local) == 0:
        raise GDetKDError(f"The teacher's weights {path!r} are an empty file. Copy or download it again.")
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
            f"The teacher's weights {path!r} cannot be read ({type(e).__name__}: {str(e).splitlines()[0]}). Is the "
            f"file complete ({os.path.getsize(local)} bytes), and a Detectron2 checkpoint?"
        ) from e
    broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise GDetKDError(
            f"The teacher's weights {path!r} hold values that are not finite ({some(broken)}): its training diverged. "
            "Take an earlier checkpoint."
        )
    return sha256_of_file(local)


class FrozenTeacher:
    """Holds the teacher without being a module, so that no checkpoint, optimizer, DDP bucket or `.train()` reaches it.

    Args:
        cfg: the config of the distillation.

    Attributes:
        model: the detector as its file has it. It looks at a batch through a copy of its backbone that is faster.

    Raises:
        GDetKDError: config or weights are missing or do not fit each other, the detector has no pyramid, or its images
            cannot be made from the student's.
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
        """What the teacher has to say on the regions of a training batch.

        Args:
            batched_inputs: as the student gets them, in *its* channel order, not normalised.
            regions: boxes in pixels of these images.
            needs: fields of `DetectorOutputs` to fill.
            later_regions: boxes of the later stages of a student that is a cascade.
        """
        images = self.preprocess(batched_inputs).tensor
        images = images.to(self._dtype).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, self._dtype, enabled=torch.finfo(self._dtype).bits < 32):
            return self.adapter.look(images, regions, needs, later_regions)

    @torch.no_grad()
    def detect(self, batched_inputs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """Detectron2's predictions on images as the student gets them, in the teacher's own classes."""
        return self.model([{**inputs, "image": self._reordered(inputs["image"])} for inputs in batched_inputs])

    def preprocess(self, batched_inputs: List[Dict[str, Any]]) -> ImageList:
        """The teacher's own channel order, pixel mean and std, and padding."""
        return self.model.preprocess_image([{"image": self._reordered(inputs["image"])} for inputs in batched_inputs])

    def _reordered(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(0) if self._reorder else image

    def describe(self) -> Dict[str, str]:
        """What a checkpoint keeps of the teacher: where its weights were, what they were, and how it sees images."""
        images = self.file.input_format
        for name in ("pixel_mean", "pixel_std"):  # which a family of one's own need not have
            if (part := getattr(self.model, name, None)) is not None:
                images += f", {name} {part.flatten().tolist()}"
        return {"weights": self.file.weights, "sha256": self.sha256, "images": images}


def _teachers_classes(cfg: CfgNode, file: TeacherFile, num_classes: int) -> Optional[Tuple[str, ...]]:
    """Names of the teacher's classes: as given, or those of the set that its own file trains on."""
    given = tuple(cfg.DISTILL.TEACHER.CLASSES)
    if given and len(given) != num_classes:
        raise GDetKDError(f"DISTILL.TEACHER.CLASSES has {len(given)} names, and the teacher {num_classes} classes.")
    known = file.class_names() or given
    if given and given != known and sorted(given) == sorted(known):
        raise GDetKDError(
            f"DISTILL.TEACHER.CLASSES has the teacher's classes in another order ({some(given)}) than the data set "
            f"that its own file trains on ({some(known)}). Leave it empty, or correct it. If it was trained on another "
            "set of that name, give the data set another name here."
        )
    return given or known or None


def _check_size(cfg: CfgNode, teacher: nn.Module) -> None:
    """A plain vision transformer pads its images to a square of one size, and can take no larger one."""
    square = getattr(teacher.backbone, "padding_constraints", {}).get("square_size", 0)
    if 0 < square < cfg.INPUT.MAX_SIZE_TRAIN:
        raise GDetKDError(
            f"The teacher takes images of at most {square} pixels on a side, and the student's have up to "
            f"{cfg.INPUT.MAX_SIZE_TRAIN}. Set INPUT.MAX_SIZE_TRAIN to {square} or less."
        )


def _needs_reordering(student_format: str, teacher_format: str) -> bool:
    if student_format == teacher_format:
        return False
    if {student_format, teacher_format} == {"RGB", "BGR"}:
        return True
    raise GDetKDError(
        f"The student reads images as {student_format} and the teacher as {teacher_format} (INPUT.FORMAT). GDetKD "
        "converts between RGB and BGR; make the two agree."
    )


def transfer_heads(teacher: nn.Module, student: nn.Module) -> List[str]:
    """Copies the teacher's heads into the student wherever name and shape agree.

    Returns:
        the names of the tensors that were copied.

    Raises:
        GDetKDError: none agrees.
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
            f"(the student has {some(skipped)}). Give the student the teacher's head widths and FPN channels, or "
            "switch it off."
        )
    logger.info("Head transfer: %d tensors from the teacher.", len(copied))
    if skipped:
        logger.warning("Head transfer leaves %d tensors as they were: %s", len(skipped), some(skipped))
    return copied
