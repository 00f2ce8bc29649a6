"""Test tools/convert_mmdet.py from its command line. tests/mmdetection tests what it converts."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mmdet_configs import config_2x, mask_head, two_stage
from mmdet_reference import Detector

TOOL = Path(__file__).parents[2] / "tools" / "convert_mmdet.py"
MODEL = two_stage("MaskRCNN")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the tool in the folder of the files."""
    spec = importlib.util.spec_from_file_location("convert_mmdet", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["convert_mmdet.py", *words])
        with tool.explained_errors():
            tool.main()

    return run


def save(model, **meta):
    torch.save({"state_dict": Detector(model).state_dict(), "meta": meta}, "mmdet.pth")


def test_weights_and_config_are_written(run, capsys):
    save(MODEL, config=config_2x(MODEL), CLASSES=("ant", "bee", "cow", "dog", "eel"))
    run("mmdet.pth", "new/teacher.pth")
    weights, config = torch.load("new/teacher.pth", weights_only=True), yaml.safe_load(open("new/teacher.yaml"))
    assert list(weights) == ["model"] and "roi_heads.mask_head.predictor.weight" in weights["model"]
    assert config["MODEL"]["MASK_ON"] and config["MODEL"]["WEIGHTS"] == "new/teacher.pth" and config["VERSION"] == 2
    printed = capsys.readouterr().out
    assert f"new/teacher.pth: {Path('new/teacher.pth').stat().st_size / 1e6:.1f} MB" in printed
    assert "new/teacher.yaml" in printed and 'DISTILL.TEACHER.CLASSES: ["ant", "bee", "cow", "dog", "eel"]' in printed


def test_config_and_masks(run):
    """The checkpoint holds no config, and its cascade has more mask heads than Detectron2's."""
    cascade = two_stage("CascadeRCNN")
    masks = {"mask_head": [mask_head(8, 5)] * 3, "mask_roi_extractor": cascade["roi_head"]["bbox_roi_extractor"]}
    cascade["roi_head"] = {**cascade["roi_head"], **masks}
    save(cascade)
    Path("cascade.py").write_text(config_2x(cascade))
    run("mmdet.pth", "teacher.pth", "--config", "cascade.py", "--drop-masks")
    assert yaml.safe_load(open("teacher.yaml"))["MODEL"]["ROI_HEADS"]["NAME"] == "CascadeROIHeads"


def test_a_refused_checkpoint_leaves_no_file(run):
    save(MODEL, config=config_2x(MODEL), mmdet_version="1.1.0")
    with pytest.raises(SystemExit, match="mmdet.pth' is of mmdetection 1.1.0"):
        run("mmdet.pth", "new/teacher.pth")
    assert [path.name for path in Path().iterdir()] == ["mmdet.pth"]


@pytest.mark.parametrize("output", ["teacher.yaml", "teacher", "mmdet.pth"])
def test_an_output_of_another_name(run, output):
    with pytest.raises(SystemExit, match=f"{output}' has to end in .pth, and to be another file"):
        run("mmdet.pth", output)


def test_a_missing_checkpoint(run):
    with pytest.raises(SystemExit, match="gone.pth' cannot be read"):
        run("gone.pth", "teacher.pth")
