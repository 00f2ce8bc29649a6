#!/usr/bin/env python
"""Trains and evaluates several methods on one config, data set and teacher, and writes a report.

python tools/compare.py --config-file FILE [--methods none,SGFI,CKD,GDetKD,PKD] [--seeds 3] [--jobs N] [--equal-time]
    [--schedules 1,2,4] [--ablate] [--output DIR] [KEY VALUE ...]

Every method has the same seeds, data order, iterations and initialisation. Complete runs are not repeated and
interrupted ones resume, so a comparison may be stopped and started again, and methods and seeds added. See
docs/compare.md.
"""

import argparse
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

from gdetkd.study.comparison import Comparison  # noqa: E402, I001
from gdetkd.errors import GDetKDError
from gdetkd.config_file import load_config
from gdetkd.study.methods import CONFIGURED, ablation
from gdetkd.program import explained_errors
from gdetkd.study.report import describe, write_report

TRAIN_NET = Path(__file__).resolve().parents[1] / "train_net.py"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="of the distillation that GDetKD names")
    parser.add_argument("--methods", help="by commas; none is always among them. Default: none,SGFI,CKD,GDetKD")
    parser.add_argument("--seeds", type=int, default=3, help="how many; they are 1, 2, ...")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--equal-time", action="store_true", help="also train none for the time of each method")
    parser.add_argument("--schedules", default="1", help="multiples of the config's iterations, by commas")
    parser.add_argument("--ablate", action="store_true", help="the config's components, alone and in conjunction")
    parser.add_argument("--output", type=Path, help="default: output/compare/NAME-OF-FILE")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE changes to the config, for every run")
    return parser.parse_args()


def make_comparison(args: argparse.Namespace) -> Comparison:
    methods = args.methods.split(",") if args.methods else []
    if args.ablate:
        methods = [*ablation(load_config(args.config_file, args.opts)), *methods]
    try:
        schedules = [float(each) for each in args.schedules.split(",")]
    except ValueError as e:
        raise GDetKDError(f"--schedules wants numbers by commas, not {args.schedules!r}.") from e
    if args.jobs < 1:
        raise GDetKDError(f"--jobs is how many trainings run at once, at least 1, not {args.jobs}.")
    output = args.output or Path("output/compare") / Path(args.config_file).stem
    methods = methods or ["SGFI", "CKD", CONFIGURED]
    seeds = range(1, args.seeds + 1)
    return Comparison(args.config_file, args.opts, output, methods, seeds, schedules, args.equal_time)


def main() -> None:
    args = parse_arguments()
    comparison = make_comparison(args)
    comparison.prepare()
    teacher_ap = comparison.score_teacher()
    runs = [run for each in comparison.runs.values() for run in each]
    print(f"{len(runs)} runs, {sum(run.is_complete() for run in runs)} of them complete, in {comparison.output}/runs")
    comparison.train(TRAIN_NET, args.jobs)
    report = comparison.output / "report"
    write_report(report, comparison, teacher_ap, describe(comparison))
    print(f"\n{(report / 'report.md').read_text()}\nReport: {report / 'report.html'}")


if __name__ == "__main__":
    with explained_errors():
        main()
