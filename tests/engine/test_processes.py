"""Two and four processes (gloo): equal parameters, the gradients of the joint batch, no rank that waits for ever."""

import gdetkd  # noqa: F401, I001  first, in the spawned processes too
import errno
import os
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
from gdetkd.engine.checkpoint import DurableCheckpointer
from gdetkd.engine.guard import NonFiniteError
from gdetkd.engine.launch import leave_process_groups
from gdetkd.errors import GDetKDError
from gdetkd.losses import DistillLoss

TIMEOUT_SECONDS = 240


# Starting a process takes seconds of imports, which a server that has made them passes on.
mp.set_forkserver_preload(["gdetkd", "detectron2.engine", "detectron2.modeling", "detectron2.evaluation"])


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


class _SlowlySaved(_Spoiled):
    def __init__(self, cfg):
        super().__init__(cfg)
        save = self.checkpointer.save_aside
        self.checkpointer.save_aside = lambda *args, **kwargs: (time.sleep(1), save(*args, **kwargs))


def _train_spoiled(rank, cfg):
    if cfg.DISTILL.SKIP_NONFINITE:
        return _train(rank, cfg, _Spoiled)
    with pytest.raises(NonFiniteError) as error:
        _train(rank, cfg, _SlowlySaved)
    return str(error.value), os.path.exists(os.path.join(cfg.OUTPUT_DIR, "nonfinite_0000001.pth"))


class _BrokenOff(DistillTrainer):
    """The last rank's forward pass breaks off in the second step: in the student, or in a loss after the first."""

    place = "student.proposal_generator.rpn_head.anchor_deltas"

    def run_step(self):
        if self.iter != 1 or comm.get_rank() != comm.get_world_size() - 1:
            return super().run_step()
        module = self.distiller.get_submodule(self.place)
        if isinstance(module, DistillLoss):
            module.compute = _breaks_off
            super().run_step()
            del module.compute
        else:
            handle = module.register_forward_hook(lambda module, inputs, output: output * float("nan"))
            super().run_step()
            handle.remove()


class _BrokenOffInALoss(_BrokenOff):
    place = "losses.SGFI"


def _breaks_off(student, teacher):
    raise FloatingPointError("found in a loss")


def _train_broken_off(rank, cfg, in_a_loss):
    trainer_class = _BrokenOffInALoss if in_a_loss else _BrokenOff
    if cfg.DISTILL.SKIP_NONFINITE:
        return _train(rank, cfg, trainer_class)
    with pytest.raises(NonFiniteError) as error:
        _train(rank, cfg, trainer_class)
    return str(error.value)


def _evaluate_on_a_full_disk(rank, cfg):
    """The main process can first not convert the set's annotations, and then not write what was found."""
    from detectron2.evaluation import coco_evaluation

    from gdetkd.engine import evaluators  # here, for each process has a module of its own

    calls, written_whole = iter(range(10)), evaluators.written_whole
    convert = coco_evaluation.convert_to_coco_json

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(DistillTrainer):
        @classmethod
        def test(cls, *args):
            call = next(calls)
            if rank == 0:
                coco_evaluation.convert_to_coco_json = full if call == 0 else convert
                evaluators.written_whole = full if call == 1 else written_whole
            results.append(super().test(*args))
            return results[-1]

    results = []
    _train(rank, cfg, Full)
    return results


def _resume(rank, folder):
    """The iteration of the checkpoint that each process resumes from, or why none does."""
    try:
        checkpointer = DurableCheckpointer(torch.nn.Linear(1, 1), folder, save_to_disk=rank == 0)
        return checkpointer.resume_or_load("", resume=True)["iteration"]
    except GDetKDError as e:
        return str(e)


def _resume_with_an_old_look(rank, folder):
    """The other process still sees the folder as it was when the main one had written but the first."""
    look = DurableCheckpointer._candidates_seen_here
    if rank == 1:
        DurableCheckpointer._candidates_seen_here = lambda self: [os.path.join(folder, "model_0000001.pth")]
    try:
        return _resume(rank, folder)
    finally:
        DurableCheckpointer._candidates_seen_here = look


def _resume_where_one_lacks_it(rank, folder):
    isfile = os.path.isfile
    os.path.isfile = lambda path: isfile(path) and not (rank == 1 and path.endswith("model_0000003.pth"))
    try:
        return _resume(rank, folder)
    finally:
        os.path.isfile = isfile


