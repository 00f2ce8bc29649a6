"""A step on images with and without labels: one pass of the backbone, weighted losses, terms on all images."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from conftest import ALL_LOSSES, DENSE, make_batch, make_cfg
from gdetkd.data.unlabeled import DOUBTFUL, UNLABELED
from gdetkd.mixture import Mixture, joined, shared_pyramid
from gdetkd.structures import DetectorOutputs, Predictions, Regions

RETINANET = {"DISTILL.STUDENT_META_ARCHITECTURE": "RetinaNet", **DENSE}
SETS = {"DATASETS.UNLABELED": ("pseudo",)}  # the models below get their batches from the test


def mixed_batch(labeled=2, unlabeled=2, doubtful=((0.0, 0.0, 20.0, 20.0),)):
    batch = make_batch(sizes=((64, 64), (64, 48), (48, 64), (64, 64))[: labeled + unlabeled])
    for sample in batch[labeled:]:
        sample.update({UNLABELED: True, DOUBTFUL: torch.tensor(doubtful).view(-1, 4)})
    return batch


def step(model, batch, seed=3):
    torch.manual_seed(seed)
    with EventStorage():
        return model(batch)


def test_the_losses_are_the_weighted_mean_over_images():
    mixture = Mixture(0.5)
    parts = [[{}, {}, {}], [{"instances": [1, 2, 3]}]]
    losses = [{"a": torch.tensor(1.0), "b": torch.tensor([4.0])}, {"a": torch.tensor(2.0), "b": torch.tensor([8.0])}]
    found = mixture.join(parts, losses)
    assert float(found["a"]) == (3 * 1 + 1 * 2 * 0.5) / 4 and float(found["b"]) == (3 * 4 + 8 * 0.5) / 4
    scalars = {name: float(value) for name, value in mixture.take_scalars().items()}
    assert scalars == {"labeled/a": 1, "labeled/b": 4, "unlabeled/a": 2, "unlabeled/b": 8, "unlabeled/boxes": 3}
    assert mixture.take_scalars() == {}


@pytest.mark.parametrize("family", ["RetinaNet", "FCOS"])
def test_the_images_of_a_dense_student_count_alike(distill_cfg, family):
    """Its losses are sums over positives, divided by a running mean of their number, which both parts update."""
    keys = {**RETINANET, "DISTILL.STUDENT_META_ARCHITECTURE": family, "MODEL.RESNETS.NORM": "FrozenBN"}
    model = build_model(distill_cfg({**keys, "DISTILL.LOSSES": (), **SETS})).train()
    [sample] = make_batch(sizes=((64, 64),))
    batch = [sample, sample, sample, {**sample, UNLABELED: True, DOUBTFUL: torch.zeros(0, 4)}]
    for _ in range(60):  # until the running mean has settled
        mixed = step(model, batch)
    alone = build_model(distill_cfg({**keys, "DISTILL.LOSSES": ()})).train()
    alone.load_state_dict(model.state_dict(), strict=False)
    for _ in range(60):
        joint = step(alone, batch)
    for name, loss in joint.items():
        assert torch.allclose(mixed[name], loss, rtol=0.02), name
    scalars = model.mixture.take_scalars()
    name = next(iter(joint))
    assert 2.8 < float(scalars[f"labeled/{name}"] / scalars[f"unlabeled/{name}"]) < 3.3


def test_the_backbone_runs_once_on_the_whole_batch(distill_cfg):
    student = build_model(make_cfg({})).train()
    parts, calls = [make_batch(), make_batch(sizes=((48, 80),), seed=1)], []
    norms = [module for module in student.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    student.backbone.bottom_up.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape))
    with shared_pyramid(student, parts) as pyramid:
        shares = [student.backbone(torch.zeros(1)) for _ in parts]
    assert calls == [(3, 3, 64, 96)] and all(int(norm.num_batches_tracked) == 1 for norm in norms)
    for name, level in pyramid.items():
        assert torch.equal(torch.cat([share[name] for share in shares]), level)
    assert student.backbone(torch.rand(1, 3, 64, 64))["p2"].shape[0] == 1  # the backbone is itself again


def test_with_weight_zero_the_unlabeled_images_do_not_count(distill_cfg):
    """A RetinaNet without BatchNorm draws no random numbers, so its losses on the labelled images can be compared."""
    keys = {**RETINANET, "MODEL.RESNETS.NORM": "FrozenBN", "DISTILL.LOSSES": ()}
    models = []
    for changes in ({**SETS, "DISTILL.UNLABELED.WEIGHT": 0.0}, {}):
        torch.manual_seed(0)
        models.append(build_model(distill_cfg({**keys, **changes})).train())
    batch = mixed_batch(labeled=3, unlabeled=1)
    mixed, labeled = step(models[0], batch), step(models[1], batch[:3])
    # The first normaliser is the mean of 100 and the positives. The second part of a mixed step changes it only later.
    for name, loss in labeled.items():
        assert torch.allclose(mixed[name], loss / 2, rtol=1e-4)


def test_terms_on_maps_see_all_images(distill_cfg, monkeypatch):
    keys = {"DISTILL.LOSSES": ("FITNET",), "MODEL.RESNETS.NORM": "FrozenBN"}
    found = []
    for changes in (SETS, {}):
        torch.manual_seed(0)
        model = build_model(distill_cfg({**keys, **changes})).train()
        batch = mixed_batch() if changes else [{**sample, UNLABELED: False} for sample in mixed_batch()]
        found.append(step(model, batch)["loss_distill_fitnet"])
    assert torch.allclose(found[0], found[1], rtol=1e-5) and found[0] > 0


@pytest.mark.parametrize(
    "pair", ["faster_rcnn-faster_rcnn", "cascade_rcnn-cascade_rcnn", "faster_rcnn-retinanet", "faster_rcnn-fcos"]
)
def test_every_family_takes_a_mixed_step(pair_cfg, pair):
    losses = ALL_LOSSES if len(set(pair.split("-"))) == 1 else ("SGFI", "CKD")
    model = build_model(pair_cfg(pair, {**SETS, "DISTILL.LOSSES": losses})).train()
    losses = step(model, mixed_batch())
    assert all(torch.isfinite(loss).all() for loss in losses.values())
    sum(loss.sum() for loss in losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_step_of_unlabeled_images_alone_ignores_doubtful_boxes_too(distill_cfg):
    model = build_model(distill_cfg(SETS)).train()
    sure = step(model, mixed_batch(labeled=0, unlabeled=2, doubtful=()))
    torch.manual_seed(0)
    doubt = step(model, mixed_batch(labeled=0, unlabeled=2, doubtful=((0.0, 0.0, 64.0, 64.0),)))
    assert float(doubt["loss_rpn_cls"]) != float(sure["loss_rpn_cls"])


def outputs_of(images, first):
    boxes = [torch.full((image + 1, 4), float(first + image)) for image in range(images)]
    regions, count = (
        Regions([type("B", (), {"tensor": box, "__len__": lambda self: len(self.tensor)})() for box in boxes]),
        sum(map(len, boxes)),
    )
    later = [Predictions(regions, torch.full((count, 2), 5.0 + first), torch.full((count, 4), 6.0 + first))]
    towers = ([[torch.full((images, 1), 7.0 + first)]], [[torch.full((images, 1), 8.0 + first)]])
    return DetectorOutputs(
        {"p3": torch.full((images, 1), float(first))},
        {"p3": 8},
        regions,
        pooled=torch.full((count, 1), 1.0 + first),
        embeddings=torch.full((count, 1), 2.0 + first),
        logits=torch.full((count, 1), 3.0 + first),
        deltas=None,
        later_stages=later,
        gt_boxes=list(range(images)),
        towers=towers,
    )


def test_outputs_are_joined_in_order():
    pyramid = {"p2": torch.zeros(3, 1), "p3": torch.ones(3, 1)}
    found = joined([outputs_of(2, 0), outputs_of(1, 10)], pyramid)
    assert found.pyramid == {"p3": pyramid["p3"]} and found.strides == {"p3": 8} and found.deltas is None
    assert found.regions.tensor()[:, 0].tolist() == [0, 1, 1, 10] and found.gt_boxes == [0, 1, 0]
    for name, base in (("pooled", 1), ("embeddings", 2), ("logits", 3)):
        assert getattr(found, name)[:, 0].tolist() == [base] * 3 + [base + 10]
    [later] = found.later_stages
    assert later.logits[:, 0].tolist() == [5] * 3 + [15] and later.deltas[:, 0].tolist() == [6] * 3 + [16]
    assert [tower[0][0][:, 0].tolist() for tower in found.towers] == [[7, 7, 17], [8, 8, 18]]
