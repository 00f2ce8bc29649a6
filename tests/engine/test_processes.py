"""Two and four processes (gloo): equal parameters, the gradients of the joint batch, no rank that waits for ever."""

import gdetkd  # noqa: F401, I001  first, in the spawned processes too
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from conftest import ALL_LOSSES, look_through_the_model, make_batch, settle_batch_norm
from gdetkd import DistillTrainer, GDetKD
from gdetkd.engine.launch import leave_process_groups
from programs import TIMEOUT_SECONDS


def spawn(function, folder, world_size, *args):
    return mp.start_processes(
        _worker,
        (f"file://{folder}/meeting", str(folder), world_size, function, args),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )


def run_in_processes(function, folder, world_size, *args):
    """Calls `function(rank, *args)` in processes that can talk; what it returns, by rank."""
    context, end = spawn(function, folder, world_size, *args), time.monotonic() + TIMEOUT_SECONDS
    while not context.join(5):
        assert time.monotonic() < end, "the processes hang"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


def _worker(rank, meeting, folder, world_size, function, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(world_size)
    else:
        comm._LOCAL_PROCESS_GROUP = dist.new_group(list(range(world_size)))
    torch.save(function(rank, *args), f"{folder}/rank{rank}.pt")
    leave_process_groups()


def train_rank(rank, cfg, trainer_class=DistillTrainer):
    torch.manual_seed(rank)  # the ranks start from other weights, which DDP makes equal
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=False)
    start = [p.clone() for p in trainer.distiller.parameters()]
    trainer.train()
    changed = any(not torch.equal(a, b) for a, b in zip(start, trainer.distiller.parameters()))
    parameters = [p.detach().clone() for p in trainer.distiller.parameters()]
    skipped = trainer._guard.state_dict().get("skipped", 0)
    return {"parameters": parameters, "changed": changed, "skipped": skipped}


def have_equal_parameters(results):
    first, *others = (result["parameters"] for result in results)
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def fail_on_rank_1(trainer, before=(), after=()):
    """Let forward passes of the student, counted from 1, fail on rank 1 as not finite, before or after they compute."""
    forward, calls = trainer.student.forward, []

    def fail_if(numbers):
        if len(calls) in numbers and comm.get_rank() == 1:
            raise FloatingPointError("not finite")

    def failing(batch):
        calls.append(batch)
        fail_if(before)
        losses = forward(batch)
        fail_if(after)
        return losses

    trainer.student.forward = failing


REGIONS = {0: 0, 1: 1, 2: 30, 3: 7}


class _Keeps:
    """A sampler of proposals that keeps the first few."""

    def __init__(self, heads, count):
        self._original, self._count = heads.label_and_sample_proposals, count

    def __call__(self, proposals, targets):
        return [sampled[: self._count] for sampled in self._original(proposals, targets)]


class _Uneven(DistillTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return [make_batch(seed=10 * i + comm.get_rank()) for i in range(9)]

    def train(self):
        heads = self.student.roi_heads
        heads.label_and_sample_proposals = _Keeps(heads, REGIONS[comm.get_rank()])
        return super().train()


def _train_unevenly(rank, cfg):
    return train_rank(rank, cfg, _Uneven)


class _FixedProposals(torch.nn.Module):
    """In the place of a proposal generator: the objects, each moved a little, and nothing to learn."""

    def forward(self, images, features, targets):
        proposals = []
        for size, instances in zip(images.image_sizes, targets):
            boxes = instances.gt_boxes.tensor
            found = Instances(size)
            found.proposal_boxes = Boxes(torch.cat([boxes + 1, boxes.flip(0) - 3, boxes * 0.8 + 2]))
            found.proposal_boxes.clip(size)
            found.objectness_logits = torch.zeros(len(found.proposal_boxes))
            proposals.append(found)
        return proposals, {}


def _gradients(cfg, images):
    """Return the gradients of the loss of a batch that the ranks share: the mean over their parts of the images."""
    torch.manual_seed(0)
    model = GDetKD(cfg).train()
    # Before the statistics are settled: their rounding depends on the number of threads, and ranks have fewer.
    model.double(), model.teacher.model.double()
    settle_batch_norm(model.student)
    model.student.proposal_generator = _FixedProposals()
    look_through_the_model(model.teacher, torch.float64)
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if comm.get_world_size() > 1 else model
    # Statistics of a batch are of a process's own images, and would not be the joint batch's.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with EventStorage():
        sum(parallel(images).values()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def _gradients_of_part(rank, cfg, world_size):
    images = _images()
    return _gradients(cfg, images[rank * len(images) // world_size : (rank + 1) * len(images) // world_size])


def _images():
    images = make_batch(sizes=((64, 64),) * 4, seed=5)
    for sample in images:
        sample["image"] = sample["image"].double()
        sample["instances"].gt_boxes.tensor = sample["instances"].gt_boxes.tensor.double()
    return images


def one_after_the_other(rank, calls):
    """Starting processes takes longer than what they do."""
    return [function(rank, *arguments) for function, arguments in calls]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_stay_together_and_have_the_joint_batchs_gradients(distill_cfg, shared_cfg, tmp_path, world_size):
    """Equal parameters after 20 steps, and with 0, 1, 30 and 7 regions; with as many in each image, equal gradients.

    The negatives of CKD come from all ranks.
    """
    fixed = {
        "DISTILL.LOSSES": ALL_LOSSES,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 9,  # all of them
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False,
    }
    unevenly = {"SOLVER.MAX_ITER": 3, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32}
    cfg = distill_cfg(fixed)
    calls = [
        (train_rank, (shared_cfg(world_size, {"SOLVER.MAX_ITER": 20}),)),
        (_train_unevenly, (shared_cfg(world_size, unevenly),)),
        (_gradients_of_part, (cfg, world_size)),
    ]
    steadily, unevenly, gradients = zip(*run_in_processes(one_after_the_other, tmp_path, world_size, calls))
    for results in (steadily, unevenly):
        assert have_equal_parameters(results) and all(result["changed"] for result in results)
    joint = _gradients(cfg, _images())
    largest = max(gradient.abs().max() for gradient in joint.values())
    for of_rank in gradients:
        assert set(of_rank) == set(joint) and any("CKD" in name for name in joint)
        for name, gradient in joint.items():
            assert (of_rank[name] - gradient).abs().max() < 1e-9 * largest, name
