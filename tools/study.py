#!/usr/bin/env python
"""Trains several methods over several seeds and tabulates them: how the figures in docs/results.md are made.

python tools/study.py --config-file FILE --output FOLDER [--methods baseline,SGFI,...] [--seeds 1,2,3] [KEY VALUE ...]

Complete runs are not repeated and interrupted ones resume, so a study may be stopped and started again.
`baseline_equal_time` is the baseline for the time of `distilled`, which has to be among the methods.
"""

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Dict, List, Optional

from gdetkd import add_gdetkd_config
from gdetkd.data.shapes import make_shapes_for
from gdetkd.errors import GDetKDError
from gdetkd.experiments import METHODS, Run, equal_time_run, run_all, time_ratio
from gdetkd.safe_load import merge_config_file

from detectron2.config import get_cfg  # isort: skip
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
EQUAL_TIME = "baseline_equal_time"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="of the full distillation")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", default=f"baseline,{EQUAL_TIME},head_transfer,SGFI,CKD,SGFI+CKD,distilled")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE changes to the config, for every run")
    return parser.parse_args()


def make_runs(args: argparse.Namespace, methods: List[str]) -> Dict[str, List[Run]]:
    """The runs of each method, one a seed; the equal-time baseline comes later."""
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    merge_config_file(cfg, args.config_file)
    cfg.merge_from_list(args.opts)
    make_shapes_for(cfg)
    runs = {}
    for method in methods:
        if method not in METHODS:
            raise GDetKDError(f"There is no method {method!r}. There are: {', '.join([*METHODS, EQUAL_TIME])}.")
        runs[method] = [
            Run(
                args.output / f"{method}-seed{seed}",
                args.config_file,
                [*args.opts, *METHODS[method], "SEED", seed],
                cfg.SOLVER.MAX_ITER,
            )
            for seed in args.seeds.split(",")
        ]
    return runs


def add_equal_time(args: argparse.Namespace, runs: Dict[str, List[Run]]) -> None:
    if not {"baseline", "distilled"} <= set(runs):
        raise GDetKDError(f"{EQUAL_TIME} needs baseline and distilled among the methods.")
    # One ratio for all seeds, the median: what else the machine did while a single run was timed falls out. It is kept,
    # so that seeds can be added later.
    kept = args.output / "equal_time_ratio.txt"
    if not kept.exists():
        kept.write_text(f"{statistics.median(map(time_ratio, runs['baseline'], runs['distilled'])):.3f}")
    ratio = float(kept.read_text())
    runs[EQUAL_TIME] = [
        equal_time_run(args.output / f"{EQUAL_TIME}-seed{seed}", baseline, ratio)
        for seed, baseline in zip(args.seeds.split(","), runs["baseline"])
    ]


def tabulate_runs(runs: Dict[str, List[Run]]) -> str:
    """Mean and standard error over seeds, in percent AP; and the gains over the baselines with theirs."""
    rows = []
    references = {name: _values(runs.get(name), "AP") for name in ("baseline", EQUAL_TIME) if name in runs}
    for method, of_method in runs.items():
        row: List[str] = [method]
        for metric in ("AP", "AP50", "AP75"):
            row.append(_mean_and_error(_values(of_method, metric)))
        # Seeds are paired: the same initialisation and data order on both sides.
        for name, reference in references.items():
            gains = [a - b for a, b in zip(_values(of_method, "AP"), reference)]
            row.append(_mean_and_error(gains) if method != name else "")
        row.append(f"{statistics.mean(_values(of_method, 'iterations')):.0f}")
        row.append(f"{statistics.mean(_values(of_method, 'seconds')):.0f} s")
        rows.append(row)
    headers = ["", "AP", "AP50", "AP75", *(f"gain over {name}" for name in references), "iterations", "training time"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _values(runs: Optional[List[Run]], metric: str) -> List[float]:
    return [run.result()[metric] for run in runs or []]


def _mean_and_error(values: List[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.1f} ± {error:.1f}"


def main() -> None:
    args = parse_arguments()
    os.chdir(ROOT)
    methods = args.methods.split(",")
    runs = make_runs(args, [method for method in methods if method != EQUAL_TIME])
    # Seed by seed, so that a study that is stopped has whole seeds.
    run_all([run for seed in zip(*runs.values()) for run in seed], ROOT / "train_net.py", args.jobs)
    if EQUAL_TIME in methods:
        add_equal_time(args, runs)
        run_all(runs[EQUAL_TIME], ROOT / "train_net.py", args.jobs)
    table = tabulate_runs({method: runs[method] for method in methods})
    results = {method: [run.result() for run in of_method] for method, of_method in runs.items()}
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.output / "results.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    try:
        main()
    except GDetKDError as error:
        sys.exit(str(error))
