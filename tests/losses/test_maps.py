"""Losses on whole maps, and their shared parts."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from conftest import make_cfg
from gdetkd.errors import GDetKDError
from gdetkd.losses import FITNET, channel_wise_distillation, pearson_imitation, whole_map_imitation
from gdetkd.losses.maps import covered_cells, match_levels
from gdetkd.losses.pkd import standardize
from gdetkd.structures import DetectorOutputs, DetectorSpec

LOSSES = [whole_map_imitation, channel_wise_distillation, pearson_imitation]


def spec(**strides):
    return DetectorSpec(4, strides, (7, 7), 6, 3, None)


def random_maps(*shape):
    return torch.randn(2, *shape, dtype=torch.float64)


def test_levels_are_matched_by_stride_not_by_name(caplog):
    levels = match_levels("PKD", spec(p3=8, p4=16, p5=32), spec(a=4, b=8, c=16))
    assert levels == ((8, "p3", "b"), (16, "p4", "c"))
    assert "PKD leaves out" in caplog.text and "p5 (1/32) of the student, a (1/4) of the teacher" in caplog.text


def test_equal_pyramids_need_no_warning(caplog):
    match_levels("PKD", spec(p3=8), spec(c=8))
    assert not caplog.text


def test_no_common_stride():
    with pytest.raises(GDetKDError, match="PKD.*p3 1/8.*p2 1/4.*DISTILL.LOSSES"):
        match_levels("PKD", spec(p3=8), spec(p2=4))


def test_covered_cells():
    # 3 x 4 cells of 8 pixels: a box from x 7 to 17 reaches into columns 0 to 2, one from y 8 to 16 into row 1.
    boxes = torch.tensor([[7.0, 8.0, 17.0, 16.0], [9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 99.0, 99.0]])
    rows, columns = covered_cells(boxes, 8, (3, 4))
    assert rows.tolist() == [[False, True, False], [False, True, False], [True, True, True]]
    assert columns[0].tolist() == [True, True, True, False]
    assert columns[1].tolist() == [False, True, False, False]  # a box without area still is somewhere
    outside, _ = covered_cells(torch.tensor([[90.0, 90.0, 95.0, 95.0]]), 8, (3, 4))
    assert outside[0].tolist() == [False, False, True]
    assert covered_cells(torch.zeros(0, 4), 8, (3, 4))[0].shape == (0, 3)


def test_of_maps_with_other_padding_the_common_part_is_compared():
    """An image lies in the left upper corner. The padding lies right of it and below it."""
    loss = FITNET(make_cfg({}), spec(p2=4), spec(p2=4))
    student_map, teacher_map = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 5, 9)
    outputs = [DetectorOutputs({"p2": maps}, {"p2": 4}) for maps in (student_map, teacher_map)]
    ((student, teacher),) = loss.maps(*outputs)
    assert torch.equal(teacher, teacher_map[..., :5, :8])
    assert torch.equal(student, loss.adapters[0](student_map[..., :5, :8]))


def whole_map_loop(student, teacher):
    pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist()))
    return sum((a - b) ** 2 for a, b in pairs) / len(pairs)


def channel_wise_loop(student, teacher, temperature=1.0):
    images, channels = student.shape[:2]
    total = 0.0
    rows = zip(student.reshape(-1, student[0, 0].numel()), teacher.reshape(-1, student[0, 0].numel()))
    for student_row, teacher_row in rows:
        s = [math.exp(v / temperature) for v in student_row.tolist()]
        t = [math.exp(v / temperature) for v in teacher_row.tolist()]
        total += sum(p / sum(t) * math.log((p / sum(t)) / (q / sum(s))) for p, q in zip(t, s))
    return temperature**2 * total / (images * channels)


def pearson_loop(student, teacher):
    total = 0.0
    for channel in range(student.shape[1]):
        a, b = (maps[:, channel].flatten().tolist() for maps in (student, teacher))
        ma, mb = sum(a) / len(a), sum(b) / len(b)
        covariance = sum((x - ma) * (y - mb) for x, y in zip(a, b))
        norms = math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))
        total += 1 - covariance / norms
    return total / student.shape[1]


@pytest.mark.parametrize("loss,loop", zip(LOSSES, (whole_map_loop, channel_wise_loop, pearson_loop)))
def test_matches_plain_loops(loss, loop):
    student, teacher = random_maps(2, 3, 4, 5)
    assert loss(student, teacher).item() == pytest.approx(loop(student, teacher), rel=1e-10)


def test_temperature_matches_plain_loops():
    student, teacher = random_maps(2, 3, 4, 5)
    loss = channel_wise_distillation(student, teacher, temperature=2.5)
    assert loss.item() == pytest.approx(channel_wise_loop(student, teacher, 2.5), rel=1e-10)


def test_closed_forms():
    ones = torch.ones(1, 2, 2, 2)
    assert whole_map_imitation(3 * ones, ones).item() == 4.0
    # There are two locations. The teacher's distribution is 1/2, 1/2 and the student's is 3/4, 1/4.
    student = torch.tensor([math.log(3.0), 0.0]).view(1, 1, 1, 2)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert channel_wise_distillation(student, torch.zeros(1, 1, 1, 2)).item() == pytest.approx(expected)
    # Opposite maps have r = -1, orthogonal ones r = 0.
    line = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 2, 2)
    assert pearson_imitation(line, -line).item() == pytest.approx(2.0)
    assert pearson_imitation(line, torch.tensor([1.0, 1.0, -1.0, -1.0]).view(1, 1, 2, 2)).item() == pytest.approx(1.0)


def test_zero_where_equal():
    (maps,) = random_maps(2, 3, 4, 5)[:1]
    for loss in LOSSES:
        assert loss(maps, maps).item() == pytest.approx(0.0, abs=1e-12)


def test_pkd_ignores_scale_and_offset_of_a_channel_and_cwd_ignores_the_offset():
    student, teacher = random_maps(2, 3, 4, 5)
    scale, offset = torch.rand(1, 3, 1, 1, dtype=torch.float64) + 0.5, torch.randn(1, 3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(
        pearson_imitation(scale * student + offset, teacher), pearson_imitation(student, teacher)
    )
    cwd = channel_wise_distillation
    torch.testing.assert_close(cwd(student + offset, teacher), cwd(student, teacher))
    assert not torch.isclose(cwd(scale * student, teacher), cwd(student, teacher))


def test_gradcheck():
    student, teacher = random_maps(2, 2, 3, 3)
    student.requires_grad_()
    for loss in LOSSES:
        assert gradcheck(lambda s: loss(s, teacher), student)


def test_nothing_gives_zero_with_a_gradient_path():
    for loss in LOSSES:
        student = torch.zeros(0, 3, 4, 5, requires_grad=True)
        value = loss(student, torch.zeros(0, 3, 4, 5))
        value.backward()
        assert value.item() == 0 and student.grad is not None


def test_a_constant_channel_has_a_finite_gradient():
    student = torch.zeros(2, 3, 4, 5, requires_grad=True)
    pearson_imitation(student, torch.randn(2, 3, 4, 5)).backward()
    assert torch.isfinite(student.grad).all() and student.grad.abs().max() < 1
    assert standardize(torch.full((1, 1, 2, 2), 7.0)).abs().max() == 0
