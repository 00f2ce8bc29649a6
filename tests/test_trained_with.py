"""Weights tell how they were trained, and a config with other settings causes a warning."""

import pytest
import torch
from detectron2.data import MetadataCatalog

from conftest import make_cfg
from gdetkd import DistillTrainer
from gdetkd.engine.check import Check
from gdetkd.safe_load import read_weights
from gdetkd.trained_with import TORCHVISION, TrainedWith, other_settings, trained_with
from programs import run_program

RGB = {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53]}


@pytest.fixture
def trained(distill_cfg):
    """Distil a tiny student for a step. Return its config."""
    keys = {"SOLVER.MAX_ITER": 1, "DATASETS.TEST": ("tiny",), "DISTILL.LOSSES": ("CKD",)}
    cfg = distill_cfg({**keys, "DATASETS.REGISTER": [dict(MetadataCatalog.get("tiny").gdetkd_entry)]})
    DistillTrainer(cfg).train()
    return cfg


def test_a_students_files_tell_classes_and_settings(trained):
    for name in ("model_final.pth", "model_best.pth"):
        told = trained_with(read_weights(f"{trained.OUTPUT_DIR}/{name}"))
        assert told.classes == ["class0", "class1", "class2"]
        assert told.settings["INPUT.FORMAT"] == "BGR" and "MODEL.ANCHOR_GENERATOR.SIZES" in told.settings
        assert other_settings(told.settings, trained) == []
        changed = make_cfg({**RGB, "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0)})
        keys = [text.split()[0] for text in other_settings(told.settings, changed)]
        assert keys == ["INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS"]


def test_other_files_tell_nothing():
    assert trained_with({"model": {}}) == TrainedWith(None, {})
    assert trained_with({"run": {"config": "MODEL: !!python/object:os.system {}", "classes": ["a"]}}).settings == {}
    assert trained_with({"run": {"config": ["a"], "classes": "cat"}, "settings": {1: 2}}) == TrainedWith(None, {})
    assert other_settings({"MODEL.NO_SUCH_KEY": 1}, make_cfg({})) == []


@pytest.mark.parametrize(
    "path, keys",
    [
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", []),
        ("detectron2://ImageNetPretrained/torchvision/R-50.pkl", [*TORCHVISION, "MODEL.RESNETS.STRIDE_IN_1X1"]),
        ("detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl", ["MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"]),
        ("detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl", []),
    ],
)
def test_the_zoos_classifiers_are_known_by_their_address(path, keys):
    usual = {"MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675], "MODEL.PIXEL_STD": [1.0, 1.0, 1.0]}
    told = trained_with({"model": {}}, path)
    assert [text.split()[0] for text in other_settings(told.settings, make_cfg(usual))] == keys


def test_an_evaluation_and_an_export_with_other_settings_warn(trained, tmp_path):
    (tmp_path / "student.yaml").write_text(trained.dump())
    weights = f"{trained.OUTPUT_DIR}/model_final.pth"
    words = ["--config-file", tmp_path / "student.yaml"]
    opts = ["INPUT.FORMAT", "RGB", "OUTPUT_DIR", tmp_path / "eval"]
    evaluation = run_program("train_net.py", *words, "--eval-only", "MODEL.WEIGHTS", weights, *opts)
    exported = run_program("tools/export.py", *words, "--weights", weights, "--output", tmp_path / "plain.yaml", *opts)
    for result in (evaluation, exported):
        assert result.returncode == 0, result.stderr[-2000:]
        assert "with other settings: INPUT.FORMAT was 'BGR' and is now 'RGB'" in result.stdout + result.stderr


def test_a_start_from_a_student_with_other_classes_or_settings(trained, caplog, distill_cfg, tmp_path):
    content = torch.load(f"{trained.OUTPUT_DIR}/model_final.pth", weights_only=False)
    content["run"]["classes"].reverse()
    torch.save(content, tmp_path / "start.pth")
    keys = {"MODEL.WEIGHTS": str(tmp_path / "start.pth"), "OUTPUT_DIR": str(tmp_path / "next")}
    cfg = distill_cfg({**keys, **RGB, "DISTILL.LOSSES": ("CKD",)})
    DistillTrainer(cfg).resume_or_load(resume=False)
    assert "with other settings: INPUT.FORMAT was 'BGR' and is now 'RGB'; MODEL.PIXEL_MEAN was" in caplog.text
    assert "was trained on the classes class2, class1, class0, and DATASETS.TRAIN has them in another" in caplog.text
    check = Check(cfg)
    check._weights()
    assert len([problem for problem in check.problems if "start.pth" in problem]) == 2


@pytest.mark.parametrize("width, is_replaced", [(16, True), (8, False)])
def test_head_transfer_replaces_the_classes_of_a_head_of_the_same_width(distill_cfg, tmp_path, width, is_replaced):
    keys = {"MODEL.ROI_BOX_HEAD.FC_DIM": width, "DISTILL.HEAD_TRANSFER": True, "DISTILL.LOSSES": ("CKD",)}
    cfg = distill_cfg({**keys, "MODEL.WEIGHTS": str(tmp_path / "start.pth")})
    trainer = DistillTrainer(cfg)
    names = ["class2", "class1", "class0"]
    torch.save({"model": trainer.student.state_dict(), "run": {"classes": names}}, cfg.MODEL.WEIGHTS)
    trainer.checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    assert any("another order" in problem for problem in trainer.start_problems()) != is_replaced


def test_other_anchors_do_not_matter_where_a_training_starts(trained, distill_cfg, tmp_path):
    keys = {"MODEL.WEIGHTS": f"{trained.OUTPUT_DIR}/model_final.pth", "OUTPUT_DIR": str(tmp_path / "next")}
    cfg = distill_cfg({**keys, "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64]]})
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert trainer.start_problems() == []
    assert "MODEL.ANCHOR_GENERATOR.SIZES was" in trainer.checkpointer.check_settings(cfg)[0]


@pytest.mark.parametrize(
    "values, differ",
    [
        ({"MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717]}, False),
        ({"MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53]}, True),
        ({"MODEL.PIXEL_STD": [1.0, 1.0, 1.5]}, True),
        ({"MODEL.PIXEL_MEAN": [110.0]}, True),
    ],
)
def test_rounded_values_of_pixels_agree(values, differ):
    usual = make_cfg({"MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675], "MODEL.PIXEL_STD": [1.0, 1.0, 1.0]})
    assert bool(other_settings(values, usual)) == differ
