"""DISTILL.WEIGHTS "auto": each term's gradient gets its share, on all processes alike, also after a resume."""

import gdetkd  # noqa: F401, I001  first, in the spawned processes too
import json
import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from conftest import ALL_LOSSES, make_batch, make_cfg
from gdetkd import DistillTrainer
from gdetkd.distiller import term_name
from gdetkd.engine.auto_weights import FIRST_STEPS, HALF_SCALE, LARGEST_CHANGE, AutoWeights
from gdetkd.engine.check import Check
from gdetkd.engine.forward_guard import BROKEN
from gdetkd.engine.gradients import OWN, term_gradients
from gdetkd.errors import GDetKDError
from test_processes import fail_on_rank_1, have_equal_parameters, run_in_processes, train_rank
from test_trainer import train
from test_unlabeled_runs import unlabeled_cfg  # noqa: F401  a fixture

SGFI, CKD = term_name("SGFI"), term_name("CKD")
AUTO = {"DISTILL.WEIGHTS": "auto", "DISTILL.AUTO.PERIOD": 2}


class Backbone(nn.Module):
    """Return two maps of one number each, scaled by a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return {"p2": self.weight * x[0], "p3": self.weight * x[1]}


def student_with(backbone):
    return nn.ModuleDict({"backbone": backbone})


@pytest.fixture
def make_weights():
    """Return a function that makes the weights of SGFI, with a share of 3, and CKD, with a share of 0.5."""

    def make(amp=False, **keys):
        changes = {"DISTILL.LOSSES": ("SGFI", "CKD"), "DISTILL.SGFI.SHARE": 3.0, "DISTILL.CKD.SHARE": 0.5}
        changes.update({"SOLVER.AMP.ENABLED": amp, **{f"DISTILL.AUTO.{key}": value for key, value in keys.items()}})
        backbone = Backbone()
        return AutoWeights(make_cfg(changes), student_with(backbone)), backbone

    return make


def measured(sgfi=1.0, ckd=1.0, own=1.0, sgfi_cosine=0.0, ckd_cosine=0.0):
    return {
        **{f"norm/{OWN}": own, f"cosine/{OWN}": 1.0},
        **{f"norm/{SGFI}": sgfi, f"cosine/{SGFI}": sgfi_cosine},
        **{f"norm/{CKD}": ckd, f"cosine/{CKD}": ckd_cosine},
    }


def test_closed_form(make_weights):
    """The student's own gradient is (3, 4), of norm 5; SGFI's is (0, 10), CKD's (-2, 0), against it."""
    weights, backbone = make_weights()
    assert weights.weight(SGFI) == weights.weight(CKD) == 0
    maps = backbone.train()(torch.ones(2))
    losses = {"a": 3 * maps["p2"], "b": 4 * maps["p3"], SGFI: 10 * maps["p3"], CKD: -2 * maps["p2"]}
    found = weights.measure(losses, 0)
    assert found == pytest.approx(measured(10, 2, 5, sgfi_cosine=0.8, ckd_cosine=-0.6))
    weights.follow(found)
    assert weights.weight(SGFI) == pytest.approx(3 * 5 / 10)
    assert weights.weight(CKD) == pytest.approx(0.5 * 5 / 2 * (1 - 0.6))
    assert backbone.weight.grad is None


def test_measurements_come_in_the_first_steps_and_every_period(make_weights):
    weights, backbone = make_weights(PERIOD=4)

    def look(iteration):
        maps = backbone.train()(torch.ones(2))
        return bool(weights.measure({"a": maps["p2"], SGFI: maps["p2"] * 0, CKD: maps["p3"] * 0}, iteration))

    assert [iteration for iteration in range(13) if look(iteration)] == [*range(FIRST_STEPS), 7, 11]


def test_the_first_measurements_count_equally_and_later_ones_by_the_momentum(make_weights):
    weights, _ = make_weights(MOMENTUM=0.75)
    for norm in (1.0, 16.0, 1.0, 1.0, 2.0):
        weights.follow(measured(sgfi=norm, ckd=0.0))  # CKD has no region
    assert weights.weight(SGFI) == pytest.approx(3 / 2)  # the geometric mean of the norms is 2
    weights.follow(measured(sgfi=2 * 2**4, ckd=0.0))
    assert weights.weight(SGFI) == pytest.approx(3 / 4)
    assert weights.weight(CKD) == 0


@pytest.mark.parametrize("values", [{"own": math.nan}, {"own": 0.0}, {"sgfi": math.inf, "ckd": math.nan}])
def test_values_that_say_nothing_change_nothing(make_weights, values):
    weights, _ = make_weights()
    weights.follow(measured(**values))
    assert weights.weight(SGFI) == 0
    weights.follow(measured())
    weights.follow(measured(**values))
    assert weights.weight(SGFI) == pytest.approx(3.0)


