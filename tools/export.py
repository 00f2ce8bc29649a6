#!/usr/bin/env python
"""Exports a trained student: TorchScript, ONNX or plain Detectron2's config, as the output's ending says.

python tools/export.py --config-file FILE --weights model_final.pth --output student.ts [--image-size 800 1216]

student.ts and student.onnx take one image, (3, H, W) float32 pixels of 0 to 255 in the channel order of INPUT.FORMAT,
of any size, and return boxes (N, 4) xyxy in pixels of that image, scores (N,) and classes (N,). TorchScript needs torch
and torchvision to run, ONNX a runtime alone; exporting to it wants the package onnx. student.yaml is a config for
Detectron2 without this package.
"""

import argparse
import os
import warnings
from pathlib import Path
from typing import Tuple

import gdetkd  # noqa: F401  it prepares the import of Detectron2
from gdetkd.config import without_gdetkd_keys
from gdetkd.config_file import load_config
from gdetkd.engine import build_plain_student
from gdetkd.engine.student_weights import StudentCheckpointer
from gdetkd.errors import GDetKDError
from gdetkd.program import explained_errors

import torch  # isort: skip
import torchvision  # noqa: F401  its operators are part of what is exported
from detectron2.config import CfgNode
from torch import nn

OPSET = 16  # the first with RoIAlign as Detectron2 means it
OUTPUTS = ["boxes", "scores", "classes"]


class TensorsOnly(nn.Module):
    """A Detectron2 detector with a tensor for an argument and tensors for a result."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector.eval()

    def forward(self, image: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = self.detector([{"image": image}])[0]["instances"]
        return found.pred_boxes.tensor, found.scores, found.pred_classes


def export(detector: nn.Module, output: Path, height: int, width: int) -> None:
    """Traces a detector on one made-up image.

    Raises:
        GDetKDError: the ending is not one of those, a package is missing, or TorchScript cannot hold the model.
    """
    model = TensorsOnly(detector)
    example = torch.randint(0, 256, (3, height, width)).float()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of each size that it takes for a constant
        if output.suffix in (".ts", ".pt"):
            _to_torchscript(model, example, output)
        elif output.suffix == ".onnx":
            _to_onnx(model, example, output)
        else:
            raise GDetKDError(f"{output}: the ending has to be .ts or .pt (TorchScript), .onnx or .yaml.")


def _to_torchscript(model: nn.Module, example: torch.Tensor, output: Path) -> None:
    traced = torch.jit.trace(model, (example,), check_trace=False)
    try:
        traced.save(str(output))
    except RuntimeError as e:
        output.unlink(missing_ok=True)  # torch has written the part before the operation
        raise GDetKDError(
            "The student holds an operation that TorchScript cannot save, as the cascades of Detectron2 v0.6 do. "
            "Export it to ONNX."
        ) from e


def _to_onnx(model: nn.Module, example: torch.Tensor, output: Path) -> None:
    try:
        torch.onnx.export(
            model,
            (example,),
            str(output),
            opset_version=OPSET,
            input_names=["image"],
            output_names=OUTPUTS,
            dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "found"} for name in OUTPUTS}},
            dynamo=False,
        )
    except (ImportError, torch.onnx.OnnxExporterError) as e:
        raise GDetKDError(f"Exporting to ONNX needs packages that are not here ({e}): pip install onnx") from e


def write_plain_config(cfg: CfgNode, weights: str, output: Path) -> None:
    """
    Raises:
        GDetKDError: plain Detectron2 cannot name the detector in a yaml file.
    """
    plain = without_gdetkd_keys(cfg)
    if plain.MODEL.META_ARCHITECTURE == "FCOS":
        raise GDetKDError(
            "Plain Detectron2 cannot name FCOS in a yaml file: see docs/deploy.md, or export to .ts or .onnx."
        )
    plain.MODEL.WEIGHTS = os.path.abspath(weights)
    output.write_text(plain.dump())
    print(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="the student's, or of its distillation")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--image-size", type=int, nargs=2, default=(800, 1216), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE changes to the config")
    args = parser.parse_args()
    cfg = load_config(args.config_file, args.opts)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.output.suffix == ".yaml":
        write_plain_config(cfg, args.weights, args.output)
        return
    cfg.MODEL.DEVICE = "cpu"
    student = build_plain_student(cfg)
    checkpointer = StudentCheckpointer(student)
    checkpointer.load(args.weights)
    checkpointer.check_whole()
    export(student, args.output, *args.image_size)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with explained_errors():
        main()
