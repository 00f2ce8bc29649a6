"""PASCAL VOC's layout, read as Detectron2 reads it, but with errors that name the file.

Detectron2's own reader also fails on a list of one image.
"""

import os
import xml.etree.ElementTree as ElementTree
from typing import Any, Dict, List, Sequence

from detectron2.structures import BoxMode

from ..errors import GDetKDError
from .coco_json import leaves


def load_voc(root: str, split: str, classes: Sequence[str], allow_outside: bool = False) -> List[Dict[str, Any]]:
    """A split's images in Detectron2's format.

    Args:
        root: holds Annotations, ImageSets and JPEGImages.
        split: names ImageSets/Main/SPLIT.txt, a line of which is an image's name without its ending.
        classes: in the order of their indices.
        allow_outside: a name may lead out of `root`.

    Raises:
        GDetKDError: a file is not VOC's, or names a class that is not among `classes`.
        FileNotFoundError: an annotation is not there.
    """
    path = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    with open(path, encoding="utf-8") as file:
        lines = [line.split("#")[0].split() for line in file]
    names = [words[0] for words in lines if words]
    wrong = [" ".join(words) for words in lines if len(words) > 1]
    wrong += [name for name in names if "\0" in name or (leaves(name) and not allow_outside)]
    wrong += sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if wrong:
        raise GDetKDError(
            f"{path!r} has the line {wrong[0]!r}: there has to be the name of one image in {root!r} a line, and each "
            "once. (DATASETS.ALLOW_OUTSIDE True would allow names that lead elsewhere.)"
        )
    return [_load_image(root, name, list(classes)) for name in names]


def _load_image(root: str, name: str, classes: List[str]) -> Dict[str, Any]:
    path = os.path.join(root, "Annotations", f"{name}.xml")
    with open(path, "rb") as file:
        text = file.read()
    try:
        if b"\0" in text:  # of UTF-16, in which what is looked for next would not be found
            raise ValueError("it has zero bytes: write it in UTF-8")
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise ValueError("it declares a document type, whose entities can grow without bound")
        tree = ElementTree.fromstring(text)
        sample: Dict[str, Any] = {
            "file_name": os.path.join(root, "JPEGImages", f"{name}.jpg"),
            "image_id": name,
            "height": int(_text(tree, "size/height")),
            "width": int(_text(tree, "size/width")),
        }
        if sample["height"] < 1 or sample["width"] < 1:
            raise ValueError(f"the image is {sample['width']}x{sample['height']}")
        sample["annotations"] = [_annotation(found, classes) for found in tree.findall("object")]
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as e:
        raise GDetKDError(
            f"{path!r} is not an annotation of VOC's ({type(e).__name__}: {e}). Correct it, take it out of the list, "
            "or name its classes in DATASETS.REGISTER."
        ) from e
    return sample


def _annotation(found: ElementTree.Element, classes: List[str]) -> Dict[str, Any]:
    name = _text(found, "name")
    if name not in classes:
        raise ValueError(f"the class {name!r} is not one of the set's")
    x1, y1, x2, y2 = (float(_text(found, f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax"))
    # VOC counts pixels from 1, both corners inside the box.
    return {"category_id": classes.index(name), "bbox": [x1 - 1, y1 - 1, x2, y2], "bbox_mode": BoxMode.XYXY_ABS}


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if not text:
        raise ValueError(f"it has no {path}")
    return text
