"""Teachers of torchvision: what they find, predict and teach is what torchvision computes itself."""

import logging
from functools import partial

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.models import get_model, list_models, resnet18
from torchvision.models._api import Weights, WeightsEnum, register_model
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from conftest import ALL_LOSSES, DENSE, make_batch, make_cfg
from gdetkd.detectors import TorchvisionDetector, build_adapter
from gdetkd.engine import evaluate_teacher
from gdetkd.engine.preprocessing import USUAL, preprocessing_of
from gdetkd.errors import GDetKDError
from gdetkd.roi_align import pool_all_levels
from gdetkd.structures import Regions
from gdetkd.teacher import FrozenTeacher, read_teacher_file

CATEGORIES = ["__background__", "class0", "N/A", "class1", "class2"]
SIZE = 64
LAYERS = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}


class TinyWeights(WeightsEnum):
    COCO_V1 = Weights("https://weights.invalid/tiny-1.pth", transforms=None, meta={"categories": CATEGORIES})
    DEFAULT = COCO_V1


def backbone(layers, extra, width=16):
    """A ResNet-18 of 8 to 64 channels with an FPN."""
    body = resnet18()
    for module in list(body.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                narrow = lambda channels: channels if channels == 3 else channels // 8  # noqa: E731
                arguments = narrow(child.in_channels), narrow(child.out_channels), child.kernel_size, child.stride
                setattr(module, name, nn.Conv2d(*arguments, padding=child.padding, bias=False))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.BatchNorm2d(child.num_features // 8))
    widths = [{"layer1": 8, "layer2": 16, "layer3": 32, "layer4": 64}[layer] for layer in layers]
    return BackboneWithFPN(body, {layer: LAYERS[layer] for layer in layers}, widths, width, extra_blocks=extra)


COMMON = {"min_size": SIZE, "max_size": 2 * SIZE}


def tiny_rcnn(kind, weights=None, weights_backbone=None, num_classes=5, **options):
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=24, canonical_level=3)  # boxes are small here
    boxes = {"box_roi_pool": pool, "rpn_post_nms_top_n_test": 20, "box_score_thresh": 0.0, "box_detections_per_img": 12}
    model = kind(backbone(list(LAYERS), LastLevelMaxPool()), num_classes, **{**COMMON, **boxes, **options})
    model.roi_heads.box_head.fc6 = nn.Linear(16 * 49, 24)
    model.roi_heads.box_head.fc7 = nn.Linear(24, 24)
    model.roi_heads.box_predictor.cls_score = nn.Linear(24, num_classes)
    model.roi_heads.box_predictor.bbox_pred = nn.Linear(24, 4 * num_classes)
    return model


def tiny_dense(kind, weights=None, weights_backbone=None, num_classes=5, **options):
    sizes = [(8 * 2**level,) for level in range(5)]
    anchors = AnchorGenerator(sizes, ((1.0,) if kind is FCOS else (0.5, 1.0, 2.0),) * 5)
    found = {"score_thresh": 0.0, "detections_per_img": 300, "anchor_generator": anchors}
    width = 64  # the GroupNorm of an FCOS has 32 groups, and a map may have a single cell
    maps = backbone(list(LAYERS)[1:], LastLevelP6P7(width, width), width)
    return kind(maps, num_classes, **{**COMMON, **found, **options})


BUILDERS = {
    "tiny_fasterrcnn": (tiny_rcnn, FasterRCNN),
    "tiny_maskrcnn": (tiny_rcnn, MaskRCNN),
    "tiny_retinanet": (tiny_dense, RetinaNet),
    "tiny_fcos": (tiny_dense, FCOS),
}


def _register(name, build, kind):
    def builder(*, weights: TinyWeights = None, weights_backbone=None, **options):
        return build(kind, weights, weights_backbone, **options)

    builder.__name__ = name
    register_model(name)(builder)


for name, (build, kind) in BUILDERS.items():
    if name not in list_models():
        _register(name, build, kind)


@pytest.fixture
def teacher_keys(tmp_path):
    """Writes the weights of a random torchvision model; returns the keys that name it as the teacher."""

    def make(name, **options):
        torch.manual_seed(5)
        model = get_model(name, **options)
        with torch.no_grad():
            for module in model.modules():  # statistics of random features, and heads that are not near zero
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None
            model.train().backbone(torch.rand(2, 3, SIZE, SIZE))
            for head, noise in (("roi_heads", 0.1), ("head", 0.02)):
                for parameter in getattr(model, head, nn.Module()).parameters():
                    parameter.add_(noise * torch.randn_like(parameter))
            if isinstance(model, FCOS):  # else the boxes have no area
                model.head.regression_head.bbox_reg.bias.add_(2.0)
        torch.save(model.state_dict(), tmp_path / "tiny-1.pth")
        keys = {"CONFIG_FILE": f"torchvision:{name}", "WEIGHTS": str(tmp_path / "tiny-1.pth")}
        keys["OPTS"] = [word for pair in options.items() for word in pair]
        return model.eval(), {f"DISTILL.TEACHER.{key}": value for key, value in keys.items()}

    return make


def frozen(keys, **changes):
    return FrozenTeacher(make_cfg({**keys, **changes}))


def images(count=2):
    return [torch.randint(0, 256, (3, SIZE, SIZE + 16 * index)).to(torch.uint8) for index in range(count)]


def rgb(batch):
    """The images as torchvision takes them: RGB from 0 to 1. The student's are BGR."""
    return [image.flip(0).float() / 255 for image in batch]


@pytest.mark.parametrize("name", BUILDERS)
def test_detections_are_torchvisions(teacher_keys, name):
    model, keys = teacher_keys(name)
    teacher, batch = frozen(keys), images()
    with torch.no_grad():
        expected = model(rgb(batch))
    found = teacher.detect([{"image": image, "height": image.shape[1], "width": image.shape[2]} for image in batch])
    index = {1: 0, 3: 1, 4: 2}  # of CATEGORIES, without background and "N/A"
    for output, own in zip(found, expected):
        has_area = (own["boxes"][:, 2:] > own["boxes"][:, :2]).all(dim=1)  # Detectron2 drops the others
        kept = [n for n, label in enumerate(own["labels"].tolist()) if label in index and has_area[n]]
        instances = output["instances"]
        assert len(instances) == len(kept) > 1
        torch.testing.assert_close(instances.pred_boxes.tensor, own["boxes"][kept], rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(instances.scores, own["scores"][kept], rtol=1e-3, atol=1e-4)
        assert instances.pred_classes.tolist() == [index[label] for label in own["labels"][kept].tolist()]
        if "masks" in own:
            same = instances.pred_masks == (own["masks"][kept][:, 0] > 0.5)
            assert same.float().mean() > 0.999 and instances.pred_masks.any() and not instances.pred_masks.all()


def test_detections_come_in_pixels_of_the_file(teacher_keys):
    _, keys = teacher_keys("tiny_maskrcnn")
    teacher, (image,) = frozen(keys), images(1)
    whole, half = (
        teacher.detect([{"image": image, "height": side, "width": side}])[0]["instances"] for side in (SIZE, SIZE // 2)
    )
    torch.testing.assert_close(half.pred_boxes.tensor * 2, whole.pred_boxes.tensor)
    assert half.pred_masks.shape[1:] == (SIZE // 2, SIZE // 2)


@torch.no_grad()
def test_predictions_on_its_own_proposals_are_those_of_its_forward_pass(teacher_keys):
    model, keys = teacher_keys("tiny_fasterrcnn")
    teacher, batch = frozen(keys), images()
    seen = {}
    model.roi_heads.box_roi_pool.register_forward_hook(lambda m, i, o: seen.update(proposals=i[1], pooled=o))
    model.roi_heads.box_head.register_forward_hook(lambda m, i, o: seen.update(embeddings=o))
    model.roi_heads.box_predictor.register_forward_hook(lambda m, i, o: seen.update(logits=o[0], deltas=o[1]))
    model(rgb(batch))
    regions = Regions([Boxes(boxes) for boxes in seen["proposals"]])
    needs = {"pooled", "levels", "embeddings", "logits", "deltas"}
    outputs = teacher.look([{"image": image} for image in batch], regions, needs)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
    as_a_student = pool_all_levels(list(outputs.pyramid.values()), list(outputs.strides.values()), regions, (7, 7), 2)
    close(outputs.pooled, as_a_student[torch.arange(len(regions)), outputs.levels])
    assert (outputs.pooled - seen["pooled"]).abs().max() > 0.01  # torchvision's is half a cell beside it
    close(outputs.embeddings, seen["embeddings"])
    scores = seen["logits"].softmax(dim=1)
    close(outputs.logits.softmax(dim=1)[:, :3], scores[:, [1, 3, 4]])
    close(outputs.logits.softmax(dim=1)[:, 3], scores[:, [0, 2]].sum(dim=1))
    close(outputs.deltas, seen["deltas"].view(-1, 5, 4)[:, [1, 3, 4]].flatten(1))
    assert outputs.levels.unique().numel() > 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_retinanet", "tiny_fcos"])
def test_dense_predictions_are_those_of_its_forward_pass(teacher_keys, name):
    model, keys = teacher_keys(name)
    teacher, batch = frozen(keys), images(1)
    seen = {}
    model.head.register_forward_hook(lambda m, i, o: seen.update(o))
    model(rgb(batch))
    number = 1 if name == "tiny_fcos" else 3
    sides = [8, 4, 2, 1, 1]
    places = [(0, 3, 5, 0), (0, 7, 0, number - 1), (1, 2, 3, 0), (2, 1, 1, number - 1), (4, 0, 0, 0)]
    rows = [
        sum(side * side * number for side in sides[:level]) + (row * sides[level] + column) * number + anchor
        for level, row, column, anchor in places
    ]
    boxes = Boxes(torch.rand(5, 4).sort(dim=1).values[:, [0, 1, 2, 3]] * SIZE)
    regions = Regions([boxes], torch.tensor(places))
    outputs = teacher.look([{"image": batch[0]}], regions, {"pooled", "embeddings", "logits", "deltas", "levels"})
    torch.testing.assert_close(outputs.logits, seen["cls_logits"][0, rows][:, [1, 3, 4]], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs.deltas, seen["bbox_regression"][0, rows], rtol=1e-3, atol=1e-3)
    assert outputs.embeddings.shape == (5, 64) and outputs.pooled.shape == (5, 64, 7, 7)


@pytest.mark.parametrize(
    "name, student, changes, losses",
    [
        ("tiny_fasterrcnn", "GeneralizedRCNN", {}, (*ALL_LOSSES, "ROIFI", "GTMASK")),
        ("tiny_maskrcnn", "RetinaNet", DENSE, ("SGFI", "CKD")),
        ("tiny_retinanet", "GeneralizedRCNN", {}, ("SGFI", "CKD")),
        ("tiny_fcos", "FCOS", DENSE, ("SGFI", "CKD")),
    ],
)
def test_it_teaches(teacher_keys, name, student, changes, losses):
    own = {"MODEL.META_ARCHITECTURE": "GDetKD", "DISTILL.STUDENT_META_ARCHITECTURE": student, "DISTILL.LOSSES": losses}
    model = build_model(make_cfg({**own, **teacher_keys(name)[1], **changes})).train()
    if student == "FCOS":  # the boxes of an untrained FCOS have no area
        nn.init.ones_(model.student.head.bbox_pred.bias)
    before = {key: value.clone() for key, value in model.teacher.model.state_dict().items()}
    with EventStorage():
        terms = model(make_batch())
    sum(terms.values()).backward()
    assert all(terms[f"loss_distill_{loss.lower()}"] > 0 for loss in losses)
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert all(torch.equal(before[key], value) for key, value in model.teacher.model.state_dict().items())
    assert not model.teacher.model.training and not model.teacher.model.torchvision_model.training


def test_it_is_evaluated_in_its_own_size_and_preprocessing(teacher_keys, tmp_path):
    _, keys = teacher_keys("tiny_fasterrcnn")
    cfg = make_cfg({**keys, "DATASETS.TEST": ("tiny",), "OUTPUT_DIR": str(tmp_path)})
    teacher = FrozenTeacher(cfg)
    assert set(evaluate_teacher(cfg, teacher)) == {"bbox"}
    (sample, *_) = next(iter(teacher.file.test_loader("tiny")))
    assert min(sample["image"].shape[1:]) == SIZE
    assert preprocessing_of(teacher.model, teacher.file.input_format) == USUAL[2]
    assert teacher.spec.class_names == ("class0", "class1", "class2")


def test_names_of_weights_are_looked_up_in_torchvision():
    for given in ("COCO_V1", "DEFAULT", "TinyWeights.COCO_V1"):
        file = read_teacher_file(make_cfg({**named("tiny_fcos"), "DISTILL.TEACHER.WEIGHTS": given}))
        assert file.weights == "https://weights.invalid/tiny-1.pth"


def named(name, opts=(), weights=""):
    keys = {"CONFIG_FILE": f"torchvision:{name}", "OPTS": list(opts), "WEIGHTS": weights}
    return {f"DISTILL.TEACHER.{key}": value for key, value in keys.items()}


def test_fine_tuned_weights_have_the_classes_that_the_config_lists(teacher_keys):
    _, keys = teacher_keys("tiny_fasterrcnn", num_classes=3)
    teacher = frozen(keys, **{"DISTILL.TEACHER.CLASSES": ["card", "chip"]})
    assert teacher.spec.num_classes == 2 and teacher.spec.class_names == ("card", "chip")
    assert frozen(keys).spec.class_names is None


def test_unknown_weights_of_as_many_labels_are_taken_for_torchvisions_with_a_warning(teacher_keys, tmp_path, caplog):
    _, keys = teacher_keys("tiny_retinanet")
    (tmp_path / "tiny-1.pth").rename(tmp_path / "mine.pth")
    keys["DISTILL.TEACHER.WEIGHTS"] = str(tmp_path / "mine.pth")
    with caplog.at_level(logging.WARNING):
        assert read_teacher_file(make_cfg(keys)).class_names() == ("class0", "class1", "class2")
    assert "mine.pth are none of torchvision's" in caplog.text and "DISTILL.TEACHER.CLASSES" in caplog.text


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn_v2", "maskrcnn_resnet50_fpn"])
def test_norms_have_the_epsilon_that_torchvision_sets_for_the_weights(name, monkeypatch):
    with torch.device("meta"):
        state = get_model(name, weights=None, weights_backbone=None).state_dict()
        monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: state)
        monkeypatch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        expected = get_model(name, weights="COCO_V1")
        cfg = make_cfg({**named(name, weights="COCO_V1"), "MODEL.DEVICE": "meta"})
        found = read_teacher_file(cfg).build()
    norms = (nn.BatchNorm2d, FrozenBatchNorm2d)
    eps_of = lambda model: [m.eps for m in model.backbone.modules() if isinstance(m, norms)]  # noqa: E731
    assert eps_of(found) == eps_of(expected) and len(eps_of(found)) > 50


@pytest.mark.parametrize("name", ["tiny_fcos", "tiny_retinanet"])
def test_levels_are_chosen_on_the_device_of_the_boxes(teacher_keys, name):
    """torchvision's anchors are no buffers, so they stay on the CPU when the model moves to a GPU."""
    adapter = frozen(teacher_keys(name)[1]).adapter
    assert adapter.choose_levels(torch.empty(3, 4, device="meta")).device.type == "meta"


@pytest.mark.parametrize("name", ["tiny_fcos", "tiny_retinanet"])
@pytest.mark.parametrize("size", [(800, 1344), (160, 224)])
def test_an_embedding_is_that_of_torchvisions_own_location(teacher_keys, name, size):
    """On coarse levels, torchvision's locations are not a stride apart if the padded image is no multiple of it."""
    adapter = frozen(teacher_keys(name)[1]).adapter
    grids = [[-(-side // stride) for side in size] for stride in adapter.spec.strides.values()]
    towers = []
    for height, width in grids:
        y, x = torch.meshgrid(torch.arange(height) * (size[0] // height), torch.arange(width) * (size[1] // width))
        towers.append(torch.stack([x, y]).float()[None])
    images = ImageList(torch.zeros(1, 3, *size), [size])
    [anchors] = adapter.model.torchvision_model.anchor_generator(images, [torch.zeros(1, 1, *grid) for grid in grids])
    per_cell = len(anchors) // sum(height * width for height, width in grids)
    centres = ((anchors[::per_cell, :2] + anchors[::per_cell, 2:]) / 2).round()
    assert torch.equal(torch.cat([tower[0].flatten(1).t() for tower in towers]), centres)
    for level, tower in enumerate(towers):
        inner = tower[0, :, 1:-1, 1:-1].flatten(1).t() if min(tower.shape[-2:]) > 2 else tower[0].flatten(1).t()
        boxes = torch.cat([inner - 3, inner + 3], dim=1)
        torch.testing.assert_close(
            adapter._embed_at_centres(towers, Regions([Boxes(boxes)]), torch.full((len(boxes),), level)), inner
        )


@pytest.mark.parametrize(
    "keys, message",
    [
        (named("fasterrcnn_resnet5"), "no such Faster R-CNN.*fasterrcnn_resnet50_fpn_v2"),
        (named("ssd300_vgg16"), "no such Faster R-CNN"),
        (named("tiny_fcos"), "no weights. Set DISTILL.TEACHER.WEIGHTS"),
        (named("tiny_fcos", weights="COCO_V7"), "'COCO_V7'.*no such file.*DEFAULT, COCO_V1"),
        (named("tiny_fcos", weights="/nowhere/tiny-1.pth"), "'/nowhere/tiny-1.pth' are not there"),
        (named("tiny_fcos", ["weights", "COCO_V1"]), "'weights'.*belong in DISTILL.TEACHER.WEIGHTS"),
        (named("tiny_fcos", ["num_classes", None]), "'num_classes'.*None.*a number, a string"),
        (
            named("tiny_fcos", ["num_clases", 4], "COCO_V1"),
            "has num_clases, but torchvision's tiny_fcos has no such argument",
        ),
        (named("tiny_fcos", ["num_classes"]), "pairs of a key and a value"),
    ],
)
def test_bad_keys_are_named(keys, message):
    with pytest.raises(GDetKDError, match=message):
        FrozenTeacher(make_cfg(keys))


def test_weights_of_another_model_are_refused(teacher_keys):
    _, keys = teacher_keys("tiny_fasterrcnn")
    with pytest.raises(GDetKDError, match="unloaded.*must belong together"):
        frozen({**keys, "DISTILL.TEACHER.CONFIG_FILE": "torchvision:tiny_maskrcnn"})


def test_what_a_torchvision_detector_cannot_do_is_refused(teacher_keys):
    model = TorchvisionDetector(get_model("tiny_fcos"), 5)
    with pytest.raises(GDetKDError, match="torchvision detector.*only teach"):
        build_adapter(model, "student", make_cfg({}))
    student = {"MODEL.META_ARCHITECTURE": "GDetKD", "DISTILL.STUDENT_META_ARCHITECTURE": "FCOS", **DENSE}
    keys = {**student, **teacher_keys("tiny_fcos")[1]}
    with pytest.raises(GDetKDError, match="CROSSKD.*teacher's head cannot be cut"):
        build_model(make_cfg({**keys, "DISTILL.LOSSES": ("CROSSKD",)}))
    with pytest.raises(GDetKDError, match="OFFSET is 0.5 for the student and 0.0 for the teacher"):
        build_model(make_cfg({**keys, "DISTILL.LOSSES": ("CLS",)}))
