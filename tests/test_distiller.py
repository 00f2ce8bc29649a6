"""The main promises of GDetKD: an untouched teacher, a plain student, and a gradient for every parameter."""

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from conftest import ALL_LOSSES, WIDER, make_batch, make_cfg
from gdetkd import GDetKD
from gdetkd.config import plain_config


def one_step(model, batch, optimizer=None):
    with EventStorage():
        losses = model(batch)
    model.zero_grad()
    sum(losses.values()).backward()
    if optimizer is not None:
        optimizer.step()
    return losses


def test_terms_stand_beside_the_students_own_losses(distill_cfg):
    model = build_model(distill_cfg()).train()
    losses = one_step(model, make_batch())
    assert {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"} < set(losses)
    assert {f"loss_distill_{name.lower()}" for name in ALL_LOSSES} < set(losses)
    assert len(losses) == 8 and all(torch.isfinite(loss) for loss in losses.values())


def test_each_loss_can_stand_alone(distill_cfg):
    for name in ALL_LOSSES:
        losses = one_step(build_model(distill_cfg({"DISTILL.LOSSES": (name,)})).train(), make_batch())
        assert [key for key in losses if "distill" in key] == [f"loss_distill_{name.lower()}"]


def test_teacher_is_bit_identical_after_steps_and_train(distill_cfg):
    model = build_model(distill_cfg()).train()
    # Training runs a copy of the backbone, without norms of its own.
    parts = {"detector": model.teacher.model, "copy": model.teacher.adapter.backbone}
    before = {part: {n: x.clone() for n, x in module.state_dict().items()} for part, module in parts.items()}
    # The optimizer gets every parameter of the model. The teacher's parameters must not be among them.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, weight_decay=0.1)
    for seed in range(3):
        one_step(model.train(), make_batch(seed=seed), optimizer)
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for part, module in parts.items():
        after = module.state_dict()
        assert after and all(torch.equal(tensor, after[name]) for name, tensor in before[part].items()), part
        assert not any(layer.training for layer in module.modules()), part
        assert not any(parameter.requires_grad for parameter in module.parameters()), part
        assert not any(id(tensor) in own for tensor in (*module.parameters(), *module.buffers())), part


def test_students_initialisation_and_draws_are_those_of_plain_training(distill_cfg):
    cfg = distill_cfg()
    torch.manual_seed(5)
    plain = build_model(plain_config(cfg)).train()
    plain_losses = one_step(plain, make_batch())
    plain_draw = torch.rand(1)
    torch.manual_seed(5)
    model = build_model(cfg).train()
    for name, tensor in plain.state_dict().items():
        if "num_batches" not in name and "running" not in name:
            assert torch.equal(tensor, model.student.state_dict()[name]), name
    losses = one_step(model, make_batch())
    for name, loss in plain_losses.items():
        assert torch.equal(loss, losses[name]), name
    assert torch.equal(plain_draw, torch.rand(1))


def test_every_parameter_has_a_gradient_without_ground_truth(distill_cfg):
    model = build_model(distill_cfg()).train()
    one_step(model, make_batch(boxes_each=0))
    lacking = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not lacking


def test_every_distillation_parameter_has_a_gradient_without_regions(distill_cfg):
    model = build_model(distill_cfg()).train()
    model.student.proposal_generator.post_nms_topk = {True: 0, False: 0}
    losses = one_step(model, make_batch(boxes_each=0))
    assert all(losses[key] == 0 for key in losses if "distill" in key)
    assert not [name for name, p in model.losses.named_parameters() if p.grad is None or p.grad.abs().sum() != 0]


def test_evaluation_is_the_plain_students(distill_cfg):
    cfg = distill_cfg()
    model = build_model(cfg).eval()
    plain = build_model(plain_config(cfg)).eval()
    plain.load_state_dict(model.student.state_dict())
    with torch.no_grad():
        found, expected = model(make_batch()), plain(make_batch())
    for output, plain_output in zip(found, expected):
        assert torch.equal(output["instances"].pred_boxes.tensor, plain_output["instances"].pred_boxes.tensor)
        assert torch.equal(output["instances"].scores, plain_output["instances"].scores)


def test_the_teachers_backbone_starts_before_the_student_on_the_same_copy_of_the_batch(distill_cfg, monkeypatch):
    model, batch = build_model(distill_cfg()).train(), make_batch()
    seen = []
    extract, forward = model.teacher.extract, model.student.forward
    monkeypatch.setattr(
        model.teacher, "extract", lambda inputs, *more: seen.append(("teacher", inputs)) or extract(inputs, *more)
    )
    monkeypatch.setattr(model.student, "forward", lambda inputs: seen.append(("student", inputs)) or forward(inputs))
    before = [(dict(inputs), inputs["instances"].get_fields().copy()) for inputs in batch]
    one_step(model, batch)
    assert [who for who, _ in seen] == ["teacher", "student"]
    assert all(inputs is same for inputs, same in zip(seen[0][1], seen[1][1], strict=True))
    after = [(inputs, inputs["instances"].get_fields()) for inputs in batch]
    assert all(a[name] is b[name] for pair in zip(before, after) for b, a in zip(*pair) for name in b)
    # Detectron2 draws the labels with NumPy (VIS_PERIOD), so they must not lie on a GPU.
    assert all(a["instances"] is b["instances"] for a, b in zip(seen[1][1], batch))


def test_no_hook_is_left_behind(distill_cfg):
    model = build_model(distill_cfg()).train()
    one_step(model, make_batch())
    assert not any(module._forward_hooks for module in model.modules())


def test_without_losses_there_is_no_teacher(tmp_path):
    model = GDetKD(make_cfg({"MODEL.META_ARCHITECTURE": "GDetKD"}))
    assert model.teacher is None and len(list(model.losses.parameters())) == 0


def test_a_teacher_of_other_pixels_sees_its_own(distill_cfg):
    """The student reads BGR scaled by 1. The teacher reads RGB with another mean and std."""
    other = {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0], "MODEL.PIXEL_STD": [4.0, 5.0, 6.0]}
    model = build_model(distill_cfg(teacher={**WIDER, **other}))
    image = torch.arange(3 * 32 * 32, dtype=torch.float32).view(3, 32, 32) % 251
    seen = model.teacher.preprocess([{"image": image}]).tensor[0, :, :32, :32]
    blue, green, red = image
    expected = torch.stack([(red - 1) / 4, (green - 2) / 5, (blue - 3) / 6])
    torch.testing.assert_close(seen, expected)


