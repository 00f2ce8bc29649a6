"""Find the images of a split in YOLO's layout, and the label file of each image."""

import os
import re
from typing import Dict, List, Optional, Set, Tuple

from ...errors import GDetKDError
from ..folders import Listing, list_images, read_text
from .yolo_yaml import (
    SAME_SPLITS,
    Description,
    check_inside,
    find_label_folder,
    is_allowed,
    short,
    without_darknets_folder,
)

# Endings of files that lie beside images in this layout.
COMPANIONS = (".txt", ".cache", ".npy", ".yaml", ".yml", ".names", ".data", ".labels")


def find_images(
    description: Description, split: str, allow_outside: bool = False
) -> Tuple[List[str], Dict[str, int], int]:
    """Find the images of a split. Images of a list keep its order, and images of a folder are sorted.

    Returns:
        the paths of the images, the counts of other files by their ending, and how many entries of lists were repeated.

    Raises:
        GDetKDError: the description does not name the split, or its files are missing or outside of the dataset.
    """
    names = [split] if split in description.splits else [name for name in SAME_SPLITS if name in description.splits]
    if split not in description.splits and (split not in SAME_SPLITS or len(names) != 1):
        raise GDetKDError(
            f"{description.path!r} has no split {split!r}; it names {', '.join(description.splits) or 'none'}. Correct "
            "`split` in DATASETS.REGISTER."
        )
    value = description.splits[names[0]]
    items = value if isinstance(value, list) else [value]
    images: List[str] = []
    other_files: Dict[str, int] = {}
    for item in items:
        if not isinstance(item, str) or "\0" in item:
            raise GDetKDError(
                f"{description.path!r}: {names[0]} is {short(value)}, not a path or a list of paths. Correct that file."
            )
        place = _find_place(description, item.strip().replace("\\", "/"), allow_outside)
        if os.path.isdir(place):
            found, skipped = list_images(place)
            images += [os.path.join(place, name) for name in found]
            for ending, count in skipped.items():
                if ending not in COMPANIONS:
                    other_files[ending] = other_files.get(ending, 0) + count
        else:
            images += _read_list(description, place, allow_outside)
    distinct = list(dict.fromkeys(images))
    return distinct, other_files, len(images) - len(distinct)


class LabelFinder:
    """Find the label file of an image. A folder is listed only once."""

    def __init__(self) -> None:
        self._folders: Dict[str, Listing] = {}
        self._stems: Dict[str, Set[str]] = {}

    def find(self, image: str) -> Optional[str]:
        """Return the label file of an image, or None if there is none."""
        folder, name = os.path.split(image)
        if folder not in self._folders:
            self._folders[folder] = Listing(find_label_folder(folder) if os.path.isdir(folder) else folder, False)
        listing = self._folders[folder]
        stem = os.path.splitext(name)[0]
        found = listing.find(f"{stem}.txt")
        if found is None or (found != f"{stem}.txt" and self._is_of_another(folder, os.path.splitext(found)[0])):
            return None
        return os.path.join(listing.folder, found)

    def _is_of_another(self, folder: str, stem: str) -> bool:
        """Return whether a folder has an image of exactly this stem."""
        if folder not in self._stems:
            names = os.listdir(folder) if os.path.isdir(folder) else []
            self._stems[folder] = {os.path.splitext(name)[0] for name in names}
        return stem in self._stems[folder]


def _find_place(description: Description, item: str, allow_outside: bool) -> str:
    """Return the folder or file that a split names.

    Roboflow writes `../train/images` for a folder beside its data.yaml, so try the path without `../`, too.
    """
    places = dict.fromkeys(
        os.path.normpath(os.path.join(description.folder, text))
        for text in (item, re.sub(r"^(\.\./)+", "", item), without_darknets_folder(item))
    )
    existing = [place for place in places if os.path.exists(place)]
    inside = [place for place in existing if is_allowed(place, description.path, allow_outside)]
    if existing and not inside:
        check_inside(existing[0], description.path, allow_outside)
    if len(inside) == 1:
        return inside[0]
    problem = f"could be {' or '.join(inside)}" if inside else f"does not exist (tried {', '.join(places)})"
    raise GDetKDError(f"{description.path!r} names {item!r}, which {problem}. Correct the path in that file.")


def _read_list(description: Description, path: str, allow_outside: bool) -> List[str]:
    """Read a text file with the path of one image a line. Missing images stay in the list for `clean` to count."""
    lines = [line.strip().replace("\\", "/") for line in read_text(path).splitlines()]
    images = []
    for line in filter(None, lines):
        if "\0" in line:
            raise GDetKDError(f"{path!r} has a line with a zero byte. Write the path of one image a line.")
        starts = (os.path.dirname(path), description.folder)
        texts = (line, without_darknets_folder(line))
        places = [os.path.normpath(os.path.join(start, text)) for text in texts for start in starts]
        place = next((place for place in places if os.path.exists(place)), places[0])
        check_inside(place, description.path, allow_outside)
        images.append(place)
    return images
