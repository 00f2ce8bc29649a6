"""Find the annotations, images, lists and class names of a dataset in VOC's layout, or in one that tools make of it."""

import os
import re
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..errors import GDetKDError
from .folders import Listing, leaves, read_text, without_image_ending

# Names of the folders, in lower case, the first of which is VOC's own.
ANNOTATIONS = ("annotations", "annotation", "xmls", "xml")
IMAGES = ("jpegimages", "images", "image", "imgs", "img")
# Files in which tools name the classes in order: CVAT and Datumaro, VoTT, several others.
CLASS_FILES = ("labelmap.txt", "label_map.txt", "pascal_label_map.pbtxt", "classes.txt")
# Says in a list of one class whether an image shows that class.
FLAGS = ("-1", "0", "1")
# Named in a message.
NAMED = 5


class Layout(NamedTuple):
    """
    Attributes:
        annotations: the XML files.
        images: the folders to look for images in, in this order.
        names: of the XML files to read, without their ending.
        missing: images of the list that have no XML file; None if there is no list, and all XML files are read.
    """

    annotations: Listing
    images: Tuple[Listing, ...]
    names: List[str]
    missing: Optional[List[str]]


def find_layout(root: str, split: Optional[str], allow_outside: bool = False) -> Layout:
    """Find a dataset's annotations.

    The first of these counts: the list `ImageSets/Main/SPLIT.txt`; VoTT's lists `ImageSets/Main/CLASS_SPLIT.txt`; the
    folder `SPLIT`. Without a split, these: the only list in `ImageSets/Main`; every XML file of the annotation folder;
    every XML file in `root` itself.

    Raises:
        GDetKDError: there is none of these, or several could be meant.
    """
    main = os.path.join(root, _subfolder(root, ("imagesets",)) or "ImageSets", "Main")
    lists = Listing(main, recursive=False)
    if split is None:
        texts = [name for name in lists.names if name.lower().endswith(".txt")]
        if len(texts) > 1:
            splits = ", ".join(os.path.splitext(name)[0] for name in texts)
            raise GDetKDError(f"{root!r} has several lists: name one of them as `split` ({splits}).")
        split = os.path.splitext(texts[0])[0] if texts else None
    listed = lists.find(f"{split}.txt")
    if listed is not None:
        annotations, images = _folders(root)
        lines = read_text(os.path.join(main, listed)).splitlines()
        return _listed(os.path.join(main, listed), lines, annotations, images, allow_outside)
    of_classes = [name for name in lists.names if name.lower().endswith(f"_{split}.txt".lower())]
    if of_classes:
        annotations, images = _folders(root)
        return _listed(main, _lines_of_classes(main, of_classes), annotations, images, allow_outside)
    folder = root if split is None else os.path.join(root, split)
    annotations, images = _folders(folder)
    names = [name[: -len(".xml")] for name in _xml_files(annotations)]
    if not names:
        raise GDetKDError(_not_found(root, split))
    return Layout(annotations, images, names, None)


def find_classes(root: str, split: Optional[str] = None) -> Optional[List[str]]:
    """Return the class names that a tool's file lists, in order; None without such a file.

    Raises:
        GDetKDError: two files list different classes.
    """
    found: Dict[str, List[str]] = {}
    for folder in [root] + [os.path.join(root, split)] * (split is not None):
        for name in CLASS_FILES:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                found[path] = _read_classes(path)
    if len(set(map(tuple, found.values()))) > 1:
        raise GDetKDError(f"{' and '.join(found)} list different classes. Name them as `classes` in DATASETS.REGISTER.")
    return next(iter(found.values()), None)


