"""Match the classes of student and teacher, and compare only those that both have."""

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from conftest import ALL_LOSSES, WIDER, make_batch, make_cfg
from gdetkd.data.class_names import class_names
from gdetkd.errors import GDetKDError
from gdetkd.losses.classes import (
    ClassMap,
    class_probabilities,
    match_classes,
    merge_logits,
    select_deltas,
    select_logits,
)
from gdetkd.structures import DetectorSpec, with_class_names


def spec(*names, count=None):
    plain = DetectorSpec(4, {"p2": 4, "p3": 8}, (7, 7), 6, count or len(names), (10.0, 10.0, 5.0, 5.0))
    return with_class_names(plain, names or None)


def test_same_classes_in_the_same_order_need_no_map():
    assert match_classes("CLS", make_cfg({}), spec("a", "b"), spec("a", "b")) == ClassMap()


def test_classes_match_by_name_in_any_order_and_the_log_says_which(caplog):
    caplog.set_level("INFO")
    found = match_classes("CLS", make_cfg({}), spec("cat", "cow", "dog"), spec("dog", "eel", "cat"))
    assert found == ClassMap((0, 2), (2, 0))
    assert "2 classes of student and teacher match: cat, dog" in caplog.text
    assert "Student: cow. Teacher: eel." in caplog.text


def test_class_map_pairs_different_names_for_one_class():
    cfg = make_cfg({"DISTILL.CLASS_MAP": [["car", "vehicle"]]})
    assert match_classes("REG", cfg, spec("cat", "car"), spec("vehicle", "cat")) == ClassMap((0, 1), (1, 0))
    with pytest.raises(GDetKDError, match="CLASS_MAP.*car"):
        match_classes("REG", cfg, spec("cat", "bus"), spec("vehicle", "cat"))


@pytest.mark.parametrize(
    "pairs,message",
    [
        ([["car", "vehicle"], ["truck", "vehicle"]], "'vehicle' matches two student classes, 'car' and 'truck'"),
        ([["truck", "car"]], "'car' matches two student classes, 'car' and 'truck'"),
        (
            [["truck", "vehicle"], ["truck", "car"]],
            "student class 'truck' with two teacher classes, 'vehicle' and 'car'",
        ),
    ],
)
def test_a_class_with_two_partners_is_refused(pairs, message):
    cfg = make_cfg({"DISTILL.CLASS_MAP": pairs})
    with pytest.raises(GDetKDError, match=f"{message}.*Remove"):
        match_classes("CLS", cfg, spec("car", "truck"), spec("vehicle", "car"))


def test_two_teacher_classes_with_one_name_are_refused():
    with pytest.raises(GDetKDError, match="2 classes with the name 'cat'.*DISTILL.TEACHER.CLASSES"):
        match_classes("CLS", make_cfg({}), spec("cat", "dog"), spec("cat", "cat"))


def test_class_map_can_swap_two_names():
    cfg = make_cfg({"DISTILL.CLASS_MAP": [["a", "b"], ["b", "a"]]})
    assert match_classes("CLS", cfg, spec("a", "b"), spec("a", "b")) == ClassMap((0, 1), (1, 0))


def test_no_class_in_common_is_refused():
    with pytest.raises(GDetKDError, match="CLS.*cat.*eel.*no name in common.*CLASS_MAP"):
        match_classes("CLS", make_cfg({}), spec("cat"), spec("eel"))


def test_unknown_names_are_assumed_equal_only_for_equal_numbers_and_with_a_warning(caplog):
    assert match_classes("CLS", make_cfg({}), spec("a", "b"), spec(count=2)) == ClassMap()
    assert "same classes in the same order" in caplog.text
    with pytest.raises(GDetKDError, match="DISTILL.TEACHER.CLASSES"):
        match_classes("CLS", make_cfg({}), spec("a", "b"), spec(count=3))


def test_merged_probabilities_are_sums():
    logits = torch.randn(5, 7)
    probabilities = logits.softmax(dim=1)
    merged = merge_logits(logits, (4, 1)).softmax(dim=1)
    torch.testing.assert_close(merged[:, 0], probabilities[:, 4])
    torch.testing.assert_close(merged[:, 1], probabilities[:, 1])
    torch.testing.assert_close(merged[:, 2], probabilities[:, [0, 2, 3, 5, 6]].sum(dim=1))
    assert merge_logits(logits, None) is logits


def test_sigmoid_classes_are_selected_and_softmax_classes_merged():
    logits = torch.randn(5, 7)
    assert torch.equal(select_logits(logits, (4, 1)), logits[:, [4, 1]]) and select_logits(logits, None) is logits
    torch.testing.assert_close(class_probabilities(logits, (4, 1), True), logits[:, [4, 1]].sigmoid())
    torch.testing.assert_close(class_probabilities(logits, None, True), logits.sigmoid())
    torch.testing.assert_close(class_probabilities(logits, (4, 1), False), logits.softmax(dim=1)[:, [4, 1]])
    torch.testing.assert_close(class_probabilities(logits, None, False), logits.softmax(dim=1)[:, :6])


def test_deltas_of_the_common_classes_are_selected():
    deltas = torch.arange(24.0).view(1, 24)
    assert select_deltas(deltas, 6, (2, 0))[0].tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    agnostic = torch.ones(1, 4)
    assert select_deltas(agnostic, 6, (2, 0)) is agnostic


def test_names_come_from_metadata_or_from_the_configs_own_entry(tmp_path):
    assert class_names(make_cfg({})) == ("class0", "class1", "class2")
    assert class_names(make_cfg({"DATASETS.TRAIN": ("coco_2017_train",)}))[0] == "person"
    entry = {"name": "elsewhere", "kind": "voc", "root": "nowhere", "split": "train", "classes": ["x", "y"]}
    assert class_names(make_cfg({"DATASETS.TRAIN": ("elsewhere",), "DATASETS.REGISTER": [entry]})) == ("x", "y")
    json_file = tmp_path / "a.json"
    json_file.write_text('{"categories": [{"id": 9, "name": "z"}, {"id": 2, "name": "y"}]}')
    entry = {"name": "elsewhere", "kind": "coco", "json": str(json_file), "images": "nowhere"}
    assert class_names(make_cfg({"DATASETS.TRAIN": ("elsewhere",), "DATASETS.REGISTER": [entry]})) == ("y", "z")
    assert class_names(make_cfg({"DATASETS.TRAIN": ("nothing",)})) is None
    assert "nothing" not in MetadataCatalog.list()


@pytest.mark.parametrize("agnostic", [False, True])
def test_a_teacher_of_80_classes_teaches_a_student_of_3(distill_cfg, agnostic):
    names = [f"other{i}" for i in range(77)] + ["class2", "class0", "class9"]
    cfg = distill_cfg(
        {"DISTILL.TEACHER.CLASSES": names, "DISTILL.LOSSES": ALL_LOSSES},
        teacher={**WIDER, "MODEL.ROI_HEADS.NUM_CLASSES": 80, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": agnostic},
    )
    model = build_model(cfg).train()
    assert model.losses["CLS"].classes == ClassMap((0, 2), (78, 77))
    with EventStorage():
        losses = model(make_batch())
    assert all(torch.isfinite(loss) for loss in losses.values())
    cfg.DISTILL.TEACHER.CLASSES = names[:5]
    with pytest.raises(GDetKDError, match="5 names, but the teacher has 80"):
        build_model(cfg)
