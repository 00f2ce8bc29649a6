#!/usr/bin/env python
"""Get torchvision's ImageNet weights as a file for a detector's backbone.

python tools/convert_torchvision.py resnet18 weights/R-18.pth [--input resnet18.pth]
python tools/convert_torchvision.py mobilenet_v2 weights/mobilenet_v2.pth

The tool downloads the weights unless --input names a torchvision file. It writes one of two files:

- A ResNet for Detectron2's own ResNets, with Detectron2's names, for MODEL.WEIGHTS. Detectron2's model zoo has no
  ResNet-18 or 34. From ResNet-50 on, set MODEL.RESNETS.STRIDE_IN_1X1 False, too.
- Any other model, or a ResNet with --keep-names, for MODEL.TORCHVISION.WEIGHTS (docs/backbones.md).

The detector that reads the result needs torchvision's preprocessing:

- INPUT.FORMAT "RGB"
- MODEL.PIXEL_MEAN [123.675, 116.280, 103.530]
- MODEL.PIXEL_STD [58.395, 57.120, 57.375]

A file for MODEL.WEIGHTS holds these values, too, and GDetKD warns if the student's config has others.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Dict, Optional

from gdetkd.program import explained_errors
from gdetkd.safe_load import read_weights
from gdetkd.trained_with import TORCHVISION
from gdetkd.weights_layout import with_model

import torch  # isort: skip
import torchvision

# Architectures that Detectron2 builds itself start like this.
RESNETS = ("resnet", "resnext", "wide_resnet")
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
    if architecture not in torchvision.models.list_models(torchvision.models):
        sys.exit(f"torchvision has no classifier {architecture!r}. Choose one, such as resnet18 or mobilenet_v2.")
    if path is not None:
        return with_model(read_weights(str(path)), str(path))["model"]
    return torchvision.models.get_model(architecture, weights="IMAGENET1K_V1").state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", help="such as resnet18, resnext101_32x8d, mobilenet_v2")
    parser.add_argument("output", type=Path, help="the weights file to write")
    parser.add_argument("--input", type=Path, help="a torchvision weights file, instead of a download")
    parser.add_argument("--keep-names", action="store_true", help="write a ResNet for MODEL.TORCHVISION.WEIGHTS")
    args = parser.parse_args()
    weights = load(args.architecture, args.input)
    renames = args.architecture.startswith(RESNETS) and not args.keep_names
    if renames and ("conv1.weight" not in weights or "layer4.0.conv1.weight" not in weights):
        sys.exit(f"{args.input or args.architecture} does not hold a torchvision ResNet. Choose one, such as resnet18.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # From ResNet-50 on, a block has three convolutions, and torchvision's second one has the stride.
    stride = {"MODEL.RESNETS.STRIDE_IN_1X1": False} if "layer1.0.conv3.weight" in weights else {}
    content = {"model": convert(weights), "settings": {**TORCHVISION, **stride}} if renames else {"model": weights}
    torch.save(content, args.output)
    key = "MODEL.WEIGHTS" if renames else "MODEL.TORCHVISION.WEIGHTS"
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, for {key}")


if __name__ == "__main__":
    with explained_errors():
        main()
