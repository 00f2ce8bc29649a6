"""The guard finds values that are not finite in every part of a step. It leaves out the step, or stops the run."""

import gdetkd  # noqa: F401, I001  imported first: it prepares the import of Detectron2
import json

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils import comm
from test_guard import States, same
from test_trainer import on_fixed_batches

from conftest import ALL_LOSSES, FAMILIES, make_batch
from gdetkd import DistillTrainer
from gdetkd.engine.forward_guard import BROKEN, ForwardGuard, is_about_nonfinite
from gdetkd.engine.guard import NonFiniteError

TWO_STAGE = ("proposal_generator.rpn_head", "roi_heads.box_pooler", "roi_heads.box_predictor", "roi_heads.box_head")
PLACES = {
    "faster_rcnn": TWO_STAGE,
    "mask_rcnn": (*TWO_STAGE, "roi_heads.mask_head"),
    "cascade_rcnn": (*TWO_STAGE[:2], "roi_heads.box_predictor.0", "roi_heads.box_predictor.1", "roi_heads.box_head.2"),
    "retinanet": ("head", "head.cls_subnet", "head.bbox_pred"),
    "fcos": ("head", "head.cls_subnet", "head.bbox_pred"),
}


def spoil_output(output, value):
    """Return a module's output with a value that is not finite added to the first half of each tensor."""
    if isinstance(output, torch.Tensor):
        if output.dim() == 0:
            return output + value
        output = output.clone()
        output[: (len(output) + 1) // 2] += value
        return output
    if isinstance(output, dict):
        return {name: spoil_output(item, value) for name, item in output.items()}
    return type(output)(spoil_output(item, value) for item in output) if isinstance(output, (list, tuple)) else output


class SpoilModule(States):
    """Spoil the output of a module of the student in the given iterations."""

    def __init__(self, place, value, iterations):
        super().__init__()
        self.place, self.value, self.iterations = place, value, iterations

    def before_step(self):
        super().before_step()
        module = self.trainer.student.get_submodule(self.place)
        self.handle = module.register_forward_hook(
            lambda module, inputs, output: (
                spoil_output(output, self.value) if self.trainer.iter in self.iterations else None
            )
        )

    def after_step(self):
        self.handle.remove()


PAIRS = [(family, place) for family in FAMILIES for place in ("backbone", *PLACES[family])]
CUT = {"DISTILL.CROSSKD.ANCHOR_BASED.SHARED_CONVS": 1, "DISTILL.CROSSKD.ANCHOR_FREE.SHARED_CONVS": 1}


@pytest.fixture
def trainer_of(pair_cfg):
    """Return a function that makes a trainer of a pair of one family. It may skip one step."""

    def make(family, losses):
        keys = {"DISTILL.LOSSES": losses, "DISTILL.SKIP_NONFINITE": 1, "SOLVER.MAX_ITER": 3, **CUT}
        trainer = on_fixed_batches(DistillTrainer)(pair_cfg(f"{family}-{family}", keys))
        trainer.resume_or_load(resume=False)
        if family == "fcos":  # half of the boxes of an untrained FCOS have no area
            torch.nn.init.constant_(trainer.student.head.bbox_pred.bias, 1.0)
        return trainer

    return make


def losses_of(family):
    return (*ALL_LOSSES, "CROSSKD") if family in ("retinanet", "fcos") else ALL_LOSSES


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("family, place", PAIRS)
def test_a_step_is_left_out_if_any_part_of_the_student_is_not_finite(trainer_of, family, place, value):
    trainer = trainer_of(family, losses_of(family))
    spoiler = SpoilModule(place, value, {1})
    trainer.register_hooks([spoiler])
    trainer.train()
    assert trainer._guard.state_dict() == {"skipped": 1}
    assert same(spoiler.before[1], spoiler.before[2]) and not same(spoiler.before[0], spoiler.before[1])


# FGFI is missing for FCOS, because it needs anchors.
TEACHERS = [
    *(("faster_rcnn", loss) for loss in (*ALL_LOSSES, "FITNET", "GTMASK", "FGFI", "ROIFI", "CWD", "PKD", "FGD", "MGD")),
    *(("retinanet", loss) for loss in (*ALL_LOSSES, "CROSSKD")),
    *(("fcos", loss) for loss in (*ALL_LOSSES, "CROSSKD")),
    *(("cascade_rcnn", loss) for loss in ("CLS", "REG")),
]


@pytest.mark.parametrize("family, loss", TEACHERS)
def test_a_step_is_left_out_if_the_teacher_is_not_finite(trainer_of, family, loss):
    trainer = trainer_of(family, (loss,))
    trainer.distiller.teacher.adapter.backbone.register_forward_hook(
        lambda module, inputs, output: spoil_output(output, float("nan")) if trainer.iter == 1 else None
    )
    trainer.train()
    assert trainer._guard.state_dict() == {"skipped": 1}


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_the_moving_average_of_a_dense_detector_is_restored(trainer_of, family):
    """Detectron2 keeps the average as a plain number, and the forward pass changes it."""
    trainer = trainer_of(family, ("CKD",))
    seen = []

    class Normalizer(HookBase):
        def before_step(self):
            seen.append(getattr(self.trainer.student, "loss_normalizer", None))

    trainer.register_hooks([Normalizer(), SpoilModule("head", float("nan"), {1})])
    trainer.train()
    assert seen[0] is None and seen[1] is not None and seen[1] == seen[2]


def test_a_run_that_skips_no_step_reports_the_error_of_the_forward_pass(trainer_of, tmp_path):
    trainer = trainer_of("fcos", ("CKD",))
    trainer._guard._tolerated = 0
    trainer.register_hooks([SpoilModule("head.bbox_pred", float("nan"), {1})])
    with pytest.raises(NonFiniteError, match="1 the forward pass is not finite .bad box.*nonfinite_0000001"):
        trainer.train()
    (found,) = json.loads((tmp_path / "run" / "nonfinite_0000001.json").read_text())["processes"]
    assert "bad box" in found["terms"]["the forward pass"]


def test_other_assertions_are_not_caught(trainer_of, monkeypatch):
    def fails(*args):
        limit = torch.tensor([1.0, 2.0])
        assert limit.sum() > 5, "a mistake in the code"

    trainer = trainer_of("faster_rcnn", ("CKD",))
    monkeypatch.setattr(trainer.student.roi_heads, "label_and_sample_proposals", fails)
    with pytest.raises(AssertionError, match="a mistake in the code"):
        trainer.train()


@pytest.mark.parametrize("where", ["tensor", "boxes", "list"])
def test_the_values_decide_whether_an_assertion_is_about_nonfinite_values(where):
    def assert_finite(values):
        raise AssertionError

    for value, expected in ((1.0, False), (float("nan"), True), (float("inf"), True)):
        tensor = torch.full((2, 4), value)
        values = {"tensor": tensor, "boxes": Boxes(tensor), "list": [{"deep": (tensor,)}]}[where]
        with pytest.raises(AssertionError) as error:
            assert_finite(values)
        assert is_about_nonfinite(error.value) == expected


HEAD_NORM = {
    "MODEL.ROI_BOX_HEAD.NORM": "naiveSyncBN",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 8,
}


@pytest.mark.parametrize("keys", [{"MODEL.RESNETS.NORM": "naiveSyncBN"}, HEAD_NORM], ids=["backbone", "box head"])
def test_a_step_cannot_be_left_out_if_others_wait_in_a_norm_outside_the_backbone(distill_cfg, monkeypatch, keys):
    model = build_model(distill_cfg({"DISTILL.LOSSES": ("SGFI",), **keys})).train()
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    guard = ForwardGuard(model, model.student).train()

    def fail(batch):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(model.student, "forward", fail)
    if keys is HEAD_NORM:
        with pytest.raises(NonFiniteError, match="SyncBN layer outside the backbone"):
            guard(make_batch())
    else:
        assert set(guard(make_batch())) == {"loss_distill_sgfi", BROKEN} and guard.failure == "not finite"
