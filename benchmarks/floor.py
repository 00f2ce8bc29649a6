#!/usr/bin/env python
"""Count the least work of a distillation step: the student's step, the teacher's forward pass and the losses.

The tool measures no time.

python benchmarks/floor.py [--config-file FILE] [--image-size 800 1333] [--images 1] [--regions 512] [--queue N]

FLOPs are torch's count for matrix products and convolutions. A multiply-add counts as two. "MB kept" is the memory that
the forward pass keeps for the backward pass, in float32.
"""

import argparse
from typing import Any, Callable, Tuple

from gdetkd.config import plain_config
from gdetkd.config_file import load_config
from gdetkd.detectors import build_adapter
from gdetkd.engine.step_costs import LATE, peak_memory
from gdetkd.losses import build_losses
from gdetkd.structures import DetectorOutputs, DetectorSpec, Regions
from gdetkd.teacher import read_teacher_file

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
    parser.add_argument("--config-file", default=PAIR, help="a pair of two-stage detectors")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), default=(800, 1333))
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--regions", type=int, default=512, help="regions of each image")
    parser.add_argument("--queue", type=int, help="embeddings in CKD's queue; default: the config's")
    return parser.parse_args()


def count(work: Callable[[], Any]) -> Tuple[float, float]:
    """Return the GFLOP and the MB kept of a piece of work."""
    with FlopCounterMode(display=False) as counter:
        megabytes = peak_memory(work)
    return counter.get_total_flops() / 1e9, megabytes


def weights(*modules: nn.Module) -> float:
    """Return the size of all parameters of the modules in MB, in float32."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters()) * 4 / 1e6


def made_up_embeddings(spec: DetectorSpec, regions: Regions, train: bool) -> DetectorOutputs:
    """Return outputs that hold a random embedding of each region, (N, D)."""
    outputs = DetectorOutputs({}, {}, regions)
    outputs.embeddings = torch.randn(len(regions), spec.embedding_dim, requires_grad=train)
    return outputs


def made_up_regions(student: DetectorSpec, teacher: DetectorSpec, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return random features of N regions: the student's on all levels, and the teacher's. RoIAlign is not counted.

    Returns:
        the student's features (N, L, C_S, H, W), channels last in memory as RoIAlign returns them, and the teacher's
        features (N, C_T, H, W).
    """

    cells = torch.randn(count, len(student.strides), *teacher.pooled_size, student.channels, requires_grad=True)
    return cells.permute(0, 1, 4, 2, 3), torch.randn(count, teacher.channels, *teacher.pooled_size)


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
    pair = made_up_embeddings(specs[0], regions, train=True), made_up_embeddings(specs[1], regions, train=False)
    student_rois, teacher_rois = made_up_regions(*specs, len(regions))
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
        teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(teacher_rois))

    rows = [("student's step", *count(step), weights(student)), ("teacher's forward", *count(look), weights(teacher))]
    floor = rows[0][1] + rows[1][1]
    works = {
        "SGFI": lambda: losses["SGFI"].imitate(student_rois, teacher_rois).backward(),
        "CKD": lambda: losses["CKD"].compute(*pair).backward(),
    }
    rows += [(name, *count(work), weights(losses[name])) for name, work in works.items()]
    table = [
        [name, f"{flop:.1f}", f"{100 * flop / floor:.1f} %", f"{kept:.0f}", f"{mb:.0f}"]
        for name, flop, kept, mb in rows
    ]
    print(f"{args.images} of {args.image_size[0]}x{args.image_size[1]}, {args.regions} regions each\n")
    headers = ["", "GFLOP", "of the floor", "MB kept", "MB of weights"]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
