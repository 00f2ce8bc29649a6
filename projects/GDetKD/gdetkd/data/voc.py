"""PASCAL VOC's layout: read as Detectron2 reads it, also where an annotation tool wrote it in another way.

Objects that are marked as difficult or truncated are objects as all others, as for Detectron2.
"""

import os
from collections import Counter
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from detectron2.structures import BoxMode

from ..errors import GDetKDError
from .coco_quirks import Counts
from .folders import Listing, is_image, leaves, without_image_ending
from .headers import read_headers
from .voc_layout import NAMED, Layout, find_layout
from .voc_quirks import Size, count_sizes_as_corners, cut_a_pixel, find_first_pixel, in_order
from .voc_xml import VocFile, VocObject, read_file

Sample = Dict[str, Any]


class Image(NamedTuple):
    """
    Attributes:
        name: of the annotation, without its ending.
        path: the image.
        file: the annotation.
    """

    name: str
    path: str
    file: VocFile


def load_voc(
    root: str,
    split: Optional[str],
    classes: Optional[Sequence[str]],
    allow_outside: bool = False,
    first_pixel: Optional[int] = None,
    most_bad: float = 0.01,
) -> Tuple[List[Sample], Counts]:
    """Read a split's images in Detectron2's format.

    Args:
        root: holds Annotations, ImageSets and JPEGImages, or what `voc_layout.find_layout` takes for them.
        split: names a list of images or a folder; None: all.
        classes: in the order of their indices; None raises an error that lists those that the files name.
        allow_outside: a name of the list may lead out of `root`.
        first_pixel: the number of the first pixel, 1 in VOC; None: 0 if the files have a corner at 0, else 1.
        most_bad: the share of listed images that may have no annotation.

    Returns:
        the samples, and how often each quirk was put right, by what a message calls it.

    Raises:
        GDetKDError: a file is not VOC's, or names a class that is not among `classes`.
    """
    counts: Counter = Counter()
    layout = find_layout(root, split, allow_outside)
    _check_missing(layout, root, most_bad, counts)
    images = _read_images(layout, counts)
    known = _check_classes(images, classes, root)
    sizes = _sizes(images, counts)
    of_pixels = [
        (each.corners, size) for image, size in zip(images, sizes) for each in image.file.objects if each.is_of_pixels
    ]
    count_sizes_as_corners(of_pixels, counts)
    if first_pixel is None:
        first_pixel = find_first_pixel([corners for corners, _ in of_pixels], counts)
    samples = []
    for image, size in zip(images, sizes):
        sample: Sample = {"file_name": image.path, "image_id": image.name}
        if size is not None:
            sample.update(height=size[1], width=size[0])
        found = image.file.objects
        sample["annotations"] = [_annotation(each, known, first_pixel, size, counts) for each in found]
        samples.append(sample)
    return samples, {name: count for name, count in counts.items() if count}


def _check_missing(layout: Layout, root: str, most: float, counts: Counter) -> None:
    missing = layout.missing or []
    total = len(missing) + len(layout.names)
    if len(missing) > most * total:
        raise GDetKDError(
            f"{len(missing)} of {total} images of a list in {root!r} have no annotation: there is no "
            f"{os.path.join(layout.annotations.folder, missing[0])}.xml. That is more than INPUT.MAX_BAD_FRACTION "
            f"{most:g}: add the annotations (an image without objects has one, too), or take the names out of the list."
        )
    counts["listed images have no annotation and are left out"] += len(missing)


def _read_images(layout: Layout, counts: Counter) -> List[Image]:
    images: List[Image] = []
    owners: Dict[str, str] = {}
    for name in layout.names:
        found = layout.annotations.find(f"{name}.xml") or f"{name}.xml"
        annotation = os.path.join(layout.annotations.folder, found)
        file = read_file(annotation, counts)
        path = _find_image(name, file.filename, layout.images, annotation, counts)
        if path in owners:
            raise GDetKDError(
                f"{owners[path]!r} and {annotation!r} are both annotations of {path!r}: remove one of them, or correct "
                "its <filename>."
            )
        owners[path] = annotation
        images.append(Image(name, path, file))
    if layout.missing is None:
        there = sum(is_image(name) for listing in layout.images for name in listing.names)
        used = sum(os.path.exists(image.path) for image in images)
        counts["images have no annotation and are passed over"] += max(0, there - used)
    return images


