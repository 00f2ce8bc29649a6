"""The contrastive loss against plain loops, its module, and the queue of teacher embeddings."""

import dataclasses
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.structures import Boxes

from conftest import LargeTensors, make_cfg
from gdetkd import add_gdetkd_config
from gdetkd.errors import GDetKDError
from gdetkd.losses import CKD, contrastive_distillation
from gdetkd.losses.ckd import queue_length
from gdetkd.losses.embedding_queue import EmbeddingQueue
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
    """Compute the equation region by region."""

    def g(a, b):
        dot = sum(x * y for x, y in zip(a, b))
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        return math.exp(dot / norms / gamma)

    student, teacher, boxes = student.tolist(), teacher.tolist(), boxes.tolist()
    queue = [] if queue is None else queue.tolist()
    total = 0.0
    for i, anchor in enumerate(student):
        positive = g(anchor, teacher[i])
        negatives = sum(g(anchor, embedding) for embedding in queue)
        for j, embedding in enumerate(teacher):
            overlaps = image_ids[i] == image_ids[j] and iou(boxes[i], boxes[j]) > threshold
            if j != i and not overlaps:
                negatives += g(anchor, embedding)
        total -= math.log(positive / (positive + negatives))
    return total / len(student)


@pytest.mark.parametrize("queue_size", [0, 7, None])
@pytest.mark.parametrize("threshold", [0.05, 0.5])
def test_matches_plain_loops(queue_size, threshold):
    inputs = random_inputs()
    queue = None if queue_size is None else torch.randn(queue_size, 4, dtype=torch.float64)
    loss = contrastive_distillation(*inputs, queue, gamma=0.3, iou_threshold=threshold)
    assert loss.item() == pytest.approx(plain_loops(*inputs, queue, 0.3, threshold), rel=1e-9)


def test_the_iou_filter_matters_here():
    """Show that the thresholds above leave out different regions."""
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


def test_regions_at_the_iou_threshold_are_negatives_still():
    vectors, half = torch.eye(2), torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2]])  # IoU 0.5
    loss = contrastive_distillation(vectors, vectors, half, torch.tensor([0, 0]), gamma=1.0)
    assert loss.item() == pytest.approx(math.log((math.e + 1) / math.e), rel=1e-6)


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
    second[0].regions.boxes[0].tensor[:] = torch.arange(4)[:, None] * 10.0 + torch.tensor([0.0, 0, 5, 5])
    module(*first).backward()
    with torch.no_grad():
        student, teacher = module.projection(module.adapter(second[0].embeddings)), second[1].embeddings
        compared = [student, module.projection(teacher), second[0].regions.tensor(), torch.zeros(4)]
        queue = module.projection(first[1].embeddings)
    loss = module(*second)
    loss.backward()
    assert loss.item() == pytest.approx(plain_loops(*compared, queue, module.gamma, module.iou_threshold), rel=1e-4)
    torch.testing.assert_close(module.queue.contents(), torch.cat([first[1].embeddings, second[1].embeddings]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_takes_gamma_and_threshold_from_the_config_and_computes_in_float32(dtype):
    changes = {"DISTILL.CKD.GAMMA": 0.5, "DISTILL.CKD.IOU_THRESHOLD": 0.1, "DISTILL.CKD.QUEUE_SIZE": 0}
    module = CKD(make_cfg(changes), SPEC, SPEC)
    student, teacher = outputs(4)
    # The first two boxes overlap by IoU 1/3, more than the threshold. They are not negatives of each other.
    student.regions.boxes[0].tensor[:] = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [50, 0, 54, 4], [70, 0, 74, 4]])
    student.embeddings, teacher.embeddings = student.embeddings.to(dtype), teacher.embeddings.to(dtype)
    with torch.no_grad():
        compared_student = module.projection(module.adapter(student.embeddings.float()))
        compared_teacher = module.projection(teacher.embeddings.float())
    boxes, images = student.regions.tensor(), torch.zeros(4)
    expected = plain_loops(compared_student, compared_teacher, boxes, images, None, 0.5, 0.1)
    assert module(student, teacher).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("gamma", [0.0, -0.07])
