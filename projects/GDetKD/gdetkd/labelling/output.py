"""Write the boxes as a COCO JSON, which annotation tools open."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from ..data.kinds.pseudo import INFO
from ..errors import GDetKDError
from ..files import written_whole
from .images import ImageFile
from .part import Found
from .source import Source
from .thresholds import ClassThreshold

# Key of `info` under which a reader finds how the labels were made.
VERSION = 1


class Labels(NamedTuple):
    """Hold everything that is written.

    Attributes:
        images: the images, with their boxes.
        classes: the student's class names in order.
        thresholds: the threshold of each class, by name.
        chosen_on: the dataset on which thresholds were chosen, or "" if all were given.
        unreadable: number of images that cannot be read.
        left_out: number of images that are left out because DATASETS.TRAIN has them.
    """

    images: List[Tuple[ImageFile, Found]]
    classes: Sequence[str]
    thresholds: Mapping[str, ClassThreshold]
    chosen_on: str
    unreadable: int
    left_out: int

    def is_above(self, label: int, score: float) -> bool:
        """Return whether a box of a class, given as an index, reaches the threshold of the class."""
        return score >= self.thresholds[self.classes[label]].min_score

    def counts_above(self) -> Dict[str, int]:
        """Return the number of boxes from the threshold on, by class name."""
        counts = dict.fromkeys(self.classes, 0)
        for _, found in self.images:
            for label, score in zip(found.classes, found.scores):
                counts[self.classes[label]] += self.is_above(label, score)
        return counts

    def dropped(self) -> int:
        """Return the number of boxes that are left out because the student lacks their class."""
        return sum(found.dropped for _, found in self.images)


def check_any_above(labels: Labels, part: Path) -> None:
    """Raise an error if no box reaches its threshold: such labels would teach that there are no objects.

    Args:
        part: the folder that holds the boxes, for the message.
    """
    if any(labels.counts_above().values()):
        return
    scores = [score for _, found in labels.images for score in found.scores]
    best = f"The highest score is {max(scores):g}" if scores else "There is no box at all"
    raise GDetKDError(
        f"No box on the {len(labels.images)} images reaches the threshold of its class. {best}. Nothing is written. "
        f"Check that the images show the classes, or give a lower --min-score: {str(part)!r} keeps the boxes, so that "
        "this is quick. Delete that folder if you do not need it."
    )


def write_labels(labels: Labels, source: Source, output: Path) -> None:
    """Write the file. It appears only when it is complete.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    content = {
        "info": _info(labels, source),
        "images": [_image(number, image, found) for number, (image, found) in enumerate(labels.images, 1)],
        "annotations": _annotations(labels),
        "categories": [{"id": number, "name": name} for number, name in enumerate(labels.classes, 1)],
    }
    with written_whole(str(output)) as file:
        file.write(json.dumps(content))  # several times faster than `json.dump`


def _info(labels: Labels, source: Source) -> Dict[str, Any]:
    counts = labels.counts_above()
    description = (
        f"Labels that GDetKD made from: {source.kind}. Low scores are written, too. Use the boxes from min_score of "
        f"their class on. {labels.dropped()} boxes of classes that the student lacks are left out."
    )
    described = {
        "version": VERSION,
        "source": source.kind,
        "teacher": source.origin(),
        "classes": list(labels.classes),
        "thresholds": {name: {**asdict(item), "boxes": counts[name]} for name, item in labels.thresholds.items()},
        "chosen_on": labels.chosen_on or None,
        "unreadable": labels.unreadable,
        "left_out": labels.left_out,
    }
    return {"description": description, INFO: described}


def _image(number: int, image: ImageFile, found: Found) -> Dict[str, Any]:
    size = {"width": image.width, "height": image.height}
    return {"id": number, "file_name": image.name, **size, "bytes": found.bytes, "sha256": found.sha256}


def _annotations(labels: Labels) -> List[Dict[str, Any]]:
    rows = [
        (number, *box)
        for number, (_, found) in enumerate(labels.images, 1)
        for box in zip(found.boxes, found.scores, found.classes)
    ]
    return [
        {
            "id": identity,
            "image_id": number,
            "category_id": label + 1,
            "bbox": box,
            "area": round(box[2] * box[3], 2),
            "iscrowd": 0,
            "score": score,
        }
        for identity, (number, box, score, label) in enumerate(rows, 1)
    ]


def table_rows(labels: Labels) -> List[List[str]]:
    """Return the thresholds as text, a row for each class: class, threshold, precision, recall, F1, boxes."""
    counts = labels.counts_above()
    return [[name, *threshold_texts(item), str(counts[name])] for name, item in labels.thresholds.items()]


def threshold_texts(item: ClassThreshold) -> List[str]:
    """Return threshold, precision, recall and F1 as text. A value that is not known is a dash."""
    return [
        f"{item.min_score:.3f}",
        *("-" if value is None else f"{value:.3f}" for value in (item.precision, item.recall, item.f1)),
    ]
