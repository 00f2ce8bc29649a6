"""Exact detections have an AP of 100 on YOLO's layout, in all variants that annotation tools write."""

import json
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from test_exact_detections import COUNT, ap_of_exact_detections

from conftest import make_cfg, write_coco
from gdetkd.data import register_datasets
from gdetkd.data.class_names import class_names

CLASSES = ["class0", "class1", "class2"]
NAMES = "names: [class0, class1, class2]\n"


def write_yolo(folder):
    """Write `COUNT` images in Ultralytics' layout. Return their objects by file: (x, y, width, height) and class."""
    images, labels = folder / "images/train", folder / "labels/train"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    write_coco(images, COUNT, name="exact")
    content = json.loads((images / "exact.json").read_text())
    (images / "exact.json").unlink()
    objects = {}
    for image in content["images"]:
        found = [item for item in content["annotations"] if item["image_id"] == image["id"]]
        objects[image["file_name"]] = [(item["bbox"], f"class{item['category_id'] - 1}") for item in found]
        lines = [label(item["category_id"] - 1, item["bbox"], image["width"], image["height"]) for item in found]
        (labels / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\n{NAMES}")
    return objects


def label(category, box, width, height):
    x, y, w, h = box
    return f"{category} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}"


def each_line(function):
    """Return a change of the folder: rewrite the columns of every label by a function."""

    def change(folder):
        for path in sorted((folder / "labels/train").iterdir()):
            lines = [" ".join(map(str, function(line.split()))) for line in path.read_text().splitlines()]
            path.write_text("\n".join(lines))

    return change


def each_text(function, encoding="utf-8"):
    def change(folder):
        for path in sorted((folder / "labels/train").iterdir()):
            path.write_bytes(function(path.read_text()).encode(encoding))

    return change


def corners(columns):
    x, y, w, h = map(float, columns[1:])
    return [x - w / 2, y - h / 2, x + w / 2, y - h / 2, x + w / 2, y + h / 2, x - w / 2, y + h / 2]


def yaml(text):
    return lambda folder: (folder / "data.yaml").write_text(text)


def roboflow(folder):
    """Make Roboflow's layout: a folder for each split beside data.yaml, which names them as if one folder above."""
    (folder / "train").mkdir()
    for part in ("images", "labels"):
        (folder / part / "train").rename(folder / "train" / part)
        (folder / part).rmdir()
    yaml(f"train: ../train/images\nval: ../valid/images\nnc: 3\n{NAMES}")(folder)


def darknet(folder):
    """Make CVAT's "YOLO 1.1": labels beside images, and paths that start one folder above."""
    (folder / "obj_train_data").mkdir()
    for part in ("images", "labels"):
        for path in sorted((folder / part / "train").iterdir()):
            path.rename(folder / "obj_train_data" / path.name)
        shutil.rmtree(folder / part)
    names = sorted(path.name for path in (folder / "obj_train_data").glob("*.png"))
    (folder / "train.txt").write_text("".join(f"data/obj_train_data/{name}\n" for name in names))
    (folder / "obj.names").write_text("class0\nclass1\nclass2\n")
    text = "classes = 3\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n"
    (folder / "obj.data").write_text(text)


def listed(line, where="train.txt", encoding="utf-8"):
    """Return a change of the folder: write a text file with a line for each image, and name it in data.yaml."""

    def change(folder):
        names = sorted(path.name for path in (folder / "images/train").iterdir())
        (folder / where).write_bytes("".join(line.format(name) for name in names).encode(encoding))
        yaml(f"train: {where}\n{NAMES}")(folder)

    return change


def two_folders(folder):
    for part, ending in (("images", ".png"), ("labels", ".txt")):
        (folder / part / "more").mkdir()
        (folder / part / "train" / f"exact1{ending}").rename(folder / part / "more" / f"exact1{ending}")
    yaml(f"train: [images/train, images/more]\n{NAMES}")(folder)


def into_subfolders(folder):
    for part in ("images", "labels"):
        (folder / part / "train").rename(folder / part / "scene")
        (folder / part / "train").mkdir()
        (folder / part / "scene").rename(folder / part / "train/scene")


def labels_beside_images(folder):
    for path in sorted((folder / "labels/train").iterdir()):
        path.rename(folder / "images/train" / path.name)
    shutil.rmtree(folder / "labels")


def upper_case(folder):
    for path in sorted((folder / "labels/train").iterdir()):
        path.rename(path.with_name(path.name.upper()))


def turned(folder):
    """Store an image on its side, with EXIF that turns it. Labels are shares of the upright image."""
    path = folder / "images/train/exact0.png"
    image = Image.open(path)
    exif = Image.Exif()
    exif[274] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def class_file(place):
    return lambda folder: [(folder / place).write_text("class0\nclass1\nclass2\n"), (folder / "data.yaml").unlink()]


def pose(folder):
    yaml(f"train: images/train\nkpt_shape: [2, 3]\n{NAMES}")(folder)
    each_line(lambda columns: [*columns, 0.5, 0.5, 2, 300, 0.5, 1])(folder)


BY_FOLDER = {"yaml": None, "split": None, "images": "images/train"}
# Maps a variant to the change of the folder, the changes of the entry, and whether GDetKD reads it without a warning.
CHANGES = {
    "as it is": (lambda folder: None, {}, True),
    "names by index": (yaml("train: images/train\nnames: {0: class0, 2: class2, 1: class1}\n"), {}, True),
    "another path that is not there": (yaml(f"path: /content/data\ntrain: images/train\n{NAMES}"), {}, True),
    "a byte order mark in data.yaml": (yaml(f"\ufefftrain: images/train\n{NAMES}"), {}, True),
    "backslashes in data.yaml": (yaml(f"train: images\\train\n{NAMES}"), {}, True),
    "Roboflow's folders": (roboflow, {}, True),
    "darknet's obj.data": (darknet, {"yaml": "obj.data"}, True),
    "two folders": (two_folders, {}, True),
    "subfolders": (into_subfolders, {}, True),
    "a list from its folder": (listed("./images/train/{}\n"), {}, True),
    "a list from its folder, without a dot": (listed("images/train/{}\r\n", encoding="utf-8-sig"), {}, True),
    "a list with backslashes": (listed("images\\train\\{}\n"), {}, True),
    "a list from the folder of data.yaml": (listed("images/train/{}\n", "images/train.txt"), {}, True),
    "a list with images twice": (listed("images/train/{0}\nimages/train/{0}\n"), {}, False),
    "no data.yaml": (lambda f: (f / "data.yaml").unlink(), {**BY_FOLDER, "classes": CLASSES}, True),
    "labelImg's classes.txt": (class_file("labels/train/classes.txt"), BY_FOLDER, True),
    "Label Studio's classes.txt": (class_file("classes.txt"), {**BY_FOLDER, "images": "images"}, True),
    "labels beside images": (labels_beside_images, {}, True),
    "another case of file names": (upper_case, {}, True),
    "empty lines, Windows line ends": (each_text(lambda text: "\r\n\r\n" + text.replace("\n", "\r\n\r\n")), {}, True),
    "byte order marks": (each_text(str, "utf-8-sig"), {}, True),
    "UTF-16": (each_text(str, "utf-16"), {}, True),
    "tabs": (each_text(lambda text: text.replace(" ", "\t")), {}, True),
    "classes with decimals": (each_line(lambda c: [f"{c[0]}.0", *c[1:]]), {}, False),
    "labels twice": (each_text(lambda text: text * 2), {}, False),
    "negative widths": (each_line(lambda c: [*c[:3], f"-{c[3]}", c[4]]), {}, False),
    "polygons": (each_line(lambda c: [c[0], *corners(c)]), {}, True),
    "boxes beside polygons": (
        each_text(lambda text: "\n".join([*text.splitlines()[1:], polygon_of(text.splitlines()[0])])),
        {},
        False,
    ),
    "keypoints": (pose, {}, False),
    "boxes without area beside the others": (each_text(lambda text: text + "0 0.5 0.5 0 0.1\n"), {}, False),
    "boxes that are not numbers beside the others": (each_text(lambda text: text + "0 nan 0.5 0.1 0.1\n"), {}, False),
    "images turned by EXIF": (turned, {}, True),
    "files that are no images": (lambda folder: (folder / "images/train/a.heic").write_text("x"), {}, False),
}


def polygon_of(line):
    columns = line.split()
    return " ".join(map(str, [columns[0], *corners(columns)]))


def register_changed(folder, change=lambda folder: None, allow_outside=False, **entry):
    objects = write_yolo(folder)
    change(folder)
    entry = {"name": "exact", "kind": "yolo", "yaml": "data.yaml", "split": "train", **entry}
    entry.update({key: str(folder / entry[key]) for key in ("yaml", "images") if entry.get(key)})
    entry = {key: value for key, value in entry.items() if value is not None}
    keys = {"DATASETS.TRAIN": ("exact",), "DATASETS.TEST": ("exact",), "OUTPUT_DIR": str(folder.parent / "run")}
    cfg = make_cfg({"DATASETS.REGISTER": [entry], "DATASETS.ALLOW_OUTSIDE": allow_outside, **keys})
    register_datasets(cfg)
    return cfg, objects


@pytest.mark.parametrize("name", CHANGES)
def test_exact_detections_have_an_ap_of_100_and_one_warning(tmp_path, caplog, name):
    change, entry, is_quiet = CHANGES[name]
    cfg, objects = register_changed(tmp_path / "yolo", change, **entry)
    assert ap_of_exact_detections(cfg, objects) == pytest.approx(100.0)
    images = DatasetCatalog.get("exact")
    assert sum(len(image["annotations"]) for image in images) == sum(map(len, objects.values()))
    assert len(images) == COUNT
    assert class_names(cfg) == tuple(MetadataCatalog.get("exact").thing_classes) == tuple(CLASSES)
    warnings = [message for message in caplog.messages if message.startswith("exact: ")]
    assert len(warnings) == (0 if is_quiet else 1), warnings


def test_polygons_become_masks(tmp_path):
    register_changed(tmp_path, CHANGES["polygons"][0])
    for annotation in [item for image in DatasetCatalog.get("exact") for item in image["annotations"]]:
        x1, y1, x2, y2 = annotation["bbox"]
        assert annotation["segmentation"][0] == pytest.approx([x1, y1, x2, y1, x2, y2, x1, y2])


def test_images_without_labels_show_no_object(tmp_path, caplog):
    def change(folder):
        (folder / "labels/train/exact1.txt").unlink()
        (folder / "labels/train/exact2.txt").write_text("\n")

    register_changed(tmp_path, change)
    annotations = {image["image_id"]: image["annotations"] for image in DatasetCatalog.get("exact")}
    assert annotations["images/train/exact1.png"] == annotations["images/train/exact2.png"] == []
    assert len(annotations) == COUNT
    assert "1 images have no label file and are taken to show no object" in caplog.text


def test_boxes_over_the_edge_are_cut_and_counted(tmp_path, caplog):
    register_changed(tmp_path, each_line(lambda c: [c[0], 0.99, 0.5, 0.1, 1.05]))
    for image in DatasetCatalog.get("exact"):
        for annotation in image["annotations"]:
            assert annotation["bbox"] == pytest.approx([0.94 * image["width"], 0, image["width"], 64])
    assert "boxes reach over the edge of their image and are cut there" in caplog.text
