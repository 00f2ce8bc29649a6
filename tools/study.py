#!/usr/bin/env python
"""Trains several methods over several seeds and tabulates them: how the figures in docs/results.md are made.

python tools/study.py --config-file FILE --output FOLDER [--methods baseline,SGFI,...] [--seeds 1,2,3] [KEY VALUE ...]

Complete runs are not repeated and interrupted ones resume, so a study may be stopped and started again.
`baseline_equal_time` is the baseline for the time of `distilled`, which has to be among the methods.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Dict, List, Optional

import gdetkd  # noqa: F401  it prepares the import of Detectron2
from gdetkd.data.shapes import make_shapes_for
from gdetkd.errors import GDetKDError
from gdetkd.experiments import (
    METHODS,
    Run,
    kept_time_ratio,
    load_config,
    mean_and_error,
    run_all,
    seed_by_seed,
    stretched,
)

from tabulate import tabulate  # isort: skip

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
    cfg = load_config(args.config_file, args.opts)
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
    ratio = kept_time_ratio(args.output / "equal_time_ratio.txt", runs["baseline"], runs["distilled"])
    runs[EQUAL_TIME] = [
        stretched(args.output / f"{EQUAL_TIME}-seed{seed}", baseline, ratio)
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
    mean, error = mean_and_error(values)
    return f"{mean:.1f} ± {float('nan') if error is None else error:.1f}"


def main() -> None:
    args = parse_arguments()
    os.chdir(ROOT)
    methods = args.methods.split(",")
    runs = make_runs(args, [method for method in methods if method != EQUAL_TIME])
    run_all(seed_by_seed(runs), ROOT / "train_net.py", args.jobs)
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
