"""Faulty annotations are left out with a count, or an error names them. Paths do not leave their folder."""

import os

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.structures import Boxes, Instances
from PIL import Image
from test_clean import BOX, dataset, with_boxes

from conftest import make_cfg, write_coco
from gdetkd.data import register_datasets
from gdetkd.data.folders import leaves
from gdetkd.data.kinds.coco_ids import respell_file_names
from gdetkd.data.kinds.coco_masks import _decoded_length, _is_near, _outline
from gdetkd.data.kinds.voc import load_voc
from gdetkd.engine.dataset_checks import check_datasets
from gdetkd.engine.evaluators import build_evaluator
from gdetkd.errors import GDetKDError


def test_boxes_with_huge_coordinates_are_left_out(tmp_path, caplog):
    far = [[1e30, 5, 9, 9], [5, 5, 10**30, 9], [5, 5, 10**400, 9], [-1e8, 5, 2e8, 9], [5, 5, 1e308, 1e308]]
    nan, inf = float("nan"), float("inf")
    none = [[5, 5, nan, 9], [5, 5, 9, -inf], [10**400, nan, 9, 9], [5, 10**400, 9, inf]]
    dataset(tmp_path, with_boxes(*far, *none, [5, 5, 9, 9]))
    assert [a["bbox"] for a in DatasetCatalog.get("mine")[0]["annotations"]] == [[5, 5, 9, 9]]
    assert "4 annotations without area are left out; 5 annotations with coordinates beyond 10000000" in caplog.text


def change_image(**changes):
    return lambda content: content["images"][1].update(changes)


def change_annotation(**changes):
    return lambda content: content["annotations"][0].update(changes)


RLE = {"size": [64, 64], "counts": [64 * 64]}


@pytest.mark.parametrize(
    "change, match",
    [
        (change_image(id=1), "image id 1 occurs twice"),
        (change_image(id=None), "image id None is not a number or text"),
        (change_image(width=0), "image 2 has the width 0"),
        (change_image(height="tall"), "image 2 has the height 'tall'"),
        (change_image(file_name="a\0.png"), "zero byte"),
        (change_image(file_name=7), "image 2 has no file name"),
        (lambda content: content["categories"].append({"id": 1, "name": "again"}), "category id 1 occurs twice"),
        (lambda content: content["categories"].clear(), "names no category"),
        (lambda content: content.update(images={}), "no list of images"),
        (change_annotation(category_id=0), "category_id=0, which is none of its categories"),
        (change_annotation(category_id=[1]), r"category_id=\[1\]"),
        (change_annotation(bbox=[1, 2, 3]), r"has the box \[1, 2, 3\]"),
        (change_annotation(bbox=[1, 2, 3, None]), "has the box"),
        (change_annotation(iscrowd=7), "iscrowd 7"),
        (change_annotation(segmentation={**RLE, "size": [10**9, 10**9]}), "segmentation of the size"),
        (change_annotation(segmentation={**RLE, "counts": [-5]}), "without run lengths"),
        (change_annotation(segmentation={**RLE, "counts": [5]}), "not add up to its size"),
        (change_annotation(segmentation={**RLE, "counts": "zzzzzzzzzzzz"}), "not add up to its size"),
        (change_annotation(segmentation=[[1, 2, "x", 4, 5, 6]]), "not a list of polygons"),
        (change_annotation(segmentation=[[0, 0, 1e9, 0, 1e9, 1e9]]), "that is longer than 10000000"),
        (change_annotation(segmentation=[[0, 0, -2e7, 0, 5, 5]]), "segmentation that is longer than"),
        (change_annotation(segmentation=[[0, 0, 10**400, 0, 5, 5]]), "not a list of polygons"),
        (change_annotation(segmentation=[[0, 0, 9e6, 9e6] * 100]), "segmentation that is longer than"),
        (change_annotation(keypoints=["x"]), "keypoints that are not numbers"),
    ],
)
def test_an_item_with_an_impossible_value_is_refused_by_name(tmp_path, change, match):
    dataset(tmp_path, change)
    with pytest.raises(GDetKDError, match=f"mine.json.*{match}.*Correct that file"):
        DatasetCatalog.get("mine")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["annotations"][2].pop("iscrowd"),
        lambda content: content["annotations"][2].pop("area"),
        change_annotation(area="12"),
        change_annotation(area=float("nan")),
        change_annotation(bbox=[5, 5, 10**400, 9]),
    ],
)
def test_the_evaluation_does_not_read_a_file_that_pycocotools_cannot_read(tmp_path, change):
    """pycocotools reads the file that the metadata name. So the evaluation writes a file of what training reads."""
    cfg = dataset(tmp_path, change)
    cfg.DATASETS.TEST = ("mine",)
    check_datasets(cfg)
    evaluator = build_evaluator(cfg, "mine")
    evaluator.reset()
    assert MetadataCatalog.get("mine").json_file != str(tmp_path / "mine.json")


