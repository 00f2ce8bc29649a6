"""Find files whose names differ in spelling from what annotation tools write, and check that paths stay in a folder."""

import codecs
import os
import unicodedata
from collections import Counter
from typing import Dict, List, Optional, Set, Tuple

from ..errors import GDetKDError

# Endings of image files. The installed Pillow decides whether `.avif` and `.jp2` can be read. Detectron2 reads only the
# first image of an animated GIF.
IMAGE_ENDINGS = tuple(
    ".jpg .jpeg .jpe .jfif .mpo .png .bmp .dib .tif .tiff .webp .gif .avif .jp2 .ppm .pgm .tga".split()
)
# Byte order marks that Windows programs write into text files.
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def resolve(path: str) -> str:
    """Join a path to Detectron2's data folder. An absolute path stays as it is."""
    return os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), path)


def leaves(path: str) -> bool:
    """Return whether a path is absolute or leads out of the folder where it starts."""
    return os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == os.pardir


def is_inside(path: str, folder: str) -> bool:
    """Return whether a path is in a folder or is that folder. Do not follow links."""
    return not leaves(os.path.relpath(os.path.abspath(path), os.path.abspath(folder)))


def read_text(path: str) -> str:
    """Read a text file in UTF-8 or in the encoding of its byte order mark.

    Raises:
        GDetKDError: the file has another encoding.
    """
    with open(path, "rb") as file:
        raw = file.read()
    encoding = next((name for mark, name in MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as e:
        raise GDetKDError(f"{path!r} cannot be read as text ({e}). Write it in UTF-8.") from e


def walk(folder: str, recursive: bool = True) -> List[str]:
    """Return the sorted files of a folder, as relative paths with forward slashes.

    Hidden files and folders are skipped, because they are not data. A folder is read once: links to a folder inside of
    the given one, and further links to the same folder, are left out.

    Args:
        recursive: also return the files of subfolders.
    """
    found: List[str] = []
    root = os.path.realpath(folder)
    seen = {root}
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if recursive and _is_new(os.path.join(where, name), root, seen)]
        start = os.path.relpath(where, folder)
        found += [os.path.normpath(os.path.join(start, name)) for name in files if not name.startswith(".")]
    return sorted(path.replace(os.sep, "/") for path in found)


def _is_new(folder: str, root: str, seen: Set[str]) -> bool:
    """Return whether a folder below `root` holds data that was not read yet, and note it in `seen`."""
    real = os.path.realpath(folder)
    if real in seen or not _is_data(os.path.basename(folder)):
        return False
    if os.path.islink(folder) and is_inside(real, root):
        if all(map(_is_data, os.path.relpath(real, root).split(os.sep))):
            return False  # the walk comes to the folder itself
    seen.add(real)
    return True


def _is_data(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def list_images(folder: str) -> Tuple[List[str], Dict[str, int]]:
    """Return the sorted images of a folder and its subfolders, and the counts of other files by their ending."""
    files = walk(folder)
    endings = (os.path.splitext(name)[1].lower() or "without an ending" for name in files if not is_image(name))
    return [name for name in files if is_image(name)], dict(sorted(Counter(endings).items()))


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def without_image_ending(name: str) -> str:
    return os.path.splitext(name)[0] if is_image(name) else name


class Listing:
    """List the files of a folder, and find a file by a name that may differ in case or in the form of accents.

    Attributes:
        folder: the folder.
        names: the files, as paths relative to the folder.

    Args:
        recursive: also list the files of subfolders.
    """

    def __init__(self, folder: str, recursive: bool = True) -> None:
        self.folder = folder
        self.names = walk(folder, recursive) if os.path.isdir(folder) else []
        self._exact = set(self.names)
        self._similar: Dict[str, List[str]] = {}
        self._images: Dict[str, List[str]] = {}
        for name in self.names:
            self._similar.setdefault(spelling_key(name), []).append(name)
            if is_image(name):
                self._images.setdefault(spelling_key(os.path.splitext(name)[0]), []).append(name)

    @property
    def image_names(self) -> List[str]:
        """Return the images among `names`."""
        return [name for name in self.names if is_image(name)]

    def find(self, name: str) -> Optional[str]:
        """Return the file of a name, or else the only file whose name differs in case or accents, or else None."""
        if name in self._exact:
            return name
        found = self._similar.get(spelling_key(name), [])
        return found[0] if len(found) == 1 else None

    def images_of(self, name: str) -> List[str]:
        """Return the images of a name that is given without its ending."""
        found = self._images.get(spelling_key(name), [])
        spelt = [image for image in found if os.path.splitext(image)[0] == name]
        return spelt or found


def spelling_key(name: str) -> str:
    """Return what names that differ in upper and lower case, or in the form of accents, have in common."""
    return unicodedata.normalize("NFC", name).casefold()
