"""YOLO's layout, as Ultralytics' tools, Roboflow, CVAT, Label Studio, labelImg and darknet write it."""

import os
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence, Tuple

from detectron2.structures import BoxMode

from ..errors import GDetKDError
from .coco_quirks import Counts
from .headers import read_headers
from .yolo_files import LabelFinder, find_images
from .yolo_labels import Label, cut_at_edge, reaches_over, read_labels, to_pixels
from .yolo_yaml import Description

Sample = Dict[str, Any]
# Maps an image to its (width, height) as Detectron2 reads it, or to None if it cannot be read.
Sizes = Dict[str, Optional[Tuple[int, int]]]
# Stands for the size of an image that cannot be read. Such an image is left out or refused later. Until then it needs
# its objects: Detectron2 drops images without objects first, and nobody would learn that it cannot be read.
UNKNOWN_SIZE = (1000, 1000)


def load_yolo(
    description: Description, split: str, allow_outside: bool = False, sizes: Optional[Sizes] = None
) -> Tuple[List[Sample], Counts]:
    """Read a split's images in Detectron2's format.

    An image without a label file shows no object, as for Ultralytics. The image's size, by which the labels are
    multiplied, is the one that Detectron2 reads: turned by EXIF.

    Args:
        split: as the description names it.
        allow_outside: paths may lead out of the folder of the description and of Detectron2's data folder.
        sizes: known sizes; this adds to them, so that a second reading need not look at the images.

    Returns:
        the samples, and how often each quirk was put right, by what a message calls it.

    Raises:
        GDetKDError: a split is not there, no image has a label file, or a label cannot be read.
    """
    counts: Counter = Counter()
    images, others, repeated = find_images(description, split, allow_outside)
    counts["images are listed again; each is read once"] += repeated
    for ending, count in others.items():
        counts[f"files {ending} are no images and are passed over"] += count
    finder = LabelFinder()
    files = [finder.find(image) for image in images]
    _check_label_files(files, images)
    counts["images have no label file and are taken to show no object"] += files.count(None)
    sizes = sizes if sizes is not None else {}
    _add_sizes(images, sizes)
    samples = []
    for image, file in zip(images, files):
        labels = read_labels(file, description.classes, description.keypoints, counts) if file is not None else []
        sample: Sample = {"file_name": image, "image_id": _identity(image, description)}
        size = sizes[image]
        if size is not None:
            sample.update(height=size[1], width=size[0])
        sample["annotations"] = [_annotation(label, size or UNKNOWN_SIZE, counts) for label in labels]
        samples.append(sample)
    _keep_polygons_of_all(samples, counts)
    return samples, {name: count for name, count in counts.items() if count}


def _check_label_files(files: Sequence[Optional[str]], images: Sequence[str]) -> None:
    if images and not any(files):
        raise GDetKDError(
            f"None of {len(images)} images has a label file. The labels of {os.path.dirname(images[0])!r} are looked "
            "for beside the images, or in the folder `labels` that stands beside the folder `images`. Correct the "
            "path, or register the images with `kind: images` if they have no labels."
        )


def _add_sizes(images: Sequence[str], sizes: Sizes) -> None:
    unknown = [image for image in images if image not in sizes]
    headers = read_headers([{"file_name": image} for image in unknown]) if unknown else []
    sizes.update({image: header.size for image, header in zip(unknown, headers)})


def _identity(image: str, description: Description) -> str:
    return os.path.relpath(image, description.folder).replace(os.sep, "/")


def _annotation(label: Label, size: Tuple[int, int], counts: Counter) -> Dict[str, Any]:
    width, height = size
    box = to_pixels(label.box, width, height)
    annotation: Dict[str, Any] = {"category_id": label.category, "bbox_mode": BoxMode.XYXY_ABS}
    if label.polygon is not None:
        annotation["segmentation"] = [cut_at_edge(to_pixels(label.polygon, width, height), width, height)]
    if reaches_over(box, width, height):
        counts["boxes reach over the edge of their image and are cut there"] += 1
        box = cut_at_edge(box, width, height)
    return {**annotation, "bbox": box}


def _keep_polygons_of_all(samples: Sequence[Sample], counts: Counter) -> None:
    """Leave polygons out where some objects have none: Detectron2 reads masks of all objects of an image or of none."""
    annotations = [each for sample in samples for each in sample["annotations"]]
    with_polygon = sum("segmentation" in each for each in annotations)
    if 0 < with_polygon < len(annotations):
        counts["polygons are read as boxes alone, because other objects have no polygon"] += with_polygon
        for each in annotations:
            each.pop("segmentation", None)