def test_the_evaluation_writes_a_file_of_a_shortened_test_set(tmp_path):
    cfg = dataset(tmp_path, lambda content: [a.pop("area") for a in content["annotations"]], limit=2)
    cfg.DATASETS.TEST = ("mine",)
    check_datasets(cfg)
    evaluator = build_evaluator(cfg, "mine")
    evaluator.reset()
    for sample in DatasetCatalog.get("mine"):
        instances = Instances((sample["height"], sample["width"]))
        instances.pred_boxes, instances.scores = Boxes(torch.tensor([[5.0, 5.0, 30.0, 30.0]])), torch.ones(1)
        instances.pred_classes = torch.zeros(1, dtype=torch.int64)
        evaluator.process([sample], [{"instances": instances}])
    assert "AP" in evaluator.evaluate()["bbox"]


def test_masks_that_pycocotools_wrote_are_read(tmp_path):
    import pycocotools.mask as mask_util

    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = np.asfortranarray((rng.random((31, 17)) < rng.random()).astype(np.uint8))
        assert _decoded_length(mask_util.encode(mask)["counts"].decode()) == mask.size
    whole = mask_util.encode(np.asfortranarray(np.ones((64, 80), np.uint8)))
    masks = [{"size": [64, 80], "counts": whole["counts"].decode()}, {"size": [64, 80], "counts": [0, 64 * 80]}]

    def change(content):
        content["annotations"] = [
            {**BOX, "id": i, "bbox": [5, 5, 9, 9], "segmentation": m} for i, m in enumerate(masks)
        ]

    dataset(tmp_path, change)
    assert len(DatasetCatalog.get("mine")[0]["annotations"]) == 2


@pytest.mark.parametrize(
    "path, out", [("a/../b.png", False), ("../b.png", True), ("a/../../b", True), ("/b", True), ("..b/c", False)]
)
def test_paths_that_leave_their_folder_are_found(path, out):
    assert leaves(path) == out


@pytest.mark.parametrize("where", ["../outside.png", "sub/../../outside.png", "absolute"])
def test_file_names_do_not_lead_out_of_their_folder(tmp_path, where):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "outside.png")
    name = str(tmp_path / "outside.png") if where == "absolute" else where
    cfg = dataset(images, change_image(file_name=name))
    with pytest.raises(GDetKDError, match="outside.png' leads out of .*DATASETS.ALLOW_OUTSIDE"):
        DatasetCatalog.get("mine")
    DatasetCatalog.remove("mine")
    cfg.DATASETS.ALLOW_OUTSIDE = True
    register_datasets(cfg)
    assert os.path.samefile(DatasetCatalog.get("mine")[1]["file_name"], tmp_path / "outside.png")


def test_paths_of_an_entry_do_not_lead_out_of_detectron2s_data_folder(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    write_coco(tmp_path, 2, name="mine")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    entry = {"name": "mine", "kind": "coco", "json": "../mine.json", "images": ".."}
    cfg = make_cfg({"DATASETS.REGISTER": [entry]})
    with pytest.raises(GDetKDError, match="json '../mine.json' of 'mine' leads out.*absolute path.*ALLOW_OUTSIDE"):
        register_datasets(cfg)
    cfg.DATASETS.REGISTER = [{**entry, "json": str(tmp_path / "mine.json")}]
    with pytest.raises(GDetKDError, match="images '..'"):
        register_datasets(cfg)
    cfg.DATASETS.ALLOW_OUTSIDE = True
    register_datasets(cfg)
    assert len(DatasetCatalog.get("mine")) == 2


def voc(folder, names=("one",), text=None, listed=None):
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for name in names:
        Image.new("RGB", (64, 48)).save(folder / f"JPEGImages/{name}.jpg")
        (folder / f"Annotations/{name}.xml").write_text(
            text
            or "<annotation><size><width>64</width><height>48</height></size><object><name>cat</name><bndbox>"
            "<xmin>3</xmin><ymin>4</ymin><xmax>30.5</xmax><ymax>40</ymax></bndbox></object><object><name>dog</name><bndbox>"
            "<xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object></annotation>"
        )
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(names if listed is None else listed) + "\n")
    return str(folder)


def test_voc_is_read_as_detectron2_reads_it(tmp_path):
    root = voc(tmp_path, ("one", "two", "sub"))
    assert load_voc(root, "train", ["cat", "dog"])[0] == load_voc_instances(root, "train", ["cat", "dog"])


