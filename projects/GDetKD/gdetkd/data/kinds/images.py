"""Images without labels, to predict on."""

import os
from typing import List, Tuple

from ..folders import list_images
from .base import DATASET_KIND_REGISTRY, Counts, DatasetKind, Keys, Sample


@DATASET_KIND_REGISTRY.register()
class Images(DatasetKind):
    """Read the images of a folder and its subfolders. An image's id is its path from that folder on."""

    keys = (Keys({"images"}, {"classes"}),)
    path_keys = ("images",)
    evaluator_type = "images"

    def load(self) -> Tuple[List[Sample], Counts]:
        folder = self.path("images")
        names, other_files = list_images(folder)
        samples = [{"file_name": os.path.join(folder, name), "image_id": name} for name in names]
        if not other_files:
            return samples, {}
        endings = ", ".join(f"{count} {ending}" for ending, count in other_files.items())
        return samples, {f"files are skipped because they are not images ({endings})": sum(other_files.values())}
