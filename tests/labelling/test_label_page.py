"""Test the page of sample images, and the tool's arguments."""

import importlib.util
import os
from dataclasses import replace

import pytest
from matplotlib import pyplot as plt
from PIL import Image

from gdetkd.errors import GDetKDError
from gdetkd.labelling.images import ImageFile
from gdetkd.labelling.onnx_source import OnnxModel
from gdetkd.labelling.output import Labels
from gdetkd.labelling.page import _draw_image, write_page
from gdetkd.labelling.part import Found
from gdetkd.labelling.run import Options
from gdetkd.labelling.source import Source
from gdetkd.labelling.thresholds import ClassThreshold
from programs import ROOT


class NoSource(Source):
    kind = "teacher"

    def origin(self):
        return {"config_file": "a <file>"}

    def settings(self):
        return {}

    def detect(self, images):
        return iter(())


@pytest.fixture
def labels(tmp_path):
    """Return ten images with three boxes each: above, at half of the threshold, and below half."""
    Image.new("RGB", (600, 300)).save(tmp_path / "image.png")
    found = Found("", 1, "", [[10, 20, 30, 40], [50, 60, 70, 80], [1, 2, 3, 4]], [0.8, 0.4, 0.39], [1, 1, 1], 0)
    images = [ImageFile(f"{index}.png", str(tmp_path / "image.png"), 600, 300, 1, index) for index in range(10)]
    thresholds = {"cat": ClassThreshold(0.1), "dog": ClassThreshold(0.8, 0.5, 0.25, 1 / 3)}
    return Labels([(image, found) for image in images], ("cat", "dog"), thresholds, "val", 1, 2)


def test_boxes_above_are_solid_and_doubtful_boxes_are_dashed(labels):
    figure, axis = plt.subplots()
    _draw_image(axis, *labels.images[0], labels)
    drawn = {(*patch.get_bbox().bounds, patch.get_linestyle()) for patch in axis.patches}
    assert drawn == {(10, 20, 30, 40, "-"), (50, 60, 70, 80, "--")}  # in pixels of the file, although it is drawn small
    assert {text.get_text() for text in axis.texts} == {"dog 0.80", "dog 0.40"}


@pytest.mark.parametrize("name", ["price_$5_$10.jpg", os.fsdecode(b"caf\xe9.jpg")])
def test_any_name_can_be_drawn(labels, tmp_path, name):
    labels = labels._replace(
        images=[(replace(image, name=name), found) for image, found in labels.images[:1]],
        classes=("cat", "$d^o^g$"),
        thresholds={"cat": ClassThreshold(0.1), "$d^o^g$": ClassThreshold(0.8)},
    )
    write_page(labels, NoSource(), tmp_path / "page.html", 1, 0)
    assert "1 of 1 images" in (tmp_path / "page.html").read_text()


def test_the_seed_chooses_the_images(labels, tmp_path):
    def page(seed):
        write_page(labels, NoSource(), tmp_path / "page.html", 4, seed)
        return (tmp_path / "page.html").read_text()

    first = page(0)
    assert page(0) == first != page(1)
    assert "4 of 10 images" in first and "10 of 30 boxes on 10 images" in first and "a &lt;file&gt;" in first
    assert '0.800</td><td class="">0.500</td><td class="">0.250</td><td class="">0.333' in first


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("label", ROOT / "tools" / "label.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arguments(tool, tmp_path):
    common = ["--config-file", "a.yaml", "--output", "x.json"]
    plain = tool.options(tool.parser().parse_args([*common, "--images", "new"]))
    assert plain == Options(output=plain.output, images="new") and str(plain.output) == "x.json"
    words = (
        "--dataset new --floor 0.1 --thresholds red=0.5,blue=cell=0.25 --onnx m.onnx --onnx-outputs a,b,c --onnx-size"
    )
    more = "32 40 --onnx-format RGB --onnx-scale 0.5 --onnx-classes red,blue MODEL.DEVICE cpu"
    args = tool.parser().parse_args([*common, *words.split(), *more.split()])
    model = OnnxModel("m.onnx", ["a", "b", "c"], (32, 40), "RGB", 0.5, ["red", "blue"])
    thresholds = {"red": 0.5, "blue=cell": 0.25}
    assert tool.options(args) == Options(
        output=plain.output, dataset="new", floor=0.1, thresholds=thresholds, onnx=model
    )
    assert args.opts == ["MODEL.DEVICE", "cpu"]
    with pytest.raises(GDetKDError, match="--thresholds has 'red'"):
        tool.options(tool.parser().parse_args([*common, "--images", "new", "--thresholds", "red"]))
    with pytest.raises(SystemExit):
        tool.parser().parse_args(common)
    assert "--onnx-scale" in tool.parser().format_help()
