#!/usr/bin/env python
"""Convert torchvision's ImageNet weights of a ResNet to the backbone of a Detectron2 detector with an FPN.

python tools/convert_torchvision.py resnet18 weights/R-18.pth [--input resnet18.pth]

Detectron2's model zoo has no ResNet-18 or 34. The tool downloads the weights unless --input names a torchvision file.
The detector that reads the result needs torchvision's preprocessing:

- INPUT.FORMAT "RGB"
- MODEL.PIXEL_MEAN [123.675, 116.280, 103.530]
- MODEL.PIXEL_STD [58.395, 57.120, 57.375]
- from ResNet-50 on also MODEL.RESNETS.STRIDE_IN_1X1 False
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Dict, Optional

import torch
import torchvision

# Name of an FPN's ResNet in Detectron2.
PREFIX = "backbone.bottom_up."
# Patterns of torchvision's names and the replacements for Detectron2, applied in this order.
RENAMES = [
    (r"^(conv|bn)1\.", r"stem.\g<1>1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.bn(\d)\.", r".conv\g<1>.norm."),
]


def convert(weights: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return the tensors of a torchvision ResNet under Detectron2's names, without the classifier."""
    converted = {}
    for name, tensor in weights.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        converted[PREFIX + name] = tensor
    return converted


def load(architecture: str, path: Optional[Path]) -> Dict[str, torch.Tensor]:
    """Return torchvision's weights from a file, or download them if there is no file."""
    if path is not None:
        return torch.load(path, map_location="cpu", weights_only=True)
    return torchvision.models.get_model(architecture, weights="IMAGENET1K_V1").state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", help="such as resnet18, resnet34, resnet50, resnext101_32x8d")
    parser.add_argument("output", type=Path, help="the weights file to write")
    parser.add_argument("--input", type=Path, help="a torchvision weights file, instead of a download")
    args = parser.parse_args()
    weights = load(args.architecture, args.input)
    if "conv1.weight" not in weights or "layer4.0.conv1.weight" not in weights:
        sys.exit(f"{args.input or args.architecture} does not hold a torchvision ResNet. Choose one, such as resnet18.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": convert(weights)}, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
