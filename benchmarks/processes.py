#!/usr/bin/env python
"""Time CKD, its gathering of embeddings and its backward pass, with several numbers of processes (gloo, on the CPU).

python benchmarks/processes.py [--processes 1,2,4] [--regions 256] [--queue 8192] [--rounds 20] [--json FILE]

Every process has the same number of regions. Embeddings have 1,024 numbers, as in a Faster R-CNN with a ResNet-50. If
there are more processes than cores, the time of gathering includes the time that a process waits for a core.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
from pathlib import Path
from typing import Any, Dict, Tuple

from gdetkd import add_gdetkd_config
from gdetkd.engine.launch import leave_process_groups
from gdetkd.engine.step_costs import now
from gdetkd.losses import CKD
from gdetkd.losses.embedding_queue import gather_embeddings
from gdetkd.structures import DetectorOutputs, DetectorSpec, Regions

import torch  # isort: skip
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import get_cfg
from detectron2.structures import Boxes
from tabulate import tabulate
from timing import WARM_UP, machine, numbers

EMBEDDING = 1024
IMAGES = 2  # in each process


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=numbers, default=[1, 2, 4], help="numbers separated by commas")
    parser.add_argument("--regions", type=int, default=256, help="regions of each process")
    parser.add_argument("--queue", type=int, default=8192, help="embeddings in CKD's queue")
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def build_ckd(queue: int) -> CKD:
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    cfg.DISTILL.CKD.QUEUE_SIZE = queue
    spec = DetectorSpec(256, {"p2": 4}, (7, 7), EMBEDDING, 80, (10.0, 10.0, 5.0, 5.0))
    return CKD(cfg, spec, spec)


def make_outputs(count: int) -> Tuple[DetectorOutputs, DetectorOutputs]:
    """Return random embeddings of the student's and the teacher's regions."""
    corners = torch.rand(count, 2) * 600
    boxes = torch.cat([corners, corners + 20 + torch.rand(count, 2) * 200], dim=1)
    regions = Regions([Boxes(part) for part in boxes.chunk(IMAGES)])
    student, teacher = DetectorOutputs({}, {}, regions), DetectorOutputs({}, {}, regions)
    student.embeddings = torch.randn(count, EMBEDDING, requires_grad=True)
    teacher.embeddings = torch.randn(count, EMBEDDING)
    return student, teacher


def work(rank: int, world_size: int, port: int, args: argparse.Namespace, folder: str) -> None:
    """Time the gathering and a whole forward and backward pass in one process. Write the medians to a file."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    if world_size > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    loss = build_ckd(args.queue)
    loss.queue.push(torch.randn(args.queue, EMBEDDING))
    student, teacher = make_outputs(args.regions)
    gathering, whole = [], []
    for _ in range(WARM_UP + args.rounds):
        if world_size > 1:
            dist.barrier()
        start = now()
        gather_embeddings(teacher.embeddings)
        gathering.append(now() - start)
        start = now()
        loss(student, teacher).backward()
        whole.append(now() - start)
    result = {"gathering": statistics.median(gathering[WARM_UP:]), "whole": statistics.median(whole[WARM_UP:])}
    Path(folder, str(rank)).write_text(json.dumps(result))
    leave_process_groups()


def run(world_size: int, args: argparse.Namespace) -> Dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (world_size, port, args, folder), nprocs=world_size)
        found = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(world_size)]
    seconds = {name: max(medians[name] for medians in found) for name in ("gathering", "whole")}
    received = (world_size - 1) * args.regions * EMBEDDING * 4 / 1e6
    return {"processes": world_size, "seconds": seconds, "megabytes_received": received}


def main() -> None:
    args = parse_arguments()
    results = [run(world_size, args) for world_size in args.processes]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    rows = [
        [result["processes"], f"{result['megabytes_received']:.1f}", *(f"{s:.4f}" for s in result["seconds"].values())]
        for result in results
    ]
    headers = ["processes", "MB received by a process", "gathering, s", "CKD whole, s"]

    print(f"{machine('cpu')}, of {os.cpu_count()} cores; {args.regions} regions a process, queue {args.queue}\n")
    print(tabulate(rows, headers, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
