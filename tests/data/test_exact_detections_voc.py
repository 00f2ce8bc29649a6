"""Exact detections have an AP of 100 on VOC's layout, in all variants that annotation tools write."""

import json
import re
import shutil

import pytest
from detectron2.data import DatasetCatalog
from PIL import Image
from test_exact_detections import COUNT, ap_of_exact_detections

from conftest import make_cfg, write_coco
from gdetkd.data import register_datasets

CLASSES = ["class0", "class1", "class2"]
ENTRY = {"name": "exact", "kind": "voc", "split": "train", "classes": CLASSES}


def write_voc(folder):
    """Write `COUNT` images in VOC's layout. Return their objects by file name: (x, y, width, height) and class."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    write_coco(folder / "JPEGImages", COUNT, name="exact")
    path = folder / "JPEGImages" / "exact.json"
    content = json.loads(path.read_text())
    path.unlink()
    objects = {}
    for image in content["images"]:
        found = [item for item in content["annotations"] if item["image_id"] == image["id"]]
        objects[image["file_name"]] = [(item["bbox"], f"class{item['category_id'] - 1}") for item in found]
        write_xml(folder, image, objects[image["file_name"]])
    names = [image["file_name"][:-4] for image in content["images"]]
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(names) + "\n")
    return objects


def write_xml(folder, image, objects):
    parts = [
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
        f"<xmax>{x + width}</xmax><ymax>{y + height}</ymax></bndbox></object>"
        for (x, y, width, height), name in objects
    ]
    size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
    text = f"<annotation><filename>{image['file_name']}</filename>{size}{''.join(parts)}</annotation>"
    (folder / "Annotations" / image["file_name"]).with_suffix(".xml").write_text(text)


def each_xml(function):
    """Return a change of the folder: rewrite the text of every annotation by a function."""

    def change(folder):
        for path in sorted((folder / "Annotations").iterdir()):
            path.write_text(function(path.read_text()))

    return change


def replace(pattern, replacement):
    return each_xml(lambda text: re.sub(pattern, replacement, text))


def from_zero(text):
    return re.sub(r"<([xy]min)>(\d+)<", lambda m: f"<{m[1]}>{int(m[2]) - 1}.0<", text)


def begin_at_zero(objects):
    """Move one object to the edge, where tools that count from 0 write 0."""
    (_, y, width, height), name = objects["exact0.png"][0]
    objects["exact0.png"][0] = ([0, y, width, height], name)


def swap(text):
    return re.sub(r"<xmin>(.*?)</xmin>(.*?)<xmax>(.*?)</xmax>", r"<xmin>\3</xmin>\2<xmax>\1</xmax>", text)


def rename(folder, function):
    for path in sorted(folder.iterdir()):
        path.rename(path.with_name(function(path.name)))


def flat(folder):
    """Make Roboflow's layout: a folder for each split, with images and annotations."""
    (folder / "train").mkdir()
    for part in ("Annotations", "JPEGImages"):
        for path in sorted((folder / part).iterdir()):
            path.rename(folder / "train" / path.name)
    for part in ("Annotations", "JPEGImages", "ImageSets"):
        shutil.rmtree(folder / part)


def vott(folder):
    main = folder / "ImageSets/Main"
    names = (main / "train.txt").read_text().split()
    (main / "train.txt").unlink()
    for name in CLASSES:
        (main / f"{name}_train.txt").write_text(
            "".join(f"{image}.png {1 if i % 2 else -1}\n" for i, image in enumerate(names))
        )


def into_subfolder(folder):
    """Move the files into a subfolder. CVAT keeps the folders of a task in the names of its images."""
    for part in ("Annotations", "JPEGImages"):
        (folder / part / "task").mkdir()
        for path in sorted((folder / part).glob("*.*")):
            path.rename(folder / part / "task" / path.name)
    path = folder / "ImageSets/Main/train.txt"
    path.write_text("".join(f"task/{name}\n" for name in path.read_text().split()))


def split_lines(function, encoding="utf-8"):
    def change(folder):
        path = folder / "ImageSets/Main/train.txt"
        path.write_bytes(function(path.read_text()).encode(encoding))

    return change