def test_a_temperature_that_is_not_positive_is_refused(gamma):
    with pytest.raises(GDetKDError, match=f"DISTILL.CKD.GAMMA is {gamma}.*must be positive"):
        CKD(make_cfg({"DISTILL.CKD.GAMMA": gamma}), SPEC, SPEC)


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
    queue, restored = EmbeddingQueue(4, 2), EmbeddingQueue(4, 2)
    queue.push(torch.ones(3, 2))
    restored.push(torch.zeros(1, 2))  # loading must forget this
    restored.load_state_dict(queue.state_dict())
    assert restored.contents().shape == (3, 2) and restored.contents().eq(1).all()


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


def length(changes, regions_per_image=64):
    spec = dataclasses.replace(SPEC, regions_per_image=regions_per_image)
    return len(CKD(make_cfg(changes), spec, SPEC).queue.embeddings)


FROM_STEPS = {"DISTILL.CKD.QUEUE_SIZE": -1, "SOLVER.IMS_PER_BATCH": 4}


def test_the_queue_holds_what_so_many_steps_of_all_processes_gather():
    assert length(FROM_STEPS) == 10 * 4 * 64  # the default of QUEUE_STEPS
    assert length({**FROM_STEPS, "DISTILL.CKD.QUEUE_STEPS": 3}) == 3 * 4 * 64
    assert length({**FROM_STEPS, "DISTILL.CKD.QUEUE_STEPS": 0}) == 0
    assert length({**FROM_STEPS, "DISTILL.CKD.QUEUE_SIZE": 100}) == 100
    assert length({**FROM_STEPS, "DISTILL.CKD.QUEUE_SIZE": 0}) == 0


def test_by_default_the_queue_follows_from_the_steps():
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    cfg.SOLVER.IMS_PER_BATCH = 16  # the public configuration: 8 GPUs of 2 images, 512 regions each
    spec = dataclasses.replace(SPEC, regions_per_image=512)
    assert queue_length(cfg, spec) == 81920


@pytest.mark.parametrize("key, value", [("QUEUE_SIZE", -2), ("QUEUE_STEPS", -1)])
def test_a_negative_length_is_refused_by_name(key, value):
    with pytest.raises(GDetKDError, match=f"DISTILL.CKD.{key} is {value}.*0 for no queue"):
        length({**FROM_STEPS, f"DISTILL.CKD.{key}": value})


def test_a_length_that_nothing_tells_is_refused():
    with pytest.raises(GDetKDError, match="regions_per_image.*DISTILL.CKD.QUEUE_SIZE"):
        length(FROM_STEPS, regions_per_image=None)
    assert length({"DISTILL.CKD.QUEUE_SIZE": 5}, regions_per_image=None) == 5


@pytest.mark.parametrize("pushed", [0, 3, 5, 7])
@pytest.mark.parametrize("size", [0, 2, 5, 8])
def test_a_queue_of_another_length_takes_over_the_newest(pushed, size):
    queue, restored = EmbeddingQueue(5, 1), EmbeddingQueue(size, 1)
    for value in range(pushed):
        queue.push(torch.tensor([[float(value)]]))
        queue.settle()
    restored.load_state_dict(queue.state_dict())
    kept = min(pushed, 5, size)
    assert sorted(restored.contents()[:, 0].tolist()) == list(range(pushed - kept, pushed))
    for value in range(pushed, pushed + size):  # the oldest is overwritten first
        restored.push(torch.tensor([[float(value)]]))
        expected = list(range(max(pushed - kept, value + 1 - size), value + 1))
        assert sorted(restored.contents()[:, 0].tolist()) == expected


def test_a_step_makes_no_copy_of_the_queue():
    module = make_module(queue_size=1000)
    module.queue.push(torch.randn(1000, 6))
    module.queue.settle()
    student, teacher = outputs(4)
    with LargeTensors(1000 * 6) as large:
        module(student, teacher).backward()
    queue = module.queue.embeddings.untyped_storage().data_ptr()
    # (N, N + K) has 4 x 1,004 numbers, the projected queue 1,000 x 8.
    assert [storage for storage in large.storages if storage == queue]
    as_large_as_the_queue = [storage for storage in large.storages.values() if storage.nbytes() == 1000 * 6 * 4]
    assert [storage.data_ptr() for storage in as_large_as_the_queue] == [queue]
