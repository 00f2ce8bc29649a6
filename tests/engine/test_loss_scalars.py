"""The scalars of losses are logged. SGFI warns if it no longer chooses among levels."""

import json

import pytest
import torch

from gdetkd import DistillTrainer
from gdetkd.engine import loss_scalars
from gdetkd.errors import GDetKDError
from gdetkd.losses import sgfi


def train(cfg, prepare=lambda trainer: None):
    torch.manual_seed(0)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    prepare(trainer)
    trainer.train()


def kill_embedding(trainer):
    """Set the biases so low that SGFI's embedding is 0 for every region."""
    with torch.no_grad():
        trainer.distiller.losses["SGFI"].embed.conv2.bias.fill_(-1e3)


@pytest.fixture
def look_often(monkeypatch):
    monkeypatch.setattr(loss_scalars, "PERIOD", 1)
    monkeypatch.setattr(sgfi, "PATIENCE", 2)


KEYS = {"DISTILL.LOSSES": ("SGFI",), "SOLVER.MAX_ITER": 4}


def test_a_dead_embedding_causes_one_warning(distill_cfg, look_often, caplog, tmp_path):
    train(distill_cfg(KEYS), kill_embedding)
    assert caplog.text.count("no longer chooses among the student's levels") == 1
    assert "mean of the 4 levels" in caplog.text and "NEGATIVE_SLOPE" in caplog.text
    line = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[-1])
    assert line["sgfi/attention"] == 0.25


def test_a_live_embedding_causes_no_warning(distill_cfg, look_often, caplog, tmp_path):
    train(distill_cfg(KEYS))
    assert "no longer chooses" not in caplog.text
    line = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[-1])
    assert 0.25 < line["sgfi/attention"] <= 1


def test_a_slope_lets_a_gradient_reach_a_dead_embedding(distill_cfg, look_often, caplog):
    """Without a slope, all ReLUs of the embedding are dead, and no gradient passes them."""
    found = {}

    def look(trainer, slope):
        kill_embedding(trainer)
        found[slope] = trainer.distiller.losses["SGFI"].embed

    for slope in (0.0, 0.01):
        cfg = distill_cfg({**KEYS, "SOLVER.MAX_ITER": 1, "DISTILL.SGFI.NEGATIVE_SLOPE": slope})
        train(cfg, lambda trainer, slope=slope: look(trainer, slope))
    assert not found[0.0].conv1.weight.grad.any()
    assert found[0.01].conv1.weight.grad.any()


def test_a_slope_out_of_range_is_refused(distill_cfg):
    with pytest.raises(GDetKDError, match="NEGATIVE_SLOPE is -0.1"):
        DistillTrainer(distill_cfg({**KEYS, "DISTILL.SGFI.NEGATIVE_SLOPE": -0.1}))