def rotated(text):
    """Replace boxes by roLabelImg's rotated boxes, turned by 180 degrees."""

    def box(match):
        x1, y1, x2, y2 = (float(match[i]) for i in range(1, 5))
        values = {"cx": (x1 - 1 + x2) / 2, "cy": (y1 - 1 + y2) / 2, "w": x2 - x1 + 1, "h": y2 - y1 + 1}
        inside = "".join(f"<{key}>{value}</{key}>" for key, value in {**values, "angle": 3.141592653589793}.items())
        return f"<robndbox>{inside}</robndbox>"

    return re.sub(
        r"<bndbox><xmin>(.*?)</xmin><ymin>(.*?)</ymin><xmax>(.*?)</xmax><ymax>(.*?)</ymax></bndbox>", box, text
    )


def polygons(text):
    def points(match):
        x1, y1, x2, y2 = (int(match[i]) for i in range(1, 5))
        corners = enumerate([(x1 - 1, y1 - 1), (x2, y1 - 1), (x2, y2), (x1 - 1, y2)], start=1)
        return f"<polygon>{''.join(f'<x{i}>{x}</x{i}><y{i}>{y}</y{i}>' for i, (x, y) in corners)}</polygon>"

    return re.sub(
        r"<bndbox><xmin>(.*?)</xmin><ymin>(.*?)</ymin><xmax>(.*?)</xmax><ymax>(.*?)</ymax></bndbox>", points, text
    )


PART = (
    "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part></object>"
)
FLAT = {"split": "train"}
NO_SPLIT = {"split": None}
# Maps a variant to the change of the folder, the changes of the entry, and whether GDetKD reads it without a warning.
CHANGES = {
    "as it is": (lambda folder: None, {}, True),
    "PNG images": (lambda folder: None, {}, True),
    "upper case endings": (lambda folder: rename(folder / "JPEGImages", lambda n: n.replace(".png", ".PNG")), {}, True),
    "upper case names": (lambda folder: rename(folder / "JPEGImages", str.upper), {}, False),
    "annotations in upper case": (lambda folder: rename(folder / "Annotations", str.upper), {}, False),
    "other names, by <filename>": (
        lambda folder: [
            rename(folder / "Annotations", lambda n: n.replace("exact", "label")),
            split_lines(lambda text: text.replace("exact", "label"))(folder),
        ],
        {},
        False,
    ),
    "paths with backslashes in <filename>": (
        lambda folder: [
            replace("<filename>", r"<filename>C:\\\\my images\\\\")(folder),
            rename(folder / "Annotations", lambda n: n.replace("exact", "label")),
            split_lines(lambda text: text.replace("exact", "label"))(folder),
        ],
        {},
        False,
    ),
    "no <filename>": (replace("<filename>.*?</filename>", ""), {}, True),
    "flat, as Roboflow's": (flat, FLAT, True),
    "flat, without a split": (
        lambda folder: [flat(folder), [path.rename(folder / path.name) for path in (folder / "train").iterdir()]],
        NO_SPLIT,
        True,
    ),
    "images and annotations": (
        lambda folder: [
            (folder / "Annotations").rename(folder / "annotations"),
            (folder / "JPEGImages").rename(folder / "images"),
            shutil.rmtree(folder / "ImageSets"),
        ],
        NO_SPLIT,
        True,
    ),
    "one list without a split": (lambda folder: None, NO_SPLIT, True),
    "VoTT's lists of classes": (vott, FLAT, True),
    "CVAT's folders in names": (into_subfolder, {}, True),
    "Windows line ends in the list": (split_lines(lambda text: text.replace("\n", "\r\n")), {}, True),
    "a byte order mark in the list": (split_lines(str, "utf-8-sig"), {}, True),
    "a list in UTF-16": (split_lines(str, "utf-16"), {}, True),
    "image endings in the list": (split_lines(lambda text: text.replace("\n", ".png\n")), {}, True),
    "another case in the list": (split_lines(str.upper), {}, True),
    "names with spaces": (
        lambda folder: [
            rename(folder / "JPEGImages", lambda n: n.replace("exact", "an exact # ")),
            rename(folder / "Annotations", lambda n: n.replace("exact", "an exact # ")),
            split_lines(lambda text: text.replace("exact", "an exact # "))(folder),
        ],
        {},
        True,
    ),
    "a byte order mark": (each_xml(lambda text: "\ufeff" + text), {}, True),
    "an empty line before the declaration": (each_xml(lambda text: '\n<?xml version="1.0"?>' + text), {}, True),
    "decimals in sizes": (replace(r"<(width|height)>(\d+)<", r"<\1>\2.0<"), {}, True),
    "spaces around numbers": (replace(r">(\d+)<", r"> \1 <"), {}, True),
    "no difficult": (replace("<difficult>0</difficult>", ""), {}, True),
    "all difficult": (replace("<difficult>0</difficult>", "<difficult>1</difficult>"), {}, True),
    "no size": (replace("<size>.*</size>", ""), {}, False),
    "a size of 0": (replace("<width>.*?</width>", "<width>0</width>"), {}, False),
    "swapped corners": (each_xml(swap), {}, False),
    "spaces around class names": (replace("<name>(.*?)</name>", r"<name> \1\n</name>"), {}, False),
    "corners from 0": (each_xml(from_zero), {}, False),
    "corners from 0, as the entry says": (each_xml(from_zero), {"first_pixel": 0}, True),
    "rotated boxes": (each_xml(rotated), {}, False),
    "polygons without boxes": (each_xml(polygons), {}, False),
    "polygons beside boxes": (replace("</bndbox>", "</bndbox><polygon><x1>3</x1><y1>4</y1></polygon>"), {}, False),
    "parts of objects": (replace("</object>", PART), {}, False),
    "CVAT's label map in place of classes": (
        lambda folder: (folder / "labelmap.txt").write_text(
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\nclass0:1,2,3::\nclass1:4,5,6::\nclass2:7,8,9::\n"
        ),
        {"classes": None},
        True,
    ),
    "VoTT's label map in place of classes": (
        lambda folder: (folder / "pascal_label_map.pbtxt").write_text(
            "".join(f"item {{\n id: {i + 1}\n name: '{name}'\n}}\n" for i, name in reversed([*enumerate(CLASSES)]))
        ),
        {"classes": None},
        True,
    ),
    "boxes without area beside the others": (
        replace(
            "</annotation>",
            "<object><name>class0</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>5</xmax><ymax>9</ymax></bndbox></object>"
            "</annotation>",
        ),
        {},
        False,
    ),
}


