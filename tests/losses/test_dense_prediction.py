"""Prediction distillation of dense detectors, whose classes are scored independently."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from gdetkd.losses import confidence_weighted_localization, soft_binary_classification


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_classification_matches_plain_loops():
    student, teacher = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist()):
        expected -= (sigmoid(t) * math.log(sigmoid(s)) + (1 - sigmoid(t)) * math.log(1 - sigmoid(s))) / 5
    assert soft_binary_classification(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_classification_closed_form_and_zero():
    # In both of two classes, the teacher's probability is 1/2 and the student's 3/4.
    loss = soft_binary_classification(torch.full((1, 2), math.log(3.0)), torch.zeros(1, 2))
    assert loss.item() == pytest.approx(-(math.log(0.75) + math.log(0.25)), rel=1e-6)
    sure = torch.tensor([[100.0, -100.0]])
    assert soft_binary_classification(sure, sure).item() == pytest.approx(0.0, abs=1e-6)


def test_localization_matches_plain_loops_and_closed_form():
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    confidence = torch.rand(5, dtype=torch.float64)
    expected = sum(
        float(confidence[i]) * abs(float(teacher[i, d] - student[i, d])) / 5 for i in range(5) for d in range(4)
    )
    assert confidence_weighted_localization(student, teacher, confidence).item() == pytest.approx(expected, rel=1e-12)
    half = confidence_weighted_localization(torch.zeros(1, 4), torch.full((1, 4), -3.0), torch.tensor([0.5]))
    assert half.item() == 6.0
    assert confidence_weighted_localization(student, student, confidence) == 0


def test_gradients():
    student, teacher = torch.randn(2, 4, 4, dtype=torch.float64)
    student.requires_grad_()
    confidence = torch.rand(4, dtype=torch.float64)
    assert gradcheck(lambda s: soft_binary_classification(s, teacher), student)
    assert gradcheck(lambda s: confidence_weighted_localization(s, teacher, confidence), student)


def test_no_region_gives_zero_with_a_gradient_path():
    empty = torch.zeros(0, 4, requires_grad=True)
    for loss in (
        soft_binary_classification(empty, empty.detach()),
        confidence_weighted_localization(empty, empty.detach(), torch.zeros(0)),
    ):
        loss.backward()
        assert loss == 0 and empty.grad is not None
