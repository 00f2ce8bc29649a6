import math

import pytest
import torch
from detectron2.structures import Boxes

from conftest import LargeTensors, make_cfg
from gdetkd.losses import CKD, contrastive_distillation
from gdetkd.losses.ckd import EmbeddingQueue
from gdetkd.structures import DetectorOutputs, DetectorSpec, Regions

SPEC = DetectorSpec(4, {"p2": 4, "p3": 8}, (7, 7), 6, 3, (10.0, 10.0, 5.0, 5.0))


def random_inputs(n=5, dim=4):
    corner = torch.rand(n, 2, dtype=torch.float64) * 20
    boxes = torch.cat([corner, corner + 5 + torch.rand(n, 2, dtype=torch.float64) * 20], dim=1)
    student, teacher = torch.randn(2, n, dim, dtype=torch.float64)
    return student, teacher, boxes, torch.tensor([0, 0, 0, 1, 1][:n])


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    return width * height / (area(a) + area(b) - width * height)


def plain_loops(student, teacher, boxes, image_ids, queue, gamma, threshold):
    """The equation, region by region."""

    def g(a, b):
        dot = sum(x * y for x, y in zip(a, b))
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        return math.exp(dot / norms / gamma)

    student, teacher, boxes = student.tolist(), teacher.tolist(), boxes.tolist()
    queue = [] if queue is None else queue.tolist()
    total = 0.0
    for i, anchor in enumerate(student):
        positive = g(anchor, teacher[i])
        negative = sum(g(anchor, other) for other in queue)
        for j, other in enumerate(teacher):
            overlaps = image_ids[i] == image_ids[j] and iou(boxes[i], boxes[j]) > threshold
            if j != i and not overlaps:
                negative += g(anchor, other)
        total -= math.log(positive / (positive + negative))
    return total / len(student)


@pytest.mark.parametrize("queue_size", [0, 7, None])
@pytest.mark.parametrize("threshold", [0.05, 0.5])
def test_matches_plain_loops(queue_size, threshold):
    inputs = random_inputs()
    queue = None if queue_size is None else torch.randn(queue_size, 4, dtype=torch.float64)
    loss = contrastive_distillation(*inputs, queue, gamma=0.3, iou_threshold=threshold)
    assert loss.item() == pytest.approx(plain_loops(*inputs, queue, 0.3, threshold), rel=1e-9)


def test_the_iou_filter_matters_here():
    """The parametrised thresholds above do leave different regions out."""
    inputs = random_inputs()
    losses = {contrastive_distillation(*inputs, iou_threshold=t).item() for t in (0.05, 1.0)}
    assert len(losses) == 2


def test_closed_form():
    # Orthogonal unit vectors at gamma = 1: g(positive) = e, g(the one negative) = 1, so the loss is log((e + 1) / e).
    vectors, apart = torch.eye(2), torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6]])
    loss = contrastive_distillation(vectors, vectors, apart, torch.tensor([0, 0]), gamma=1.0)
    assert loss.item() == pytest.approx(math.log((math.e + 1) / math.e), rel=1e-6)


def test_length_does_not_matter():
    student, teacher, boxes, ids = random_inputs()
    loss = contrastive_distillation(student, teacher, boxes, ids)
    scaled = contrastive_distillation(3 * student, 0.1 * teacher, boxes, ids)
    torch.testing.assert_close(loss, scaled)


def test_overlapping_regions_of_one_image_are_no_negatives_but_those_of_two_images_are():
    vectors, same = torch.eye(2), torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9]])
    assert contrastive_distillation(vectors, vectors, same, torch.tensor([0, 0])).item() == 0.0
    assert contrastive_distillation(vectors, vectors, same, torch.tensor([0, 1]), gamma=1.0).item() > 0.3


def test_zero_with_one_region_and_never_negative():
    student, teacher, boxes, ids = random_inputs(1)
    assert contrastive_distillation(student, teacher, boxes, ids).item() == pytest.approx(0.0, abs=1e-12)
    for seed in range(10):
        torch.manual_seed(seed)
        assert contrastive_distillation(*random_inputs()).item() >= 0


def test_gradcheck():
    student, teacher, boxes, ids = random_inputs()
    queue = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    function = lambda s, t, q: contrastive_distillation(s, t, boxes, ids, q, gamma=0.5)  # noqa: E731
    assert torch.autograd.gradcheck(function, (student.requires_grad_(), teacher.requires_grad_(), queue))


