"""Every family trains under autocast, as a student and as a teacher, through the real AMP trainer.

The tests have no GPU. They use bfloat16 autocast on the CPU, where the same dtypes meet in the same places.
"""

import math

import pytest
import torch
from detectron2.utils.events import EventStorage

from conftest import ALL_LOSSES, FAMILIES, make_batch
from gdetkd import DistillTrainer
from gdetkd.engine.gradients import OWN, term_gradients

# torch 2.15 leaves most of the weight gradient of a bfloat16 3x3 convolution uninitialised on a CPU if the map has 1x1
# cells. On images of this size (height, width) the coarsest such map has 2x2.
SIZES = ((128, 128), (128, 96))


class Trainer(DistillTrainer):
    """Train on fixed batches."""

    @classmethod
    def build_train_loader(cls, cfg):
        return [make_batch(SIZES, seed=seed) for seed in range(2)]


@pytest.fixture
def amp_on_cpu(monkeypatch):
    """Let Detectron2's AMP trainer run on a CPU. It asks for CUDA, and uses CUDA's autocast and scaler."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.amp, "autocast", lambda **keys: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", init_scale=4.0))


def losses_of(teacher, student):
    dense = ("retinanet", "fcos")
    same_kind = teacher == student or not {teacher, student} & set(dense)
    return ALL_LOSSES if same_kind else ("SGFI", "CKD")


PAIRS = [(family, family) for family in FAMILIES]
PAIRS += [("faster_rcnn", "fcos"), ("fcos", "faster_rcnn"), ("faster_rcnn", "retinanet"), ("retinanet", "cascade_rcnn")]


@pytest.mark.parametrize("teacher, student", PAIRS)
def test_a_step_of_the_amp_trainer(pair_cfg, amp_on_cpu, teacher, student):
    keys = {"DISTILL.LOSSES": losses_of(teacher, student), "DISTILL.TEACHER.DTYPE": "bfloat16"}
    cfg = pair_cfg(f"{teacher}-{student}", {**keys, "SOLVER.AMP.ENABLED": True, "SOLVER.MAX_ITER": 1})
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    if student == "fcos":  # half of the boxes of an untrained FCOS have no area
        torch.nn.init.constant_(trainer.student.head.bbox_pred.bias, 1.0)
    before = [parameter.detach().clone() for parameter in trainer.distiller.parameters()]
    assert trainer.loss_scale == 4.0
    trainer.train()
    losses = {name: value[0] for name, value in trainer.storage.latest().items() if name.startswith("loss_")}
    assert all(map(math.isfinite, losses.values()))
    assert {f"loss_distill_{name.lower()}" for name in cfg.DISTILL.LOSSES} <= set(losses)
    changed = [not torch.equal(*pair) for pair in zip(before, trainer.distiller.parameters())]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_dense_losses_under_autocast_are_computed_in_float32(pair_cfg, family):
    """Half precision would change the losses: they sum over thousands of locations, and boxes would have 8 bits."""
    student = DistillTrainer(pair_cfg(f"{family}-{family}")).student.train()
    images = student.preprocess_image(make_batch())
    targets = [sample["instances"] for sample in make_batch()]
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        maps = [student.backbone(images.tensor)[name] for name in student.head_in_features]
        predictions = student.head(maps)
        found = student.forward_training(images, maps, predictions, targets)
    exact = [[tensor.detach().float() for tensor in level] for level in predictions]
    student.loss_normalizer = 100 if family == "retinanet" else 300  # the value before the first forward pass
    with EventStorage():
        expected = student.forward_training(images, maps, exact, targets)
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected[name].item(), rel=1e-5), name


def test_gradient_norms_are_the_same_inside_and_outside_of_autocast():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    parameters = list(layer.parameters())

    def losses(values):
        output = layer(values)
        return {"own": output.float().square().mean(), "term": (values[:, :8] - output).float().abs().mean()}

    values = torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = term_gradients(losses(values), ["term"], parameters)
        outside_losses = losses(values)
    outside = term_gradients(outside_losses, ["term"], parameters)
    assert inside == outside and inside[OWN]["norm"] > 0