@pytest.mark.parametrize("norm, factor", [(1e-5, LARGEST_CHANGE), (1e9, 1 / LARGEST_CHANGE)])
def test_weights_stay_in_bounds(make_weights, norm, factor):
    weights, _ = make_weights(MOMENTUM=0.0)
    for _ in range(FIRST_STEPS):
        weights.follow(measured())
    weights.follow(measured(sgfi=norm))
    assert weights.weight(SGFI) == pytest.approx(3 * factor)
    weights.follow(measured())
    assert weights.weight(SGFI) == pytest.approx(3)


def test_an_overflow_in_half_precision_lowers_the_scale_of_its_term_alone(make_weights):
    weights, backbone = make_weights(amp=True)
    backbone.half()

    def look():
        maps = backbone.train()(torch.ones(2, dtype=torch.float16))
        losses = {"a": 3 * maps["p2"].float(), SGFI: maps["p3"].float(), CKD: 1e3 * maps["p2"].float()}
        found = weights.measure(losses, 0)
        weights.follow(found)
        return found

    first, second = look(), look()
    assert math.isinf(first[f"norm/{CKD}"]) and first[f"norm/{SGFI}"] == 1
    assert second == pytest.approx({**measured(1, 1e3, 3, ckd_cosine=1.0)})
    assert weights.weight(SGFI) == pytest.approx(9) and weights.weight(CKD) == pytest.approx(0.0015)


def test_a_scale_recovers_after_an_overflow_and_is_at_least_1(make_weights):
    weights, backbone = make_weights(amp=True)
    for _ in range(10):
        weights.follow(measured(sgfi=math.nan, ckd=math.nan, own=math.nan))
    assert set(weights.state_dict()["scales"].values()) == {1.0}
    for _ in range(10):
        weights.follow(measured())
    assert set(weights.state_dict()["scales"].values()) == {HALF_SCALE}


def test_small_gradients_in_half_precision_are_measured_if_the_pyramid_returns_float32(make_weights):
    """A norm in the pyramid returns float32 maps, and the heads after it compute in half precision."""
    weights, backbone = make_weights(amp=True)
    maps = backbone.train()(torch.ones(2))
    small = maps["p2"].half() * 2.0**-26  # 0 in half precision, and 2 ** -18 with the scale
    found = weights.measure({"a": small.float(), SGFI: maps["p3"], CKD: maps["p3"]}, 0)
    assert found[f"norm/{OWN}"] == 2.0**-26


def test_a_gradient_that_is_rounding_sets_no_weight(make_weights, caplog):
    """A student that starts as its teacher has a CLS loss of which only rounding is left."""
    weights, _ = make_weights()
    for _ in range(FIRST_STEPS):
        weights.follow(measured(sgfi=1e-9))
    assert weights.weight(SGFI) == 0 and not caplog.text
    weights.follow(measured(sgfi=1e-9))
    weights.follow(measured(sgfi=1e-9))
    assert caplog.text.count("loss_distill_sgfi has had no weight for 6 measurements") == 1
    assert "loss_distill_ckd" not in caplog.text


def test_a_loss_without_a_gradient_and_a_backbone_in_evaluation_mode_are_measured(make_weights):
    weights, backbone = make_weights()
    maps = backbone.eval()(torch.ones(2))
    found = weights.measure({"a": maps["p2"], SGFI: maps["p3"], CKD: torch.zeros(())}, 0)
    assert found == measured(ckd=0.0)


def test_a_forward_pass_that_failed_measures_nothing(make_weights):
    weights, backbone = make_weights()
    maps = backbone.train()(torch.ones(2))
    loss = (maps["p2"] + maps["p3"]) * 0 + math.nan
    assert all(map(math.isnan, weights.measure({BROKEN: loss, SGFI: loss, CKD: loss}, 0).values()))


def test_a_term_that_opposes_the_student_is_reduced_and_reported_once(make_weights, caplog):
    weights, _ = make_weights()
    weights.follow(measured(sgfi_cosine=0.2, ckd_cosine=-0.8))
    weights.follow(measured(sgfi_cosine=-0.4, ckd_cosine=-1.0))
    assert weights.weight(SGFI) == pytest.approx(3 * 0.9)
    assert weights.weight(CKD) == pytest.approx(0.5 * 0.1)
    assert caplog.text.count("loss_distill_ckd points against") == 1 and "loss_distill_sgfi" not in caplog.text


def test_a_share_of_zero_is_a_weight_of_zero(distill_cfg):
    trainer, losses = train(DistillTrainer, distill_cfg({**AUTO, "DISTILL.CKD.SHARE": 0.0}))
    assert all(step["loss_distill_ckd"] == 0 < step["raw/loss_distill_ckd"] for step in losses.values())


def test_a_frozen_backbone_is_refused():
    with pytest.raises(GDetKDError, match="no parameter of the backbone is trained"):
        AutoWeights(make_cfg({"DISTILL.LOSSES": ("SGFI",)}), student_with(Backbone().requires_grad_(False)))


def test_a_student_whose_backbone_has_another_name_is_refused():
    with pytest.raises(GDetKDError, match="A ModuleDict has no attribute `backbone`"):
        AutoWeights(make_cfg({"DISTILL.LOSSES": ("SGFI",)}), nn.ModuleDict({"body": Backbone()}))


