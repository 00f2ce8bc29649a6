"""Boxes that another program wrote as COCO results: a list of {image_id, category_id, bbox, score}."""

import json
from typing import Any, Collection, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

import torch

from ..data.clean import FARTHEST
from ..data.folders import leaves
from ..data.kinds.coco_ids import match_ids
from ..errors import GDetKDError
from ..safe_load import sha256_of_file
from .images import ImageFile
from .source import LARGEST_RELATIVE, Detections, Source, own_part

REMEDY = "Write COCO results: a list of {image_id, category_id, bbox: [x, y, width, height] in pixels, score}."


class Annotations(NamedTuple):
    """Hold the images and categories of a COCO JSON.

    Attributes:
        images: dictionaries with `id` and `file_name`.
        categories: the category ids in the order of the file, with the names.
    """

    images: List[Dict[str, Any]]
    categories: Dict[int, str]


def read_annotations(path: str) -> Annotations:
    """Read the images and categories of a COCO JSON. Its annotations are not used.

    Raises:
        GDetKDError: the file cannot be read, lacks images or categories, or one of them is invalid.
    """
    content = _read_json(path, "--annotations")
    images = content.get("images") if isinstance(content, dict) else None
    categories = content.get("categories") if isinstance(content, dict) else None
    if not _are_dicts(images) or not _are_dicts(categories) or not images or not categories:
        raise GDetKDError(
            f"--annotations {path!r} has no list of `images` and `categories`. Give the COCO JSON whose image and "
            "category ids the results use."
        )
    for image in images:
        name = image.get("file_name")
        if not isinstance(image.get("id"), (int, str)) or not isinstance(name, str) or leaves(name):
            raise GDetKDError(
                f"--annotations {path!r} has the image {image!r}. Each image needs an `id`, and a `file_name` that "
                "stays in the folder of --images."
            )
    for category in categories:
        if not isinstance(category.get("id"), int) or not isinstance(category.get("name"), str):
            raise GDetKDError(f"--annotations {path!r} has the category {category!r}. Give it an `id` and a `name`.")
    for key in ("id", "file_name"):
        if len({image[key] for image in images}) < len(images):
            raise GDetKDError(f"--annotations {path!r} has two images with the same {key}. Give each image its own.")
    return Annotations(images, {category["id"]: category["name"] for category in categories})


class ResultsSource(Source):
    """Read the results of another program.

    Args:
        path: the results.
        flag: the flag that named the file, for messages.
        image_ids: the ids of all images that the results may name.
        categories: the names of the categories by id.

    Raises:
        GDetKDError: the file cannot be read, or an entry is invalid or names an unknown image or category.
    """

    kind = "results"

    def __init__(self, path: str, flag: str, image_ids: Collection[Any], categories: Mapping[int, str]) -> None:
        self._path = path
        self.class_names = tuple(categories.values())
        self.num_classes = len(categories)
        entries = _read_json(path, flag)
        if not _are_dicts(entries):
            raise GDetKDError(f"{flag} {path!r} is not a list of results. {REMEDY}")
        position = {identity: index for index, identity in enumerate(categories)}
        # A registered dataset may have 7 where its file has "7" or "0007".
        match_ids(entries, "image_id", [{"id": image} for image in image_ids])
        known = set(image_ids)
        self._rows: Dict[Any, List[Tuple[List[float], float, int]]] = {}
        for index, entry in enumerate(entries):
            fault = _fault(entry, known, position)
            if fault:
                raise GDetKDError(f"{flag} {path!r}: entry {index} {fault}. {REMEDY}")
            row = (entry["bbox"], entry["score"], position[entry["category_id"]])
            self._rows.setdefault(entry["image_id"], []).append(row)
        if entries and max(max(entry["bbox"]) for entry in entries) <= LARGEST_RELATIVE:
            raise GDetKDError(f"{flag} {path!r} has no box of more than a pixel, so its boxes seem relative. {REMEDY}")
        self._sha256 = sha256_of_file(path)

    def origin(self) -> Dict[str, str]:
        return {"file": self._path, "sha256": self._sha256}

    def settings(self) -> Dict[str, Any]:
        return {"results' SHA-256": self._sha256}

    def detect(self, images: Sequence[ImageFile]) -> Iterator[Tuple[ImageFile, Detections]]:
        for image in own_part(images):
            rows = self._rows.get(image.identity, [])
            boxes = torch.tensor([box for box, _, _ in rows], dtype=torch.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            scores = torch.tensor([score for _, score, _ in rows], dtype=torch.float64)
            yield image, Detections(boxes, scores, torch.tensor([index for *_, index in rows], dtype=torch.long))


def _fault(entry: Dict[str, Any], image_ids: Collection[Any], categories: Mapping[int, int]) -> str:
    """Say what is wrong with an entry, or return ""."""
    image, category = entry.get("image_id"), entry.get("category_id")
    score, box = entry.get("score"), entry.get("bbox")
    if not isinstance(image, (int, str)) or image not in image_ids:
        return f"has the unknown image_id {image!r}"
    if not isinstance(category, int) or category not in categories:
        return f"has the unknown category_id {category!r}"
    if not _is_number(score) or not 0 <= score <= 1:
        return f"has the score {score!r}, which is not a number from 0 to 1"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        return f"has the bbox {box!r}"
    return ""


def _is_number(value: Any) -> bool:
    # NaN fails, too. `math.isfinite` would fail on an integer that is too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= FARTHEST


def _are_dicts(items: Any) -> bool:
    return isinstance(items, list) and all(isinstance(item, dict) for item in items)


def _read_json(path: str, flag: str) -> Any:
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except OSError as e:
        raise GDetKDError(f"{flag} {path!r} cannot be read ({e.strerror}). Correct the path.") from e
    except (ValueError, RecursionError) as e:
        raise GDetKDError(f"{flag} {path!r} is not valid JSON ({e}). {REMEDY}") from e