def test_a_voc_dataset_with_one_image_is_read(tmp_path):
    entry = {"name": "mine", "kind": "voc", "root": voc(tmp_path), "split": "train", "classes": ["cat", "dog"]}
    register_datasets(make_cfg({"DATASETS.REGISTER": [entry]}))
    assert len(DatasetCatalog.get("mine")) == 1


@pytest.mark.parametrize(
    "text, match",
    [
        ("<annotation><size><width>x</width><height>4</height></size></annotation>", "could not convert"),
        ("<annotation><size><width>1.5</width><height>4</height></size></annotation>", "width is 1.5"),
        ("<annotation><size><width>1e999</width><height>4</height></size></annotation>", "width is 1e999"),
        ("<annotation><size><width>-1</width><height>4</height></size></annotation>", "width is -1"),
        ("<annotations><image /></annotations>", "first element is <annotations>"),
        ("<annotation><object><bndbox /></object></annotation>", "an object has no name"),
        ("<annotation><object><name>cat</name></object></annotation>", "'cat' has no bndbox"),
        ("<annotation><object><name>cat</name><bndbox /></object></annotation>", "bndbox has no xmin"),
        ("<annotation><object><name>cat</name><polygon><pt /></polygon></object></annotation>", "polygon has no x1"),
        (
            "<annotation><object><name>cat</name><robndbox><cx>9</cx><cy>9</cy><w>4</w><h>4</h><angle>90</angle>"
            "</robndbox></object></annotation>",
            "angle of a rotated box is 90, not in radians",
        ),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "document type"),
        ("\0\0\0", "ParseError"),
        ("<annotation>", "ParseError"),
    ],
)
def test_a_file_that_is_no_voc_annotation_is_refused(tmp_path, text, match):
    root = voc(tmp_path, text=text)
    with pytest.raises(GDetKDError, match=f"one.xml' is not a VOC annotation.*{match}"):
        load_voc(root, "train", ["cat"])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_document_type_in_another_encoding_is_refused(tmp_path, encoding):
    root = voc(tmp_path)
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'
    (tmp_path / "Annotations" / "one.xml").write_bytes(text.encode(encoding))
    with pytest.raises(GDetKDError, match="one.xml' is not a VOC annotation.*declares a document type"):
        load_voc(root, "train", ["cat"])


@pytest.mark.parametrize(
    "declared",
    [
        '<!DOCTYPE a SYSTEM "file:///etc/passwd">',
        '<!DOCTYPE a [<!ENTITY % b SYSTEM "file:///etc/passwd"> %b;]>',
        '<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;"><!ENTITY d "&c;&c;&c;&c;&c;">]>',
    ],
)
def test_external_and_growing_entities_are_refused(tmp_path, declared):
    with pytest.raises(GDetKDError, match="declares a document type"):
        load_voc(voc(tmp_path, text=f"{declared}<annotation></annotation>"), "train", ["cat"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_an_annotation_that_only_mentions_a_document_type_is_read(tmp_path, encoding):
    root = voc(tmp_path)
    text = f'<?xml version="1.0" encoding="{encoding}"?>\n<annotation><!-- <!DOCTYPE a> --></annotation>\n'
    (tmp_path / "Annotations" / "one.xml").write_bytes(text.encode(encoding))
    assert load_voc(root, "train", ["cat"])[0][0]["annotations"] == []


def test_outlines_are_accepted_up_to_a_length():
    zigzag = [value for x in range(1500) for value in (x, 5000 * (x % 2))]
    assert _is_near(zigzag) and not _is_near(zigzag * 3)  # 7,500,000 pixels, and three times as many
    assert _outline([0, 0, 4, 0, 4, 3]) == 4 + 3 + 4


@pytest.mark.parametrize("listed", [["../../etc/passwd"], ["one", "one"], ["one -1"], ["/etc/passwd"]])
def test_invalid_voc_lists_are_refused(tmp_path, listed):
    with pytest.raises(GDetKDError, match="train.txt' has the line"):
        load_voc(voc(tmp_path, listed=listed), "train", ["cat", "dog"])
    entry = {"name": "mine", "kind": "voc", "root": str(tmp_path), "split": "../../x", "classes": ["cat"]}
    with pytest.raises(GDetKDError, match="split '../../x'"):
        register_datasets(make_cfg({"DATASETS.REGISTER": [entry]}))


def test_a_file_of_another_image_is_not_taken_for_its_spelling(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    images = [{"file_name": name} for name in ("A.jpg", "a.jpg", "B.jpg", "B.JPG")]
    assert respell_file_names(images, str(tmp_path)) == 1
    assert [image["file_name"] for image in images] == ["A.jpg", "a.jpg", "b.jpg", "B.JPG"]