def _read_classes(path: str) -> List[str]:
    text = read_text(path)
    if path.endswith(".pbtxt"):
        items = re.findall(r"item\s*\{(.*?)\}", text, re.DOTALL)
        pairs = [
            (re.search(r"\bid\s*:\s*(\d+)", item), re.search(r"\bname\s*:\s*['\"](.*?)['\"]", item)) for item in items
        ]
        return [name.group(1) for _, name in sorted((int(i.group(1)), name) for i, name in pairs if i and name)]
    lines = [line.strip() for line in text.splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    if not path.endswith("classes.txt"):  # label:color:parts:actions
        names = [name.split(":")[0].strip() for name in names]
        names = [name for name in names if name.lower() != "background"]
    return names


def _subfolder(root: str, names: Sequence[str]) -> Optional[str]:
    """Return the subfolder of the first of these names that there is, in whatever case."""
    there = {name.lower(): name for name in sorted(os.listdir(root)) if os.path.isdir(os.path.join(root, name))}
    return next((there[name] for name in names if name in there), None)


def _folders(root: str) -> Tuple[Listing, Tuple[Listing, ...]]:
    """Return the folder of the annotations, and those of the images. Without subfolders both are `root` itself."""
    if not os.path.isdir(root):
        return Listing(root), ()
    here = Listing(root, recursive=False)
    named, images = _subfolder(root, ANNOTATIONS), _subfolder(root, IMAGES)
    annotations = here if named is None else Listing(os.path.join(root, named))
    first = here if images is None else Listing(os.path.join(root, images))
    return annotations, (first, annotations) if first is not annotations else (first,)


def _xml_files(listing: Listing) -> List[str]:
    return [name for name in listing.names if name.lower().endswith(".xml")]


def _listed(
    path: str, lines: List[str], annotations: Listing, images: Tuple[Listing, ...], allow_outside: bool
) -> Layout:
    names: List[str] = []
    missing: List[str] = []
    for line in filter(None, map(str.strip, lines)):
        if line.startswith("#"):
            continue
        name = _name_in(line, annotations)
        if name is None or "\0" in name or (leaves(name) and not allow_outside):
            raise _refused(path, line, annotations.folder)
        is_there = annotations.find(f"{name}.xml") is not None
        if not is_there and leaves(name):
            is_there = os.path.isfile(os.path.join(annotations.folder, f"{name}.xml"))
        (names if is_there else missing).append(name)
    seen = set()
    for name in names + missing:
        if name in seen:
            raise _refused(path, name, annotations.folder)
        seen.add(name)
    return Layout(annotations, images, names, missing)


def _refused(path: str, line: str, folder: str) -> GDetKDError:
    return GDetKDError(
        f"{path!r} has the line {line!r}: there has to be the name of one image of {folder!r} a line, and each once. "
        "(DATASETS.ALLOW_OUTSIDE True would allow names that lead elsewhere.)"
    )


def _name_in(line: str, annotations: Listing) -> Optional[str]:
    """Return the name that a line of a list gives, without an ending; None if it could be several."""
    line = line.replace("\\", "/")
    bare = line.split("#")[0].strip()
    for text in (line, line.strip('"'), bare):
        for name in (text, without_image_ending(text)):
            found = annotations.find(f"{name}.xml")
            if found is not None:
                return found[: -len(".xml")]
    return without_image_ending(bare) if len(bare.split()) == 1 else None


def _lines_of_classes(folder: str, lists: Sequence[str]) -> List[str]:
    """Return the images that lists of one class each name. Every list names all images of its split."""
    names: Dict[str, None] = {}
    for name in lists:
        path = os.path.join(folder, name)
        for line in filter(None, map(str.strip, read_text(path).splitlines())):
            parts = line.rsplit(None, 1)
            if len(parts) != 2 or parts[1] not in FLAGS:
                raise GDetKDError(f"{path!r} has the line {line!r}, not an image's name and one of {', '.join(FLAGS)}.")
            names[parts[0]] = None
    return list(names)


def _not_found(root: str, split: Optional[str]) -> str:
    holding = [name for name in sorted(os.listdir(root)) if _xml_files(_folders(os.path.join(root, name))[0])]
    wanted = "ImageSets/Main" if split is None else f"ImageSets/Main/{split}.txt"
    hint = f" It has the folders {', '.join(holding[:NAMED])}." if holding else ""
    return (
        f"{root!r} has no {wanted}, and no XML files where this split could have them.{hint} Correct `root` or `split` "
        "in DATASETS.REGISTER: `split` names a list, or a folder of XML files and images."
    )
