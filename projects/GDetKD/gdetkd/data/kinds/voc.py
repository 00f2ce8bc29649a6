"""Datasets in PASCAL VOC's layout, also as annotation tools write it. Read as Detectron2 reads VOC.

Objects that are marked as difficult or truncated are ordinary objects, as in Detectron2.
"""

import os
from collections import Counter
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from detectron2.structures import BoxMode

from ...errors import GDetKDError
from ..headers import read_headers
from .base import DATASET_KIND_REGISTRY, Counts, DatasetKind, Keys, Sample
from .voc_images import find_image
from .voc_layout import Layout, find_classes, find_layout
from .voc_quirks import Size, count_sizes_as_corners, cut_a_pixel, find_first_pixel, in_order
from .voc_xml import VocFile, VocObject, read_file


@DATASET_KIND_REGISTRY.register()
class Voc(DatasetKind):
    """Read XML annotations in PASCAL VOC's layout."""

    keys = (Keys({"root"}, {"split", "classes", "first_pixel"}),)
    path_keys = ("root",)
    inner_path_keys = ("split",)

    @classmethod
    def find_problems(cls, entry: Mapping[str, Any]) -> List[str]:
        problems = super().find_problems(entry)
        if entry.get("first_pixel", 1) not in (0, 1):
            problems.append(f"has first_pixel {entry['first_pixel']!r}, not 0 or 1")
        return problems

    def check_files(self) -> None:
        super().check_files()
        find_layout(self.source, self.entry.get("split"), self.allow_outside)  # raises an error if there is none

    def class_names(self) -> Optional[List[str]]:
        if "classes" in self.entry or not os.path.isdir(self.source):
            return super().class_names()
        return find_classes(self.source, self.entry.get("split"))

    def load(self) -> Tuple[List[Sample], Counts]:
        return load_voc(
            self.source,
            self.entry.get("split"),
            self.class_names(),
            self.allow_outside,
            self.entry.get("first_pixel"),
            self.max_bad_fraction,
        )