def register_changed(folder, change=lambda folder: None, prepare=lambda objects: None, **entry):
    objects = write_voc(folder)
    prepare(objects)
    for name in objects:
        size = dict(zip(("width", "height"), Image.open(folder / "JPEGImages" / name).size))
        write_xml(folder, {"file_name": name, **size}, objects[name])
    change(folder)
    entry = {key: value for key, value in {**ENTRY, "root": str(folder), **entry}.items() if value is not None}
    keys = {"DATASETS.TRAIN": ("exact",), "DATASETS.TEST": ("exact",), "OUTPUT_DIR": str(folder.parent / "run")}
    cfg = make_cfg({"DATASETS.REGISTER": [entry], **keys})
    register_datasets(cfg)
    return cfg, objects


@pytest.mark.parametrize("name", CHANGES)
def test_exact_detections_have_an_ap_of_100_and_one_warning(tmp_path, caplog, name):
    change, entry, is_quiet = CHANGES[name]
    prepare = begin_at_zero if name == "corners from 0" else lambda objects: None
    cfg, objects = register_changed(tmp_path / "voc", change, prepare, **entry)
    # A change can rename images, so find their objects by the digit in the name.
    by_digit = {re.findall(r"\d", image)[0]: found for image, found in objects.items()}
    images = DatasetCatalog.get("exact")
    exact = {
        image["file_name"].rsplit("/", 1)[-1]: by_digit[re.findall(r"\d", image["image_id"])[0]] for image in images
    }
    assert ap_of_exact_detections(cfg, exact) == pytest.approx(100.0)
    assert (
        sum(len(image["annotations"]) for image in images) == sum(map(len, objects.values())) and len(images) == COUNT
    )
    warnings = [message for message in caplog.messages if message.startswith("exact: ")]
    assert len(warnings) == (0 if is_quiet else 1), warnings
