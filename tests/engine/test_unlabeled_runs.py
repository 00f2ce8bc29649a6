"""Trainings on images with and without labels: resumed, in two processes, checked, and refused."""

import gdetkd  # noqa: F401, I001  first, in the spawned processes too
import json

import pytest
import torch
from detectron2.data import MetadataCatalog

from conftest import ALL_LOSSES, DENSE
from gdetkd import DistillTrainer
from gdetkd.data import register_datasets
from gdetkd.data.train_mapper import build_mapper
from gdetkd.data.unlabeled import is_unlabeled, load_unlabeled
from gdetkd.engine.check import Check
from gdetkd.engine.unlabeled_checks import UnlabeledReport, check_unlabeled
from gdetkd.errors import GDetKDError
from gdetkd.study.methods import method_opts
from test_processes import fail_on_rank_1, have_equal_parameters, run_in_processes, train_rank


@pytest.fixture
def unlabeled_cfg(distill_cfg, pseudo_entry):
    """Return a function that makes the config of a distillation on images with and without labels."""

    def make(changes={}, **entry):
        entries = [dict(MetadataCatalog.get("tiny").gdetkd_entry), pseudo_entry(**entry)]
        keys = {"DATASETS.REGISTER": entries, "DATASETS.UNLABELED": ("pseudo",), "SOLVER.IMS_PER_BATCH": 4}
        return distill_cfg({**keys, "SOLVER.BASE_LR": 1e-5, **changes})

    return make


def train(cfg, resume=False):
    torch.manual_seed(0)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return [parameter.detach().clone() for parameter in trainer.distiller.parameters()]


@pytest.mark.parametrize("losses", [ALL_LOSSES, ()])
def test_a_resumed_run_is_bit_identical_and_both_parts_are_logged(unlabeled_cfg, tmp_path, losses):
    keys = {"DISTILL.LOSSES": losses, "SOLVER.MAX_ITER": 40, "SOLVER.CHECKPOINT_PERIOD": 10}
    cfg = unlabeled_cfg(keys)
    whole = train(cfg)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    for name in ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"):
        assert all(f"{part}/{name}" in rows[-1] for part in ("labeled", "unlabeled"))
    assert 0 < rows[-1]["unlabeled/boxes"] <= 3
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000019.pth")
    (tmp_path / "run" / "model_final.pth").unlink()
    assert all(torch.equal(a, b) for a, b in zip(train(cfg, resume=True), whole, strict=True))


@pytest.mark.parametrize("keys", [{"DISTILL.LOSSES": ALL_LOSSES}, {"DISTILL.LOSSES": ()}])
def test_two_processes_stay_together(unlabeled_cfg, tmp_path, keys):
    results = run_in_processes(train_rank, tmp_path, 2, unlabeled_cfg({"SOLVER.MAX_ITER": 6, **keys}))
    assert have_equal_parameters(results) and all(result["changed"] for result in results)


class _FailsOnce(DistillTrainer):
    """In the second step, the forward pass of rank 1 is not finite."""

    def __init__(self, cfg):
        super().__init__(cfg)
        fail_on_rank_1(self, before=[3])  # each step calls it twice


def _train_with_a_failure(rank, cfg):
    return train_rank(rank, cfg, _FailsOnce)


def test_a_forward_pass_that_breaks_off_on_one_rank_is_left_out_on_all(unlabeled_cfg, tmp_path):
    keys = {"SOLVER.MAX_ITER": 4, "DISTILL.SKIP_NONFINITE": 1, "DISTILL.LOSSES": ALL_LOSSES}
    results = run_in_processes(_train_with_a_failure, tmp_path, 2, unlabeled_cfg(keys))
    assert have_equal_parameters(results) and all(result["changed"] for result in results)
    assert [result["skipped"] for result in results] == [1, 1]


@pytest.mark.parametrize(
    "changes, match",
    [
        (
            {"MODEL.META_ARCHITECTURE": "GeneralizedRCNN", "DISTILL.LOSSES": ()},
            "needs MODEL.META_ARCHITECTURE 'GDetKD'",
        ),
        ({"MODEL.MASK_ON": True}, "MODEL.MASK_ON is True, but the labels of DATASETS.UNLABELED are boxes"),
        ({"DATASETS.TRAIN": ("pseudo",)}, "DATASETS.TRAIN names 'pseudo', whose boxes a teacher found"),
        ({"DATASETS.TEST": ("pseudo",)}, "DATASETS.TEST names 'pseudo', whose boxes a teacher found"),
        ({"SOLVER.IMS_PER_BATCH": 1}, "needs an image with labels and one without"),
        ({"DISTILL.UNLABELED.FRACTION": 1.0}, "DISTILL.UNLABELED.FRACTION is 1.0 and must be between 0 and 1"),
        ({"DISTILL.UNLABELED.WEIGHT": -1.0}, "DISTILL.UNLABELED.WEIGHT is -1.0 and must be 0 or more"),
    ],
)
def test_configs_that_cannot_use_unlabeled_images_are_refused(unlabeled_cfg, changes, match):
    with pytest.raises(GDetKDError, match=match):
        DistillTrainer(unlabeled_cfg(changes))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"MODEL.LOAD_PROPOSALS": True}, "MODEL.LOAD_PROPOSALS is True, but images of DATASETS.UNLABELED have no"),
        ({"DISTILL.STUDENT_META_ARCHITECTURE": "PanopticFPN"}, "A PanopticFPN learns from maps of stuff classes"),
    ],
)
def test_detectors_that_cannot_use_unlabeled_images_are_refused(unlabeled_cfg, changes, match):
    with pytest.raises(GDetKDError, match=match):
        check_unlabeled(unlabeled_cfg(changes))


