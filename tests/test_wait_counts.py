"""Count the waits for a GPU that distillation adds to a step. This needs no GPU (benchmarks/waits.py)."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torchvision.ops import nms
from waits import ROOTS, WaitCounter, added_waits, tensors_of

from conftest import ALL_LOSSES, make_batch
from gdetkd import DistillTrainer
from gdetkd.detectors import FCOS
from gdetkd.device import images_on_device, objects_on_device

HERE = [Path(__file__).parent]
IMAGES = 2
TWO_STAGE = ("faster_rcnn", "mask_rcnn", "cascade_rcnn")
# One NMS for each image, and one count of the regions.
REGIONS_OF_DENSE = IMAGES + 1


def expected(teacher: str, student: str) -> int:
    """A two-stage teacher splits the regions by level to pool them. A dense one also does so to embed them."""
    split = 1 if teacher in TWO_STAGE else 2
    return split + (0 if student in TWO_STAGE else REGIONS_OF_DENSE)


def waits_of(cfg):
    model = build_model(cfg).train()
    for detector in (model.student, model.teacher.model):
        if isinstance(detector, FCOS):  # the boxes of an untrained FCOS have no area
            torch.nn.init.ones_(detector.head.bbox_pred.bias)
    return sum(added_waits(model, make_batch()).values())


@pytest.mark.parametrize(
    "teacher, student",
    [("faster_rcnn", "mask_rcnn"), ("faster_rcnn", "cascade_rcnn"), ("cascade_rcnn", "faster_rcnn")]
    + [("faster_rcnn", "retinanet"), ("retinanet", "faster_rcnn"), ("retinanet", "fcos"), ("fcos", "retinanet")],
)
def test_waits_that_sgfi_and_ckd_add(pair_cfg, teacher, student):
    limit = 3 if student in TWO_STAGE else 2 * IMAGES + 3
    assert waits_of(pair_cfg(f"{teacher}-{student}")) == expected(teacher, student) <= limit


@pytest.mark.parametrize("family", ["faster_rcnn", "cascade_rcnn", "retinanet", "fcos"])
def test_waits_that_all_terms_add(pair_cfg, family):
    """A cascade teacher splits the regions of each of its three stages."""
    waits = waits_of(pair_cfg(f"{family}-{family}", {"DISTILL.LOSSES": ALL_LOSSES}))
    assert waits == (3 if family == "cascade_rcnn" else expected(family, family))


@pytest.mark.parametrize(
    "family, loss, waits",
    [
        ("faster_rcnn", "ROIFI", 2),  # teacher and student split the regions by level
        *(("faster_rcnn", loss, 0) for loss in ("FGFI", "GTMASK", "FGD", "FITNET", "MGD", "PKD", "CWD")),
        ("retinanet", "CROSSKD", 2 * IMAGES),  # in RetinaNet's own label assignment
        ("fcos", "CROSSKD", 0),
    ],
)
def test_waits_that_a_rival_adds(pair_cfg, family, loss, waits):
    cuts = {f"DISTILL.CROSSKD.{kind}.SHARED_CONVS": 1 for kind in ("ANCHOR_BASED", "ANCHOR_FREE")}
    cfg = pair_cfg(f"{family}-{family}", {"DISTILL.LOSSES": (loss,), **cuts})
    assert waits_of(cfg) == waits + (waits_to_make_anchors(cfg) if loss == "CROSSKD" else 0)


def waits_to_make_anchors(cfg):
    """Count the waits that the teacher's anchors add: none in Detectron2 v0.6, two for each level in its main branch.

    The main branch copies anchors and images in the same line, and a distilled step copies images without a wait.
    """
    teacher = build_model(cfg).teacher
    with WaitCounter([], ROOTS) as counter:
        teacher.model.anchor_generator([torch.zeros(1, 1, 4, 4) for _ in teacher.spec.strides])
    return max(0, sum(counter.places.values()) - IMAGES)


def test_classes_in_another_order_add_no_wait(distill_cfg):
    names = ("class2", "class0", "other")
    cfg = distill_cfg({"DISTILL.LOSSES": ("CLS", "REG"), "DISTILL.TEACHER.CLASSES": names})
    assert waits_of(cfg) == expected("faster_rcnn", "faster_rcnn")


def test_the_trainer_waits_once_after_the_backward_pass(distill_cfg):
    """It reads the losses and the scalars of the terms together. Detectron2 reads each loss once more."""
    trainer = DistillTrainer(distill_cfg({"SOLVER.MAX_ITER": 3}))
    trainer.resume_or_load(resume=False)
    with WaitCounter([], ROOTS) as counter:
        trainer.train()
    in_engine = {place: count for place, count in counter.places.items() if "gdetkd/engine" in place[0]}
    assert [(Path(file).name, count) for (file, _, _), count in in_engine.items()] == [("optimizer_step.py", 3)]


def counted(work, host=()):
    with WaitCounter(host, HERE) as counter:
        work()
    assert all(Path(file) == Path(__file__) for file, _, _ in counter.places)
    return sum(counter.places.values())


VALUES = torch.arange(6.0)
MASK = VALUES > 2
ROWS = VALUES.view(3, 2)
BOXES = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5]])


@pytest.mark.parametrize(
    "work, waits",
    [
        (lambda: VALUES.sum().item(), 1),
        (lambda: bool(MASK.any()), 1),
        (lambda: VALUES.tolist(), 1),
        (lambda: VALUES.cpu().tolist(), 1),
        (lambda: MASK.nonzero(), 1),
        (lambda: VALUES[MASK], 1),
        (lambda: VALUES[VALUES.long()], 0),
        (lambda: VALUES.clone().masked_fill_(MASK, 0.0), 0),
        (lambda: VALUES.clone().__setitem__(MASK, 0.0), 0),
        (lambda: VALUES.clone().__setitem__(MASK, VALUES[:3]), 1),
        (lambda: ROWS[:, [1, 0]], 1),
        (lambda: ROWS[:, 1:], 0),
        (lambda: VALUES.new_tensor([1.0, 2.0]), 1),
        (lambda: torch.tensor([1.0], device="cpu"), 1),
        (lambda: torch.tensor([1.0]).to("cpu"), 1),
        (lambda: torch.tensor([1.0]).to("cpu", non_blocking=True), 0),
        (lambda: torch.tensor([1.0]).tolist(), 0),
        (lambda: torch.arange(3, device="cpu"), 0),
        (lambda: VALUES.repeat_interleave(VALUES.long()), 1),
        (lambda: VALUES.repeat_interleave(2), 0),
        (lambda: nms(BOXES, BOXES[:, 0], 0.5), 1),
        (lambda: VALUES.argsort(stable=True), 0),
    ],
)
def test_the_counter(work, waits):
    assert counted(work) == waits


def test_the_counter_follows_the_batch():
    instances = Instances((4, 4), gt_boxes=Boxes(BOXES.clone()), gt_classes=torch.tensor([0, 1]))
    batch = [{"image": torch.ones(3, 4, 4), "instances": instances, "height": 4}]
    host = tensors_of(batch)
    assert len(host) == 3
    assert counted(lambda: (instances.gt_boxes.tensor * 2).sum().item(), host) == 0  # on the host all along
    assert counted(lambda: instances.gt_classes.to("cpu").tolist(), host) == 2  # over to the device and back
    assert counted(lambda: images_on_device(batch, torch.device("cpu")), host) == 0
    assert counted(lambda: objects_on_device(batch, torch.device("cpu")), host) == 0