def _find_image(name: str, filename: str, folders: Sequence[Listing], annotation: str, counts: Counter) -> str:
    """Return the image of an annotation: the one of its name, whatever the ending, else the one of `filename`.

    Raises:
        GDetKDError: several images have the name, and `filename` is none of them.
    """
    for listing in folders:
        found = listing.images_of(name)
        named = [each for each in found if os.path.basename(each) == os.path.basename(filename)]
        found = named or found
        if len(found) > 1:
            raise GDetKDError(
                f"{annotation!r} could be of {' or '.join(found[:NAMED])} in {listing.folder!r}: let its <filename> "
                "name the image with its ending."
            )
        if found:
            counts["images are not spelt as their annotations"] += os.path.splitext(found[0])[0] != name
            return os.path.join(listing.folder, found[0])
    for listing in folders:
        for text in (filename, os.path.basename(filename)):
            image = listing.find(text) if text else None
            if image is not None and is_image(image):
                counts["images have another name than their annotations, which name them in <filename>"] += 1
                return os.path.join(listing.folder, image)
    ending = filename[len(without_image_ending(filename)) :] or ".jpg"
    path = os.path.join(folders[0].folder, name + ending)
    if leaves(name):  # DATASETS.ALLOW_OUTSIDE lets a list name it
        return path if os.path.exists(path) else os.path.join(folders[0].folder, f"{name}.jpg")
    return path


def _check_classes(images: Sequence[Image], classes: Optional[Sequence[str]], root: str) -> List[str]:
    found = Counter(each.name for image in images for each in image.file.objects)
    if classes is None:
        names = ", ".join(sorted(found))
        raise GDetKDError(
            f"{root!r} does not say the order of its classes. Add `classes: [{names}]`, which are all of this split, "
            "to its entry in DATASETS.REGISTER, and give every split the same list."
        )
    unknown = {name: count for name, count in found.items() if name not in classes}
    if not unknown:
        return list(classes)
    first = {each.name: image.name for image in reversed(images) for each in image.file.objects}
    named = ", ".join(f"{name!r} ({count}, first in {first[name]}.xml)" for name, count in sorted(unknown.items()))
    similar = {name.lower(): name for name in classes}
    hints = [f"{name!r} may be {similar[name.lower()]!r}" for name in sorted(unknown) if name.lower() in similar]
    raise GDetKDError(
        f"{root!r} has objects of {len(unknown)} classes that are not among its `classes`: {named}. Add these names to "
        f"`classes` in DATASETS.REGISTER, or correct the files.{' '.join(['', *hints]) + '.' if hints else ''}"
    )


def _sizes(images: Sequence[Image], counts: Counter) -> List[Size]:
    """Return the size of each image, from its header where the file does not say; None if it has none, either."""
    unknown = [{"file_name": image.path} for image in images if image.file.size is None]
    headers = iter(read_headers(unknown) if unknown else ())
    counts["sizes are not in the annotations and are read from the images"] += len(unknown)
    return [image.file.size or next(headers).size for image in images]


def _annotation(
    found: VocObject, classes: Sequence[str], first_pixel: int, size: Size, counts: Counter
) -> Dict[str, Any]:
    x1, y1, x2, y2 = in_order(found.corners, counts)
    has_area = x1 < x2 and y1 < y2  # `clean_annotations` counts and leaves out a box without
    if found.is_of_pixels and has_area:
        # A box holds the pixels of its corners, so its left and upper edges lie one pixel before VOC's numbers.
        x1, y1, x2, y2 = cut_a_pixel((x1 - first_pixel, y1 - first_pixel, x2, y2), size, counts)
    return {"category_id": classes.index(found.name), "bbox": [x1, y1, x2, y2], "bbox_mode": BoxMode.XYXY_ABS}
