"""Find the annotations, images, lists and class names of a dataset in VOC's layout or a variant that tools write."""

import os
import re
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from ...errors import GDetKDError
from ..folders import Listing, leaves, read_text, without_image_ending

# Names of the folders in lower case. VOC uses the first name.
ANNOTATIONS = ("annotations", "annotation", "xmls", "xml")
IMAGES = ("jpegimages", "images", "image", "imgs", "img")
# Files in which CVAT, Datumaro, VoTT and other tools list the class names in order.
CLASS_FILES = ("labelmap.txt", "label_map.txt", "pascal_label_map.pbtxt", "classes.txt")
# Flags in a list for one class. They say whether an image shows that class.
FLAGS = ("-1", "0", "1")
MOST_NAMED = 5  # files or folders that a message names


class Layout(NamedTuple):
    """Hold the files of a dataset in VOC's layout.

    Attributes:
        annotations: the XML files.
        images: the folders where images can be, in the order of search.
        names: the names of the XML files to read, without their ending.
        missing: names in the list that have no XML file; None if there is no list and all XML files are read.
    """

    annotations: Listing
    images: Tuple[Listing, ...]
    names: List[str]
    missing: Optional[List[str]]


def find_layout(root: str, split: Optional[str], allow_outside: bool = False) -> Layout:
    """Find a dataset's annotations.

    With a split, use the first of these that exists:

    1. the list `ImageSets/Main/SPLIT.txt`
    2. VoTT's lists `ImageSets/Main/CLASS_SPLIT.txt`
    3. the folder `SPLIT`

    Without a split, use the first of these that exists:

    1. the only list in `ImageSets/Main`
    2. all XML files in the annotation folder
    3. all XML files in `root` itself

    Raises:
        GDetKDError: none of these exists, or several lists could be meant.
    """
    main = os.path.join(root, _subfolder(root, ("imagesets",)) or "ImageSets", "Main")
    lists = Listing(main, recursive=False)
    if split is None:
        texts = [name for name in lists.names if name.lower().endswith(".txt")]
        if len(texts) > 1:
            splits = ", ".join(os.path.splitext(name)[0] for name in texts)
            raise GDetKDError(f"{root!r} has several lists. Set `split` to one of them ({splits}).")
        split = os.path.splitext(texts[0])[0] if texts else None
    listed = lists.find(f"{split}.txt")
    if listed is not None:
        annotations, images = _folders(root)
        lines = read_text(os.path.join(main, listed)).splitlines()
        return _listed(os.path.join(main, listed), lines, annotations, images, allow_outside)
    class_lists = [name for name in lists.names if name.lower().endswith(f"_{split}.txt".lower())]
    if class_lists:
        annotations, images = _folders(root)
        return _listed(main, _merge_class_lists(main, class_lists), annotations, images, allow_outside)
    folder = root if split is None else os.path.join(root, split)
    annotations, images = _folders(folder)
    names = [name[: -len(".xml")] for name in _xml_files(annotations)]
    if not names:
        raise GDetKDError(_not_found(root, split))
    return Layout(annotations, images, names, None)


def find_classes(root: str, split: Optional[str] = None) -> Optional[List[str]]:
    """Return the class names in order from a file that a tool wrote, or None if there is no such file.

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
        raise GDetKDError(
            f"{' and '.join(found)} list different classes. List the right ones as `classes` in DATASETS.REGISTER."
        )
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
    """Return the first of these subfolders that exists, in upper or lower case, or None."""
    existing = {name.lower(): name for name in sorted(os.listdir(root)) if os.path.isdir(os.path.join(root, name))}
    return next((existing[name] for name in names if name in existing), None)


def _folders(root: str) -> Tuple[Listing, Tuple[Listing, ...]]:
    """Return the folder of the annotations and the folders where images can be. Use `root` if it has no subfolders."""
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
        exists = annotations.find(f"{name}.xml") is not None
        if not exists and leaves(name):
            exists = os.path.isfile(os.path.join(annotations.folder, f"{name}.xml"))
        (names if exists else missing).append(name)
    seen = set()
    for name in names + missing:
        if name in seen:
            raise _refused(path, name, annotations.folder)
        seen.add(name)
    return Layout(annotations, images, names, missing)


def _refused(path: str, line: str, folder: str) -> GDetKDError:
    return GDetKDError(
        f"{path!r} has the line {line!r}. A line has to name one image that has an annotation in {folder!r}, and no "
        "image may be named twice. DATASETS.ALLOW_OUTSIDE True would allow names that lead elsewhere."
    )


def _name_in(line: str, annotations: Listing) -> Optional[str]:
    """Return the name in a line of a list without its ending, or None if the line is not one name."""
    line = line.replace("\\", "/")
    bare = line.split("#")[0].strip()
    for text in (line, line.strip('"'), bare):
        for name in (text, without_image_ending(text)):
            found = annotations.find(f"{name}.xml")
            if found is not None:
                return found[: -len(".xml")]
    return without_image_ending(bare) if len(bare.split()) == 1 else None


def _merge_class_lists(folder: str, lists: Sequence[str]) -> List[str]:
    """Return the images of lists for one class. A list names all images of its split, with a flag."""
    names: Dict[str, None] = {}
    for name in lists:
        path = os.path.join(folder, name)
        for line in filter(None, map(str.strip, read_text(path).splitlines())):
            parts = line.rsplit(None, 1)
            if len(parts) != 2 or parts[1] not in FLAGS:
                raise GDetKDError(
                    f"{path!r} has the line {line!r}. Write an image's name and one of {', '.join(FLAGS)}."
                )
            names[parts[0]] = None
    return list(names)


def _not_found(root: str, split: Optional[str]) -> str:
    candidates = [name for name in sorted(os.listdir(root)) if _xml_files(_folders(os.path.join(root, name))[0])]
    wanted = "ImageSets/Main" if split is None else f"ImageSets/Main/{split}.txt"
    hint = f" It has the folders {', '.join(candidates[:MOST_NAMED])}." if candidates else ""
    return (
        f"{root!r} has no {wanted}, and no XML files in a folder of this split.{hint} Correct `root` or `split` in "
        "DATASETS.REGISTER. `split` names a list, or a folder of XML files and images."
    )
