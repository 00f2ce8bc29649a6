"""Read image headers before training: find unusable images and image sizes."""

import os
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from detectron2.data.detection_utils import read_image
from PIL import Image, UnidentifiedImageError

# Import Pillow's formats now. If they were imported with the first image, their modules would lie in memory among the
# dicts of the training set. Then the freed memory of the dicts could not return to the system: 130 MB for COCO.
Image.preinit()

Sample = Dict[str, Any]
# The EXIF tag, its values for images that are turned or mirrored, and those that exchange width and height.
EXIF_ORIENTATION, NOT_UPRIGHT, TURNED = 274, range(2, 9), (5, 6, 7, 8)
HEADERS_AT_ONCE = 16
# Images that are handed to the threads together. A task takes 1.5 kB, so do not make the tasks of all images at once.
CHUNK = 4096
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Errors that Pillow's readers raise for a broken image.
IMAGE_ERRORS = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
)
# Formats of photographs, by Pillow's names. Pillow reads other formats as well, some by other programs.
FORMATS = "AVIF BMP DIB GIF HEIF JPEG JPEG2000 MPO PNG PPM TGA TIFF WEBP".split()
# Modes with more than 8 bits. A conversion to 8 bits would clip their values.
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class Header(NamedTuple):
    """Describe an image by its header.

    Attributes:
        fault: why the image cannot be used; None if it can be used.
        size: (width, height) in pixels after EXIF turned the image, as Detectron2 reads it; None if it is not known.
    """

    fault: Optional[str] = None
    size: Optional[Tuple[int, int]] = None


def read_headers(dicts: Sequence[Sample], whole: bool = False) -> List[Header]:
    """Read the header of each image. A remote image is not opened, because Detectron2 fetches it when it is needed.

    Args:
        dicts: images in Detectron2's format. Only `file_name` is required.
        whole: decode the images, which also finds truncated files.
    """
    headers: List[Header] = []
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        for start in range(0, len(dicts), CHUNK):
            headers += pool.map(partial(_read_header, whole=whole), dicts[start : start + CHUNK])
    return headers


def with_sizes(dicts: Sequence[Sample], headers: Sequence[Header]) -> List[Sample]:
    """Return the samples with `width` and `height`. Detectron2 does not require either key for training.

    A sample that lacks a key is copied, not changed. It keeps lacking the key if its header does not give the size.
    """
    return [_with_size(sample, header.size) for sample, header in zip(dicts, headers)]


def has_size(sample: Sample) -> bool:
    return "width" in sample and "height" in sample


def for_evaluation(dicts: Sequence[Sample]) -> List[Sample]:
    """Return the samples that training would use, with `width`, `height` and `image_id`, which evaluation requires."""
    headers = read_headers(dicts)
    usable = [sample for sample, header in zip(with_sizes(dicts, headers), headers) if header.fault is None]
    usable = [sample if has_size(sample) else _with_size(sample, _fetch_size(sample)) for sample in usable]
    if all("image_id" in sample for sample in usable):
        return usable
    return [{**sample, "image_id": index} for index, sample in enumerate(usable)]


def _fetch_size(sample: Sample) -> Tuple[int, int]:
    """Return (width, height) of a remote image. This fetches the whole image."""
    height, width = read_image(sample["file_name"]).shape[:2]
    return width, height


def _with_size(sample: Sample, size: Optional[Tuple[int, int]]) -> Sample:
    if size is None or has_size(sample):
        return sample
    return {"width": size[0], "height": size[1], **sample}


def _read_header(sample: Sample, whole: bool = False) -> Header:
    path = os.fspath(sample["file_name"])
    if REMOTE.match(path):
        return Header()
    if not os.path.exists(path):
        return Header("not there")
    try:
        with Image.open(path) as image:  # reads only the header
            if image.format not in FORMATS:
                return Header(f"is {image.format}, not one of {', '.join(FORMATS)}: convert it")
            size, mode = image.size, image.mode
            orientation = _orientation(image)
            if image.format == "TIFF" and orientation in NOT_UPRIGHT:
                return Header("is a TIFF with an EXIF orientation, which is read the wrong way up: save it upright")
            if whole:
                image.draft(None, (1, 1))  # decodes a JPEG coarsely and fast, but to its end
                image.load()
    except IMAGE_ERRORS as e:
        return Header(f"does not open ({type(e).__name__})")
    if mode in DEEP:
        return Header("has more than 8 bits a channel, which would be clipped: convert it to 8 bits")
    size = size[::-1] if orientation in TURNED else size
    expected: Tuple[Any, Any] = (sample.get("width", size[0]), sample.get("height", size[1]))
    if size != expected:
        return Header(f"is {size[0]}x{size[1]}, annotated as {expected[0]}x{expected[1]}")
    return Header(None, size)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except IMAGE_ERRORS:
        return 1  # Detectron2 does not turn an image whose EXIF it cannot read
