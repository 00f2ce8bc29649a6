"""Run a source of boxes over images, and go on where an earlier run stopped."""

from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List, NamedTuple, Optional, Sequence, Set

import torch
from detectron2.structures import Boxes
from detectron2.utils import comm
from tqdm import tqdm

from ..safe_load import sha256_of_file
from .images import ImageFile
from .part import Found, Identity, Part
from .source import Detections, Source

# Decimal digits that are written. They hide the rounding by which processes with other numbers of threads differ.
BOX_DIGITS, SCORE_DIGITS = 2, 5
# A threshold of 1 (`thresholds.NONE_TRUSTED`) leaves out every box, so no score is 1.
HIGHEST_SCORE = 1 - 10**-SCORE_DIGITS
FILES_AT_ONCE = 8


class Kept(NamedTuple):
    """Say which boxes are kept.

    Attributes:
        floor: the lowest score, from 0 to 1.
        classes: for each class of the source, the student's class index; None if the student lacks the class.
    """

    floor: float
    classes: Sequence[Optional[int]]


def detect_all(source: Source, images: Sequence[ImageFile], part: Part, kind: str, kept: Kept) -> Dict[str, Found]:
    """Return the boxes of all images, by name, in the main process. All processes must call this function.

    Other processes return an empty dict, because all boxes of a large dataset take gigabytes.

    Args:
        part: keeps the boxes, so that a killed run can continue.
        kind: "labels", or "validation" and what tells the source of these boxes.
    """
    before = {found.identity for found in part.read(kind)}
    done = _unchanged(before, images)
    names_done = {name for name, *_ in done}
    left = [image for image in images if image.name not in names_done]
    comm.synchronize()  # every process has read what an earlier run left
    own = len(range(comm.get_rank(), len(left), comm.get_world_size()))
    with (
        part.appending(kind) as add,
        tqdm(total=own, desc=kind.partition("-")[0], disable=not comm.is_main_process()) as progress,
    ):
        for image, detections in source.detect(left):
            add(as_found(image, detections, kept))
            progress.update()
    comm.synchronize()
    if not comm.is_main_process():
        return {}
    outdated = before - done
    found = {found.name: found for found in part.read(kind) if found.identity not in outdated}
    return {image.name: found[image.name] for image in images}


def _unchanged(before: Set[Identity], images: Sequence[ImageFile]) -> Set[Identity]:
    """Return what was found before in images whose content is still the same."""
    sizes = {(name, size) for name, size, _ in before}
    same = [image for image in images if (image.name, image.bytes) in sizes]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        digests = pool.map(sha256_of_file, [image.path for image in same])
        return {(image.name, image.bytes, digest) for image, digest in zip(same, digests)} & before


def as_found(image: ImageFile, detections: Detections, kept: Kept) -> Found:
    """Return the boxes of an image as they are written: cut at the edge of the image and rounded, the best first.

    Boxes without area and boxes below the floor are left out.
    """
    scores = [min(round(score, SCORE_DIGITS), HIGHEST_SCORE) for score in detections.scores.tolist()]
    boxes = Boxes(detections.boxes.to(torch.float64, copy=True))
    boxes.clip((image.height, image.width))
    rows, dropped = [], 0
    for box, score, index in zip(boxes.tensor.tolist(), scores, detections.classes.tolist()):
        written = _as_xywh(box)
        if score < kept.floor or min(written[2:]) <= 0:
            continue
        label = kept.classes[index]
        if label is None:
            dropped += 1
        else:
            rows.append((-score, label, written))
    rows.sort()  # equal scores also get an order that does not depend on the source
    columns: List[List] = [[box for *_, box in rows], [-score for score, *_ in rows], [label for _, label, _ in rows]]
    return Found(image.name, image.bytes, sha256_of_file(image.path), *columns, dropped)


def _as_xywh(box: Sequence[float]) -> List[float]:
    x1, y1, x2, y2 = (round(value, BOX_DIGITS) for value in box)
    return [x1, y1, round(x2 - x1, BOX_DIGITS), round(y2 - y1, BOX_DIGITS)]
