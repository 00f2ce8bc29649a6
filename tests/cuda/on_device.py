"""Trainings of tiny pairs on a device, in full and in half precision."""

import torch
from detectron2.engine import HookBase

from conftest import ALL_LOSSES, FAMILIES, make_batch
from gdetkd import DistillTrainer

# torch 2.15 leaves most of the weight gradient of a bfloat16 3x3 convolution uninitialised on a CPU if the map has 1x1
# cells. On images of these sizes (height, width) the coarsest such map of the student has 2x2.
SIZES = {"dense": ((128, 128), (128, 96)), "two-stage": ((64, 64), (64, 48))}
EVERY = 4096  # more than there are anchors and predictions
# Every anchor, proposal and prediction is taken. Otherwise draws and rounding would choose others on each device.
NOTHING_IS_CHOSEN = {
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": EVERY,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": EVERY,
    "MODEL.RPN.NMS_THRESH": 1.0,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 2 * EVERY,
    "MODEL.RPN.POSITIVE_FRACTION": 1.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": EVERY,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
    "DISTILL.REGIONS.PRE_NMS_TOPK": EVERY,
    "DISTILL.REGIONS.POST_NMS_TOPK": EVERY,
    "DISTILL.REGIONS.NMS_THRESH": 1.0,
    "DISTILL.REGIONS.BATCH_SIZE_PER_IMAGE": EVERY,
    "DISTILL.REGIONS.POSITIVE_FRACTION": 1.0,
    "DISTILL.CKD.QUEUE_SIZE": 4 * EVERY,
    "SOLVER.BASE_LR": 1e-6,  # an untrained teacher is far off, and would drive small differences apart
}
TEACHER_KEYS = {key: NOTHING_IS_CHOSEN[key] for key in ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",)}
DENSE_FAMILIES = ("retinanet", "fcos")
PAIRS = [f"{teacher}-{student}" for teacher in FAMILIES for student in FAMILIES]
# The pairs that stand in for all of them on a CPU.
PAIRS_ON_CPU = ("mask_rcnn-cascade_rcnn", "retinanet-fcos")


class Trainer(DistillTrainer):
    """Train on fixed batches."""

    @classmethod
    def build_train_loader(cls, cfg):
        dense = cfg.DISTILL.STUDENT_META_ARCHITECTURE in ("RetinaNet", "FCOS")
        return [make_batch(SIZES["dense" if dense else "two-stage"], seed=seed) for seed in range(6)]


class Losses(HookBase):
    """Keep the losses of each step, by name."""

    def __init__(self):
        self.steps = []

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.steps.append({name: value for name, (value, _) in latest.items() if name.startswith("loss_")})


def losses_of(pair):
    """Return the losses of the paper that a pair can use."""
    teacher, student = pair.split("-")
    same_kind = teacher == student or not {teacher, student} & set(DENSE_FAMILIES)
    return ALL_LOSSES if same_kind else ("SGFI", "CKD")


def steady(cfg):
    """Rewrite the teacher's weights so that half precision changes its features little. Return the config.

    An untrained teacher has channels that hardly vary. Its BatchNorm would magnify their rounding errors.
    """
    path = cfg.DISTILL.TEACHER.WEIGHTS
    state = torch.load(path, weights_only=True)["model"]
    for name, value in state.items():
        if name.endswith("running_var"):
            value.clamp_(min=value.median())
    torch.save({"model": state}, path)
    return cfg


def make_trainer(cfg, trainer_class=Trainer, resume=False):
    """Return a trainer whose student is the same on every device."""
    torch.manual_seed(0)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=resume)
    if cfg.DISTILL.STUDENT_META_ARCHITECTURE == "FCOS" and not resume:  # untrained, half of its boxes have no area
        torch.nn.init.constant_(trainer.student.head.bbox_pred.bias, 1.0)
    return trainer


def train(trainer):
    """Return the losses of each step of a training."""
    losses = Losses()
    trainer.register_hooks([losses])
    trainer.train()
    return losses.steps


def use_amp(monkeypatch, device, dtype):
    """Let Detectron2's AMP trainer compute in `dtype`, also on a CPU.

    v0.6 has no key for the precision, and asks for CUDA's autocast and scaler. On a GPU, float16 needs no change.
    """
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", init_scale=4.0))
    if device == "cpu" or dtype != torch.float16:
        monkeypatch.setattr(torch.cuda.amp, "autocast", lambda **keys: torch.autocast(device, dtype))


def tensors_of(teacher):
    """Return copies of all tensors of a teacher and of its faster backbone, by name."""
    states = {"model": teacher.model.state_dict(), "backbone": teacher.adapter.backbone.state_dict()}
    return {(role, name): value.clone() for role, state in states.items() for name, value in state.items()}


def devices_of(module):
    """Return the kinds of devices that hold a module's parameters, buffers and other tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [value for part in module.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
    return {tensor.device.type for tensor in tensors}
