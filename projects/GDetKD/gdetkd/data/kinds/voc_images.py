"""Find the image of an annotation in VOC's layout."""

import os
from collections import Counter
from typing import List, Sequence

from ...errors import GDetKDError
from ..folders import Listing, is_image, leaves, without_image_ending
from .voc_layout import MOST_NAMED


def find_image(name: str, filename: str, folders: Sequence[Listing], annotation: str, counts: Counter) -> str:
    """Return the path of an annotation's image. It has the annotation's name, or else the name in <filename>.

    Args:
        name: the name of the annotation, without its ending.
        filename: the annotation's <filename>. It decides if several images have the annotation's name.
        folders: where images can be, in the order of search.
        annotation: the path of the annotation, for messages.
        counts: how often each quirk was corrected; this function adds to it.

    Raises:
        GDetKDError: several images have the name, and `filename` is none of them.
    """
    for listing in folders:
        found = _same_name(listing, name, filename)
        if len(found) > 1:
            raise GDetKDError(
                f"{annotation!r} could be of {' or '.join(found[:MOST_NAMED])} in {listing.folder!r}. Write the "
                "image's name with its ending into <filename>."
            )
        if found:
            counts["images are not spelt as their annotations"] += os.path.splitext(found[0])[0] != name
            return os.path.join(listing.folder, found[0])
    for listing in folders:
        for text in (filename, os.path.basename(filename)):
            image = listing.find(text) if text else None
            if image is not None and is_image(image):
                counts["images have another name than their annotations, which name them in <filename>"] += 1
                return os.path.join(listing.folder, image)
    return _expected_path(name, filename, folders[0].folder)


def _same_name(listing: Listing, name: str, filename: str) -> List[str]:
    found = listing.images_of(name)
    matches = [image for image in found if os.path.basename(image) == os.path.basename(filename)]
    return matches or found


def _expected_path(name: str, filename: str, folder: str) -> str:
    """Return where an image that no listing has should be. DATASETS.ALLOW_OUTSIDE lets it be outside of the folder."""
    ending = filename[len(without_image_ending(filename)) :] or ".jpg"
    path = os.path.join(folder, name + ending)
    return os.path.join(folder, f"{name}.jpg") if leaves(name) and not os.path.exists(path) else path
