#!/usr/bin/env python
"""Times CKD, its gathering and its backward pass, as processes are added, each with as many regions (gloo, on the CPU).

python benchmarks/processes.py [--processes 1,2,4] [--regions 256] [--queue 8192] [--rounds 20] [--json FILE]

With more processes than cores they wait for each other's arithmetic, too; the time of gathering holds that wait.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
from pathlib import Path
from typing import Any, Dict

from losses import EMBEDDING, build, make_outputs

import torch  # isort: skip
import torch.distributed as dist
import torch.multiprocessing as mp
from tabulate import tabulate
from timing import WARM_UP, machine, numbers

from gdetkd.engine.launch import leave_process_groups
from gdetkd.engine.step_costs import now
from gdetkd.losses.ckd import gather_embeddings


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=numbers, default=[1, 2, 4])
    parser.add_argument("--regions", type=int, default=256, help="of each process")
    parser.add_argument("--queue", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def work(rank: int, world_size: int, port: int, args: argparse.Namespace, folder: str) -> None:
    """One process: its median seconds of gathering and of a whole forward and backward pass, into a file."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    if world_size > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    loss = build("cpu", args.queue)["CKD"]
    loss.queue.push(torch.randn(args.queue, EMBEDDING))
    student, teacher = make_outputs(args.regions, 1, "cpu")
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
    seconds = {name: max(each[name] for each in found) for name in ("gathering", "whole")}
    received = (world_size - 1) * args.regions * EMBEDDING * 4 / 1e6
    return {"processes": world_size, "seconds": seconds, "megabytes_received": received}


def main() -> None:
    args = parse_arguments()
    results = [run(world_size, args) for world_size in args.processes]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    rows = [
        [each["processes"], f"{each['megabytes_received']:.1f}", *(f"{s:.4f}" for s in each["seconds"].values())]
        for each in results
    ]
    headers = ["processes", "received by each, MB", "gathering, s", "CKD whole, s"]
    print(f"{machine('cpu')}, of {os.cpu_count()} cores; {args.regions} regions a process, queue {args.queue}\n")
    print(tabulate(rows, headers, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
