"""Give the teacher the student's augmented image at another resolution, made from the original pixels."""

import copy
import hashlib
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.data import transforms as T
from fvcore.transforms.transform import (
    BlendTransform,
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    PadTransform,
    Transform,
    TransformList,
    VFlipTransform,
)

from ..errors import GDetKDError

# The keys of the teacher's image, and of the digest of what the teacher sees, in a training sample.
TEACHER_IMAGE, CACHE_KEY = "teacher_image", "teacher_cache_key"
# Transforms that do the same at each resolution.
FREE_OF_SIZE = (BlendTransform, HFlipTransform, NoOpTransform, VFlipTransform, T.ColorTransform, T.PILColorTransform)


class TeacherViewMapper:
    """Add the teacher's view to the training samples of a Detectron2 mapper, under the key "teacher_image".

    The view has the same augmentations as the student's image, and `scale` times its size. The student's image does not
    change.

    Args:
        mapper: a mapper with `augmentations`, such as Detectron2's `DatasetMapper`.
        scale: DISTILL.TEACHER.SCALE.
    """

    def __init__(self, mapper: Any, scale: float) -> None:
        self._view = _View(scale)
        self._mapper = copy.copy(mapper)
        augmentations = [_Following(augmentation, self._view) for augmentation in mapper.augmentations.augs]
        self._mapper.augmentations = T.AugmentationList([_Start(self._view), *augmentations])

    @property
    def augmentations(self) -> T.AugmentationList:
        return self._mapper.augmentations

    @augmentations.setter
    def augmentations(self, augmentations: T.AugmentationList) -> None:
        self._mapper = copy.copy(self._mapper)
        self._mapper.augmentations = augmentations

    @property
    def image_format(self) -> str:
        return self._mapper.image_format

    def __call__(self, dataset_dict: Dict[str, Any]) -> Dict[str, Any]:
        """
        Raises:
            GDetKDError: an augmentation cannot be repeated at another resolution.
        """
        sample = self._mapper(dataset_dict)
        sample[TEACHER_IMAGE] = self._view.finish(tuple(sample["image"].shape[-2:]))
        return sample


class CacheKeyMapper:
    """Add the digest by which DISTILL.TEACHER.CACHE_MB knows a view to the training samples of a mapper.

    In a training the workers of the loader do so. Later, with several GPUs, DistributedDataParallel has moved the image
    to its GPU.
    """

    def __init__(self, mapper: Callable[[Dict[str, Any]], Dict[str, Any]]) -> None:
        self._mapper = mapper

    def __call__(self, dataset_dict: Dict[str, Any]) -> Dict[str, Any]:
        sample = self._mapper(dataset_dict)
        return {**sample, CACHE_KEY: key_of(sample.get(TEACHER_IMAGE, sample["image"]))}


def key_of(image: torch.Tensor) -> bytes:
    """Return a digest of an image's pixels and size. An image on a GPU would make the CPU wait."""
    pixels = image.contiguous().cpu().numpy()
    return hashlib.blake2b(pixels.data, digest_size=16, key=str(tuple(image.shape)).encode()).digest()


class _View:
    """Follow the transforms of the student's image on the teacher's image.

    Up to the first resizing, both images are the same. The teacher's is then resized to `scale` times the student's
    size, and later transforms are scaled.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._image = np.zeros((0, 0, 3), np.uint8)
        self._is_scaled = False

    def start(self, image: np.ndarray) -> None:
        self._image, self._is_scaled = image, False

    def follow(self, transform: Transform) -> None:
        if isinstance(transform, TransformList):
            for part in transform.transforms:
                self.follow(part)
        elif isinstance(transform, T.ResizeTransform):
            self._resize((transform.new_h, transform.new_w), transform.interp)
        else:
            self._image = (self._scaled(transform) if self._is_scaled else transform).apply_image(self._image)

    def _resize(self, size: Tuple[int, int], interp: Any) -> None:
        height, width = self._image.shape[:2]
        resize = T.ResizeTransform(height, width, *self._scaled_sides(size, least=1), interp)
        self._image, self._is_scaled = resize.apply_image(self._image), True

    def _scaled_sides(self, sides: Sequence[int], least: int = 0) -> List[int]:
        return [max(least, round(self._scale * side)) for side in sides]

    def _scaled(self, transform: Transform) -> Transform:
        if isinstance(transform, FREE_OF_SIZE) and np.ndim(getattr(transform, "src_image", 0)) < 2:
            return transform
        if isinstance(transform, CropTransform):
            return CropTransform(*self._scaled_sides((transform.x0, transform.y0, transform.w, transform.h)))
        if isinstance(transform, PadTransform):
            sides = self._scaled_sides((transform.x0, transform.y0, transform.x1, transform.y1))
            return PadTransform(*sides, pad_value=transform.pad_value)
        raise GDetKDError(
            f"DISTILL.TEACHER.SCALE is {self._scale}, but the augmentation {_name(transform)} cannot be repeated at "
            "another resolution. Apply it before the image is resized, or set DISTILL.TEACHER.SCALE to 1."
        )

    def finish(self, size: Tuple[int, int]) -> torch.Tensor:
        """Return the teacher's image (3, H, W) for a student's image of the given size, without padding."""
        if list(self._image.shape[:2]) != self._scaled_sides(size, least=1):
            self._resize(size, T.ResizeTransform(1, 1, 1, 1).interp)
        return torch.as_tensor(np.ascontiguousarray(self._image.transpose(2, 0, 1)))


def _name(transform: Transform) -> str:
    # A blend with an image depends on the size of the image.
    is_blend = isinstance(transform, BlendTransform)
    return "RandomSaturation (BlendTransform with an image)" if is_blend else type(transform).__name__


def at_scale(pixels: np.ndarray, scale: float, size: Tuple[int, int]) -> torch.Tensor:
    """Return the teacher's view (3, H, W) of an image (height, width, 3) that the student sees in the given size."""
    view = _View(scale)
    view.start(pixels)
    return view.finish(size)


class _Start(T.Augmentation):
    """Show the original image to a view."""

    def __init__(self, view: _View) -> None:
        super().__init__()
        self._view = view

    def __call__(self, aug_input: T.AugInput) -> Transform:
        self._view.start(aug_input.image)
        return NoOpTransform()


class _Following(T.Augmentation):
    """Apply an augmentation, and let a view follow it."""

    def __init__(self, augmentation: Callable[[T.AugInput], Transform], view: _View) -> None:
        super().__init__()
        self._augmentation = augmentation
        self._view = view

    def __call__(self, aug_input: T.AugInput) -> Transform:
        transform = self._augmentation(aug_input)
        self._view.follow(transform)
        return transform
