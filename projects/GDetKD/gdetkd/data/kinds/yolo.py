"""Datasets in YOLO's layout, as Ultralytics, Roboflow, CVAT, Label Studio, labelImg and darknet write it."""

import os
from collections import Counter
from functools import cached_property
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from detectron2.structures import BoxMode

from ...errors import GDetKDError
from ..headers import read_headers
from .base import DATASET_KIND_REGISTRY, Counts, DatasetKind, Keys, Sample
from .yolo_files import LabelFinder, find_images
from .yolo_labels import Label, cut_at_edge, reaches_over, read_labels, to_pixels
from .yolo_yaml import Description, describe_folder, read_description

# Maps an image to its (width, height) as Detectron2 reads it, or to None if it cannot be read.
Sizes = Dict[str, Optional[Tuple[int, int]]]
# Replaces the size of an image that cannot be read. Such an image is reported later. Until then it needs its objects,
# because Detectron2 drops images without objects first, and nobody would learn that it cannot be read.
UNKNOWN_SIZE = (1000, 1000)


@DATASET_KIND_REGISTRY.register()
class Yolo(DatasetKind):
    """Read text labels in YOLO's layout, with a data.yaml or obj.data, or from a folder of images."""

    keys = (Keys({"yaml", "split"}), Keys({"images"}, {"classes"}))
    path_keys = ("yaml", "images")
    inner_path_keys = ("split",)

    def __init__(self, entry: Mapping[str, Any], allow_outside: bool = False, max_bad_fraction: float = 0.01) -> None:
        super().__init__(entry, allow_outside, max_bad_fraction)
        self._sizes: Sizes = {}  # kept, because the catalog calls `load` several times

    @cached_property
    def _description(self) -> Description:
        if "yaml" in self.entry:
            return read_description(self.source, self.allow_outside)
        return describe_folder(self.source, super().class_names())

    def check_files(self) -> None:
        super().check_files()
        find_images(self._description, self.entry.get("split", ""), self.allow_outside)  # raises an error without any

    def class_names(self) -> Optional[List[str]]:
        if "classes" in self.entry or not os.path.exists(self.source):
            return super().class_names()
        return self._description.classes

    def load(self) -> Tuple[List[Sample], Counts]:
        return load_yolo(self._description, self.entry.get("split", ""), self.allow_outside, self._sizes)


def load_yolo(
    description: Description, split: str, allow_outside: bool = False, sizes: Optional[Sizes] = None
) -> Tuple[List[Sample], Counts]:
    """Read the images of a split in Detectron2's format.

    An image without a label file shows no object, as in Ultralytics. Labels are multiplied by the size of the image
    that Detectron2 reads, which EXIF may have turned.

    Args:
        split: a split of the description.
        allow_outside: whether paths may lead out of the description's folder and of Detectron2's data folder.
        sizes: sizes that are known already; this function adds to them, so that images are opened only once.

    Returns:
        the samples, and how often each quirk was corrected.

    Raises:
        GDetKDError: a split does not exist, no image has a label file, or a label cannot be read.
    """
    counts: Counter = Counter()
    images, other_files, repeated = find_images(description, split, allow_outside)
    counts["images are listed again and are read once"] += repeated
    for ending, count in other_files.items():
        counts[f"files {ending} are skipped because they are not images"] += count
    finder = LabelFinder()
    files = [finder.find(image) for image in images]
    _check_label_files(files, images)
    counts["images have no label file and are taken to show no object"] += files.count(None)
    sizes = sizes if sizes is not None else {}
    _add_sizes(images, sizes)
    samples = []
    for image, file in zip(images, files):
        labels = read_labels(file, description.classes, description.keypoints, counts) if file is not None else []
        identity = os.path.relpath(image, description.folder).replace(os.sep, "/")
        sample: Sample = {"file_name": image, "image_id": identity}
        size = sizes[image]
        if size is not None:
            sample.update(height=size[1], width=size[0])
        sample["annotations"] = [_annotation(label, size or UNKNOWN_SIZE, counts) for label in labels]
        samples.append(sample)
    _drop_mixed_polygons(samples, counts)
    return samples, {name: count for name, count in counts.items() if count}


def _check_label_files(files: Sequence[Optional[str]], images: Sequence[str]) -> None:
    if images and not any(files):
        raise GDetKDError(
            f"None of {len(images)} images in {os.path.dirname(images[0])!r} has a label file. Labels have to lie "
            "beside the images, or in a folder `labels` beside the folder `images`. Correct the path, or register the "
            "images with `kind: images` if they have no labels."
        )


def _add_sizes(images: Sequence[str], sizes: Sizes) -> None:
    unknown = [image for image in images if image not in sizes]
    headers = read_headers([{"file_name": image} for image in unknown]) if unknown else []
    sizes.update({image: header.size for image, header in zip(unknown, headers)})


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


def _drop_mixed_polygons(samples: Sequence[Sample], counts: Counter) -> None:
    """Leave out polygons if only some objects have them. Detectron2 needs the masks of all objects of an image."""
    annotations = [annotation for sample in samples for annotation in sample["annotations"]]
    with_polygon = sum("segmentation" in annotation for annotation in annotations)
    if 0 < with_polygon < len(annotations):
        counts["polygons are read as boxes alone, because other objects have no polygon"] += with_polygon
        for annotation in annotations:
            annotation.pop("segmentation", None)
