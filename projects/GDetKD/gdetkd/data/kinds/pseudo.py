"""Images without labels, with the boxes that a teacher found in them."""

import functools
import json
import os
from numbers import Real
from typing import Any, Dict, List, Mapping, NamedTuple, Tuple

from ...errors import GDetKDError
from ..clean import Findings
from .base import DATASET_KIND_REGISTRY, Counts, Keys, Sample
from .coco import Coco
from .coco_json import read_coco

# The key under `info` in which tools/label.py describes its labels.
INFO = "gdetkd_labels"
# Default of `ignore_score`, as a share of `min_score`. Source: our choice.
IGNORED_FROM = 0.5


@DATASET_KIND_REGISTRY.register()
class Pseudo(Coco):
    """Read a COCO JSON whose annotations have scores, as `tools/label.py` writes it. DATASETS.UNLABELED names the set.

    The score decides what becomes of a box:

    - A box with `min_score` or more is an object, unless it is a crowd.
    - Any other box with `ignore_score` or more is doubtful. It becomes a crowd, and the student's losses ignore its
      place.
    - Any other box is left out.

    An entry's `min_score` holds for all classes. Without it, the file must have a threshold for each class.
    `ignore_score` is `min_score` / 2 by default.
    """

    keys = (Keys({"json", "images"}, {"min_score", "ignore_score"}),)
    origin = "tools/label.py writes the JSON (docs/unlabeled.md). "

    @classmethod
    def find_problems(cls, entry: Mapping[str, Any]) -> List[str]:
        problems = super().find_problems(entry)
        for key in ("min_score", "ignore_score"):
            if not _is_score(entry.get(key, 0.0)):
                problems.append(f"has {key} {entry[key]!r}, not a number from 0 to 1")
        if not problems and entry.get("ignore_score", 0.0) > entry.get("min_score", 1.0):
            problems.append(f"has an ignore_score {entry['ignore_score']} above its min_score {entry['min_score']}")
        return problems

    def load(self) -> Tuple[List[Sample], Counts]:
        path = self.path("json")
        content, counts = read_coco(path, self.name, self.path("images"), self.allow_outside, self.max_bad_fraction)
        thresholds = self._thresholds(content)
        kept, doubtful = [], 0
        for annotation in content["annotations"]:
            score = annotation.get("score")
            if not _is_score(score):
                raise GDetKDError(
                    f"The annotation {annotation['id']} in {path!r} has the score {score!r}, not a number from 0 to 1. "
                    "A dataset of kind `pseudo` needs a score in each annotation. Correct that file, or write it anew "
                    "with tools/label.py."
                )
            min_score, ignore_score = thresholds[annotation["category_id"]]
            if score >= ignore_score:
                is_doubtful = score < min_score or bool(annotation.get("iscrowd"))
                doubtful += is_doubtful
                kept.append({**annotation, "iscrowd": int(is_doubtful)})
        if len(kept) == doubtful:
            raise GDetKDError(
                f"No box of {self.name!r} has a score above its threshold, of {len(content['annotations'])} boxes in "
                f"{path!r}. Lower `min_score` in DATASETS.REGISTER, or use a better teacher."
            )
        left_out = len(content["annotations"]) - len(kept)
        content["annotations"] = kept
        counts = {**counts, "boxes are doubtful": doubtful, "boxes have lower scores and are left out": left_out}
        return self._load_content(content), {name: count for name, count in counts.items() if count}

    def _thresholds(self, content: Dict[str, Any]) -> Dict[int, Tuple[float, float]]:
        """Return `min_score` and `ignore_score` by category id."""
        known = label_info(content).get("thresholds", {})
        found = {}
        for category in content["categories"]:
            min_score = self.entry.get("min_score", known.get(category["name"], {}).get("min_score"))
            if not _is_score(min_score):
                raise GDetKDError(
                    f"The dataset {self.name!r} has no `min_score`, and {self.path('json')!r} has no threshold for the "
                    f"class {category['name']!r}. Add `min_score` to the entry in DATASETS.REGISTER."
                )
            ignore_score = self.entry.get("ignore_score", IGNORED_FROM * min_score)
            found[category["id"]] = (min_score, min(ignore_score, min_score))
        return found

    def note_findings(self, findings: Findings) -> None:
        """Do nothing: nobody evaluates on a teacher's boxes."""

    def read_info(self) -> Dict[str, Any]:
        """Return what the file says about its labels (`label_info`)."""
        return self._description().info

    def digests(self) -> Dict[str, Tuple[int, str]]:
        """Return the size in bytes and the SHA-256 of each image, by its path, as far as the file has them."""
        images = self.path("images")
        return {os.path.join(images, name): digest for name, digest in self._description().digests.items()}

    def _description(self) -> "_Description":
        return _describe(self.path("json"), os.stat(self.path("json")).st_mtime_ns)


class _Description(NamedTuple):
    info: Dict[str, Any]
    digests: Dict[str, Tuple[int, str]]


@functools.lru_cache(maxsize=4)
def _describe(path: str, modified: int) -> _Description:
    """Read the description of the labels in a file. It is cached, because the file can be large.

    Args:
        modified: when the file was last modified, so that a changed file is read again.
    """
    with open(path, "rb") as file:
        content = json.load(file)
    digests = {
        image["file_name"]: (image["bytes"], image["sha256"])
        for image in content["images"]
        if "bytes" in image and "sha256" in image
    }
    return _Description(label_info(content), digests)


def label_info(content: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what `tools/label.py` wrote about the labels of a COCO JSON, or an empty dict for a file without it."""
    info = content.get("info")
    found = info.get(INFO) if isinstance(info, dict) else None
    return found if isinstance(found, dict) else {}


def _is_score(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1
