#!/usr/bin/env python
"""The main job on the embedded default: a teacher, few labelled images, and what distillation makes of them.

python tools/quickstart.py [--pair faster_rcnn-faster_rcnn] [--seed 1] [--output FOLDER]
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, Tuple

warnings.filterwarnings("ignore")

from gdetkd import experiments  # noqa: E402, I001
from gdetkd.config import plain_config
from gdetkd.data import register_datasets
from gdetkd.data.shapes import make_shapes_for
from gdetkd.engine import evaluate_teacher
from gdetkd.errors import GDetKDError
from gdetkd.experiments import PLAIN, Run, stretched, time_ratio
from gdetkd.jobs import run_all
from gdetkd.safe_load import SafeCheckpointer
from gdetkd.teacher import FrozenTeacher
from gdetkd.visualization.comparison import Curve, draw_comparison

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
LABELS = {"baseline": "baseline", "baseline_equal_time": "baseline, equal time", "distilled": "distilled"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair", default="faster_rcnn-faster_rcnn", help="teacher-student, a file in configs/quickstart"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: output/quickstart/PAIR")
    return parser.parse_args()


def load_config(pair: str) -> Tuple[str, CfgNode]:
    path = f"configs/quickstart/{pair}.yaml"
    if not os.path.exists(path):
        files = Path("configs/quickstart").glob("*-*.yaml")
        pairs = sorted(file.stem for file in files if not file.stem.startswith(("Base-", "teacher-")))
        raise GDetKDError(f"There is no pair {pair!r}. There are: {', '.join(pairs)}.")
    cfg = experiments.load_config(path, [])
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return path, cfg


def train(config_file: str, cfg: CfgNode, output: Path, seed: int) -> Dict[str, Run]:
    """The baseline and the distilled student side by side, then the baseline for as long as distillation took."""
    opts, train_net = ["SEED", str(seed)], ROOT / "train_net.py"
    iterations = cfg.SOLVER.MAX_ITER
    runs = {
        "baseline": Run(output / "baseline", config_file, PLAIN + opts, iterations),
        "distilled": Run(output / "distilled", config_file, opts, iterations),
    }
    run_all(runs.values(), train_net)
    ratio = time_ratio(runs["baseline"], runs["distilled"])
    equal_time = stretched(output / "baseline_equal_time", runs["baseline"], ratio)
    # Two jobs, though it is alone: the same number of threads as the first two had.
    run_all([equal_time], train_net, jobs=2)
    return {"baseline": runs["baseline"], "baseline_equal_time": equal_time, "distilled": runs["distilled"]}


def summarize(teacher: Dict[str, float], runs: Dict[str, Run]) -> Dict[str, Dict[str, float]]:
    summary = {"teacher": {name: teacher[name] for name in ("AP", "AP50", "AP75")}}
    summary.update({name: run.result() for name, run in runs.items()})
    lead = summary["teacher"]["AP"] - summary["baseline"]["AP"]
    for name in runs:
        summary[name]["lead_closed"] = (summary[name]["AP"] - summary["baseline"]["AP"]) / lead if lead > 0 else 0.0
    return summary


def as_table(summary: Dict[str, Dict[str, float]]) -> str:
    rows = []
    for name, result in summary.items():
        row = [LABELS.get(name, name)] + [f"{result[metric]:.1f}" for metric in ("AP", "AP50", "AP75")]
        if name != "teacher":
            row += [result["iterations"], f"{result['seconds']:.0f} s", f"{100 * result['lead_closed']:.0f} %"]
        rows.append(row)
    headers = ["", "AP", "AP50", "AP75", "iterations", "training time", "teacher's lead closed"]
    return tabulate(rows, headers, tablefmt="github", numalign="right", stralign="right", disable_numparse=True)


def load_student(run: Run, cfg: CfgNode) -> Tuple[nn.Module, CfgNode]:
    plain = plain_config(cfg)
    model = build_model(plain)
    SafeCheckpointer(model).load(str(run.folder / "model_final.pth"))
    return model.eval(), plain


def main() -> None:
    args = parse_arguments()
    os.chdir(ROOT)
    config_file, cfg = load_config(args.pair)
    output = args.output or Path("output/quickstart") / args.pair
    output.mkdir(parents=True, exist_ok=True)
    cfg.OUTPUT_DIR = str(output)
    make_shapes_for(cfg)
    register_datasets(cfg)
    runs = train(config_file, cfg, output, args.seed)
    teacher = FrozenTeacher(cfg)
    summary = summarize(quietly(evaluate_teacher, cfg, teacher)["bbox"], runs)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    detectors = {"teacher": (teacher.model, teacher.file.cfg)}
    detectors.update({name: load_student(runs[name], cfg) for name in ("baseline", "distilled")})
    curves = [
        Curve(LABELS[name], [p.seconds for p in run.curve()], [p.metrics["AP"] for p in run.curve()])
        for name, run in runs.items()
    ]
    draw_comparison(output / "comparison.png", curves, summary["teacher"]["AP"], detectors, cfg.DATASETS.TEST[0])
    print(f"\n{as_table(summary)}\n\nFigures: {output / 'summary.json'}   Picture: {output / 'comparison.png'}")


def quietly(function: Any, *args: Any) -> Any:
    """Runs a function without what it and its libraries print."""
    with open(os.devnull, "w") as nothing:
        before, sys.stdout = sys.stdout, nothing
        try:
            return function(*args)
        finally:
            sys.stdout = before


if __name__ == "__main__":
    try:
        main()
    except GDetKDError as error:
        sys.exit(str(error))
