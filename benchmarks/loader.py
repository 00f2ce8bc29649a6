#!/usr/bin/env python
"""Times how long a distillation step waits for its batch, against the step itself, as the loader's workers grow.

python benchmarks/loader.py --config-file FILE [--workers 0,1,4] [--device cuda] [--steps 30] [--json FILE]
    [KEY VALUE ...]

The data are the config's own. A step includes the backward pass, not the optimizer.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict

from gdetkd.config_file import load_config
from gdetkd.data import build_train_loader, register_datasets
from gdetkd.data.shapes import make_shapes_for
from gdetkd.distiller import GDetKD
from gdetkd.engine.step_costs import LATE, now
from gdetkd.errors import GDetKDError

import torch  # isort: skip
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from timing import WARM_UP, machine, numbers, quartiles


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--workers", type=numbers, default=[0, 1, 4], help="DATALOADER.NUM_WORKERS; Detectron2's is 4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE changes to the config")
    return parser.parse_args()


def run(cfg: CfgNode, model: torch.nn.Module, workers: int, steps: int) -> Dict[str, Any]:
    """Seconds of each step's wait and of the step itself."""
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = workers
    batches = iter(build_train_loader(cfg))
    waits, works = [], []
    for _ in range(WARM_UP + steps):
        start = now()
        batch = next(batches)
        got = now()
        with EventStorage(LATE):
            sum(model(batch).values()).backward()
        model.zero_grad(set_to_none=True)
        waits.append(got - start)
        works.append(now() - got)
    waits, works = waits[WARM_UP:], works[WARM_UP:]
    share = sum(waits) / (sum(waits) + sum(works))
    return {"workers": workers, "wait": quartiles(waits), "step": quartiles(works), "share_waiting": share}


def main() -> None:
    args = parse_arguments()
    cfg = load_config(args.config_file, ["MODEL.DEVICE", args.device, *args.opts])
    make_shapes_for(cfg)
    register_datasets(cfg)
    torch.manual_seed(0)
    model = GDetKD(cfg).train()
    results = [run(cfg, model, workers, args.steps) for workers in args.workers]
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(args.device), "runs": results}, indent=2) + "\n")
    rows = [
        [each["workers"], f"{each['wait'][1]:.4f}", f"{each['step'][1]:.4f}", f"{100 * each['share_waiting']:.1f} %"]
        for each in results
    ]
    print(f"{machine(args.device)}; {cfg.SOLVER.IMS_PER_BATCH} images a step\n")
    print(tabulate(rows, ["workers", "waits, s", "step, s", "share of all time"], "github", disable_numparse=True))


if __name__ == "__main__":
    try:
        main()
    except GDetKDError as error:
        sys.exit(str(error))
