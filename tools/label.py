#!/usr/bin/env python
"""Label images with the teacher of a distillation, so that the student can also train on them.

python tools/label.py --config-file FILE (--images FOLDER | --dataset NAME) --output pseudo.json
torchrun --nproc-per-node N tools/label.py --config-file FILE ...

It writes a COCO JSON with boxes and scores, and pseudo.html with sample images to look at. The score threshold of each
class is chosen on the labelled images of DATASETS.TEST. A killed run continues when it is started again. The boxes of
other programs can replace the teacher's: --results or --onnx. See docs/unlabeled.md.
"""

import logging
import warnings
from argparse import REMAINDER, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Dict, List, Optional

warnings.filterwarnings("ignore")

import gdetkd  # noqa: F401, I001  imported first, because it prepares the import of Detectron2
from gdetkd.data.shapes import make_shapes_for
from gdetkd.engine.launch import run_everywhere
from gdetkd.engine.setup import read_config
from gdetkd.errors import GDetKDError
from gdetkd.labelling.onnx_source import OnnxModel
from gdetkd.labelling.run import Options, label_images
from gdetkd.program import explained_errors

from detectron2.utils import comm  # isort: skip
from detectron2.utils.logger import setup_logger


def parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the distillation")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--images", default="", metavar="FOLDER", help="folder of the images, with its subfolders")
    images.add_argument("--dataset", default="", metavar="NAME", help="registered dataset of the images")
    parser.add_argument("--output", type=Path, required=True, help="the COCO JSON to write")
    parser.add_argument("--floor", type=float, default=0.05, help="lowest score of a written box; default: 0.05")
    thresholds = parser.add_argument_group("thresholds")
    thresholds.add_argument("--validation", default="", metavar="NAME", help="default: the first of DATASETS.TEST")
    thresholds.add_argument("--min-score", type=float, help="threshold of all classes, in place of a choice")
    thresholds.add_argument("--thresholds", default="", metavar="CLASS=SCORE,...", help="thresholds of single classes")
    others = parser.add_argument_group("boxes of another program")
    others.add_argument("--results", default="", metavar="FILE.json", help="COCO results in place of the teacher")
    others.add_argument("--annotations", default="", metavar="FILE.json", help="images and categories of --results")
    others.add_argument("--validation-results", default="", metavar="FILE.json", help="results on the validation data")
    others.add_argument("--onnx", default="", metavar="FILE", help="ONNX model in place of the teacher")
    others.add_argument("--onnx-outputs", default="", metavar="BOXES,SCORES,CLASSES", help="names of the outputs")
    others.add_argument("--onnx-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="size of the input")
    others.add_argument("--onnx-format", default="", choices=["RGB", "BGR"], help="default: INPUT.FORMAT")
    others.add_argument("--onnx-scale", type=float, default=1.0, help="factor of the pixels, such as 0.00392")
    others.add_argument("--onnx-classes", default="", metavar="NAME,...", help="default: the student's classes")
    page = parser.add_argument_group("page")
    page.add_argument("--page-images", type=int, default=24, help="number of sample images; default: 24")
    page.add_argument("--seed", type=int, default=0, help="chooses the sample images")
    parser.add_argument("--timeout", type=float, default=30, help="minutes that a process waits for another")
    parser.add_argument("opts", nargs=REMAINDER, metavar="KEY VALUE", help="changes to the config")
    # The launcher of trainings also reads these.
    parser.set_defaults(check=False, num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")
    return parser


def options(args: Namespace) -> Options:
    taken = "output images dataset floor min_score validation results annotations validation_results page_images seed"
    values = {name: getattr(args, name) for name in taken.split()}
    return Options(thresholds=_thresholds(args.thresholds), onnx=_onnx_model(args), **values)


def _onnx_model(args: Namespace) -> Optional[OnnxModel]:
    if not args.onnx:
        return None
    size = tuple(args.onnx_size) if args.onnx_size else None
    outputs, classes = _names(args.onnx_outputs), _names(args.onnx_classes)
    return OnnxModel(args.onnx, outputs, size, args.onnx_format, args.onnx_scale, classes)


def _names(text: str) -> List[str]:
    return [name.strip() for name in text.split(",")] if text else []


def _thresholds(text: str) -> Dict[str, float]:
    thresholds = {}
    for word in _names(text):
        name, _, score = word.rpartition("=")
        try:
            thresholds[name] = float(score)
        except ValueError as e:
            raise GDetKDError(f"--thresholds has {word!r}. Write CLASS=SCORE, for example car=0.5,person=0.4.") from e
    return thresholds


def main(args: Namespace) -> None:
    setup_logger(distributed_rank=comm.get_rank(), name="gdetkd")
    if not comm.is_main_process():
        logging.getLogger("gdetkd").addHandler(logging.NullHandler())  # warnings are shown once
    cfg = read_config(args, trains=False)
    if comm.is_main_process():
        make_shapes_for(cfg)
    comm.synchronize()
    label_images(cfg, options(args))


if __name__ == "__main__":
    with explained_errors():
        run_everywhere(main, parser().parse_args())
