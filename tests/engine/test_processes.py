"""Two and four processes (gloo): equal parameters, the gradients of the joint batch, no rank that waits for ever."""

import gdetkd  # noqa: F401, I001  first, in the spawned processes too
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from conftest import ALL_LOSSES, make_batch, settle_batch_norm
from gdetkd import DistillTrainer, GDetKD
from gdetkd.engine.guard import EXIT_STOPPED, NonFiniteError
from gdetkd.engine.launch import which_ended
from gdetkd.safe_load import read_weights

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 240
# An untrained teacher is far off: what tiny runs take for a few steps would not be finite after twenty.
SLOWLY = {"SOLVER.BASE_LR": 1e-5}


def spawn(function, folder, world_size, *args):
    return mp.start_processes(
        _worker,
        (f"file://{folder}/meeting", str(folder), world_size, function, args),
        nprocs=world_size,
        join=False,
        start_method="spawn",
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
    dist.destroy_process_group()


def _train(rank, cfg, trainer_class=DistillTrainer):
    torch.manual_seed(rank)  # the ranks start from other weights, which DDP makes equal
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=False)
    start = [p.clone() for p in trainer.distiller.parameters()]
    trainer.train()
    changed = any(not torch.equal(a, b) for a, b in zip(start, trainer.distiller.parameters()))
    return {"parameters": [p.detach().clone() for p in trainer.distiller.parameters()], "changed": changed}


def _equal(results):
    first, *others = (result["parameters"] for result in results)
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.fixture
def shared_cfg(distill_cfg):
    """Of a set that each process registers for itself."""

    def make(world_size, **changes):
        keys = {"DATASETS.REGISTER": [MetadataCatalog.get("tiny").gdetkd_entry], "DISTILL.LOSSES": ALL_LOSSES}
        return distill_cfg({**keys, "SOLVER.IMS_PER_BATCH": world_size, **SLOWLY, **changes})

    return make


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_have_the_same_parameters_after_20_steps(shared_cfg, tmp_path, world_size):
    results = run_in_processes(_train, tmp_path, world_size, shared_cfg(world_size, **{"SOLVER.MAX_ITER": 20}))
    assert _equal(results) and all(result["changed"] for result in results)


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
    return _train(rank, cfg, _Uneven)


def test_ranks_with_none_one_and_many_regions_stay_together(shared_cfg, tmp_path):
    keys = {"SOLVER.MAX_ITER": 3, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32}
    results = run_in_processes(_train_unevenly, tmp_path, 4, shared_cfg(4, **keys))
    assert _equal(results) and all(result["changed"] for result in results)


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
    """Of the mean over ranks of the losses of the given images' batch, which each rank has its part of."""
    torch.manual_seed(0)
    model = GDetKD(cfg).train()
    settle_batch_norm(model.student)
    model.student.proposal_generator = _FixedProposals()
    model.double(), model.teacher.model.double()
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


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_are_those_of_one_process_with_the_joint_batch(distill_cfg, tmp_path, world_size):
    """With as many regions in each image; the negatives of CKD come from all ranks."""
    keys = {
        "DISTILL.LOSSES": ALL_LOSSES,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 9,  # all of them
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False,
    }
    cfg = distill_cfg(keys)
    joint = _gradients(cfg, _images())
    results = run_in_processes(_gradients_of_part, tmp_path, world_size, cfg, world_size)
    largest = max(gradient.abs().max() for gradient in joint.values())
    for result in results:
        assert set(result) == set(joint) and any("CKD" in name for name in joint)
        for name, gradient in joint.items():
            assert (result[name] - gradient).abs().max() < 1e-5 * largest, name


class _Spoiled(DistillTrainer):
    """The last rank's CKD term is not a number in the second step."""

    def run_step(self):
        if self.iter == 1 and comm.get_rank() == comm.get_world_size() - 1:
            loss = self.distiller.losses["CKD"]
            compute = loss.compute
            loss.compute = lambda *outputs: compute(*outputs) * float("nan")
            super().run_step()
            loss.compute = compute
        else:
            super().run_step()


def _train_spoiled(rank, cfg):
    if cfg.DISTILL.SKIP_NONFINITE:
        return _train(rank, cfg, _Spoiled)
    with pytest.raises(NonFiniteError) as error:
        _train(rank, cfg, _Spoiled)
    return str(error.value)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(shared_cfg, tmp_path):
    cfg = shared_cfg(2, **{"SOLVER.MAX_ITER": 4})
    messages = run_in_processes(_train_spoiled, tmp_path, 2, cfg)
    assert all("loss_distill_ckd is nan (process 1; images " in message for message in messages)
    assert (tmp_path / "run" / "nonfinite_0000001.pth").exists()


def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(shared_cfg, tmp_path):
    cfg = shared_cfg(2, **{"SOLVER.MAX_ITER": 4, "DISTILL.SKIP_NONFINITE": 1})
    results = run_in_processes(_train_spoiled, tmp_path, 2, cfg)
    assert _equal(results) and all(torch.isfinite(p).all() for p in results[0]["parameters"])


class _Signalled(HookBase):
    """One rank gets a signal in the third step."""

    def __init__(self, number):
        self.number = number

    def before_step(self):
        if self.trainer.iter == 2 and comm.get_rank() == 1:
            os.kill(os.getpid(), self.number)


def _train_signalled(rank, cfg, number):
    torch.manual_seed(0)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([_Signalled(number)])
    trainer.train()


def ended(context):
    with pytest.raises(mp.ProcessExitedException) as error:
        end = time.monotonic() + TIMEOUT_SECONDS
        while not context.join(5):
            assert time.monotonic() < end, "the processes hang"
    return error.value


def test_sigterm_of_one_rank_saves_and_stops_all(shared_cfg, tmp_path):
    cfg = shared_cfg(2, **{"SOLVER.MAX_ITER": 50})
    context = spawn(_train_signalled, tmp_path, 2, cfg, signal.SIGTERM)
    assert ended(context).exit_code == EXIT_STOPPED
    assert all(process.exitcode in (EXIT_STOPPED, -signal.SIGTERM) for process in context.processes)
    saved = read_weights(str(tmp_path / "run" / "model_0000002.pth"))
    assert len(saved["trainer"]["hooks"]["RandomState"]["states"]) == 2


def test_a_rank_that_dies_ends_the_others_and_is_named(shared_cfg, tmp_path):
    context = spawn(_train_signalled, tmp_path, 2, shared_cfg(2, **{"SOLVER.MAX_ITER": 5000}), signal.SIGKILL)
    error = ended(context)
    assert "The process of rank 1 was killed by SIGKILL, and the others were ended." in which_ended(error)
    assert "rank 9" in which_ended(error, first_rank=8)
    assert not any(process.is_alive() for process in context.processes)


def torchrun(config_file, *arguments):
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, "train_net.py", "--config-file", str(config_file), *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture
def config_file(shared_cfg, tmp_path):
    path = tmp_path / "distill.yaml"
    path.write_text(shared_cfg(2, **{"SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2}).dump())
    return path


def test_torchrun_trains_in_as_many_processes(config_file, tmp_path):
    process = torchrun(config_file)
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, output[-3000:]
    saved = read_weights(str(tmp_path / "run" / "model_final.pth"))
    assert len(saved["trainer"]["hooks"]["RandomState"]["states"]) == 2 and saved["run"]["processes"] == 2


def test_torchrun_and_num_gpus_do_not_go_together(config_file):
    process = torchrun(config_file, "--num-gpus", "2")
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode != 0 and "leave --num-gpus and --num-machines out" in output
