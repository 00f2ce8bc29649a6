"""The preflight check shows a summary of a sound run, and names the reason for each problem."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from conftest import make_cfg
from gdetkd import DistillTrainer, add_gdetkd_config
from gdetkd.data import register_datasets
from gdetkd.data.shapes import CLASSES, draw_image
from gdetkd.engine.check import Check
from gdetkd.engine.preprocessing import USUAL, preprocessing_of, with_channels_swapped
from gdetkd.engine.sample_score import score_on_sample
from gdetkd.engine.step_costs import measure_steps
from gdetkd.errors import GDetKDError
from gdetkd.teacher import FrozenTeacher
from programs import run_program

ROOT = Path(__file__).parents[2]
IMAGES = 16


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Write some images like those of the quickstart, in COCO's format. Return their folder."""
    folder = tmp_path_factory.mktemp("shapes")
    images, annotations = [], []
    for index in range(IMAGES):
        pixels, objects = draw_image(10_000 + index)
        Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1])).save(folder / f"{index}.png")
        images.append({"id": index + 1, "file_name": f"{index}.png", "height": 128, "width": 128})
        for item in objects:
            annotations.append({**item, "id": len(annotations) + 1, "image_id": index + 1, "iscrowd": 0})
    write(folder / "shapes.json", images, annotations, CLASSES)
    write(folder / "backwards.json", images, annotations, CLASSES[::-1])
    return folder


def write(path, images, annotations, classes):
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(classes)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


@pytest.fixture
def shapes_cfg(shapes, tmp_path, monkeypatch):
    """Return a function that makes the config of the quickstart's pair on these images, with changes."""
    monkeypatch.chdir(ROOT)

    def make(**changes):
        cfg = get_cfg()
        add_gdetkd_config(cfg)
        cfg.merge_from_file("configs/quickstart/faster_rcnn-faster_rcnn.yaml")
        cfg.DATASETS.REGISTER = [
            {"name": f"check_{name}", "kind": "coco", "json": str(shapes / f"{name}.json"), "images": str(shapes)}
            for name in ("shapes", "backwards")
        ]
        keys = {"DATASETS.TRAIN": ("check_shapes",), "DATASETS.TEST": ("check_shapes",), "MODEL.DEVICE": "cpu"}
        keys.update({"SOLVER.IMS_PER_BATCH": 2, "OUTPUT_DIR": str(tmp_path / "run")})
        keys.update({"DISTILL.TEACHER.CLASSES": CLASSES, "DISTILL.TEACHER.MIN_AP": 20.0})
        keys.update({key.replace("__", "."): value for key, value in changes.items()})
        cfg.merge_from_list([item for pair in keys.items() for item in pair])
        register_datasets(cfg)
        return cfg

    return make


def problems_of(cfg):
    check = Check(cfg, images=IMAGES)
    check.run()
    return check.problems


def save_untrained_teacher(folder, opts=()):
    """Write the weights of an untrained teacher with the quickstart's config and changes. Return their path."""
    teacher = get_cfg()
    add_gdetkd_config(teacher)
    teacher.merge_from_file("configs/quickstart/teacher-FasterRCNN.yaml")
    teacher.merge_from_list(["MODEL.DEVICE", "cpu", *opts])
    torch.save({"model": build_model(teacher).state_dict()}, folder / "untrained.pth")
    return str(folder / "untrained.pth")


def test_a_sound_run_has_no_problem(shapes_cfg):
    check = Check(shapes_cfg(), images=IMAGES)
    teacher = {name: tensor.clone() for name, tensor in check._teacher.model.state_dict().items()}
    screen = check.run()
    assert check.problems == [] and screen.endswith("No problem found.")
    for shown in (
        "1.79 M",
        "p2 1/4, p3 1/8, p4 1/16, p5 1/32",
        "BGR, mean (103.53, 116.28, 123.675), std (57.375, 57.12, 58.395)",
        "Classes: the same 6 in the same order.",
        f"Teacher on {IMAGES} images of check_shapes, 6 classes: AP ",
        "kept for the backward pass; of the student alone:",
        "500 iterations take",
        "from scratch",
    ):
        assert shown in screen, shown
    for term in ("sgfi", "ckd", "cls", "reg"):
        [row] = [line.split() for line in screen.splitlines() if line.startswith(f"loss_distill_{term} ")]
        assert float(row[3]) > 0
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in check._teacher.model.state_dict().items())
    assert len(screen.splitlines()) < 40


