"""Evaluators: the metrics of a dataset, and the files of detections."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from conftest import NUM_CLASSES, make_cfg
from gdetkd.engine.evaluators import CocoMetrics, build_evaluator
from gdetkd.errors import GDetKDError

XML = """<annotation><filename>{name}.jpg</filename><size><width>64</width><height>48</height><depth>3</depth></size>
<object><name>cat</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>
<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>"""


@pytest.fixture
def voc(tmp_path):
    """Register two images in VOC's layout with a cat each. The second cat is difficult. Return the dataset's name."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for difficult, name in enumerate(("000001", "000002")):
        (tmp_path / "Annotations" / f"{name}.xml").write_text(XML.format(name=name, difficult=difficult))
        Image.new("RGB", (64, 48)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
    (tmp_path / "ImageSets/Main/test.txt").write_text("000001\n000002\n")
    register_pascal_voc("voc_tiny", str(tmp_path), "test", 2007, ["cat", "dog"])
    MetadataCatalog.get("voc_tiny").set(evaluator_type="pascal_voc")
    return "voc_tiny"


def evaluate(dataset, found, tmp_path):
    """Return the metrics of a detector that finds the cats of the images in `found`."""
    evaluator = build_evaluator(make_cfg({"OUTPUT_DIR": str(tmp_path)}), dataset)
    evaluator.reset()
    for sample in DatasetCatalog.get(dataset):
        count = int(sample["image_id"] in found)
        instances = Instances((48, 64))
        instances.pred_boxes = Boxes(torch.tensor([[10.0, 5.0, 30.0, 40.0]])[:count])
        instances.scores = torch.ones(count)
        instances.pred_classes = torch.zeros(count, dtype=torch.int64)
        evaluator.process([sample], [{"instances": instances}])
    return evaluator.evaluate()


def test_voc_datasets_have_both_metrics(voc, tmp_path):
    results = evaluate(voc, {"000001", "000002"}, tmp_path / "both")
    assert results["bbox"]["AP"] == pytest.approx(100)
    # No image has a dog. VOC's metric counts that class as 0 in the average over classes.
    assert results["voc"]["AP50"] == pytest.approx(50) and set(results["voc"]) == {"AP", "AP50", "AP75"}


def test_a_folder_that_is_removed_is_made_again(voc, tmp_path):
    evaluate(voc, {"000001"}, tmp_path)
    shutil.rmtree(tmp_path / "inference")
    assert evaluate(voc, {"000001", "000002"}, tmp_path)["bbox"]["AP"] == pytest.approx(100)
    assert (tmp_path / "inference" / "coco_instances_results.json").exists()


def test_difficult_objects_count_only_in_cocos_metric(voc, tmp_path):
    results = evaluate(voc, {"000001"}, tmp_path / "easy")
    assert results["voc"]["AP50"] == pytest.approx(50)
    assert results["bbox"]["AP"] == pytest.approx(50, abs=1)


def test_other_datasets_have_cocos_metric(tmp_path):
    evaluator = build_evaluator(make_cfg({"OUTPUT_DIR": str(tmp_path)}), "tiny")
    assert type(evaluator) is CocoMetrics


def test_a_converted_file_of_an_earlier_run_is_not_used(voc, tmp_path):
    """Detectron2 would evaluate against a file that it finds, although the annotations may have changed."""
    stale = tmp_path / "run" / "inference" / f"{voc}_coco_format.json"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"images": [], "annotations": [], "categories": []}')
    assert evaluate(voc, {"000001", "000002"}, tmp_path / "run")["bbox"]["AP"] == pytest.approx(100)
    # Within a run the file is used again, because the metadata name it.
    assert evaluate(voc, {"000001", "000002"}, tmp_path / "run")["bbox"]["AP"] == pytest.approx(100)
    stale.unlink()  # somebody makes room during the run
    assert evaluate(voc, {"000001", "000002"}, tmp_path / "run")["bbox"]["AP"] == pytest.approx(100)


def score_disturbed_truth(implementation, tmp_path):
    """Return the metrics of detections that are the moved objects of "tiny". Some are renamed, missed or doubled."""
    evaluator = build_evaluator(make_cfg({"OUTPUT_DIR": str(tmp_path), "TEST.COCO_EVAL": implementation}), "tiny")
    return find_disturbed_truth(evaluator)["bbox"]


def find_disturbed_truth(evaluator):
    evaluator.reset()
    rng = np.random.default_rng(0)
    for sample in DatasetCatalog.get("tiny"):
        boxes, classes = [], []
        for annotation in sample["annotations"] * 2:
            x, y, w, h = annotation["bbox"] + rng.normal(0, 2, 4)
            if rng.random() < 0.8:
                boxes.append([x, y, x + w, y + h])
                wrong = rng.random() < 0.2
                classes.append(int(rng.integers(NUM_CLASSES)) if wrong else annotation["category_id"])
        instances = Instances((sample["height"], sample["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
        instances.scores = torch.from_numpy(rng.random(len(boxes)))
        instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
        evaluator.process([sample], [{"instances": instances}])
    return evaluator.evaluate()


def test_detections_are_written_as_detectron2_writes_them(tmp_path):
    detectron2s = COCOEvaluator("tiny", output_dir=str(tmp_path / "detectron2"), use_fast_impl=False)
    expected = find_disturbed_truth(detectron2s)
    keys = {"OUTPUT_DIR": str(tmp_path), "TEST.COCO_EVAL": "pycocotools"}
    found = find_disturbed_truth(build_evaluator(make_cfg(keys), "tiny"))
    assert found["bbox"] == pytest.approx(expected["bbox"], rel=0, nan_ok=True)
    name, folder = "coco_instances_results.json", tmp_path / "inference"
    assert json.loads((folder / name).read_text()) == json.loads((tmp_path / "detectron2" / name).read_text()) != []
    assert [path.name for path in folder.iterdir()] == [name]


def test_the_fast_implementation_gives_the_official_figures(tmp_path):
    pytest.importorskip("faster_coco_eval")
    official = score_disturbed_truth("pycocotools", tmp_path)
    fast = score_disturbed_truth("faster-coco-eval", tmp_path)
    assert 10 < official["AP"] < 90
    assert fast == pytest.approx(official, rel=1e-9, nan_ok=True)


def test_the_config_chooses_the_implementation_that_runs(tmp_path, monkeypatch):
    package = pytest.importorskip("faster_coco_eval")
    calls = []
    evaluate_images = package.COCOeval_faster.evaluate
    monkeypatch.setattr(package.COCOeval_faster, "evaluate", lambda self: (calls.append(1), evaluate_images(self))[1])
    score_disturbed_truth("pycocotools", tmp_path)
    assert not calls
    score_disturbed_truth("faster-coco-eval", tmp_path)
    assert calls
    score_disturbed_truth("pycocotools", tmp_path)
    assert len(calls) == 1


def test_an_unknown_or_missing_implementation_is_refused(tmp_path, monkeypatch):
    with pytest.raises(GDetKDError, match="TEST.COCO_EVAL is 'fast'"):
        score_disturbed_truth("fast", tmp_path)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(GDetKDError, match="pip install"):
        score_disturbed_truth("faster-coco-eval", tmp_path)
