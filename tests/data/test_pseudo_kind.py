"""Datasets of kind `pseudo`: the scores of a teacher's boxes decide which boxes are objects."""

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog

from conftest import make_cfg
from gdetkd.data import register_datasets
from gdetkd.errors import GDetKDError


def load(entry):
    register_datasets(make_cfg({"DATASETS.REGISTER": [entry]}))
    return DatasetCatalog.get(entry["name"])


def crowds(samples):
    return [item["iscrowd"] for sample in samples for item in sample["annotations"]]


def test_the_score_decides_what_becomes_of_a_box(pseudo_entry):
    def change(content):
        for annotation, score in zip(content["annotations"], (0.5, 0.4999, 0.25, 0.2499, 0.0)):
            annotation["score"] = score
        del content["annotations"][5:]

    entry = pseudo_entry(change=change)
    assert crowds(load(entry)) == [0, 1, 1]
    assert crowds(load({**entry, "name": "other", "ignore_score": 0.45})) == [0, 1]
    assert crowds(load({**entry, "name": "third", "min_score": 0.0})) == [0] * 5


def test_a_crowd_of_the_file_stays_a_crowd(pseudo_entry):
    def change(content):
        content["annotations"] = [{**item, "iscrowd": 1, "score": 0.9} for item in content["annotations"][:2]]
        content["annotations"] += [{**content["annotations"][0], "id": 99, "iscrowd": 0}]

    assert sorted(crowds(load(pseudo_entry(change=change)))) == [0, 1, 1]


def test_a_backslash_may_be_part_of_a_name(pseudo_entry):
    """It is, on Linux, in an archive that was packed on Windows. In a COCO file it may also stand for a slash."""
    entry = pseudo_entry()
    content, folder = json.loads(Path(entry["json"]).read_text()), Path(entry["images"])
    before = content["images"][0]["file_name"]
    (folder / before).rename(folder / "sub\\image.png")
    content["images"][0]["file_name"] = "sub\\image.png"
    Path(entry["json"]).write_text(json.dumps(content))
    assert str(folder / "sub\\image.png") in [sample["file_name"] for sample in load(entry)]


def test_the_file_has_a_threshold_for_each_class(pseudo_entry):
    def change(content):
        thresholds = {name: {"min_score": score} for name, score in (("class0", 0.8), ("class1", 0.3), ("class2", 0.0))}
        content["info"]["gdetkd_labels"] = {"version": 1, "thresholds": thresholds}
        content["annotations"] = [
            {**content["annotations"][0], "id": number, "category_id": category, "score": score}
            for number, (category, score) in enumerate([(1, 0.8), (1, 0.7), (1, 0.3), (2, 0.3), (2, 0.1), (3, 0.0)], 1)
        ]

    entry = pseudo_entry(min_score=None, change=change)
    assert crowds(load(entry)) == [0, 1, 0, 0]
    assert crowds(load({**entry, "name": "other", "min_score": 0.3})) == [0] * 4
    # A box with `min_score` is an object, whatever `ignore_score` says.
    assert crowds(load({**entry, "name": "third", "ignore_score": 0.75})) == [0, 0, 0]


def test_a_missing_file_names_the_tool_that_writes_it(tmp_path):
    with pytest.raises(GDetKDError, match="tools/label.py writes the JSON"):
        load({"name": "pseudo", "kind": "pseudo", "json": str(tmp_path / "none.json"), "images": str(tmp_path)})


def without_score(content):
    del content["annotations"][3]["score"]


def with_score(score):
    def change(content):
        content["annotations"][3]["score"] = score

    return change


@pytest.mark.parametrize(
    "keys, match",
    [
        ({"change": without_score}, "annotation 4 .* score None, not a number from 0 to 1"),
        ({"change": with_score(1.5)}, "annotation 4 .* score 1.5, not a number"),
        ({"change": with_score("high")}, "annotation 4 .* score 'high', not a number"),
        ({"min_score": 0.95}, "No box of 'pseudo' has a score above its threshold, of 15 boxes"),
        ({"min_score": None}, "has no `min_score`, and .* has no threshold for the class 'class0'"),
        ({"min_score": 50}, "has min_score 50, not a number from 0 to 1"),
        ({"ignore_score": True}, "has ignore_score True, not a number"),
        ({"ignore_score": 0.6}, "has an ignore_score 0.6 above its min_score 0.5"),
        ({"classes": ["a"]}, "has the unknown key classes"),
    ],
)
def test_bad_labels_are_refused(pseudo_entry, keys, match):
    with pytest.raises(GDetKDError, match=match):
        load(pseudo_entry(**keys))
