"""Images without labels, to predict on."""

import os
from typing import Any, Dict, List, Tuple

from .coco_quirks import Counts
from .folders import list_images


def load_images(folder: str) -> Tuple[List[Dict[str, Any]], Counts]:
    """Read the images of a folder and its subfolders, sorted by their path from the folder on, which is their id.

    Returns:
        the samples, and the counts of files that were passed over, by what a message calls them.
    """
    names, others = list_images(folder)
    samples = [{"file_name": os.path.join(folder, name), "image_id": name} for name in names]
    if not others:
        return samples, {}
    endings = ", ".join(f"{count} {ending}" for ending, count in others.items())
    return samples, {f"files that are not read as images are passed over ({endings})": sum(others.values())}
