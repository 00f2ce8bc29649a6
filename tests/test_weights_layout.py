"""Checkpoints of other programs are read if the model is found, else refused with a list of their keys."""

import numpy as np
import pytest
import torch
from torch import nn

from gdetkd.engine.student_weights import StudentCheckpointer
from gdetkd.errors import GDetKDError
from gdetkd.teacher import load_weights
from gdetkd.weights_layout import with_model


@pytest.fixture
def source():
    torch.manual_seed(1)
    return nn.Linear(2, 3)


LAYOUTS = {
    "plain": lambda weights: weights,
    "numbers beside the tensors": lambda weights: {**weights, "iteration": 5},
    "model": lambda weights: {"model": weights, "iteration": 5, "optimizer": 3, "scheduler": None},
    "numbers in the model": lambda weights: {"model": {**weights, "step": 5}},
    "state_dict": lambda weights: {"state_dict": weights, "meta": {"epoch": 3}},
    "model_state_dict": lambda weights: {"epoch": 3, "model_state_dict": weights},
    "ema": lambda weights: {"model": weights, "ema": {name: 0 * tensor for name, tensor in weights.items()}},
    "DataParallel": lambda weights: {"model": {f"module.{name}": tensor for name, tensor in weights.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_every_layout_is_loaded_whole(source, tmp_path, layout, role):
    path, model = str(tmp_path / "weights.pth"), nn.Linear(2, 3)
    torch.save(LAYOUTS[layout](dict(source.state_dict())), path)
    if role == "teacher":
        load_weights(model, path)
    else:
        StudentCheckpointer(model, str(tmp_path / "run")).resume_or_load(path, resume=False)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in source.state_dict().items())


def test_entries_that_are_left_out_are_logged(source, caplog):
    weights = dict(source.state_dict())
    with_model({"model": {**weights, "step": 5}, "ema": weights}, "a.pth")
    assert "a.pth: step is not a tensor and is left out." in caplog.text
    assert "a.pth holds averaged weights under 'ema', which are not used" in caplog.text


@pytest.mark.parametrize("content", [{}, {"model": None}, {"epoch": 3}, {"weights": {"a": torch.zeros(1)}}])
def test_a_file_without_a_model_is_refused_with_its_keys(content):
    with pytest.raises(GDetKDError, match=f"'a.pth' hold no model.*{next(iter(content), 'none')}"):
        with_model(content, "a.pth")


def test_arrays_are_tensors():
    assert list(with_model({"a": np.zeros(1)}, "a.pth")["model"]) == ["a"]


def test_weights_that_set_nothing_of_the_student_are_refused(tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save({"model": {"other.weight": torch.zeros(3)}}, path)
    with pytest.raises(GDetKDError, match="fits none of the student's 2 tensors"):
        StudentCheckpointer(nn.Linear(2, 3), str(tmp_path)).resume_or_load(path, resume=False)