def test_gradients_can_be_asked_for_twice():
    student, teacher, boxes, ids = random_inputs()
    student.requires_grad_()
    loss = contrastive_distillation(student, teacher, boxes, ids)
    first, second = (torch.autograd.grad(3 * loss, student, retain_graph=True)[0] for _ in range(2))
    assert first.abs().sum() > 0 and torch.equal(first, second)


def test_what_grows_with_regions_times_negatives_is_made_once():
    count, negatives, dim = 8, 100, 4
    student, teacher, queue = (torch.randn(n, dim, requires_grad=True) for n in (count, count, negatives))
    boxes = torch.arange(count)[:, None] * 10.0 + torch.tensor([0.0, 0, 5, 5])
    with LargeTensors(count * (count + negatives)) as large:
        loss = contrastive_distillation(student, teacher, boxes, torch.zeros(count, dtype=torch.long), queue)
        loss.backward()
    assert len(large.storages) == 1 and queue.grad.abs().sum() > 0


def test_no_regions():
    student, teacher = torch.zeros(2, 0, 4).requires_grad_().unbind()
    student, teacher = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    loss = contrastive_distillation(student, teacher, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and student.grad is not None


def test_box_without_area_is_finite():
    vectors, flat = torch.eye(2), torch.tensor([[3.0, 3, 3, 3], [3, 3, 3, 9]])
    assert torch.isfinite(contrastive_distillation(vectors, vectors, flat, torch.tensor([0, 0])))


def outputs(n):
    student, teacher = (DetectorOutputs({}, {}, Regions([Boxes(torch.rand(n, 4))])) for _ in range(2))
    student.embeddings = torch.randn(n, 6, requires_grad=True)
    teacher.embeddings = torch.randn(n, 6)
    return student, teacher


def make_module(queue_size=10):
    return CKD(make_cfg({"DISTILL.CKD.QUEUE_SIZE": queue_size}), SPEC, SPEC)


def test_module_uses_the_queue_of_past_steps_and_stays_differentiable():
    module = make_module()
    first, second = outputs(4), outputs(4)
    alone = module(*second)
    module = make_module()
    module.load_state_dict({**module.state_dict()})
    module(*first).backward()
    loss = module(*second)
    loss.backward()
    assert loss != alone
    torch.testing.assert_close(module.queue.contents(), torch.cat([first[1].embeddings, second[1].embeddings]))


def test_module_without_regions_gives_every_parameter_a_gradient():
    module = make_module()
    module(*outputs(3)).backward()
    module.zero_grad(set_to_none=True)
    loss = module(*outputs(0))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None for p in module.parameters())


def test_queue_overwrites_the_oldest():
    queue = EmbeddingQueue(size=5, dim=1)
    for start in (0, 3, 6):
        queue.push(torch.arange(start, start + 3.0)[:, None])
        queue.contents()
    assert sorted(queue.contents()[:, 0].tolist()) == [4, 5, 6, 7, 8]
    queue.push(torch.arange(20.0)[:, None])
    assert sorted(queue.contents()[:, 0].tolist()) == [15, 16, 17, 18, 19]


def test_queue_is_saved_with_what_was_just_pushed():
    queue, other = EmbeddingQueue(4, 2), EmbeddingQueue(4, 2)
    queue.push(torch.ones(3, 2))
    other.push(torch.zeros(1, 2))  # what loading must forget
    other.load_state_dict(queue.state_dict())
    assert other.contents().shape == (3, 2) and other.contents().eq(1).all()


def test_a_queue_of_length_zero_keeps_nothing():
    module = make_module(queue_size=0)
    for _ in range(2):
        module(*outputs(3)).backward()
    assert module.queue.contents().shape == (0, 6)


def test_what_is_not_finite_never_enters_the_queue():
    queue, nan = EmbeddingQueue(4, 2), float("nan")
    queue.push(torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]))
    queue.settle()
    queue.push(torch.tensor([[nan, 5.0], [6.0, 6.0], [7.0, float("inf")]]))
    assert queue.contents().tolist() == [[1.0, 1.0], [6.0, 6.0], [3.0, 3.0], [4.0, 4.0]]
    queue.push(torch.ones(4, 2))
    queue.drop_pending()
    assert queue.contents().tolist() == [[1.0, 1.0], [6.0, 6.0], [3.0, 3.0], [4.0, 4.0]]
