"""What real annotations and images have wrong with them: left out or named, with counts, before training."""

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
NAMED = 5  # bad images in a message
# Pixels from the origin beyond which a coordinate is taken for none; integers overflow at the 200-fold.
FARTHEST = 1e7


@dataclass(frozen=True)
class Findings:
    """Counts of annotations.

    Attributes:
        without_area: left out: their box is no wider or higher than nothing, or not a number.
        far: left out: their box has a coordinate that no image has.
        outside: left out: nothing of their box is in the image.
        over_edge: kept: a part of their box is outside the image, and is cut off in training.
        crowds: kept: training passes them over, evaluation does not punish detections in them.
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
            (self.over_edge, "boxes reach over the edge of their image, and are cut there"),
            (self.crowds, "are crowds, which training passes over"),
        ]
        return "; ".join(f"{count} {text}" for count, text in parts if count)


def clean_annotations(dicts: List[Sample]) -> Findings:
    """Takes annotations out, in place, that no detector can learn from.

    Args:
        dicts: in Detectron2's format.
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
    # Of an integer that no float is as large as, `isfinite` cannot tell.
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
    # A pixel of tolerance: conventions differ by that.
    return "over_edge" if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1 else None


def find_bad_images(dicts: List[Sample], whole: bool = False) -> Dict[str, str]:
    """Of each image that cannot be used its file name, and why.

    Args:
        whole: decode the images. Else headers alone are read, and a truncated file that has its header is not found.
    """
    return _faults(dicts, read_headers(dicts, whole))


def _faults(dicts: List[Sample], headers: List[Header]) -> Dict[str, str]:
    return {image["file_name"]: header.fault for image, header in zip(dicts, headers) if header.fault is not None}


class BadImages:
    """Counts the images that turn out to be broken in training, and stops it when they are too many.

    Args:
        total: images of the data sets.
        left_out: those that were found to be bad before.
        most: share of bad images above which the set itself is taken to be wrong.
        what: the data sets' names, for messages.
    """

    def __init__(self, total: int, left_out: int, most: float, what: str) -> None:
        self.found: Dict[str, str] = {}
        self._total = total
        self._left_out = left_out
        self._most = most
        self._what = what

    def note(self, bad: Dict[str, str]) -> None:
        """
        Args:
            bad: reasons by file name, of images that another was taken in place of.

        Raises:
            GDetKDError: more than the given share are bad.
        """
        new = {path: reason for path, reason in bad.items() if path not in self.found}
        if not new:
            return
        self.found.update(new)
        count = self._left_out + len(self.found)
        message = f"{self._what}: {count} of {self._total} images cannot be used so far, now {_named(new)}."
        if count > self._most * self._total:
            raise GDetKDError(
                f"{message} That is more than INPUT.MAX_BAD_FRACTION {self._most:g}: correct the files, or raise it to "
                "train without them."
            )
        logger.warning("%s Others are taken in their place.", message)


def without_bad_images(dicts: List[Sample], most: float, what: str) -> Tuple[List[Sample], np.ndarray]:
    """Leave out the images that cannot be used. They are counted and named in the log.

    Args:
        most: share of bad images above which the set itself is taken to be wrong.
        what: the data sets' names, for messages.

    Returns:
        the samples that are kept, with their sizes where these are known; and (len(dicts),) booleans, which of `dicts`
        are kept.

    Raises:
        GDetKDError: more than `most` are bad.
    """
    headers = read_headers(dicts)
    bad, dicts = _faults(dicts, headers), with_sizes(dicts, headers)
    kept = np.array([image["file_name"] not in bad for image in dicts], bool)
    if not bad:
        return dicts, kept
    message = f"{what}: {len(bad)} of {len(dicts)} images cannot be used ({_named(bad)})."
    if len(bad) > most * len(dicts):
        raise GDetKDError(
            f"{message} That is more than INPUT.MAX_BAD_FRACTION {most:g}: correct the folder or the annotations, or "
            "raise it to leave these images out."
        )
    logger.warning("%s They are left out.", message)
    return [image for image, is_kept in zip(dicts, kept) if is_kept], kept


def check_images(dicts: List[Sample], what: str) -> None:
    """
    Raises:
        GDetKDError: an image cannot be used; evaluation would break off there.
    """
    bad = find_bad_images(dicts, whole=True)
    if bad:
        raise GDetKDError(
            f"{what}: {len(bad)} of {len(dicts)} images cannot be used for evaluation ({_named(bad)}). Correct the "
            "files or the annotations."
        )


def _named(bad: Dict[str, str]) -> str:
    some = [f"{os.path.basename(path)} {reason}" for path, reason in list(bad.items())[:NAMED]]
    return "; ".join(some + ["..."] * (len(bad) > NAMED))
