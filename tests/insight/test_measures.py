"""Test the numbers about levels, classes and gradients against closed forms."""

import math

import numpy as np
import pytest
import torch

from gdetkd.engine.gradients import OWN, term_gradients
from gdetkd.insight.measures import class_correlation, correlation_gap, level_matching


def test_alphas_are_averaged_by_level_and_size():
    alpha = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8], [0.0, 1.0]])
    levels = torch.tensor([0, 0, 2, 2])
    areas = torch.tensor([100.0, 32.0**2, 96.0**2 - 1, 96.0**2])
    found = level_matching(alpha, levels, areas, teacher_levels=3)
    assert found["all"]["objects"] == [2, 0, 2]
    assert found["all"]["alpha"][0] == [0.75, 0.25]
    assert found["all"]["alpha"][1] is None
    np.testing.assert_allclose(found["all"]["alpha"][2], [0.1, 0.9], rtol=1e-6)
    assert found["small"]["objects"] == [1, 0, 0] and found["small"]["alpha"][0] == [1.0, 0.0]
    assert found["medium"]["objects"] == [1, 0, 1] and found["medium"]["alpha"][0] == [0.5, 0.5]
    assert found["large"]["objects"] == [0, 0, 1] and found["large"]["alpha"][2] == [0.0, 1.0]


def test_no_object_at_all():
    found = level_matching(torch.empty(0, 4), torch.empty(0, dtype=torch.long), torch.empty(0), teacher_levels=2)
    assert found["all"] == {"alpha": [None, None], "objects": [0, 0]}
    assert class_correlation(torch.empty(0, 5), torch.empty(0, dtype=torch.long), 2).isnan().all()


def test_correlation_is_that_of_the_classes_means():
    embeddings = torch.rand(12, 7)
    classes = torch.arange(12) % 3
    means = np.stack([embeddings[classes == index].double().mean(dim=0).numpy() for index in range(3)])
    np.testing.assert_allclose(class_correlation(embeddings, classes, 3).numpy(), np.corrcoef(means), atol=1e-12)


def test_a_class_without_objects_is_unknown_and_leaves_the_others():
    embeddings, classes = torch.rand(6, 5), torch.tensor([0, 0, 2, 2, 2, 0])
    matrix = class_correlation(embeddings, classes, 3)
    assert matrix[1].isnan().all() and matrix[:, 1].isnan().all()
    assert not matrix[0, 2].isnan()


def test_gap_is_over_known_pairs_of_different_classes():
    first = torch.tensor([[1.0, 0.5, math.nan], [0.5, 1.0, 0.1], [math.nan, 0.1, 1.0]])
    second = torch.tensor([[0.0, 0.1, 0.3], [0.1, 0.0, 0.3], [0.3, 0.3, 0.0]])
    assert correlation_gap(first, second) == pytest.approx((0.4 + 0.4 + 0.2 + 0.2) / 4)
    assert correlation_gap(torch.eye(1), torch.eye(1)) is None


def test_gradients_of_terms_in_closed_form():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    unused = torch.tensor([1.0], requires_grad=True)
    x, y = weight
    losses = {"loss_a": 0.5 * x**2, "loss_b": 0.5 * y**2, "loss_distill_c": -2 * x, "loss_distill_d": y * 0}
    found = term_gradients(losses, ["loss_distill_c", "loss_distill_d"], [weight, unused], scale=1024.0)
    # The student's own gradient is (3, 4); the first term's is (-2, 0).
    assert found[OWN] == {"norm": pytest.approx(5.0), "cosine": pytest.approx(1.0)}
    assert found["loss_distill_c"] == {"norm": pytest.approx(2.0), "cosine": pytest.approx(-0.6)}
    assert found["loss_distill_d"] == {"norm": 0.0, "cosine": 0.0}
    assert weight.grad is None
    sum(losses.values()).backward()  # the graph is still there
    assert weight.grad.tolist() == [1.0, 4.0]


def test_gradients_that_half_precision_makes_infinite_are_left_out():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    losses = {"loss_a": weight.sum(), "loss_distill_c": (weight.half() * 2).float().sum()}
    assert term_gradients(losses, ["loss_distill_c"], [weight], scale=2.0**16) == {}
    found = term_gradients(losses, ["loss_distill_c"], [weight], scale=2.0**8)
    assert found["loss_distill_c"] == {"norm": pytest.approx(8**0.5), "cosine": pytest.approx(1.0)}
