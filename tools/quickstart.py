#!/usr/bin/env python
"""Distil a student on generated data, and compare it with the student alone: one seed, also at equal time.

python tools/quickstart.py [--pair faster_rcnn-faster_rcnn_unlabeled] [--seed 1] [--output FOLDER]

If the config of the pair has images without labels, the teacher labels them, and the student also learns from them. The
tool prints a table and writes summary.json and comparison.png. Start it again to continue where it was stopped.
"""

import argparse
import os
import warnings
from pathlib import Path
from typing import Optional

warnings.filterwarnings("ignore")

from gdetkd.config_file import load_config  # noqa: E402, I001
from gdetkd.data.folders import resolve
from gdetkd.data.shapes import make_shapes_for
from gdetkd.errors import GDetKDError
from gdetkd.insight.run import FinishedRun
from gdetkd.labelling.run import Options, label_images
from gdetkd.study.comparison import Comparison
from gdetkd.study.executors import LocalExecutor
from gdetkd.study.methods import CONFIGURED, WITH_UNLABELED
from gdetkd.program import explained_errors
from gdetkd.teacher import FrozenTeacher
from gdetkd.study.picture import LABELS, draw_comparison
from gdetkd.study.report import describe
from gdetkd.study.summary import summarize
from gdetkd.study.table import as_json, as_markdown

import torch  # isort: skip
from detectron2.config import CfgNode

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair", default="faster_rcnn-faster_rcnn_unlabeled", help="teacher-student, a file in configs/quickstart"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: output/quickstart/PAIR")
    return parser.parse_args()


def find_config(pair: str) -> str:
    path = f"configs/quickstart/{pair}.yaml"
    if not os.path.exists(path):
        files = Path("configs/quickstart").glob("*-*.yaml")
        pairs = sorted(file.stem for file in files if not file.stem.startswith(("Base-", "teacher-")))
        raise GDetKDError(f"There is no pair {pair!r}. Choose from: {', '.join(pairs)}.")
    return path


def draw(path: Path, comparison: Comparison, teacher_ap: Optional[float]) -> None:
    teacher = FrozenTeacher(comparison.cfg)
    detectors = {"teacher": (teacher.model, teacher.file.cfg)}
    for method in comparison.methods:
        run = FinishedRun(str(comparison.runs[method, 1.0][0].folder))
        detectors[LABELS.get(method, "baseline")] = (run.student(), run.cfg)
    draw_comparison(path, comparison, teacher_ap, detectors)


def label_images_of(cfg: CfgNode) -> None:
    """Let the teacher label the images of DATASETS.UNLABELED, unless that is done already."""
    make_shapes_for(cfg)
    for entry in [entry for entry in cfg.DATASETS.REGISTER if entry["name"] in cfg.DATASETS.UNLABELED]:
        labels = Path(resolve(entry["json"]))
        if not labels.exists():
            print(f"The teacher labels the images in {entry['images']}.")
            label_images(cfg, Options(labels, images=resolve(entry["images"])))


def main() -> None:
    args = parse_arguments()
    os.chdir(ROOT)
    output = args.output or Path("output/quickstart") / args.pair
    config = find_config(args.pair)
    cfg = load_config(config, [] if torch.cuda.is_available() else ["MODEL.DEVICE", "cpu"])
    label_images_of(cfg)
    methods = [CONFIGURED, WITH_UNLABELED] if cfg.DATASETS.UNLABELED else [CONFIGURED]
    comparison = Comparison(config, [], output, methods, [args.seed], equal_time=True, one_longer=True)
    comparison.prepare()
    teacher_ap = comparison.score_teacher()
    comparison.train(ROOT / "train_net.py", LocalExecutor(jobs=2))
    rows = summarize(comparison, teacher_ap)
    (output / "summary.json").write_text(as_json(rows, teacher_ap, describe(comparison)))
    draw(output / "comparison.png", comparison, teacher_ap)
    print(f"\n{as_markdown(rows, teacher_ap)}")
    print(f"Figures: {output / 'summary.json'}   Picture: {output / 'comparison.png'}")


if __name__ == "__main__":
    with explained_errors():
        main()
