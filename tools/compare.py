#!/usr/bin/env python
"""Train and evaluate several methods on one config, dataset and teacher, and write a report.

python tools/compare.py --config-file FILE [--methods none,SGFI,CKD,GDetKD,PKD] [--seeds 3] [--jobs N] [--equal-time]
    [--schedules 1,2,4] [--ablate] [--output DIR] [--executor slurm --slurm partition=NAME time=MINUTES ...]
    [KEY VALUE ...]

Every method has the same seeds, data order, iterations and initialisation. You can stop a comparison and start it
again, or add methods and seeds: complete runs are not repeated, and interrupted runs resume. See docs/compare.md.
"""

import argparse
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

from gdetkd.study.comparison import Comparison  # noqa: E402, I001
from gdetkd.study.cluster import parse_parameters, slurm_executor
from gdetkd.study.executors import Executor, LocalExecutor
from gdetkd.errors import GDetKDError
from gdetkd.config_file import load_config
from gdetkd.study.methods import CONFIGURED, ablation
from gdetkd.program import explained_errors
from gdetkd.study.report import describe, write_report

TRAIN_NET = Path(__file__).resolve().parents[1] / "train_net.py"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="config of a distillation, as the method GDetKD uses it")
    parser.add_argument("--methods", help="separated by commas; none is always included. Default: none,SGFI,CKD,GDetKD")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; the seeds are 1, 2, ...")
    parser.add_argument(
        "--jobs", type=int, help="number of trainings that run at once; default: 1, or all with --executor slurm"
    )
    parser.add_argument("--equal-time", action="store_true", help="also train none for the time of each method")
    parser.add_argument("--schedules", default="1", help="multiples of the config's iterations, separated by commas")
    parser.add_argument("--ablate", action="store_true", help="compare the config's components, alone and joined")
    parser.add_argument(
        "--output", type=Path, help="folder of the runs and the report; default: output/compare/NAME-OF-FILE"
    )
    parser.add_argument(
        "--executor", choices=("local", "slurm"), default="local", help="train on this machine, or in jobs of SLURM"
    )
    parser.add_argument(
        "--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="parameters of a job, such as partition=gpu time=60"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE changes to the config, for every run")
    args = parser.parse_args()
    # argparse gives the changes to the config that follow --slurm to --slurm.
    count = next((i for i, word in enumerate(args.slurm) if "=" not in word), len(args.slurm))
    args.slurm, args.opts = args.slurm[:count], [*args.slurm[count:], *args.opts]
    return args


def make_comparison(args: argparse.Namespace) -> Comparison:
    methods = args.methods.split(",") if args.methods else []
    if args.ablate:
        methods = [*ablation(load_config(args.config_file, args.opts)), *methods]
    try:
        schedules = [float(number) for number in args.schedules.split(",")]
    except ValueError as e:
        raise GDetKDError(f"--schedules is {args.schedules!r}. Give numbers separated by commas, such as 1,2,4.") from e
    if args.jobs is not None and args.jobs < 1:
        raise GDetKDError(f"--jobs is {args.jobs}. Give the number of trainings that run at once, at least 1.")
    output = args.output or Path("output/compare") / Path(args.config_file).stem
    methods = methods or ["SGFI", "CKD", CONFIGURED]
    seeds = range(1, args.seeds + 1)
    return Comparison(args.config_file, args.opts, output, methods, seeds, schedules, args.equal_time)


def make_executor(args: argparse.Namespace, comparison: Comparison) -> Executor:
    """Return what starts the trainings. All of them may be in SLURM's queue at once, unless --jobs says less."""
    if args.executor == "slurm":
        jobs = args.jobs or 2 * sum(map(len, comparison.runs.values()))  # with those at equal time
        return slurm_executor((comparison.output / "slurm").resolve(), jobs, parse_parameters(args.slurm))
    if args.slurm:
        raise GDetKDError("--slurm has no effect with --executor local. Add --executor slurm, or leave it out.")
    return LocalExecutor(args.jobs or 1)


def main() -> None:
    args = parse_arguments()
    comparison = make_comparison(args)
    executor = make_executor(args, comparison)
    comparison.prepare()
    teacher_ap = comparison.score_teacher()
    runs = [run for seeds in comparison.runs.values() for run in seeds]
    print(f"{len(runs)} runs, {sum(run.is_complete() for run in runs)} of them complete, in {comparison.output}/runs")
    comparison.train(TRAIN_NET, executor)
    report = comparison.output / "report"
    write_report(report, comparison, teacher_ap, describe(comparison, executor.machine))
    print(f"\n{(report / 'report.md').read_text()}\nReport: {report / 'report.html'}")


if __name__ == "__main__":
    with explained_errors():
        main()