def test_widths_class_agnostic_boxes_and_masks(distill_cfg):
    """Teacher and student differ in FPN width and masks, or have class-agnostic regression."""
    agnostic = {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
    cfg = distill_cfg({"MODEL.FPN.OUT_CHANNELS": 12, **agnostic}, teacher={**WIDER, "MODEL.MASK_ON": True, **agnostic})
    losses = one_step(build_model(cfg).train(), make_batch())
    assert all(torch.isfinite(loss) for loss in losses.values())
    cfg = distill_cfg(agnostic)  # the teacher has deltas for every class
    assert torch.isfinite(one_step(build_model(cfg).train(), make_batch())["loss_distill_reg"])


def test_unusual_batches(distill_cfg):
    """Boxes touch the border, there is a single region, or images differ in size."""
    model = build_model(distill_cfg({"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1})).train()
    batch = make_batch(sizes=((96, 33),), boxes_each=1)
    batch[0]["instances"].gt_boxes.tensor[:] = torch.tensor([0.0, 0.0, 33.0, 96.0])
    losses = one_step(model, batch)
    assert all(torch.isfinite(loss) for loss in losses.values())
    losses = one_step(model, make_batch(sizes=((40, 100), (64, 64), (33, 57))))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_half_precision_forward_gives_float32_terms(distill_cfg):
    model = build_model(distill_cfg()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16), EventStorage():
        losses = model(make_batch())
    for name in ALL_LOSSES:
        term = losses[f"loss_distill_{name.lower()}"]
        assert term.dtype == torch.float32 and torch.isfinite(term)
