#!/usr/bin/env python
"""Times RoIAlign as sums of rows, as it is on a CPU, against torchvision's, forward and backward, as the map grows.

python benchmarks/roi_align.py [--channels 256] [--regions 256] [--rounds 10]
"""

import argparse
import statistics

from gdetkd.engine.step_costs import time_in_rounds
from gdetkd.losses.roi_align import roi_align_torchvision
from gdetkd.losses.roi_align_cpu import roi_align_cpu
from gdetkd.structures import Regions

import torch  # isort: skip
from detectron2.structures import Boxes
from tabulate import tabulate
from timing import machine

HEIGHTS = (8, 16, 32, 64, 100, 152, 200)  # of maps 4:3
SIZE, SAMPLING_RATIO, STRIDE = (7, 7), 2, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--regions", type=int, default=256, help="of one image")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for height in HEIGHTS:
        width = height * 4 // 3
        features = torch.randn(1, args.channels, height, width, requires_grad=True)
        extent = STRIDE * torch.tensor([width, height])
        corners = torch.rand(args.regions, 2) * extent * 0.7
        sides = (0.05 + 0.25 * torch.rand(args.regions, 2)) * extent
        regions = Regions([Boxes(torch.cat([corners, corners + sides], dim=1))])
        gradient = torch.randn(args.regions, args.channels, *SIZE)

        def sums_of_rows() -> torch.Tensor:
            return roi_align_cpu([features], [STRIDE], regions, SIZE, SAMPLING_RATIO)[:, 0]

        def torchvision() -> torch.Tensor:
            return roi_align_torchvision(features, STRIDE, regions, SIZE, SAMPLING_RATIO)

        works = {
            "sums of rows": lambda: sums_of_rows().backward(gradient),
            "torchvision": lambda: torchvision().backward(gradient),
        }
        middle = {name: statistics.median(values) for name, values in time_in_rounds(works, args.rounds, 2).items()}
        ratio = middle["sums of rows"] / middle["torchvision"]
        rows.append(
            [f"{height}x{width}", height * width, *(f"{value:.4f}" for value in middle.values()), f"{ratio:.2f}"]
        )
    print(f"{machine('cpu')}; {args.regions} regions of one image, {args.channels} channels\n")
    headers = ["map", "cells", "sums of rows, s", "torchvision, s", "ratio"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
