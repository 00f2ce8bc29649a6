"""Prediction distillation of box heads against plain loops and closed forms."""

import math

import pytest
import torch

from conftest import make_cfg
from gdetkd.errors import GDetKDError
from gdetkd.losses import (
    CLS,
    REG,
    class_aware_localization,
    probability_weighted_localization,
    soft_classification,
)
from gdetkd.structures import DetectorOutputs, DetectorSpec


def softmax(row):
    norm = sum(math.exp(v) for v in row)
    return [math.exp(v) / norm for v in row]


def spec(num_classes=3, weights=(10.0, 10.0, 5.0, 5.0)):
    return DetectorSpec(4, {"p2": 4, "p3": 8}, (7, 7), 6, num_classes, weights)


def test_classification_matches_plain_loops():
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist()):
        expected -= sum(p * math.log(q) for p, q in zip(softmax(t), softmax(s))) / 5
    assert soft_classification(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_the_module_takes_the_teachers_certainty_as_the_target():
    student, teacher = (DetectorOutputs({}, {}, logits=torch.randn(5, 4)) for _ in range(2))
    loss = CLS(make_cfg({}), spec(), spec())(student, teacher)
    torch.testing.assert_close(loss, soft_classification(student.logits, teacher.logits))
    assert (loss - soft_classification(teacher.logits, student.logits)).abs() > 0.01


def test_classification_closed_form():
    # Teacher (1/2, 1/2), student (3/4, 1/4): -(ln(3/4) + ln(1/4)) / 2.
    loss = soft_classification(torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2))
    assert loss.item() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2, rel=1e-6)


def test_classification_is_zero_for_the_same_certainty_and_least_at_the_teacher():
    sure = torch.tensor([[100.0, 0.0, 0.0]])
    assert soft_classification(sure, sure).item() == pytest.approx(0.0, abs=1e-6)
    teacher = torch.randn(4, 3, dtype=torch.float64)
    student = teacher.clone().requires_grad_()
    soft_classification(student, teacher).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


def test_localization_matches_plain_loops():
    n, classes = 4, 3
    student, teacher = torch.randn(2, n, 4 * classes, dtype=torch.float64)
    logits = torch.randn(n, classes + 1, dtype=torch.float64)
    expected = 0.0
    for i in range(n):
        p = softmax(logits[i].tolist())
        for d in range(4):
            total = sum(p[c] * float(teacher[i, 4 * c + d] - student[i, 4 * c + d]) for c in range(classes))
            expected += abs(total) / n
    assert class_aware_localization(student, teacher, logits).item() == pytest.approx(expected, rel=1e-12)


def test_localization_closed_form():
    # Two classes have the probability 1/4, background 1/2. The deltas differ by 1 and by 3: |1/4 + 3/4| * 4 = 4.
    logits = torch.tensor([[0.0, 0.0, math.log(2.0)]])
    student, teacher = torch.zeros(1, 8), torch.tensor([[1.0] * 4 + [3.0] * 4])
    assert class_aware_localization(student, teacher, logits).item() == pytest.approx(4.0)


def test_localization_class_agnostic_is_foreground_times_difference():
    logits = torch.tensor([[0.0, 0.0, math.log(2.0)]])  # foreground 1/2
    student, teacher = torch.zeros(1, 4), torch.full((1, 4), -3.0)
    assert class_aware_localization(student, teacher, logits).item() == pytest.approx(0.5 * 3 * 4)
    # If only the student predicts deltas for every class, the teacher's deltas count for every class.
    mixed = class_aware_localization(torch.zeros(1, 8), teacher, logits)
    assert mixed.item() == pytest.approx(6.0)


def test_localization_by_given_probabilities_matches_plain_loops():
    """Sigmoid probabilities need not sum to 1."""
    student, teacher = torch.randn(2, 4, 12, dtype=torch.float64)
    probabilities = torch.rand(4, 3, dtype=torch.float64)
    expected = 0.0
    for i in range(4):
        for d in range(4):
            gaps = [float(teacher[i, 4 * c + d] - student[i, 4 * c + d]) for c in range(3)]
            expected += abs(sum(float(p) * gap for p, gap in zip(probabilities[i], gaps))) / 4
    found = probability_weighted_localization(student, teacher, probabilities)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_localization_by_given_probabilities_closed_form_and_zero():
    # Two classes have the probabilities 1 and 1/2. The class-agnostic deltas differ by 2: |2 + 1| * 4 = 12.
    probabilities, zeros = torch.tensor([[1.0, 0.5]]), torch.zeros(1, 4)
    assert probability_weighted_localization(zeros, torch.full((1, 4), 2.0), probabilities).item() == 12.0
    assert probability_weighted_localization(zeros, zeros, probabilities).item() == 0.0
    assert probability_weighted_localization(zeros, zeros + 1, torch.zeros(1, 2)).item() == 0.0


def test_localization_zero_where_equal():
    deltas = torch.randn(3, 8)
    assert class_aware_localization(deltas, deltas, torch.randn(3, 3)).item() == 0.0


def test_gradchecks():
    logits = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    student, teacher = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(class_aware_localization, (student, teacher, logits))
    probabilities = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(probability_weighted_localization, (student, teacher, probabilities))
    student_logits = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_classification, (student_logits, logits))


def test_no_regions():
    student, logits = torch.zeros(0, 8, requires_grad=True), torch.zeros(0, 3, requires_grad=True)
    loss = class_aware_localization(student, torch.zeros(0, 8), logits) + soft_classification(logits, torch.zeros(0, 3))
    loss.backward()
    assert loss.item() == 0 and student.grad is not None and logits.grad is not None
    probabilities = torch.zeros(0, 2, requires_grad=True)
    probability_weighted_localization(student, torch.zeros(0, 8), probabilities).backward()
    assert probabilities.grad is not None


def test_other_classes_are_refused():
    for loss in (CLS, REG):
        with pytest.raises(GDetKDError, match="3 classes and the teacher 80.*SGFI and CKD"):
            loss(make_cfg({}), spec(3), spec(80))


def test_other_units_are_refused():
    with pytest.raises(GDetKDError, match="BBOX_REG_WEIGHTS"):
        REG(make_cfg({}), spec(), spec(weights=(1.0, 1.0, 1.0, 1.0)))
