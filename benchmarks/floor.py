#!/usr/bin/env python
"""Counts what a distillation step has to compute at least: the student's step and the teacher's forward pass, and what
the losses add. Nothing is timed.

python benchmarks/floor.py [--config-file FILE] [--image-size 800 1333] [--images 1] [--regions 512] [--queue N]

FLOPs are torch's count, two for a multiply-add, of matrix products and convolutions. MB kept is what the forward pass
leaves for the backward pass, in float32: written once and read once at least.
"""

import argparse
from typing import Any, Callable, Tuple

from gdetkd.config import plain_config
from gdetkd.config_file import load_config
from gdetkd.detectors import build_adapter
from gdetkd.engine.step_costs import LATE, peak_memory
from gdetkd.losses import build_losses
from gdetkd.structures import DetectorOutputs, DetectorSpec, Regions
from gdetkd.teacher_file import read_teacher_file

import torch  # isort: skip
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from inputs import make_batch
from tabulate import tabulate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

PAIR = "configs/COCO-Detection/faster_rcnn_R_50-faster_rcnn_R_18_1x.yaml"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=PAIR, help="of a two-stage pair")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), default=(800, 1333))
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--regions", type=int, default=512, help="of an image")
    parser.add_argument("--queue", type=int, help="embeddings in CKD's queue; default: of the config")
    return parser.parse_args()


def count(work: Callable[[], Any]) -> Tuple[float, float]:
    """GFLOP and MB kept of a piece of work."""
    with FlopCounterMode(display=False) as counter:
        megabytes = peak_memory(work)
    return counter.get_total_flops() / 1e9, megabytes


def weights(*modules: nn.Module) -> float:
    """MB, in float32."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters()) * 4 / 1e6


def outputs_of(spec: DetectorSpec, regions: Regions, levels: int) -> DetectorOutputs:
    count = len(regions)
    outputs = DetectorOutputs({}, {}, regions)
    outputs.pooled = torch.randn(count, spec.channels, *spec.pooled_size)
    outputs.embeddings = torch.randn(count, spec.embedding_dim, requires_grad=levels > 0)
    if levels:
        cells = torch.randn(count, levels, *spec.pooled_size, spec.channels, requires_grad=True)
        outputs.level_pooled = cells.permute(0, 1, 4, 2, 3)
    return outputs


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", args.regions]
    opts += [] if args.queue is None else ["DISTILL.CKD.QUEUE_SIZE", args.queue]
    cfg = load_config(args.config_file, opts)
    student, teacher = build_model(plain_config(cfg)).train(), read_teacher_file(cfg).build().eval()
    batch = make_batch(args.images, *args.image_size)
    specs = tuple(build_adapter(model, "student", cfg).spec for model in (student, teacher))
    regions = Regions([Boxes(torch.rand(args.regions, 4)) for _ in range(args.images)])
    pair = outputs_of(specs[0], regions, len(specs[0].strides)), outputs_of(specs[1], regions, 0)
    cfg.DISTILL.LOSSES = ("SGFI", "CKD")
    losses = build_losses(cfg, *specs)
    queue = losses["CKD"].queue
    queue.push(torch.randn_like(queue.embeddings))

    def step() -> None:
        with EventStorage(LATE):
            sum(student(batch).values()).backward()

    @torch.no_grad()
    def look() -> None:
        teacher.backbone(teacher.preprocess_image(batch).tensor)
        teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pair[1].pooled))

    rows = [("student's step", *count(step), weights(student)), ("teacher's forward", *count(look), weights(teacher))]
    floor = rows[0][1] + rows[1][1]
    rows += [
        (name, *count(lambda loss=loss: loss.compute(*pair).backward()), weights(loss)) for name, loss in losses.items()
    ]
    table = [
        [name, f"{flop:.1f}", f"{100 * flop / floor:.1f} %", f"{kept:.0f}", f"{mb:.0f}"]
        for name, flop, kept, mb in rows
    ]
    print(f"{args.images} of {args.image_size[0]}x{args.image_size[1]}, {args.regions} regions each\n")
    headers = ["", "GFLOP", "of the floor", "MB kept", "MB of weights"]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
