"""Resume, the queue, masks and a process group on a GPU. A CPU stands in where there is none."""

import socket
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from on_device import Losses, devices_of, make_trainer, steady, train, use_amp
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import make_batch
from gdetkd import DistillTrainer
from gdetkd.engine.launch import run_everywhere
from gdetkd.engine.setup import check_device

# Losses on whole feature maps, most of which compute masks.
ON_MAPS = {
    "faster_rcnn-faster_rcnn": ("FITNET", "GTMASK", "FGFI", "ROIFI", "CWD", "PKD", "FGD", "MGD"),
    "retinanet-retinanet": ("CROSSKD",),
    "fcos-fcos": ("CROSSKD",),
}


# The maps of a dense student are too small here for bfloat16 on a CPU: see SIZES in on_device.py.
@pytest.mark.parametrize("student, amp", [("faster_rcnn", True), ("fcos", False)])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(pair_cfg, monkeypatch, tmp_path, device, student, amp):
    """The random state of the GPU, the scaler, the queue and a dense student's moving average are kept.

    A GPU adds in an order that changes from run to run, so its losses are equal up to rounding.
    """
    keys = {"MODEL.DEVICE": device, "SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.BASE_LR": 1e-5}
    if amp:
        use_amp(monkeypatch, device, {"cpu": torch.bfloat16, "cuda": torch.float16}[device])
        keys.update({"SOLVER.AMP.ENABLED": True, "DISTILL.TEACHER.DTYPE": "bfloat16"})
    cfg = pair_cfg(f"faster_rcnn-{student}", keys)
    whole = make_trainer(steady(cfg), DistillTrainer)
    if amp:
        scaler = whole._trainer.grad_scaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": 4.0})  # a larger scale would skip the first steps
    uninterrupted = train(whole)
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    resumed = make_trainer(cfg, DistillTrainer, resume=True)
    steps = train(resumed)
    relative = {"cpu": 0.0, "cuda": 0.01}[device]
    assert len(steps) == 2
    for losses, expected in zip(steps, uninterrupted[2:]):
        assert losses == pytest.approx(expected, rel=relative, abs=0.0)
    if amp:
        assert resumed._trainer.grad_scaler.state_dict() == whole._trainer.grad_scaler.state_dict()
    resumed_state, whole_state = resumed.distiller.losses.state_dict(), whole.distiller.losses.state_dict()
    assert resumed_state["CKD.queue.filled"] == whole_state["CKD.queue.filled"] > 0
    assert devices_of(resumed.distiller) == {device}
    assert {value.device.type for state in resumed.optimizer.state.values() for value in state.values()} == {device}


class BoolTensors(TorchDispatchMode):
    """Collect the kinds of devices of all tensors of truth values that are made inside."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.bool:
            self.devices.add(result.device.type)
        return result


# The towers of the tiny detectors have one convolution.
ONE_CONVOLUTION = {"DISTILL.CROSSKD.ANCHOR_BASED.SHARED_CONVS": 1, "DISTILL.CROSSKD.ANCHOR_FREE.SHARED_CONVS": 1}


@pytest.mark.parametrize("pair", ON_MAPS)
def test_losses_on_maps_compute_their_masks_on_the_device(pair_cfg, device, pair):
    cfg = pair_cfg(pair, {"DISTILL.LOSSES": ON_MAPS[pair], "MODEL.DEVICE": device, **ONE_CONVOLUTION})
    torch.manual_seed(0)
    model = build_model(cfg).train()
    with EventStorage(), BoolTensors() as masks:
        losses = model(make_batch())
    sum(losses.values()).backward()
    assert {f"loss_distill_{name.lower()}" for name in ON_MAPS[pair]} <= set(losses)
    assert all(torch.isfinite(loss) and loss.device.type == device for loss in losses.values())
    assert masks.devices == devices_of(model) == {device}
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_a_process_group_of_one(pair_cfg, monkeypatch, device):
    """torchrun starts one process. One GPU allows no more, so exchanges between GPUs are not tested."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in {**names, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    cfg = pair_cfg("faster_rcnn-faster_rcnn", {"MODEL.DEVICE": device, "SOLVER.MAX_ITER": 2})
    found = {}

    def main(args):
        check_device(device)
        found["backend"] = dist.get_backend()
        trainer = DistillTrainer(cfg)
        losses = Losses()
        trainer.register_hooks([losses])
        trainer.train()
        found["steps"] = len(losses.steps)
        ids = [0] if device == "cuda" else None
        parallel = DistributedDataParallel(trainer.distiller, device_ids=ids, broadcast_buffers=False)
        with EventStorage():
            sum(parallel(make_batch()).values()).backward()
        found["without"] = [name for name, p in trainer.distiller.named_parameters() if p.grad is None]

    run_everywhere(main, Namespace(check=False, num_gpus=1, num_machines=1, timeout=1.0))
    assert found == {"backend": {"cpu": "gloo", "cuda": "nccl"}[device], "steps": 2, "without": []}
    assert not dist.is_initialized()
