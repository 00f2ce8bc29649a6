"""The frozen teacher, which looks at the student's regions."""

import logging
from dataclasses import replace
from typing import Any, Collection, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch import nn

from ..data.class_names import as_student_names, class_names, is_reordered
from ..data.teacher_view import CACHE_KEY, TEACHER_IMAGE, key_of
from ..detectors import build_adapter
from ..errors import GDetKDError, some
from ..inference import for_inference, parse_dtype
from ..structures import DetectorOutputs, Regions, seen_at_scale, with_class_names
from .feature_cache import FeatureCache, Features
from .files import TeacherFile, read_teacher_file
from .weights import load_weights

logger = logging.getLogger(__name__)


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
        cache: keeps the backbone's features of images that come again, or None.

    Raises:
        GDetKDError: config or weights are missing or do not fit each other, the detector has no pyramid, or the
            student's images cannot be converted for it.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.file = read_teacher_file(cfg)
        self._reorder = _needs_reordering(cfg.INPUT.FORMAT, self.file.input_format)
        self.model: nn.Module = self.file.build()
        self.adapter = build_adapter(self.model, "teacher", cfg)
        self._scale = cfg.DISTILL.TEACHER.SCALE
        _check_size(cfg, self.model)
        self.sha256, trained_with = load_weights(self.model, self.file.weights)
        if other := self.file.other_settings(trained_with.settings):
            logger.warning(
                "The teacher's weights %r were trained with other settings: %s. So it sees images or places boxes in "
                "another way than in its training. Set the values of its training, in its config file or by "
                "DISTILL.TEACHER.OPTS.",
                self.file.weights,
                "; ".join(other),
            )
        names = _teachers_classes(cfg, self.file, self.adapter.spec.num_classes, trained_with.classes)
        self.spec = with_class_names(seen_at_scale(self.adapter.spec, self._scale), names)
        config = cfg.DISTILL.TEACHER
        self._device = torch.device(cfg.MODEL.DEVICE)
        self.cache: Optional[FeatureCache] = FeatureCache(config.CACHE_MB) if config.CACHE_MB > 0 else None
        self._dtype = parse_dtype(config.DTYPE, cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED)
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
    def extract(self, batched_inputs: List[Dict[str, Any]], for_regions_alone: bool = False) -> Dict[str, torch.Tensor]:
        """Run the teacher's backbone on a training batch. This depends on nothing that the student computes.

        Args:
            batched_inputs: the student's inputs, in the student's channel order, not normalised.
            for_regions_alone: whether only features in regions will be read. Then the cache has a view of an image for
                all batches: the image is padded for itself, and the border of its maps fills the batch's padding.

        Returns:
            the backbone's features by name.
        """
        keys = [inputs[CACHE_KEY] for inputs in batched_inputs if CACHE_KEY in inputs]
        if self.cache is None or len(keys) < len(batched_inputs):
            return self._run_backbone(self.preprocess(batched_inputs).tensor)
        if for_regions_alone:
            images = [self.preprocess([inputs]).tensor for inputs in batched_inputs]
        else:
            images = list(self.preprocess(batched_inputs).tensor.split(1))
        return self.cache.features(images, keys, self._run_backbone)

    def _run_backbone(self, images: torch.Tensor) -> Features:
        images = images.to(self._dtype).contiguous(memory_format=torch.channels_last)
        with self._autocast():
            return self.adapter.extract(images)

    def with_cache_keys(self, batched_inputs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """Return a training batch whose images have digests for the cache, if there is one.

        GDetKD's training loader has added them. For other batches, call this before the images go to the device. The
        given batch does not change.
        """
        if self.cache is None:
            return batched_inputs
        return [
            inputs if CACHE_KEY in inputs else {**inputs, CACHE_KEY: key_of(self._view_of(inputs))}
            for inputs in batched_inputs
        ]

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
        with self._autocast():
            if self._scale == 1:
                return self.adapter.look(features, regions, needs, later_regions)
            scaled = None if regions is None else regions.scaled(self._scale)
            later = [stage.scaled(self._scale) for stage in later_regions]
            outputs = self.adapter.look(features, scaled, needs, later)
        head = None if outputs.head is None else outputs.head.at_scale(self._scale)
        return replace(outputs, regions=regions, strides=self.spec.strides, head=head)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=torch.finfo(self._dtype).bits < 32)

    @torch.no_grad()
    def detect(self, batched_inputs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """Return the teacher's predictions, in the teacher's classes, for inputs in the student's channel order."""
        return self.model([{**inputs, "image": self._image_of(inputs)} for inputs in batched_inputs])

    def preprocess(self, batched_inputs: List[Dict[str, Any]]) -> ImageList:
        """Convert images to the teacher's channel order, normalise and pad them as the teacher does."""
        return self.model.preprocess_image([{"image": self._image_of(inputs)} for inputs in batched_inputs])

    def _image_of(self, inputs: Dict[str, Any]) -> torch.Tensor:
        """Return the image (3, H, W) that the teacher sees, in its own channel order."""
        image = self._view_of(inputs)
        return image.flip(0) if self._reorder else image

    def _view_of(self, inputs: Dict[str, Any]) -> torch.Tensor:
        if self._scale != 1 and TEACHER_IMAGE not in inputs:
            raise GDetKDError(
                f"DISTILL.TEACHER.SCALE is {self._scale}, but a training sample has no {TEACHER_IMAGE!r}. Use GDetKD's "
                "training loader, or wrap your mapper in gdetkd.data.teacher_view.TeacherViewMapper."
            )
        return inputs["image"] if self._scale == 1 else inputs[TEACHER_IMAGE]

    def describe(self) -> Dict[str, str]:
        """Return what a checkpoint records about the teacher: its weights' path and SHA-256, and its image format."""
        images = self.file.input_format
        for name in ("pixel_mean", "pixel_std"):  # a user's own detector may lack them
            if (part := getattr(self.model, name, None)) is not None:
                images += f", {name} {part.flatten().tolist()}"
        if self._scale != 1:
            images += f", {self._scale:g} times as large as the student's"
        return {"weights": self.file.weights, "sha256": self.sha256, "images": images}


def _teachers_classes(
    cfg: CfgNode, file: TeacherFile, num_classes: int, trained: Optional[Sequence[str]]
) -> Optional[Tuple[str, ...]]:
    """Return the names of the teacher's classes: DISTILL.TEACHER.CLASSES, or those of the dataset in its file.

    Args:
        trained: the names that the weights record. They count if no other names are known. If they differ from the
            student's in upper and lower case alone, they are returned as the student spells them.
    """
    given = tuple(cfg.DISTILL.TEACHER.CLASSES)
    if given and len(given) != num_classes:
        raise GDetKDError(
            f"DISTILL.TEACHER.CLASSES has {len(given)} names, but the teacher has {num_classes} classes. List the "
            "names of all classes in order."
        )
    if not all(isinstance(name, str) for name in given):
        raise GDetKDError(
            f"DISTILL.TEACHER.CLASSES is {list(given)}, not a list of texts. Put numbers, yes and no in quotes."
        )
    known = file.class_names() or given
    if len(known) != num_classes:  # the file names the dataset of another detector
        known = ()
    if given and given != known and sorted(given) == sorted(known):
        raise GDetKDError(
            f"DISTILL.TEACHER.CLASSES ({some(given)}) and the dataset in the teacher's config ({some(known)}) have the "
            "same classes in another order. Correct the order, or leave DISTILL.TEACHER.CLASSES empty. If the teacher "
            "was trained on another dataset of that name, register the dataset under another name here."
        )
    names = given or known
    if trained is None or len(trained) != num_classes:
        return names or None
    if names and is_reordered(trained, names):
        where = "DISTILL.TEACHER.CLASSES has" if given else "the dataset in the teacher's config has"
        raise GDetKDError(
            f"The teacher's weights were trained on the classes {some(trained)}, but {where} them in another order: "
            f"{some(names)}. The student would learn wrong classes. Use the order of the training. If a dataset of "
            "this name has another order now, register it under a name that the teacher's config does not have."
        )
    return names or tuple(map(str, as_student_names(trained, class_names(cfg))))


def _check_size(cfg: CfgNode, teacher: nn.Module) -> None:
    """Raise an error if training images may be too large for the teacher.

    A plain vision transformer pads images to a square of a fixed size. It cannot take larger images.
    """
    square = getattr(getattr(teacher, "backbone", None), "padding_constraints", {}).get("square_size", 0)
    scale = cfg.DISTILL.TEACHER.SCALE
    if 0 < square < scale * cfg.INPUT.MAX_SIZE_TRAIN:
        raise GDetKDError(
            f"The teacher takes images of at most {square} pixels on a side, but INPUT.MAX_SIZE_TRAIN is "
            f"{cfg.INPUT.MAX_SIZE_TRAIN} and DISTILL.TEACHER.SCALE is {scale}. Set INPUT.MAX_SIZE_TRAIN to "
            f"{int(square / scale)} or less."
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