def test_a_teacher_with_a_wrong_std_is_found(shapes_cfg):
    [problem] = problems_of(shapes_cfg(DISTILL__TEACHER__OPTS=["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]]))
    assert "less than DISTILL.TEACHER.MIN_AP 20" in problem
    assert "with images in BGR, mean (103.53, 116.28, 123.675), std (57.375, 57.12, 58.395). Set" in problem


def test_a_wrong_channel_order_is_found_although_the_teacher_is_not_weak(shapes_cfg):
    opts = ["INPUT.FORMAT", "RGB"]
    [problem] = problems_of(shapes_cfg(DISTILL__TEACHER__OPTS=opts, DISTILL__TEACHER__MIN_AP=1.0))
    assert "with images in BGR" in problem and "MIN_AP" not in problem


def test_a_weak_teacher_of_grey_images_is_found(shapes_cfg, tmp_path):
    opts = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [110.0], "MODEL.PIXEL_STD", [1.0]]
    grey = {"INPUT__FORMAT": "L", "MODEL__PIXEL_MEAN": [110.0], "MODEL__PIXEL_STD": [1.0]}
    weights = save_untrained_teacher(tmp_path, opts)
    [problem] = problems_of(shapes_cfg(**grey, DISTILL__TEACHER__OPTS=opts, DISTILL__TEACHER__WEIGHTS=weights))
    assert "less than DISTILL.TEACHER.MIN_AP 20" in problem and "preprocessing" not in problem


def test_a_teacher_that_is_worthless_at_the_size_of_training_is_found(shapes_cfg):
    cfg = shapes_cfg(INPUT__MIN_SIZE_TRAIN=(24,), INPUT__MIN_SIZE_TEST=24)
    [problem] = problems_of(cfg)
    assert "on images with a short side of 128 pixels, and" in problem and "at 24, which is what it sees" in problem
    assert "Set DISTILL.TEACHER.SCALE to about 5.3," in problem
    cfg.DISTILL.TEACHER.SCALE = 5.3
    check = Check(cfg, images=IMAGES)
    assert "in training" not in check._teacher_score() and check.problems == []


def test_the_size_in_training_follows_every_key_of_it(shapes_cfg):
    keys = {"INPUT__MIN_SIZE_TRAIN": (32, 64), "INPUT__MAX_SIZE_TRAIN": 20, "DISTILL__TEACHER__SCALE": 2.0}
    cfg = shapes_cfg(**keys)
    score = score_on_sample(cfg, FrozenTeacher(cfg), "check_shapes", 2)
    assert (score.side, score.side_in_training) == (128, 40)  # the images are squares
    cfg.INPUT.CROP.ENABLED = True
    assert score_on_sample(cfg, FrozenTeacher(cfg), "check_shapes", 2).side_in_training is None


def test_test_images_that_are_also_in_the_training_are_named(shapes_cfg, shapes, tmp_path, caplog):
    cfg = shapes_cfg()
    Check(cfg)
    assert f"{IMAGES} of the {IMAGES} images in DATASETS.TEST are also in DATASETS.TRAIN" in caplog.text
    caplog.clear()
    shutil.copytree(shapes, tmp_path / "copies")
    copies = {"name": "check_copies", "kind": "coco", "json": str(shapes / "shapes.json")}
    cfg.DATASETS.REGISTER = [*cfg.DATASETS.REGISTER, {**copies, "images": str(tmp_path / "copies")}]
    cfg.DATASETS.TEST = ("check_copies",)
    check = Check(cfg)
    assert "also in DATASETS.TRAIN" not in caplog.text
    check._data()
    assert f"{IMAGES} of the {IMAGES} images in DATASETS.TEST are also in DATASETS.TRAIN" in caplog.text


def test_an_untrained_teacher_is_found(shapes_cfg, tmp_path):
    [problem] = problems_of(shapes_cfg(DISTILL__TEACHER__WEIGHTS=save_untrained_teacher(tmp_path)))
    assert "no usual preprocessing makes it better" in problem and "MIN_AP 20" in problem


def test_a_loss_without_a_gradient_is_found(shapes_cfg):
    [problem] = problems_of(shapes_cfg(DISTILL__CKD__WEIGHT=0.0))
    assert problem.startswith("loss_distill_ckd sends no gradient to the student")


def test_a_loss_that_is_not_finite_is_found(shapes_cfg):
    [problem] = problems_of(shapes_cfg(DISTILL__SGFI__WEIGHT=1e39))
    assert problem.startswith("loss_distill_sgfi is inf")


def test_starting_weights_that_are_not_finite_are_found(shapes_cfg, tmp_path):
    torch.save(
        {"model": {"backbone.fpn_output2.weight": torch.full((32, 32, 3, 3), float("nan"))}}, tmp_path / "nan.pth"
    )
    problems = problems_of(shapes_cfg(MODEL__WEIGHTS=str(tmp_path / "nan.pth")))
    assert any("A training step fails" in problem and "finite" in problem for problem in problems)


def test_starting_weights_of_another_backbone_are_found(shapes_cfg, tmp_path):
    torch.save({"model": {"backbone.bottom_up.stem.conv1.weight": torch.zeros(16, 3, 7, 7)}}, tmp_path / "few.pth")
    [problem] = problems_of(shapes_cfg(MODEL__WEIGHTS=str(tmp_path / "few.pth")))
    assert "few.pth' leaves" in problem and "Check that the file belongs to MODEL.RESNETS." in problem


def test_training_warns_of_starting_weights_of_another_backbone(shapes_cfg, tmp_path, caplog):
    torch.save({"model": {"backbone.bottom_up.stem.conv1.weight": torch.zeros(16, 3, 7, 7)}}, tmp_path / "few.pth")
    DistillTrainer(shapes_cfg(MODEL__WEIGHTS=str(tmp_path / "few.pth"))).resume_or_load(resume=False)
    assert "few.pth' leaves" in caplog.text


def test_a_teacher_with_values_that_are_not_finite_is_refused(distill_cfg, tmp_path):
    cfg = distill_cfg()
    weights = torch.load(tmp_path / "teacher.pth", weights_only=True)
    weights["model"]["backbone.fpn_output2.bias"][1] = float("inf")
    torch.save(weights, tmp_path / "teacher.pth")
    with pytest.raises(GDetKDError, match=r"not finite \(backbone.fpn_output2.bias\).*earlier checkpoint"):
        FrozenTeacher(cfg)


def test_datasets_with_classes_in_different_orders_are_refused(shapes_cfg):
    with pytest.raises(
        GDetKDError, match="'check_shapes' and 'check_backwards' have the same classes in different orders"
    ):
        Check(shapes_cfg(DATASETS__TEST=("check_backwards",)))


def test_head_transfer_to_classes_in_another_order_is_refused(shapes_cfg):
    backwards = shapes_cfg(DATASETS__TRAIN=("check_backwards",), DATASETS__TEST=("check_backwards",))
    with pytest.raises(GDetKDError, match="HEAD_TRANSFER would start.*order"):
        Check(backwards)
    backwards.DISTILL.HEAD_TRANSFER = False
    Check(backwards)  # CLS and REG match classes by name


def test_head_transfer_from_classes_without_names_causes_a_warning(shapes_cfg, caplog):
    cfg = shapes_cfg(DISTILL__TEACHER__CLASSES=(), DISTILL__LOSSES=("SGFI",))
    Check(cfg)
    assert "Head transfer assumes that student and teacher have the same classes in the same order" in caplog.text


def test_teacher_classes_in_another_order_than_the_datasets_are_refused(shapes_cfg, tmp_path):
    cfg = shapes_cfg(DISTILL__TEACHER__OPTS=["DATASETS.TRAIN", ("check_shapes",)])
    FrozenTeacher(cfg)
    cfg.DISTILL.TEACHER.CLASSES = CLASSES[::-1]
    with pytest.raises(GDetKDError, match="DISTILL.TEACHER.CLASSES .*same classes in another order.*another name"):
        FrozenTeacher(cfg)


def test_the_teacher_is_scored_on_classes_that_match_by_name(shapes_cfg):
    """The order of the classes does not change the AP. Only classes that both detectors have count."""
    cfg = shapes_cfg(DISTILL__HEAD_TRANSFER=False)
    teacher = FrozenTeacher(cfg)
    straight = score_on_sample(cfg, teacher, "check_shapes", IMAGES)
    assert straight.ap > 30 and (straight.images, straight.classes) == (IMAGES, 6)
    names = ("triangle", "square", "circle", "star", "hoop", "plus")
    cfg.DISTILL.TEACHER.CLASSES = names
    four = score_on_sample(cfg, FrozenTeacher(cfg), "check_shapes", IMAGES)
    assert four.classes == 4 and four.ap > 30
    cfg.DISTILL.CLASS_MAP = [["ring", "hoop"], ["cross", "plus"]]
    assert score_on_sample(cfg, FrozenTeacher(cfg), "check_shapes", IMAGES) == straight
    cfg.DISTILL.CLASS_MAP = []
    cfg.DISTILL.TEACHER.CLASSES = tuple("abcdef")
    with pytest.raises(GDetKDError, match="cannot be evaluated.*no name in common.*DISTILL.CLASS_MAP"):
        score_on_sample(cfg, FrozenTeacher(cfg), "check_shapes", IMAGES)


def test_a_teacher_cannot_be_scored_on_a_sample_without_objects(shapes_cfg):
    cfg = shapes_cfg()
    images = DatasetCatalog.get("check_shapes")
    DatasetCatalog.register("check_empty", lambda: [{**image, "annotations": []} for image in images])
    MetadataCatalog.get("check_empty").set(thing_classes=list(CLASSES), evaluator_type="coco")
    with pytest.raises(GDetKDError, match="The 4 images of 'check_empty' .*have no object"):
        score_on_sample(cfg, FrozenTeacher(cfg), "check_empty", 4)


def test_trying_another_preprocessing_does_not_change_the_teacher(shapes_cfg):
    cfg = shapes_cfg()
    teacher = FrozenTeacher(cfg)
    own = preprocessing_of(teacher.model, teacher.file.input_format)
    straight = score_on_sample(cfg, teacher, "check_shapes", 8)
    assert score_on_sample(cfg, teacher, "check_shapes", 8, USUAL[0]).ap < straight.ap
    assert own == USUAL[1] and with_channels_swapped(with_channels_swapped(own)) == own
    assert score_on_sample(cfg, teacher, "check_shapes", 8, own) == straight
    assert score_on_sample(cfg, teacher, "check_shapes", 8) == straight


def test_the_check_stands_for_one_of_several_processes(distill_cfg):
    keys = {"SOLVER.IMS_PER_BATCH": 8, "SOLVER.REFERENCE_WORLD_SIZE": 4, "DISTILL.CKD.QUEUE_SIZE": -1}
    check = Check(distill_cfg(keys), processes=2)
    assert check._cfg.SOLVER.IMS_PER_BATCH == 2 and check._cfg.SOLVER.MAX_ITER == 8
    # In ten steps, both processes gather 4 images of 8 regions each.
    assert len(check._distiller.losses["CKD"].queue.embeddings) == 10 * 4 * 8


def test_the_last_line_says_that_the_teacher_cannot_be_evaluated(shapes_cfg, tmp_path):
    cfg = shapes_cfg(DISTILL__TEACHER__CLASSES=(), DISTILL__LOSSES=("SGFI",), DISTILL__HEAD_TRANSFER=False)
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", 7]
    cfg.DISTILL.TEACHER.OPTS, cfg.DISTILL.TEACHER.WEIGHTS = opts, save_untrained_teacher(tmp_path, opts)
    check = Check(cfg, images=2)
    screen = check.run()
    assert check.problems == [] and "No problem found." not in screen
    last = screen.splitlines()[-2:]
    assert last[0] == "No problem found in what could be checked." and last[1].startswith("Not checked: how good")
    assert "a wrong teacher would not be noticed." in last[1] and "in DISTILL.TEACHER.CLASSES" in last[1]
    cfg.DISTILL.EVAL_TEACHER = True
    with pytest.raises(GDetKDError, match="has 6 classes and the teacher 7.*set DISTILL.EVAL_TEACHER to False"):
        DistillTrainer(cfg)


def test_an_invalid_class_map_is_a_problem(shapes_cfg):
    classes = [["circle", "square"], ["square", "square"]]
    cfg = shapes_cfg(DISTILL__LOSSES=("SGFI",), DISTILL__HEAD_TRANSFER=False, DISTILL__CLASS_MAP=classes)
    assert any("The teacher class 'square' matches two student classes" in problem for problem in problems_of(cfg))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_parameter_that_no_loss_reaches_is_a_problem_for_several_processes(distill_cfg, processes):
    check = Check(distill_cfg({"SOLVER.IMS_PER_BATCH": 2, "DISTILL.LOSSES": ("SGFI",)}), processes=processes)
    check._student.spare = torch.nn.Parameter(torch.zeros(1))
    check.run()
    assert any("No loss reaches 1 parameters of the student (spare)" in text for text in check.problems) == (
        processes == 2
    )


def test_the_check_of_a_run_without_a_teacher(distill_cfg, tmp_path):
    keys = {"OUTPUT_DIR": str(tmp_path)}
    for cfg in (distill_cfg({"DISTILL.LOSSES": ()}), make_cfg(keys)):
        check = Check(cfg)
        assert "teacher" not in check.run().lower() and check.problems == []


def test_the_step_is_measured_with_a_full_queue(distill_cfg, monkeypatch):
    cfg = distill_cfg({"DISTILL.LOSSES": ("CKD",), "DISTILL.CKD.QUEUE_SIZE": 5000})
    check, lengths = Check(cfg), []

    def measure(models, *args):
        lengths.append(len(check._distiller.losses["CKD"].queue.contents()))
        return measure_steps(models, *args)

    monkeypatch.setattr("gdetkd.engine.check.measure_steps", measure)
    check.run()
    assert lengths == [5000]


def test_the_check_on_the_command_line(distill_cfg, tmp_path):
    cfg = distill_cfg(
        {"DATASETS.REGISTER": [dict(MetadataCatalog.get("tiny").gdetkd_entry)], "DATASETS.TEST": ("tiny",)}
    )
    (tmp_path / "run.yaml").write_text(cfg.dump())
    command = ["train_net.py", "--config-file", tmp_path / "run.yaml", "--check", "--check-images", "5"]

    def run(*changes):
        return run_program(*command, *changes)

    weak = run()  # the tiny teacher is untrained
    assert weak.returncode == 1 and "PROBLEMS: 1" in weak.stdout and "MIN_AP" in weak.stdout
    assert "Teacher on 5 images of tiny" in weak.stdout and "Traceback" not in weak.stderr
    sound = run("DISTILL.TEACHER.MIN_AP", "0.0")
    assert sound.returncode == 0 and sound.stdout.rstrip().endswith("No problem found.")
    assert not list((tmp_path / "run").glob("*.pth"))
    unloaded = run("DISTILL.TEACHER.OPTS", "['MODEL.ROI_HEADS.NUM_CLASSES', 7]")
    assert unloaded.returncode == 1 and "unloaded" in unloaded.stderr.splitlines()[-1]
