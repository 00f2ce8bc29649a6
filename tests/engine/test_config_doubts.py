"""Values that are valid alone, but do not fit together, cause a warning before the training starts."""

import pytest

from gdetkd import DistillTrainer
from gdetkd.engine.check import Check
from gdetkd.engine.config_doubts import config_doubts
from gdetkd.errors import GDetKDError

SCHEDULE = {"SOLVER.MAX_ITER": 90, "SOLVER.STEPS": (60, 80), "SOLVER.WARMUP_ITERS": 10}


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"SOLVER.WARMUP_ITERS": 60}, "SOLVER.STEPS lowers the learning rate at iteration 60"),
        ({"SOLVER.WARMUP_ITERS": 90, "SOLVER.STEPS": (100,)}, "the training ends at iteration 90"),
        ({"SOLVER.WARMUP_ITERS": 90, "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"}, "the training ends at"),
    ],
)
def test_a_warm_up_that_never_reaches_the_learning_rate(distill_cfg, changes, key):
    cfg = distill_cfg({**SCHEDULE, **changes})
    [doubt] = config_doubts(cfg)
    assert doubt.startswith(f"SOLVER.WARMUP_ITERS is {changes['SOLVER.WARMUP_ITERS']}, but {key}")
    assert highest_rate(cfg) < 0.99


@pytest.mark.parametrize(
    "changes",
    [
        {"SOLVER.WARMUP_ITERS": 59},
        {"SOLVER.WARMUP_ITERS": 60, "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"},
        {"SOLVER.WARMUP_ITERS": 0},
        {"SOLVER.WARMUP_ITERS": 90, "SOLVER.WARMUP_FACTOR": 1.0},
    ],
)
def test_a_warm_up_that_reaches_the_learning_rate(distill_cfg, changes):
    assert config_doubts(distill_cfg({**SCHEDULE, **changes})) == []


def highest_rate(cfg):
    """Return the highest learning rate of a schedule, as a share of SOLVER.BASE_LR."""
    model = DistillTrainer.build_model(cfg)
    optimizer = DistillTrainer.build_optimizer(cfg, model)
    scheduler, rates = DistillTrainer.build_lr_scheduler(cfg, optimizer), []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return max(rates) / cfg.SOLVER.BASE_LR


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"DISTILL.WARMUP_ITERS": 91}, "DISTILL.WARMUP_ITERS 91: "),
        ({"DISTILL.CKD.WARMUP_ITERS": 46, "DISTILL.UNTIL": 0.5}, "DISTILL.CKD.WARMUP_ITERS 46: "),
    ],
)
def test_a_warm_up_of_losses_that_never_ends(distill_cfg, changes, part):
    [doubt] = config_doubts(distill_cfg({**SCHEDULE, **changes}))
    assert doubt.startswith(part)


def test_a_warm_up_of_losses_that_are_not_used_or_end_in_time(distill_cfg):
    assert config_doubts(distill_cfg({**SCHEDULE, "DISTILL.WARMUP_ITERS": 91, "DISTILL.LOSSES": ()})) == []
    assert config_doubts(distill_cfg({**SCHEDULE, "DISTILL.WARMUP_ITERS": 45, "DISTILL.UNTIL": 0.5})) == []
    keys = {**SCHEDULE, "SOLVER.MAX_ITER": 100, "DISTILL.WARMUP_ITERS": 29, "DISTILL.UNTIL": 0.29}
    assert config_doubts(distill_cfg(keys)) == []


def test_values_that_scaling_changed_are_marked(distill_cfg):
    cfg = distill_cfg({**SCHEDULE, "SOLVER.WARMUP_ITERS": 60, "SOLVER.REFERENCE_WORLD_SIZE": 8})
    assert "iteration 60 (scaled by SOLVER.REFERENCE_WORLD_SIZE)" in config_doubts(cfg)[0]


def test_an_unknown_loss_is_named_first(distill_cfg):
    for build in (DistillTrainer, Check):
        with pytest.raises(GDetKDError, match="unknown loss 'SGIF'"):
            build(distill_cfg({"DISTILL.LOSSES": ("SGIF",)}))


@pytest.mark.parametrize("train, test", [((64,), 97), ((64, 96), 42), (64, 800)])
def test_test_images_of_another_size_than_in_training(distill_cfg, train, test):
    cfg = distill_cfg({**SCHEDULE, "DATASETS.TEST": ("tiny",)})
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = train, test
    [doubt] = config_doubts(cfg)
    assert doubt.startswith(f"INPUT.MIN_SIZE_TEST is {test}, but the student trains on images with a short side of 64")


@pytest.mark.parametrize("train, test", [((64,), 96), ((64, 96), 43), ((0,), 800), ((64,), 0), ((), 800)])
def test_test_images_of_about_the_same_size_or_of_the_files(distill_cfg, train, test):
    cfg = distill_cfg({**SCHEDULE, "DATASETS.TEST": ("tiny",)})
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = train, test
    assert config_doubts(cfg) == []


def test_crops_of_another_size_than_the_test_images(distill_cfg):
    cfg = distill_cfg({**SCHEDULE, "DATASETS.TEST": ("tiny",), "INPUT.MIN_SIZE_TEST": 800})
    assert len(config_doubts(cfg)) == 1
    cfg.INPUT.CROP.ENABLED = True
    assert config_doubts(cfg) == []


def test_training_warns_and_the_check_names_a_problem(distill_cfg, caplog):
    cfg = distill_cfg({**SCHEDULE, "SOLVER.WARMUP_ITERS": 1000})
    DistillTrainer(cfg)
    assert "SOLVER.WARMUP_ITERS is 1000" in caplog.text
    assert Check(cfg).problems[0].startswith("SOLVER.WARMUP_ITERS is 1000")


@pytest.mark.parametrize("trains_alone", [True, False])
def test_a_teacher_that_nothing_uses(distill_cfg, caplog, trains_alone):
    DistillTrainer(distill_cfg({"DISTILL.LOSSES": () if trains_alone else ("CKD",)}))
    assert ("The student trains alone" in caplog.text) == trains_alone
