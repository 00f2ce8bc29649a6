"""Datasets in COCO's format."""

import json
import os
import tempfile
from typing import Any, Dict, List, Mapping, Optional, Tuple

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json

from ...errors import GDetKDError
from ..clean import Findings
from .base import DATASET_KIND_REGISTRY, Counts, DatasetKind, Keys, Sample
from .coco_json import read_coco
from .coco_keypoints import flip_map, keypoint_names
from .coco_quirks import id_from_text


@DATASET_KIND_REGISTRY.register()
class Coco(DatasetKind):
    """Read a COCO JSON with Detectron2's reader, after its quirks are corrected."""

    keys = (Keys({"json", "images"}),)
    path_keys = ("json", "images")

    def __init__(self, entry: Mapping[str, Any], allow_outside: bool = False, max_bad_fraction: float = 0.01) -> None:
        super().__init__(entry, allow_outside, max_bad_fraction)
        self._has_quirks: Optional[bool] = None  # None until the file is read

    def class_names(self) -> Optional[List[str]]:
        path = self.path("json")
        if not os.path.exists(path):
            return None
        try:
            with open(path, "rb") as file:
                categories = json.load(file)["categories"]
            for category in categories:
                id_from_text(category)  # "10" comes after "9"
            return [category["name"].strip() for category in sorted(categories, key=lambda item: item["id"])]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise GDetKDError(
                f"The categories cannot be read from {path!r} ({type(e).__name__}: {e}). Correct that file."
            ) from e

    def metadata(self) -> Dict[str, Any]:
        # Without class names: the file can be large, and Detectron2's reader sets them.
        return {"evaluator_type": self.evaluator_type, "image_root": self.path("images")}

    def load(self) -> Tuple[List[Sample], Counts]:
        path, images = self.path("json"), self.path("images")
        if self._has_quirks is False:
            return load_coco_json(path, images, self.name), {}
        content, counts = read_coco(path, self.name, images, self.allow_outside, self.max_bad_fraction)
        self._has_quirks = bool(counts)
        self._set_keypoint_names(content["categories"])
        return self._load_content(content) if counts else load_coco_json(path, images, self.name), counts

    def note_findings(self, findings: Findings) -> None:
        # The evaluation reads the file that `json_file` names. If training reads anything else, the evaluation has to
        # write a file of what training reads.
        is_same = not self._has_quirks and not findings.left_out and "limit" not in self.entry
        metadata = MetadataCatalog.get(self.name)
        if is_same and metadata.get("json_file") is None:
            metadata.set(json_file=self.path("json"))

    def _set_keypoint_names(self, categories: List[Dict[str, Any]]) -> None:
        metadata, names = MetadataCatalog.get(self.name), keypoint_names(categories)
        if names is not None and metadata.get("keypoint_names") is None:
            metadata.set(keypoint_names=names, keypoint_flip_map=flip_map(names))

    def _load_content(self, content: Dict[str, Any]) -> List[Sample]:
        """Load corrected content. Detectron2's reader takes only the path of a file."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "annotations.json")
            with open(path, "w") as file:
                json.dump(content, file)
            return load_coco_json(path, self.path("images"), self.name)