@pytest.mark.parametrize(
    "pair, losses",
    [
        ("faster_rcnn-faster_rcnn", ALL_LOSSES),
        ("faster_rcnn-faster_rcnn", ("CKD", "PKD")),
        ("cascade_rcnn-cascade_rcnn", ALL_LOSSES),
        ("faster_rcnn-retinanet", ("SGFI", "CKD")),
    ],
)
def test_a_training_gives_each_term_its_share(pair_cfg, pair, losses):
    shares = dict(zip(losses, (2.0, 1.0, 0.5, 0.25)))
    keys = {f"DISTILL.{name}.SHARE": share for name, share in shares.items()}
    trainer = DistillTrainer(pair_cfg(pair, {**AUTO, "DISTILL.LOSSES": losses, **keys}))
    maps = []
    trainer.student.backbone.register_forward_hook(lambda module, inputs, output: maps.extend(output.values()))
    for iteration in (0, FIRST_STEPS + 1):  # the first step sets the weights, the second one uses them
        maps.clear()
        torch.manual_seed(0)
        vars(trainer.student).pop("loss_normalizer", None)  # the moving average of a dense student
        with EventStorage(iteration):
            weighted = trainer.model.train()(make_batch())
        trainer.schedule.follow(trainer.schedule.take_gradients())
    found = term_gradients(weighted, trainer.schedule.terms, maps)
    for name, share in shares.items():
        agreement = 1 + min(0.0, found[term_name(name)]["cosine"])
        assert found[term_name(name)]["norm"] / found[OWN]["norm"] == pytest.approx(share * agreement, rel=1e-3)


def test_a_resumed_run_is_bit_identical_and_the_weights_are_logged(distill_cfg, tmp_path):
    cfg = distill_cfg({**AUTO, "SOLVER.MAX_ITER": 40, "SOLVER.CHECKPOINT_PERIOD": 5, "SOLVER.BASE_LR": 1e-5})
    whole, losses = train(DistillTrainer, cfg)
    assert losses[0]["loss_distill_sgfi"] == 0 < losses[1]["loss_distill_sgfi"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert lines[-1]["weight/loss_distill_sgfi"] == whole.schedule.full_weight("loss_distill_sgfi") > 0
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000004.pth")
    (tmp_path / "run" / "model_final.pth").unlink()
    resumed, losses_again = train(DistillTrainer, cfg, resume=True)
    assert losses_again == {step: values for step, values in losses.items() if step >= 5}
    assert resumed.schedule.scalars() == whole.schedule.scalars()


def _train(rank, cfg):
    weights = []

    class Trainer(DistillTrainer):
        def after_train(self):
            weights.append(self.schedule.scalars())
            super().after_train()

    return {**train_rank(rank, cfg, Trainer), "weights": weights[0]}


def test_two_processes_have_the_same_weights(shared_cfg, tmp_path):
    results = run_in_processes(_train, tmp_path, 2, shared_cfg(2, {**AUTO, "SOLVER.MAX_ITER": 6}))
    assert have_equal_parameters(results) and results[0]["weights"] == results[1]["weights"]
    assert all(weight > 0 for weight in results[0]["weights"].values())


class _Fails(DistillTrainer):
    """The forward pass of rank 1 is not finite twice, before and after the student's backbone."""

    def __init__(self, cfg):
        super().__init__(cfg)
        fail_on_rank_1(self, before=[3], after=[4])


def _train_with_failures(rank, cfg):
    return train_rank(rank, cfg, _Fails)


def test_two_processes_stay_together_when_steps_fail(shared_cfg, tmp_path):
    keys = {**AUTO, "DISTILL.SKIP_NONFINITE": 2, "SOLVER.MAX_ITER": 6}
    results = run_in_processes(_train_with_failures, tmp_path, 2, shared_cfg(2, keys))
    assert have_equal_parameters(results) and all(result["changed"] for result in results)
    assert [result["skipped"] for result in results] == [2, 2]


def test_with_unlabeled_images_the_gradients_are_those_of_the_whole_batch(unlabeled_cfg):  # noqa: F811
    trainer = DistillTrainer(unlabeled_cfg({**AUTO, "DISTILL.LOSSES": ("SGFI",)}))
    kept = []
    measure = trainer.schedule._auto.measure
    trainer.schedule._auto.measure = lambda *args: (kept.extend(trainer.schedule._auto._features), measure(*args))[1]
    with EventStorage(1):
        trainer.model.train()(next(iter(trainer.data_loader)))
    assert {len(features) for features in kept} == {4}
    gradients = trainer.schedule.take_gradients()
    assert gradients[f"norm/{OWN}"] > 0 and gradients[f"norm/{SGFI}"] > 0


def test_the_check_shows_the_weights_of_the_start(distill_cfg):
    check = Check(distill_cfg({**AUTO, "DATASETS.TEST": ("tiny",), "DISTILL.TEACHER.MIN_AP": 0.0}), images=2)
    screen = check.run()
    assert not any("sends no gradient" in problem for problem in check.problems)
    weight = check._trainer.schedule.full_weight(SGFI)
    assert weight > 0 and f"{weight:.3g} (auto)" in screen