def _one_after_the_other(rank, calls):
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
        (_train, (shared_cfg(world_size, {"SOLVER.MAX_ITER": 20}),)),
        (_train_unevenly, (shared_cfg(world_size, unevenly),)),
        (_gradients_of_part, (cfg, world_size)),
    ]
    steadily, unevenly, gradients = zip(*run_in_processes(_one_after_the_other, tmp_path, world_size, calls))
    for results in (steadily, unevenly):
        assert _equal(results) and all(result["changed"] for result in results)
    joint = _gradients(cfg, _images())
    largest = max(gradient.abs().max() for gradient in joint.values())
    for of_rank in gradients:
        assert set(of_rank) == set(joint) and any("CKD" in name for name in joint)
        for name, gradient in joint.items():
            assert (of_rank[name] - gradient).abs().max() < 1e-9 * largest, name


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_or_is_left_out_on_all(shared_cfg, tmp_path):
    stops = shared_cfg(2, {"SOLVER.MAX_ITER": 4})
    goes_on = shared_cfg(2, {"SOLVER.MAX_ITER": 4, "DISTILL.SKIP_NONFINITE": 1})
    calls = [(_train_spoiled, (cfg,)) for cfg in (stops, goes_on)]
    stopped, results = zip(*run_in_processes(_one_after_the_other, tmp_path, 2, calls))
    for message, is_saved in stopped:
        assert "loss_distill_ckd is nan (process 1; images " in message
        assert is_saved  # before any process ends, which would make the launcher end the one that writes
    assert _equal(results) and all(torch.isfinite(p).all() for p in results[0]["parameters"])


def test_a_forward_pass_that_breaks_off_on_one_rank_stops_all_or_is_left_out_on_all(shared_cfg, tmp_path):
    """The others have exchanged CKD's embeddings and SyncBN's statistics by then, and wait in the backward pass."""
    keys = {"SOLVER.MAX_ITER": 4, "DISTILL.LOSSES": ("SGFI", "CKD"), "DISTILL.SKIP_NONFINITE": 1}
    synchronized = {"MODEL.RESNETS.NORM": "naiveSyncBN"}
    calls = [
        (_train_broken_off, (shared_cfg(2, {**keys, "DISTILL.SKIP_NONFINITE": 0}), False)),
        (_train_broken_off, (shared_cfg(2, keys), False)),
        (_train_broken_off, (shared_cfg(2, keys), True)),
        (_train_broken_off, (shared_cfg(2, {**keys, **synchronized}), False)),
    ]
    stopped, *goes_on = zip(*run_in_processes(_one_after_the_other, tmp_path, 2, calls))
    for message in stopped:
        assert "the forward pass is not finite (Predicted boxes" in message and "(process 1; images" in message
    for results in goes_on:
        assert _equal(results) and all(result["changed"] for result in results)
        assert all(torch.isfinite(p).all() for p in results[0]["parameters"])


def test_an_evaluation_on_a_full_disk_keeps_the_ranks_together(shared_cfg, tmp_path):
    (tiny,) = shared_cfg(2).DATASETS.REGISTER
    converted = {**tiny, "name": "converted", "limit": 4}  # Detectron2 writes its annotations down
    keys = {"DATASETS.REGISTER": [tiny, converted], "DATASETS.TEST": ("converted", "tiny"), "TEST.EVAL_PERIOD": 1}
    cfg = shared_cfg(2, {**keys, "SOLVER.MAX_ITER": 3, "DISTILL.LOSSES": ()})
    results, others = run_in_processes(_evaluate_on_a_full_disk, tmp_path, 2, cfg)
    assert [result["converted"] != {} for result in results] == [False, True, True]
    assert all("AP" in result["tiny"]["bbox"] for result in results) and len(others) == 3
    names = {path.name for path in (tmp_path / "run" / "inference").iterdir()}
    assert names >= {"converted_coco_format.json", "coco_instances_results.json"}


def test_all_ranks_resume_from_the_main_ones_checkpoint_or_none_does(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for iteration in (1, 3):
        DurableCheckpointer(torch.nn.Linear(1, 1), str(folder)).save(f"model_{iteration:07d}", iteration=iteration)
    functions = (_resume, _resume_with_an_old_look, _resume_where_one_lacks_it)
    calls = [(function, (str(folder),)) for function in functions]
    same, with_an_old_look, lacking = zip(*run_in_processes(_one_after_the_other, tmp_path, 2, calls))
    assert same == with_an_old_look == (3, 3)
    assert all("model_0000003.pth', but the process of rank 1 does not" in message for message in lacking)
