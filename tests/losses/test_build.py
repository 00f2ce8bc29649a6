"""Promises of the base class to every loss, and the messages about DISTILL.LOSSES."""

import copy

import pytest
import torch
from detectron2.structures import Boxes
from torch import nn

from conftest import make_cfg
from gdetkd.errors import GDetKDError
from gdetkd.losses import (
    CKD,
    CLS,
    CWD,
    DISTILL_LOSS_REGISTRY,
    FGD,
    FGFI,
    FITNET,
    GTMASK,
    MGD,
    PKD,
    REG,
    ROIFI,
    SGFI,
    DistillLoss,
    build_losses,
)
from gdetkd.structures import DetectorOutputs, DetectorSpec, Regions

ANCHORS = {"p2": ((-8.0, -8.0, 8.0, 8.0),), "p3": ((-16.0, -16.0, 16.0, 16.0),)}
SPEC = DetectorSpec(4, {"p2": 4, "p3": 8}, (7, 7), 6, 3, (10.0, 10.0, 5.0, 5.0), location_anchors=ANCHORS)


def outputs(count: int) -> DetectorOutputs:
    corner = torch.rand(count, 2) * 30
    boxes = Boxes(torch.cat([corner, corner + 10], dim=1))
    return DetectorOutputs(
        pyramid={"p2": torch.randn(1, 4, 12, 12), "p3": torch.randn(1, 4, 6, 6)},
        strides=SPEC.strides,
        regions=Regions([boxes]),
        levels=torch.arange(count) % 2,
        gt_boxes=[boxes[:2]],
        pooled=torch.randn(count, 4, 7, 7),
        embeddings=torch.randn(count, 6),
        logits=torch.randn(count, 4),
        deltas=torch.randn(count, 12),
    )


# CROSSKD needs dense detectors. tests/cuda has it in half precision.
TESTED = [SGFI, CKD, CLS, REG, FITNET, GTMASK, FGFI, ROIFI, CWD, PKD, FGD, MGD]


def test_the_list_is_complete():
    assert {loss.__name__ for loss in TESTED} | {"CROSSKD"} == {name for name, _ in DISTILL_LOSS_REGISTRY}


@pytest.mark.parametrize("loss_class", TESTED)
def test_autocast_does_not_reach_a_loss(loss_class):
    loss, student, teacher = loss_class(make_cfg({}), SPEC, SPEC), outputs(5), outputs(5)
    teacher.regions = student.regions
    again = copy.deepcopy(loss)  # CKD's queue holds the teacher's embeddings after the first call
    state = torch.get_rng_state()
    expected = loss.compute(student, teacher)  # no autocast is on here
    torch.set_rng_state(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(again(student, teacher), expected)


class _Idle(DistillLoss):
    """Have a parameter that the term does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(3))

    def compute(self, student, teacher):
        return student.embeddings.sum()


def test_a_parameter_that_a_step_does_not_use_has_a_gradient_of_zero():
    loss = _Idle()
    loss(outputs(0), outputs(0)).backward()
    assert torch.equal(loss.idle.grad, torch.zeros(3))


def test_an_unknown_loss_and_a_loss_named_twice_are_refused():
    with pytest.raises(GDetKDError, match="unknown loss 'KCD'. Choose from: .*CKD"):
        build_losses(make_cfg({"DISTILL.LOSSES": ("KCD",)}), SPEC, SPEC)
    with pytest.raises(GDetKDError, match="has 'PKD' twice.*DISTILL.PKD.WEIGHT"):
        build_losses(make_cfg({"DISTILL.LOSSES": ("PKD", "PKD")}), SPEC, SPEC)