class AnnotatedImage(NamedTuple):
    """Hold an image and its annotation file.

    Attributes:
        name: the name of the annotation file, without its ending.
        path: the path of the image.
        file: the content of the annotation file.
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
    max_bad_fraction: float = 0.01,
) -> Tuple[List[Sample], Counts]:
    """Read the images of a split in Detectron2's format.

    Args:
        root: the folder of the dataset, see `voc_layout.find_layout`.
        split: the name of a list of images or of a folder. None: all images.
        classes: class names in order. None raises an error that lists the names in the files.
        allow_outside: whether names of a list may lead out of `root`.
        first_pixel: the number of the first pixel, 1 in VOC. None: 0 if the files have a corner at 0, else 1.
        max_bad_fraction: the share of listed images that may have no annotation.

    Returns:
        the samples, and how often each quirk was corrected.

    Raises:
        GDetKDError: a file is not a VOC annotation, or names a class that is not in `classes`.
    """
    counts: Counter = Counter()
    layout = find_layout(root, split, allow_outside)
    _check_missing(layout, root, max_bad_fraction, counts)
    images = _read_images(layout, counts)
    class_list = _check_classes(images, classes, root)
    sizes = _sizes(images, counts)
    pixel_boxes = [
        (found.corners, size) for image, size in zip(images, sizes) for found in image.file.objects if found.has_pixels
    ]
    count_sizes_as_corners(pixel_boxes, counts)
    if first_pixel is None:
        first_pixel = find_first_pixel([corners for corners, _ in pixel_boxes], counts)
    samples = []
    for image, size in zip(images, sizes):
        sample: Sample = {"file_name": image.path, "image_id": image.name}
        if size is not None:
            sample.update(height=size[1], width=size[0])
        sample["annotations"] = [
            _annotation(found, class_list, first_pixel, size, counts) for found in image.file.objects
        ]
        samples.append(sample)
    return samples, {name: count for name, count in counts.items() if count}


def _check_missing(layout: Layout, root: str, max_bad_fraction: float, counts: Counter) -> None:
    missing = layout.missing or []
    total = len(missing) + len(layout.names)
    if len(missing) > max_bad_fraction * total:
        example = os.path.join(layout.annotations.folder, missing[0])
        raise GDetKDError(
            f"{len(missing)} of {total} images of a list in {root!r} have no annotation: {example}.xml does not exist. "
            f"That is more than INPUT.MAX_BAD_FRACTION {max_bad_fraction:g}. Add the annotations, also for images "
            "without objects, or take the names out of the list."
        )
    counts["listed images have no annotation and are left out"] += len(missing)


def _read_images(layout: Layout, counts: Counter) -> List[AnnotatedImage]:
    images: List[AnnotatedImage] = []
    annotation_of: Dict[str, str] = {}  # by the path of the image
    for name in layout.names:
        found = layout.annotations.find(f"{name}.xml") or f"{name}.xml"
        annotation = os.path.join(layout.annotations.folder, found)
        file = read_file(annotation, counts)
        path = find_image(name, file.filename, layout.images, annotation, counts)
        if path in annotation_of:
            raise GDetKDError(
                f"{annotation_of[path]!r} and {annotation!r} are both annotations of {path!r}: remove one of them, or "
                "correct its <filename>."
            )
        annotation_of[path] = annotation
        images.append(AnnotatedImage(name, path, file))
    if layout.missing is None:
        existing = sum(len(listing.image_names) for listing in layout.images)
        used = sum(os.path.exists(image.path) for image in images)
        counts["images have no annotation and are skipped"] += max(0, existing - used)
    return images


def _check_classes(images: Sequence[AnnotatedImage], classes: Optional[Sequence[str]], root: str) -> List[str]:
    """Return the class names, or raise an error if they are not known or the files name other classes."""
    found = Counter(item.name for image in images for item in image.file.objects)
    if classes is None:
        names = ", ".join(sorted(found))
        raise GDetKDError(
            f"{root!r} does not say the order of its classes. This split has the classes [{names}]. List them as "
            f"`classes: [{names}]` in DATASETS.REGISTER, with the same list for every split."
        )
    unknown = {name: count for name, count in found.items() if name not in classes}
    if not unknown:
        return list(classes)
    first = {item.name: image.name for image in reversed(images) for item in image.file.objects}
    named = ", ".join(f"{name!r} ({count}, first in {first[name]}.xml)" for name, count in sorted(unknown.items()))
    similar = {name.lower(): name for name in classes}
    hints = [f" {name!r} may be {similar[name.lower()]!r}." for name in sorted(unknown) if name.lower() in similar]
    raise GDetKDError(
        f"{root!r} has objects of {len(unknown)} classes that are not among its `classes`: {named}. Add these names to "
        f"`classes` in DATASETS.REGISTER, or correct the files.{''.join(hints)}"
    )


def _sizes(images: Sequence[AnnotatedImage], counts: Counter) -> List[Size]:
    """Return the size of each image from its annotation, else from its header, else None."""
    unknown = [{"file_name": image.path} for image in images if image.file.size is None]
    headers = iter(read_headers(unknown) if unknown else ())
    counts["sizes are not in the annotations and are read from the images"] += len(unknown)
    return [image.file.size or next(headers).size for image in images]


def _annotation(
    found: VocObject, classes: Sequence[str], first_pixel: int, size: Size, counts: Counter
) -> Dict[str, Any]:
    x1, y1, x2, y2 = in_order(found.corners, counts)
    has_area = x1 < x2 and y1 < y2  # `clean_annotations` counts and leaves out a box without area
    if found.has_pixels and has_area:
        # A box contains the pixels of its corners, so its left and upper edges lie one pixel before VOC's numbers.
        x1, y1, x2, y2 = cut_a_pixel((x1 - first_pixel, y1 - first_pixel, x2, y2), size, counts)
    return {"category_id": classes.index(found.name), "bbox": [x1, y1, x2, y2], "bbox_mode": BoxMode.XYXY_ABS}
