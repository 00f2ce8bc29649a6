"""Predictions gathered at the sources of dense regions."""

import pytest
import torch

from gdetkd.detectors.sources import gather

SHAPES = [(12, 16), (6, 8), (3, 4)]


def random_sources(count):
    level = torch.arange(count) % len(SHAPES)
    place = torch.tensor([[int(torch.randint(0, side, ())) for side in SHAPES[index]] for index in level.tolist()])
    return torch.cat([level[:, None], place, torch.randint(0, 3, (count, 1))], dim=1)


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return [torch.randn(2, 3, 5, *shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]


def test_gather_is_a_plain_loop_over_regions(maps):
    sources, image_ids = random_sources(40), torch.randint(0, 2, (40,))
    found = gather(maps, image_ids, sources)
    places = zip(image_ids.tolist(), sources.tolist())
    expected = torch.stack([maps[level][image, anchor, :, y, x] for image, (level, y, x, anchor) in places])
    assert torch.equal(found, expected)
    weights = torch.randn_like(found)
    gradients, plain = (torch.autograd.grad((values * weights).sum(), maps) for values in (found, expected))
    for gradient, plain_gradient in zip(gradients, plain):
        torch.testing.assert_close(gradient, plain_gradient)


def test_gather_waits_for_no_number_of_regions(maps, monkeypatch):
    monkeypatch.setattr(torch, "nonzero", pytest.fail)
    assert gather(maps, torch.zeros(4, dtype=torch.long), random_sources(4)).shape == (4, 5)


def test_no_sources(maps):
    found = gather(maps, torch.zeros(0, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long))
    assert found.shape == (0, 5)
    assert all(gradient is not None for gradient in torch.autograd.grad(found.sum(), maps))


def test_values_that_are_not_finite_stay_where_they_are(maps):
    """Values of one level that are not finite do not reach the values and gradients of another level."""
    with torch.no_grad():
        maps[1].fill_(float("nan"))
    sources = random_sources(9)[0::3]  # on the first level
    found = gather(maps, torch.zeros(3, dtype=torch.long), sources)
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(found.sum(), maps))
