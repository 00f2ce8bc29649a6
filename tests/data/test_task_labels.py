"""Datasets without the masks, keypoints or panoptic labels that a detector needs are refused, or read without them."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from conftest import make_cfg, write_coco
from gdetkd import DistillTrainer
from gdetkd.data import build_train_loader, register_datasets
from gdetkd.data.kinds.coco_keypoints import flip_map, keypoint_names
from gdetkd.data.task_labels import check_test_labels
from gdetkd.engine.dataset_checks import check_datasets
from gdetkd.errors import GDetKDError

KEYPOINTS = ["left_end", "right_end"]
MASKS = {"MODEL.MASK_ON": True, "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead"}
POINTS = {"MODEL.KEYPOINT_ON": True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2}


@pytest.fixture
def labelled_cfg(tmp_path):
    """Return a function that makes the config of a plain student on a dataset with masks and keypoints.

    `change` of that function changes the content of the dataset's file in place.
    """

    def make(changes, change=lambda content: None):
        write_coco(tmp_path, 6, name="labelled", masks=True)
        content = json.loads((tmp_path / "labelled.json").read_text())
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            annotation.update(keypoints=[x, y, 2, x + width, y + height, 1], num_keypoints=2)
        for category in content["categories"]:
            category.update(keypoints=KEYPOINTS, skeleton=[[1, 2]])
        change(content)
        (tmp_path / "labelled.json").write_text(json.dumps(content))
        entry = {"name": "labelled", "kind": "coco", "json": str(tmp_path / "labelled.json"), "images": str(tmp_path)}
        keys = {"DATASETS.REGISTER": [entry], "DATASETS.TRAIN": ("labelled",), "OUTPUT_DIR": str(tmp_path / "run")}
        keys.update({"MODEL.ROI_MASK_HEAD.CONV_DIM": 8, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (8,)})
        keys.update({"SOLVER.MAX_ITER": 2, "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": 0})
        cfg = make_cfg({**keys, **changes})
        (tmp_path / "run").mkdir(exist_ok=True)
        register_datasets(cfg)
        return cfg

    return make


def as_run_lengths(content, more=0):
    sizes = {image["id"]: [image["height"] + more, image["width"]] for image in content["images"]}
    for annotation in content["annotations"]:
        height, width = sizes[annotation["image_id"]]
        annotation["segmentation"] = {"size": [height, width], "counts": [10, 20, height * width - 30]}


def test_masks_of_another_size_than_their_images_are_refused(labelled_cfg):
    masks = {"MODEL.MASK_ON": True, "INPUT.MASK_FORMAT": "bitmask"}
    wrong = partial(as_run_lengths, more=1)
    DistillTrainer(labelled_cfg(masks, as_run_lengths))
    message = r"\d+ masks of 'labelled' are not as large as.*height and width \[65, \d+\], and.*\[64, "
    with pytest.raises(GDetKDError, match=message):
        DistillTrainer(labelled_cfg(masks, wrong))
    cfg = labelled_cfg(masks, wrong)
    with pytest.raises(GDetKDError, match=message):
        check_test_labels(cfg, DatasetCatalog.get("labelled"), "labelled")
    DistillTrainer(labelled_cfg({"MODEL.MASK_ON": False}, wrong))  # boxes need no masks


def test_a_mask_of_a_crowd_matters_in_an_evaluation_alone(labelled_cfg):
    def change(content):
        as_run_lengths(content)
        crowd = content["annotations"][0]
        crowd.update(iscrowd=1, segmentation={"size": [8, 8], "counts": [64]})

    cfg = labelled_cfg({"MODEL.MASK_ON": True, "INPUT.MASK_FORMAT": "bitmask"}, change)
    DistillTrainer(cfg)
    with pytest.raises(GDetKDError, match=r"1 masks of 'labelled' are not as large.*height and width \[8, 8\]"):
        check_test_labels(cfg, DatasetCatalog.get("labelled"), "labelled")


def test_an_array_has_the_size_of_its_image_too():
    cfg = make_cfg({"MODEL.MASK_ON": True, "INPUT.MASK_FORMAT": "bitmask"})
    image = {"file_name": "a.png", "height": 4, "width": 6}
    check_test_labels(cfg, [{**image, "annotations": [{"segmentation": np.ones((4, 6), bool)}]}], "mine")
    with pytest.raises(GDetKDError, match=r"In 'a.png', a mask has height and width \[6, 4\], and the image \[4, 6\]"):
        check_test_labels(cfg, [{**image, "annotations": [{"segmentation": np.ones((6, 4), bool)}]}], "mine")


def train_and_test(cfg):
    """Return the results by task."""
    torch.manual_seed(0)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer.test(cfg, trainer.student)


def without(key, count):
    def change(content):
        for annotation in content["annotations"][:count]:
            del annotation[key]

    return change


def test_a_set_without_masks_is_refused_for_a_detector_of_masks(labelled_cfg):
    cfg = labelled_cfg(MASKS, without("segmentation", 2))
    with pytest.raises(GDetKDError, match="labelled: 2 of 12 objects have no mask, but MODEL.MASK_ON is True.*False"):
        DistillTrainer(cfg)


def test_few_objects_without_masks_are_left_out_of_training(labelled_cfg, caplog):
    train_and_test(labelled_cfg({**MASKS, "INPUT.MAX_BAD_FRACTION": 0.2}, without("segmentation", 2)))
    assert "labelled: 2 objects have no mask and are left out" in caplog.text
    assert sum(len(image["annotations"]) for image in DatasetCatalog.get("labelled")) == 12


@pytest.mark.parametrize("changes", [{}, {**MASKS, "MODEL.META_ARCHITECTURE": "RetinaNet"}])
def test_a_detector_of_boxes_needs_no_masks(labelled_cfg, changes):
    check_datasets(labelled_cfg(changes, without("segmentation", 12)))


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "RetinaNet"])
@pytest.mark.parametrize("are_filtered", [False, True])
def test_an_image_without_masks_can_be_cropped(labelled_cfg, architecture, are_filtered):
    """Detectron2 fits the boxes in a crop to their masks, which fails if an image has none, or not for all objects."""

    def change(content):
        as_run_lengths(content)
        of_first = [item for item in content["annotations"] if item["image_id"] == content["images"][0]["id"]]
        of_second = [item for item in content["annotations"] if item["image_id"] == content["images"][1]["id"]]
        for item in [*of_first, of_second[0]]:
            del item["segmentation"], item["keypoints"]
        of_second[0]["bbox"] = [0, 0, 50, 50]

    keys = {**MASKS, "MODEL.META_ARCHITECTURE": architecture, "INPUT.MASK_FORMAT": "bitmask", "MODEL.KEYPOINT_ON": True}
    keys.update({"INPUT.MAX_BAD_FRACTION": 0.5, "DATALOADER.FILTER_EMPTY_ANNOTATIONS": are_filtered})
    keys.update({"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "relative", "INPUT.CROP.SIZE": [0.9, 0.9]})
    cfg = labelled_cfg({**POINTS, **keys, "INPUT.RANDOM_FLIP": "none", "SOLVER.IMS_PER_BATCH": 2}, change)
    check_datasets(cfg)
    stream = iter(build_train_loader(cfg))
    samples = {sample["file_name"]: sample["instances"] for _ in range(6) for sample in next(stream)}
    counts = [len(samples[name]) if name in samples else None for name in sorted(samples)]
    has_masks = architecture == "GeneralizedRCNN"
    assert len(samples) == (5 if has_masks and are_filtered else 6)
    if not are_filtered:
        assert (counts[0] == 0) == has_masks
    assert all(boxes.has("gt_masks") for boxes in list(samples.values()) if len(boxes) > 0 and has_masks)


@pytest.mark.parametrize("architecture, count", [("GeneralizedRCNN", 5), ("RetinaNet", 6)])
def test_only_a_detector_with_keypoints_leaves_out_images_without_keypoints(labelled_cfg, architecture, count):
    def change(content):
        for item in content["annotations"]:
            if item["image_id"] == content["images"][0]["id"]:
                item.update(keypoints=[0] * 6, num_keypoints=0)

    keys = {**POINTS, "MODEL.META_ARCHITECTURE": architecture, "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": 1}
    assert build_train_loader(labelled_cfg(keys, change)).description["images"] == count


def test_run_lengths_need_bitmasks(labelled_cfg):
    def change(content):
        size = [content["images"][0]["height"], content["images"][0]["width"]]
        content["annotations"][0]["segmentation"] = {"size": size, "counts": [0, size[0] * size[1]]}

    with pytest.raises(GDetKDError, match="1 objects of 'labelled' have masks that are not polygons.*bitmask"):
        check_datasets(labelled_cfg(MASKS, change))
    check_datasets(labelled_cfg({**MASKS, "INPUT.MASK_FORMAT": "bitmask"}, change))


def test_masks_in_crops_need_a_package_if_they_are_polygons(labelled_cfg, monkeypatch):
    found = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found or None)
    keys = {"MODEL.MASK_ON": True, "INPUT.CROP.ENABLED": True}
    with pytest.raises(GDetKDError, match="cuts the masks of 'labelled' .* pip install shapely"):
        check_datasets(labelled_cfg(keys))
    check_datasets(labelled_cfg({**keys, "INPUT.MASK_FORMAT": "bitmask"}, as_run_lengths))
    found.append("shapely")
    check_datasets(labelled_cfg(keys))


def test_a_test_set_in_which_one_object_lacks_its_mask_is_refused(labelled_cfg):
    cfg = labelled_cfg(
        {**MASKS, "DATASETS.TEST": ("labelled",), "INPUT.MAX_BAD_FRACTION": 0.2}, without("segmentation", 1)
    )
    with pytest.raises(GDetKDError, match="cannot be evaluated on: 1 of its 12 annotations have no mask"):
        check_datasets(cfg)


def test_a_test_set_without_masks_is_evaluated_by_its_boxes(labelled_cfg, tmp_path, caplog):
    write_coco(tmp_path, 3, name="boxes")
    entry = {"name": "boxes", "kind": "coco", "json": str(tmp_path / "boxes.json"), "images": str(tmp_path)}
    cfg = labelled_cfg(MASKS)
    cfg.DATASETS.REGISTER = [*cfg.DATASETS.REGISTER, entry]
    cfg.DATASETS.TEST = ("boxes",)
    assert set(train_and_test(cfg)) == {"bbox"}
    assert "boxes has no masks: only the AP of boxes is evaluated on it." in caplog.text
    cfg = labelled_cfg({**MASKS, "DATASETS.TEST": ("labelled",), "OUTPUT_DIR": str(tmp_path / "masks")})
    (tmp_path / "masks").mkdir()
    assert set(train_and_test(cfg)) == {"bbox", "segm"}


def test_a_keypoint_detector_reads_the_names_from_the_file(labelled_cfg):
    def change(content):
        without("keypoints", 1)(content)
        for annotation in content["annotations"]:
            del annotation["num_keypoints"]

    cfg = labelled_cfg({**POINTS, "DATASETS.TEST": ("labelled",), "TEST.KEYPOINT_OKS_SIGMAS": [0.1, 0.1]}, change)
    assert set(train_and_test(cfg)) == {"bbox", "keypoints"}
    metadata = MetadataCatalog.get("labelled")
    assert metadata.keypoint_names == KEYPOINTS and metadata.keypoint_flip_map == [tuple(KEYPOINTS)]


def rename(*names):
    return lambda content: [category.update(keypoints=list(names)) for category in content["categories"]]


@pytest.mark.parametrize(
    "changes, change, match",
    [
        ({}, rename(), "'labelled' does not name its keypoints"),
        ({}, rename("only"), "names 1 keypoints and the student has 2"),
        ({"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 17}, rename(*KEYPOINTS), "12 objects.*student's 17: 6 numbers"),
        ({"DATASETS.TEST": ("labelled",)}, rename(*KEYPOINTS), "KEYPOINT_OKS_SIGMAS has 0 numbers.*2 keypoints"),
    ],
)
def test_keypoints_that_do_not_fit_the_student_are_refused(labelled_cfg, changes, change, match):
    with pytest.raises(GDetKDError, match=match):
        check_datasets(labelled_cfg({**POINTS, **changes}, change))


def test_keypoints_without_left_and_right_cause_a_warning(labelled_cfg, caplog):
    check_datasets(labelled_cfg({**POINTS, "INPUT.RANDOM_FLIP": "none"}, rename("top", "bottom")))
    assert "differ by left and right" not in caplog.text
    check_datasets(labelled_cfg(POINTS, rename("top", "bottom")))
    assert "labelled: no names of keypoints differ by left and right" in caplog.text


def test_flip_map_pairs_left_and_right_by_name():
    names = ["nose", "left_eye", "right_eye", "l_ear", "r_ear", "paw.L", "paw.R", "leftHand", "rightHand", "left"]
    pairs = [("left_eye", "right_eye"), ("l_ear", "r_ear"), ("paw.L", "paw.R"), ("leftHand", "rightHand")]
    assert flip_map(names) == pairs


@pytest.mark.parametrize(
    "categories, names",
    [
        ([{"keypoints": ["a", "b"]}, {}], ["a", "b"]),
        ([{"keypoints": ["a", "b"]}, {"keypoints": ["b", "a"]}], None),
        ([{"keypoints": ["a", "a"]}], None),
        ([{"keypoints": "a"}, {"keypoints": []}], None),
    ],
)
def test_keypoint_names_need_to_agree_in_all_categories(categories, names):
    assert keypoint_names(categories) == names


@pytest.mark.parametrize("architecture", ["PanopticFPN", "SemanticSegmentor"])
def test_images_without_panoptic_labels_are_refused_for_a_panoptic_detector(labelled_cfg, architecture):
    with pytest.raises(GDetKDError, match=f"A {architecture} cannot learn from 'labelled': 6 of its 6 images have no"):
        check_datasets(labelled_cfg({"MODEL.META_ARCHITECTURE": architecture}))