def test_masks_do_not_matter_for_a_dense_student(unlabeled_cfg):
    keys = {"MODEL.MASK_ON": True, "DISTILL.STUDENT_META_ARCHITECTURE": "RetinaNet", "DISTILL.LOSSES": ("SGFI",)}
    DistillTrainer(unlabeled_cfg({**DENSE, **keys}))


def test_a_dense_student_with_masks_trains_on_crops_of_unlabeled_images(unlabeled_cfg):
    """Detectron2 fits boxes in a crop to their masks, which a teacher's boxes lack."""
    crop = {
        "MODEL.MASK_ON": True,
        "INPUT.CROP.ENABLED": True,
        "INPUT.CROP.TYPE": "absolute",
        "INPUT.CROP.SIZE": [40, 40],
    }
    keys = {"DISTILL.STUDENT_META_ARCHITECTURE": "RetinaNet", "DISTILL.LOSSES": ("SGFI",), **crop}
    cfg = unlabeled_cfg({**DENSE, **keys})
    register_datasets(cfg)
    sample = build_mapper(cfg)(load_unlabeled(cfg)[0])
    assert max(sample["image"].shape[1:]) <= 64 and is_unlabeled(sample)


def test_the_check_shows_no_precision_of_thresholds_that_are_not_in_use(unlabeled_cfg):
    cfg = unlabeled_cfg({"DATASETS.TEST": ("tiny",)}, min_score=0.5, change=made_by("0"))
    register_datasets(cfg)
    assert [row[3:] for row in UnlabeledReport(cfg).rows] == [[None, None]] * 3


def made_by(sha256):
    def change(content):
        thresholds = {f"class{index}": {"min_score": 0.5, "precision": 0.75, "recall": 0.5} for index in range(3)}
        teacher = {"sha256": sha256, "weights": "other.pth"}
        content["info"]["gdetkd_labels"] = {"source": "teacher", "teacher": teacher, "thresholds": thresholds}

    return change


def test_labels_of_another_teacher_are_warned_of(unlabeled_cfg, caplog):
    DistillTrainer(unlabeled_cfg(change=made_by("0" * 64)))
    assert "The boxes of 'pseudo' come from another teacher ('other.pth') than DISTILL.TEACHER" in caplog.text


def without_class_0(content):
    made_by("0" * 64)(content)
    content["annotations"] = [item for item in content["annotations"] if item["category_id"] != 1]


def test_the_check_compares_both_kinds_of_images(unlabeled_cfg, tmp_path):
    cfg = unlabeled_cfg(
        {"DATASETS.TEST": ("tiny",), "DISTILL.TEACHER.MIN_AP": 0.0}, min_score=None, change=made_by("0")
    )
    (tmp_path / "pseudo" / "pseudo.html").write_text("a page")
    check = Check(cfg)
    screen = check.run()
    assert "8 images without labels, 2 of 4 in a step of a process, weight 1." in screen and "pseudo.html" in screen
    assert [row[3:] for row in UnlabeledReport(cfg).rows] == [[0.75, 0.5]] * 3
    assert "0.75" in screen and "0.50" in screen and check.problems == []


def test_the_check_warns_of_classes_that_are_never_found_or_much_more_frequent(unlabeled_cfg, caplog):
    Check(unlabeled_cfg({"DISTILL.LOSSES": (), "DATASETS.TEST": ("tiny",)}, change=without_class_0)).run()
    assert "The teacher's boxes have no 'class0', of which the labelled images have" in caplog.text
    assert "'class1' is 60.0% of the teacher's boxes, and" in caplog.text


def test_methods_of_a_comparison(unlabeled_cfg, distill_cfg):
    cfg, off = unlabeled_cfg(), ["DATASETS.UNLABELED", "()"]
    plain = ["DISTILL.LOSSES", "()", "DISTILL.HEAD_TRANSFER", "False"]
    assert method_opts("GDetKD+unlabeled", cfg) == [] and method_opts("pseudo", cfg) == plain
    assert method_opts("none", cfg) == [*off, *plain] and method_opts("GDetKD", cfg) == off
    assert method_opts("SGFI+unlabeled", cfg)[:2] == ["DISTILL.LOSSES", "('SGFI',)"]
    for nonsense in ("pseudo+unlabeled", "unlabeled+unlabeled", "none+unlabeled"):
        with pytest.raises(GDetKDError, match="There is no method .*stand alone"):
            method_opts(nonsense, cfg)
    with pytest.raises(GDetKDError, match="'pseudo' trains on images without labels, but DATASETS.UNLABELED is empty"):
        method_opts("pseudo", distill_cfg())
