"""The distillation part of a step makes the CPU wait for the GPU only a few times."""

import warnings
from unittest import mock

import pytest
import torch
from detectron2.utils.events import EventStorage
from on_device import DENSE_FAMILIES, PAIRS, losses_of

from conftest import make_batch
from gdetkd import DistillTrainer

MESSAGE = "called a synchronizing CUDA operation"


def most_waits(student, images):
    """Return how many waits the distillation part of a step may have.

    A dense student's regions are found image by image, and the number of boxes that stay is known only afterwards.
    """
    return 2 * images + 3 if student in DENSE_FAMILIES else 3


def waits_of_distillation(distiller, batch):
    """Return the places in the code where a distiller's forward pass waits, without those of the student's own pass."""
    forward = distiller.student.forward

    def unwatched(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return forward(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("warn")

    with mock.patch.object(distiller.student, "forward", unwatched), EventStorage():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                distiller(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return [f"{warning.filename}:{warning.lineno}" for warning in caught if MESSAGE in str(warning.message)]


def start(pair_cfg, pair, device):
    cfg = pair_cfg(pair, {"DISTILL.LOSSES": losses_of(pair), "MODEL.DEVICE": device})
    distiller = DistillTrainer(cfg).distiller
    with EventStorage():
        distiller(make_batch())  # the first pass also loads kernels and reads anchors
    return distiller


@pytest.mark.parametrize("device, pair", [("cuda", pair) for pair in PAIRS], indirect=["device"])
def test_waits_of_the_distillation_part(pair_cfg, device, pair):
    batch = make_batch()
    places = waits_of_distillation(start(pair_cfg, pair, device), batch)
    assert len(places) <= most_waits(pair.split("-")[1], len(batch)), places


def test_waits_outside_of_the_students_forward_pass_are_counted(pair_cfg, monkeypatch):
    """A CPU never waits. Here torch's warning is made by hand: once in the student, twice in the teacher."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    distiller = start(pair_cfg, "faster_rcnn-faster_rcnn", "cpu")

    def waiting(function, times):
        def run(*args, **kwargs):
            for _ in range(times if modes[-1] == "warn" else 0):
                warnings.warn(f"{MESSAGE} (made by hand)", stacklevel=1)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(distiller.student, "forward", waiting(distiller.student.forward, 1))
    monkeypatch.setattr(distiller.teacher, "look_at", waiting(distiller.teacher.look_at, 2))
    assert len(waits_of_distillation(distiller, make_batch())) == 2
    assert modes == ["default", "warn", "default", "warn", "default"]
