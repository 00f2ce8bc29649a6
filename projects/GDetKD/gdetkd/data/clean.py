"""Find annotations and images that cannot be used, and leave them out or report them with counts."""

import logging
import math
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from detectron2.structures import BoxMode

from ..errors import GDetKDError
from .headers import Header, read_headers, with_sizes

logger = logging.getLogger(__name__)

Sample = Dict[str, Any]
MOST_NAMED = 5  # bad images that a message names
# A coordinate farther than this from the origin, in pixels, is an error. Integers overflow at 200 times as many.
FARTHEST = 1e7


@dataclass(frozen=True)
class Findings:
    """Count the annotations of a dataset that have a defect or are crowds.

    Attributes:
        without_area: left out. Their box has no width or height, or is not a number.
        far: left out. Their box has a coordinate that is too large for an image.
        outside: left out. Their box lies outside of the image.
        over_edge: kept. A part of their box lies outside of the image. Training cuts it off.
        crowds: kept. Training ignores them, and evaluation does not punish detections in them.
    """

    without_area: int = 0
    far: int = 0
    outside: int = 0
    over_edge: int = 0
    crowds: int = 0

    @property
    def left_out(self) -> int:
        """Return how many annotations were left out."""
        return self.without_area + self.far + self.outside

    def __str__(self) -> str:
        parts = [
            (self.without_area, "annotations without area are left out"),
            (self.far, f"annotations with coordinates beyond {FARTHEST:.0f} pixels are left out"),
            (self.outside, "annotations outside their image are left out"),
            (self.over_edge, "boxes reach over the edge of their image, and training cuts them there"),
            (self.crowds, "are crowds, which training ignores"),
        ]
        return "; ".join(f"{count} {text}" for count, text in parts if count)


def clean_annotations(dicts: List[Sample]) -> Findings:
    """Leave out annotations that no detector can learn from.

    Args:
        dicts: images in Detectron2's format, changed in place.
    """
    counts = dict.fromkeys(Findings.__dataclass_fields__, 0)
    for image in dicts:
        annotations = image.get("annotations", [])
        kept = []
        for annotation in annotations:
            finding = _judge(annotation, image)
            if finding is not None:
                counts[finding] += 1
            if finding not in ("without_area", "far", "outside"):
                counts["crowds"] += bool(annotation.get("iscrowd", 0))
                kept.append(annotation)
        if len(kept) < len(annotations):
            image["annotations"] = kept
    return Findings(**counts)


def _judge(annotation: Sample, image: Sample) -> Optional[str]:
    # `isfinite` fails on an integer that is too large for a float.
    if not all(isinstance(value, int) or math.isfinite(value) for value in annotation["bbox"]):
        return "without_area"
    if any(abs(value) > FARTHEST for value in annotation["bbox"]):
        return "far"
    x1, y1, x2, y2 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    if not (x2 > x1 and y2 > y1):
        return "without_area"
    width, height = image.get("width", math.inf), image.get("height", math.inf)
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        return "outside"
    # One pixel is tolerated, because tools count pixels differently.
    return "over_edge" if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1 else None


def find_bad_images(dicts: List[Sample], whole: bool = False) -> Dict[str, str]:
    """Return the file names of images that cannot be used, with the reasons.

    Args:
        whole: decode the images. If False, read only headers, which does not find truncated files.
    """
    return _faults(dicts, read_headers(dicts, whole))


def _faults(dicts: List[Sample], headers: List[Header]) -> Dict[str, str]:
    return {image["file_name"]: header.fault for image, header in zip(dicts, headers) if header.fault is not None}


class BadImages:
    """Count the images that fail in training, and stop the training if there are too many.

    Args:
        total: the number of images in the datasets.
        left_out: the number of images that were left out before training.
        max_fraction: the share of bad images that is allowed.
        names: the names of the datasets, for messages.
    """

    def __init__(self, total: int, left_out: int, max_fraction: float, names: str) -> None:
        self.found: Dict[str, str] = {}
        self._total = total
        self._left_out = left_out
        self._max_fraction = max_fraction
        self._names = names

    def note(self, bad: Dict[str, str]) -> None:
        """Count bad images, which other images replaced in a batch.

        Args:
            bad: maps the file name of an image to the reason.

        Raises:
            GDetKDError: too many images are bad.
        """
        new = {path: reason for path, reason in bad.items() if path not in self.found}
        if not new:
            return
        self.found.update(new)
        count = self._left_out + len(self.found)
        message = f"{self._names}: {count} of {self._total} images cannot be used so far, now {_named(new)}."
        if count > self._max_fraction * self._total:
            raise GDetKDError(
                f"{message} That is more than INPUT.MAX_BAD_FRACTION {self._max_fraction:g}. Correct the files, or "
                "raise it to train without them."
            )
        logger.warning("%s Other images replace them.", message)


def without_bad_images(dicts: List[Sample], max_fraction: float, names: str) -> Tuple[List[Sample], np.ndarray]:
    """Leave out images that cannot be used, and log which.

    Args:
        max_fraction: the share of bad images that is allowed.
        names: the names of the datasets, for messages.

    Returns:
        the samples that are kept, with their sizes if known, and (len(dicts),) booleans that say which samples these
        are.

    Raises:
        GDetKDError: too many images are bad.
    """
    headers = read_headers(dicts)
    bad, dicts = _faults(dicts, headers), with_sizes(dicts, headers)
    kept = np.array([image["file_name"] not in bad for image in dicts], bool)
    if not bad:
        return dicts, kept
    message = f"{names}: {len(bad)} of {len(dicts)} images cannot be used ({_named(bad)})."
    if len(bad) > max_fraction * len(dicts):
        raise GDetKDError(
            f"{message} That is more than INPUT.MAX_BAD_FRACTION {max_fraction:g}. Correct the folder or the "
            "annotations, or raise it to leave these images out."
        )
    logger.warning("%s They are left out.", message)
    return [image for image, is_kept in zip(dicts, kept) if is_kept], kept


def check_images(dicts: List[Sample], names: str) -> None:
    """Raise an error if an image cannot be used. An evaluation would fail at that image."""
    bad = find_bad_images(dicts, whole=True)
    if bad:
        raise GDetKDError(
            f"{names}: {len(bad)} of {len(dicts)} images cannot be used for evaluation ({_named(bad)}). Correct the "
            "files or the annotations."
        )


def _named(bad: Dict[str, str]) -> str:
    some = [f"{os.path.basename(path)} {reason}" for path, reason in list(bad.items())[:MOST_NAMED]]
    return "; ".join(some + ["..."] * (len(bad) > MOST_NAMED))
