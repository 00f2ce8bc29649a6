#!/usr/bin/env python
"""Distil a student on generated data, and compare it with the student alone: one seed, also at equal time.

python tools/quickstart.py [--pair faster_rcnn-faster_rcnn] [--seed 1] [--output FOLDER]

The tool prints a table and writes summary.json and comparison.png. Start it again to continue where it was stopped.
"""

import argparse
import os
import warnings
from pathlib import Path
from typing import Optional

warnings.filterwarnings("ignore")

from gdetkd.study.comparison import Comparison  # noqa: E402, I001
from gdetkd.errors import GDetKDError
from gdetkd.insight.run import FinishedRun
from gdetkd.study.methods import BASELINE, CONFIGURED
from gdetkd.program import explained_errors
from gdetkd.teacher import FrozenTeacher
from gdetkd.study.picture import draw_comparison
from gdetkd.study.report import describe
from gdetkd.study.summary import as_json, as_markdown, summarize

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair", default="faster_rcnn-faster_rcnn", help="teacher-student, a file in configs/quickstart"
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
    for title, method in (("baseline", BASELINE), ("distilled", CONFIGURED)):
        run = FinishedRun(str(comparison.runs[method, 1.0][0].folder))
        detectors[title] = (run.student(), run.cfg)
    draw_comparison(path, comparison, teacher_ap, detectors)


def main() -> None:
    args = parse_arguments()
    os.chdir(ROOT)
    output = args.output or Path("output/quickstart") / args.pair
    comparison = Comparison(find_config(args.pair), [], output, [CONFIGURED], [args.seed], equal_time=True)
    comparison.prepare()
    teacher_ap = comparison.score_teacher()
    comparison.train(ROOT / "train_net.py", jobs=2)
    rows = summarize(comparison, teacher_ap)
    (output / "summary.json").write_text(as_json(rows, teacher_ap, describe(comparison)))
    draw(output / "comparison.png", comparison, teacher_ap)
    print(f"\n{as_markdown(rows, teacher_ap)}")
    print(f"Figures: {output / 'summary.json'}   Picture: {output / 'comparison.png'}")


if __name__ == "__main__":
    with explained_errors():
        main()
