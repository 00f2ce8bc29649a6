#!/usr/bin/env python
"""Show what distillation did in a finished run: levels, classes, loss terms, AP and detections.

python tools/insight.py RUN [--baseline RUN] [--images 32]

RUN is the OUTPUT_DIR of a distillation. Start the tool in the folder where the training was started. It writes
RUN/insight/index.html from the records of DISTILL.INSIGHT.PERIOD. If there are none, it reads the checkpoints, and
the page has no gradients. See docs/insight.md.
"""

import argparse
import warnings

warnings.filterwarnings("ignore")

from gdetkd.data import register_test_sets  # noqa: E402, I001
from gdetkd.data.shapes import make_shapes_for
from gdetkd.distiller import GDetKD
from gdetkd.errors import GDetKDError
from gdetkd.insight.page import PAGE, write_page
from gdetkd.insight.probe import Probe, load_probe
from gdetkd.insight.records import RecordFile, make_record
from gdetkd.insight.references import look_at_references
from gdetkd.insight.run import FinishedRun, load_checkpoint
from gdetkd.program import explained_errors

from detectron2.config import CfgNode
from tqdm import tqdm

SOURCE = "checkpoints"  # marks the records that this tool made


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the OUTPUT_DIR of a finished distillation")
    parser.add_argument("--baseline", default="", help="the OUTPUT_DIR of the student trained alone")
    parser.add_argument(
        "--images",
        type=int,
        help="number of labelled images of DATASETS.TEST; default: DISTILL.INSIGHT.IMAGES of the run, the only number "
        "possible if the training made records",
    )
    return parser.parse_args()


def configure(run: FinishedRun, args: argparse.Namespace) -> CfgNode:
    cfg = run.cfg
    if cfg.MODEL.META_ARCHITECTURE != "GDetKD" or not cfg.DISTILL.LOSSES:
        raise GDetKDError(
            f"{args.run!r} is a run without distillation losses, so there is nothing to show. Name a distillation."
        )
    cfg.DISTILL.INSIGHT.BASELINE = args.baseline or cfg.DISTILL.INSIGHT.BASELINE
    cfg.DISTILL.INSIGHT.IMAGES = args.images or cfg.DISTILL.INSIGHT.IMAGES
    make_shapes_for(cfg)
    register_test_sets(cfg)
    return cfg


def look_at_checkpoints(run: FinishedRun, distiller: GDetKD, probe: Probe, file: RecordFile) -> None:
    """Make the records that are missing if the training made none. Leave the distiller with the last weights."""
    checkpoints, records = run.checkpoints(), file.read()
    are_of_training = any(record.get("source") != SOURCE for record in records)
    if records and records[-1]["objects"] != len(probe.classes):
        if are_of_training:
            raise GDetKDError(
                f"The records of the training show {records[-1]['objects']} objects, but the images now have "
                f"{len(probe.classes)}. Leave out --images, and use the dataset of the training."
            )
        file.start_at(0)  # an earlier call of this tool showed other images
        records = []
    if not are_of_training:
        done = {record["iterations"] for record in records}
        missing = [(iterations, path) for iterations, path in checkpoints if iterations not in done]
        for iterations, path in tqdm(missing, desc="reading checkpoints", disable=not missing):
            load_checkpoint(distiller, path)
            file.add({**make_record(distiller, probe, iterations), "gradients": None, "source": SOURCE})
    load_checkpoint(distiller, checkpoints[-1][1])


def main() -> None:
    args = parse_arguments()
    run = FinishedRun(args.run)
    cfg = configure(run, args)
    baseline = FinishedRun(cfg.DISTILL.INSIGHT.BASELINE) if cfg.DISTILL.INSIGHT.BASELINE else None
    distiller = GDetKD(cfg).to(cfg.MODEL.DEVICE)  # the losses too, as `build_model` does it in a training
    probe = load_probe(cfg, distiller.teacher)
    file = RecordFile(args.run)
    look_at_checkpoints(run, distiller, probe, file)
    write_page(file, cfg, distiller.student, probe, look_at_references(distiller.teacher, probe, baseline))
    print(f"Page: {file.folder / PAGE}")


if __name__ == "__main__":
    with explained_errors():
        main()
