"""Measure what the steps of a pair cost: the student alone, the teacher, each loss alone and all losses."""

import functools
import statistics
import tempfile
from typing import Any, Callable, Dict, List, Tuple

from gdetkd.config_file import load_config
from gdetkd.detectors import FCOS
from gdetkd.distiller import GDetKD
from gdetkd.engine.step_costs import peak_memory
from gdetkd.teacher import read_teacher_file

import torch  # isort: skip
from budget import Budget
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from step import build, give_weights, step, teachers_look
from timing import quartiles
from torch import nn

Batch = List[Dict[str, Any]]
PLAIN, TEACHER, ALL = "plain", "teacher", "all"
# The precisions that AMP computes in: Detectron2 trains in float16, which few CPUs support.
HALF = {"cuda": torch.float16, "cpu": torch.bfloat16}


def precision_of(device: str, amp: bool) -> str:
    """Return the name of the precision of a step."""
    return str(HALF[device]).split(".")[1] if amp else "float32"


def measure_pair(
    config_file: str,
    opts: List[Any],
    teacher_opts: List[Any],
    batch: Batch,
    amp: bool,
    budget: Budget,
    warm_up: int,
) -> Dict[str, Any]:
    """Measure time and memory of the steps of a pair with random weights.

    Args:
        config_file: config of the distillation.
        opts, teacher_opts: KEY VALUE changes to the config and to the teacher's config. `opts` sets MODEL.DEVICE.
        batch: a training batch.
        amp: whether the student and the teacher compute in half precision.
        budget: sets the number of rounds.
        warm_up: rounds that are not counted.

    Raises:
        OutOfTime: there is no time for enough rounds.
    """
    cfg = load_config(config_file, [*opts, "DISTILL.TEACHER.OPTS", teacher_opts])
    device = cfg.MODEL.DEVICE
    if amp:
        cfg.DISTILL.TEACHER.DTYPE = precision_of(device, amp)
    autocast = functools.partial(torch.autocast, device, HALF[device], enabled=amp)
    models = build_models(cfg, batch)
    full = models[ALL]
    look = teachers_look(full, batch, autocast)
    works: Dict[str, Callable[[], Any]] = {PLAIN: lambda: step(full.student, batch, autocast), TEACHER: look}
    works.update({name: functools.partial(step, model, batch, autocast) for name, model in models.items()})
    seconds = budget.time(works, warm_up)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "config_file": config_file,
        "precision": precision_of(device, amp),
        "regions": len(look.args[1]),
        "rounds": len(seconds[ALL]),
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "megabytes": {name: peak_memory(work) for name, work in works.items()},
        "ratio_to_plain": middle[ALL] / middle[PLAIN],
        "ratio_to_floor": middle[ALL] / (middle[PLAIN] + middle[TEACHER]),
        "images_a_second": {name: len(batch) / middle[name] for name in (PLAIN, ALL)},
    }


def build_models(cfg: CfgNode, batch: Batch) -> Dict[str, GDetKD]:
    """Build a distiller with each loss alone and one with all losses. All have one teacher and equal students.

    Their steps are those of the later part of a training: CKD's queue is full.
    """
    teacher = read_teacher_file(cfg).build()
    settle(teacher, batch)
    with tempfile.TemporaryDirectory() as folder:
        give_weights(cfg, teacher, folder)
        full = build(cfg, tuple(cfg.DISTILL.LOSSES))
    settle(full.student, batch)
    models = {name: build(cfg, (name,), full) for name in cfg.DISTILL.LOSSES}
    models[ALL] = full
    for model in models.values():
        model.student.load_state_dict(full.student.state_dict())
        model.fill_buffers()
    return models


@torch.no_grad()
def settle(detector: nn.Module, batch: Batch) -> None:
    """Give an untrained detector features and boxes of ordinary size, in place.

    Features grow from layer to layer if the frozen norms do nothing, and are infinite in half precision.
    """
    norms = [module for module in detector.modules() if isinstance(module, FrozenBatchNorm2d)]
    handles = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    detector.backbone(detector.preprocess_image(batch).tensor)
    for handle in handles:
        handle.remove()
    if isinstance(detector, FCOS):  # the boxes of an untrained FCOS have no area, and would be no regions
        nn.init.ones_(detector.head.bbox_pred.bias)


def _take_statistics(norm: nn.Module, inputs: Tuple[torch.Tensor]) -> None:
    norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
    norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))
