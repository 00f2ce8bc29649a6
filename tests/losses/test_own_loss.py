"""The example in docs/losses.md runs as written: it trains, logs its term, and is kept in the checkpoint."""

import json

import pytest
import torch
from detectron2.modeling import build_model

from conftest import run_example
from gdetkd import DistillTrainer
from gdetkd.errors import GDetKDError
from gdetkd.safe_load import read_weights


@pytest.fixture
def own_loss():
    run_example("losses.md")


def train(cfg):
    torch.manual_seed(0)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def test_the_example_trains_and_has_its_keys(own_loss, distill_cfg, tmp_path):
    cfg = distill_cfg({"DISTILL.LOSSES": ("SGFI", "PEAK"), "DISTILL.PEAK.POWER": 2.0, "SOLVER.MAX_ITER": 1})
    assert cfg.DISTILL.PEAK.WEIGHT == 0.5 and cfg.DISTILL.PEAK.WARMUP_ITERS == 0
    trainer = train(cfg)
    line = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[-1])
    assert line["loss_distill_peak"] == pytest.approx(0.5 * line["raw/loss_distill_peak"], rel=1e-5)
    assert line["loss_distill_peak"] > 0
    saved = read_weights(str(tmp_path / "run" / "model_final.pth"))
    assert torch.equal(saved["distill"]["losses"]["PEAK.scale"], trainer.distiller.losses["PEAK"].scale)
    assert not any("PEAK" in name for name in saved["model"])


def test_the_example_without_a_region(own_loss, distill_cfg):
    cfg = distill_cfg({"DISTILL.LOSSES": ("PEAK",)})
    loss = build_model(cfg).losses["PEAK"]

    class Outputs:
        logits, device = torch.zeros(0, 4), torch.device("cpu")

    value = loss(Outputs, Outputs)
    value.backward()
    assert value == 0 and loss.scale.grad == 0


def test_the_example_refuses_a_pair_that_it_cannot_use(own_loss, pair_cfg):
    with pytest.raises(GDetKDError, match="PEAK compares two box heads"):
        build_model(pair_cfg("retinanet-faster_rcnn", {"DISTILL.LOSSES": ("PEAK",)}))
