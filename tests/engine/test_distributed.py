"""Two processes on the CPU (gloo) with different numbers of regions do not hang, and their shared state stays equal."""

import gdetkd  # noqa: F401, I001  imported first, also in the spawned processes: it prepares the import of Detectron2
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils import comm

from conftest import ALL_LOSSES, make_batch, make_cfg
from gdetkd import DistillTrainer
from gdetkd._compat.training import batch_norms
from gdetkd.config import plain_config
from gdetkd.errors import GDetKDError
from gdetkd.losses import CKD
from gdetkd.losses.embedding_queue import gather_embeddings
from gdetkd.structures import DetectorOutputs, DetectorSpec, Regions
from gdetkd.teacher import FrozenTeacher
from test_processes import run_in_processes

COUNTS = [(2, 5), (0, 3), (4, 0), (0, 0)]


def _gather(rank):
    return [gather_embeddings(torch.full((counts[rank], 3), float(rank + 1))) for counts in COUNTS]


def test_processes_gather_different_numbers_of_embeddings(tmp_path):
    for rank, results in enumerate(run_in_processes(_gather, tmp_path, 2)):
        for counts, (found_rank, parts) in zip(COUNTS, results):
            assert found_rank == rank and [len(part) for part in parts] == list(counts)
            assert all((part == i + 1).all() for i, part in enumerate(parts))


def _outputs(images):
    """Return the embeddings of two regions, far apart, in each of the given images."""
    boxes = [Boxes(torch.tensor([[0.0, 0, 10, 10], [30, 30, 50, 50]])) for _ in images]
    embeddings = torch.cat([torch.randn(2, 6, generator=torch.Generator().manual_seed(image)) for image in images])
    return DetectorOutputs({}, {}, Regions(boxes), embeddings=embeddings)


def _contrast(rank, images_of_ranks):
    torch.manual_seed(0)
    spec = DetectorSpec(4, {"p2": 4, "p3": 8}, (7, 7), 6, 3, None)
    student, teacher = _outputs(images_of_ranks[rank]), _outputs([i + 10 for i in images_of_ranks[rank]])
    return CKD(make_cfg({}), spec, spec)(student, teacher).item()


def test_regions_of_other_processes_are_negatives(tmp_path):
    """The mean over all regions of two processes equals the mean of one process with both batches."""
    losses = run_in_processes(_contrast, tmp_path, 2, [[0], [1, 2]])
    together = _contrast(0, [[0, 1, 2]])
    assert together == pytest.approx((losses[0] + 2 * losses[1]) / 3, rel=1e-5)


class _Record(HookBase):
    def __init__(self):
        self.queues = []

    def after_step(self):
        queue = self.trainer.distiller.losses["CKD"].queue
        queue.contents()
        self.queues.append((queue.embeddings.clone(), queue.filled.clone()))


class _NoRegions:
    """Replace the sampler of proposals by a sampler that keeps no proposal."""

    def __init__(self, heads):
        self._original = heads.label_and_sample_proposals

    def __call__(self, proposals, targets):
        return [sampled[:0] for sampled in self._original(proposals, targets)]


class _Trainer(DistillTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return [make_batch(seed=10 * i + comm.get_rank(), boxes_each=0 if comm.get_rank() else 3) for i in range(9)]


def _train(rank, cfg):
    torch.manual_seed(0)
    trainer = _Trainer(cfg)
    trainer.resume_or_load(resume=False)
    if rank == 1:
        heads = trainer.student.roi_heads
        heads.label_and_sample_proposals = _NoRegions(heads)
    record = _Record()
    trainer.register_hooks([record])
    trainer.train()
    state = {name: value.clone() for name, value in trainer.distiller.named_parameters()}
    return {"queues": record.queues, "parameters": state, "teacher": trainer.distiller.teacher.sha256}


def test_one_rank_without_regions_does_not_hang_and_all_ranks_stay_equal(distill_cfg, tmp_path):
    # Every process is a new one and must register the dataset for itself.
    keys = {"DATASETS.REGISTER": [MetadataCatalog.get("tiny").gdetkd_entry]}
    cfg = distill_cfg({**keys, "SOLVER.MAX_ITER": 3, "SOLVER.IMS_PER_BATCH": 4, "DISTILL.LOSSES": ALL_LOSSES})
    first, second = run_in_processes(_train, tmp_path, 2, cfg)
    assert len(first["queues"]) == 3
    for (first_queue, first_filled), (second_queue, second_filled) in zip(first["queues"], second["queues"]):
        assert first_filled == second_filled > 0 and torch.equal(first_queue, second_queue)
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name


def _start_with_other_files(rank, cfg, files):
    for key, path in files[rank].items():
        cfg.merge_from_list([key, path])
    try:
        DistillTrainer(cfg).resume_or_load(resume=False)
    except GDetKDError as e:
        return str(e)


@pytest.mark.parametrize("key, name", [("DISTILL.TEACHER.WEIGHTS", "teacher"), ("MODEL.WEIGHTS", "student")])
def test_processes_with_other_files_do_not_start(distill_cfg, tmp_path, key, name):
    cfg = distill_cfg({"DATASETS.REGISTER": [MetadataCatalog.get("tiny").gdetkd_entry], "SOLVER.IMS_PER_BATCH": 4})
    model = build_model(plain_config(cfg)) if name == "student" else FrozenTeacher(cfg).model
    torch.save({"model": model.state_dict()}, tmp_path / "first.pth")
    next(model.parameters()).data += 1
    torch.save({"model": model.state_dict()}, tmp_path / "second.pth")
    files = [{key: str(tmp_path / "first.pth")}, {key: str(tmp_path / "second.pth")}]
    for message in run_in_processes(_start_with_other_files, tmp_path, 2, cfg, files):
        assert message.startswith(f"Ranks 0 and 1 have different weights of the {name}")
    assert run_in_processes(_start_with_other_files, tmp_path, 2, cfg, files[:1] * 2) == [None, None]


class _Evaluated(_Trainer):
    """Keep BatchNorm's statistics at each evaluation."""

    statistics = []

    def test(self, cfg, model, evaluators=None):
        norms = batch_norms(self.student)
        self.statistics.append(torch.cat([norm.running_mean for norm in norms]))
        return {}


def _evaluate(rank, cfg):
    torch.manual_seed(0)
    trainer = _Evaluated(cfg)
    trainer.train()
    return trainer.statistics


def test_all_ranks_evaluate_the_student_of_the_checkpoint(shared_cfg, tmp_path):
    """Each rank has statistics of its own images, and the checkpoint holds those of the first."""
    cfg = shared_cfg(2, {"MODEL.RESNETS.NORM": "BN", "TEST.EVAL_PERIOD": 2, "SOLVER.CHECKPOINT_PERIOD": 2})
    first, second = run_in_processes(_evaluate, tmp_path, 2, cfg)
    assert len(first) == len(second) == 2 and all(torch.equal(a, b) for a, b in zip(first, second))
    saved = torch.load(f"{cfg.OUTPUT_DIR}/model_0000001.pth", weights_only=True)["model"]
    assert torch.equal(torch.cat([saved[name] for name in saved if name.endswith("running_mean")]), first[0])
    assert not torch.equal(first[0], first[1])
