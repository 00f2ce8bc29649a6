#!/usr/bin/env python
"""Export a trained student as TorchScript, ONNX or a plain Detectron2 config, chosen by the ending of the output.

python tools/export.py --config-file FILE --weights model_final.pth --output student.ts [--image-size 800 1216]

student.ts and student.onnx take an image of any size, (3, H, W) float32, with pixels of 0 to 255 in the channel order
of INPUT.FORMAT. They return boxes (N, 4) xyxy in pixels of that image, scores (N,) and classes (N,).

- TorchScript needs torch and torchvision to run.
- ONNX needs only a runtime. The export needs the package onnx.
- student.yaml is a config for Detectron2 without this package.
"""

import argparse
import io
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Sequence, Tuple

import gdetkd  # noqa: F401  imported first, because it prepares the import of Detectron2
from gdetkd.backbones.config import node_of
from gdetkd.config import without_gdetkd_keys
from gdetkd.config_file import load_config
from gdetkd.config_places import places_of_keys
from gdetkd.engine import build_plain_student
from gdetkd.engine.student_weights import StudentCheckpointer
from gdetkd.errors import GDetKDError, first_line
from gdetkd.files import written_whole
from gdetkd.program import explained_errors

import torch  # isort: skip
import torchvision  # noqa: F401  registers operators that the exported model uses
from detectron2.config import CfgNode, get_cfg
from torch import nn

# The first version with antialiasing, by which a vision transformer resizes its position embedding. RoIAlign is the
# one of Detectron2 from version 16 on.
OPSET = 18
OUTPUTS = ["boxes", "scores", "classes"]


class TensorsOnly(nn.Module):
    """Wrap a Detectron2 detector, so that it takes a tensor and returns tensors."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector.eval()

    def forward(self, image: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        instances = self.detector([{"image": image}])[0]["instances"]
        return instances.pred_boxes.tensor, instances.scores, instances.pred_classes


def export(detector: nn.Module, output: Path, height: int, width: int) -> None:
    """Trace a detector on a random image, and write the file.

    Raises:
        GDetKDError: a package is missing, or the format cannot save an operation of the model.
        OSError: the file cannot be written. An old file stays.
    """
    model, content = TensorsOnly(detector), io.BytesIO()
    example = torch.randint(0, 256, (3, height, width)).float()
    with torch.no_grad(), warnings.catch_warnings(), _whole_splits():
        warnings.simplefilter("ignore")  # tracing warns about every size that becomes a constant
        write = _to_onnx if output.suffix == ".onnx" else _to_torchscript
        write(model, example, content)
    with written_whole(str(output), "wb") as file:
        file.write(content.getbuffer())


@contextmanager
def _whole_splits() -> Iterator[None]:
    """Let a split into one part return the tensor itself. Otherwise tracing fixes its size.

    Detectron2 splits the boxes of a batch by image, and here the batch is one image. The number of its proposals
    depends on the image.
    """
    original = torch.Tensor.split

    def split(tensor: torch.Tensor, sizes: Any, dim: int = 0) -> Sequence[torch.Tensor]:
        is_whole = isinstance(sizes, (list, tuple)) and len(sizes) == 1
        return (tensor,) if is_whole else original(tensor, sizes, dim)

    torch.Tensor.split = split
    try:
        yield
    finally:
        torch.Tensor.split = original


def _to_torchscript(model: nn.Module, example: torch.Tensor, content: io.BytesIO) -> None:
    traced = torch.jit.trace(model, (example,), check_trace=False)
    try:
        torch.jit.save(traced, content)
    except RuntimeError as e:
        raise GDetKDError(
            "The student has an operation that TorchScript cannot save, as cascades of Detectron2 v0.6 have. "
            "Export it to ONNX."
        ) from e


def _to_onnx(model: nn.Module, example: torch.Tensor, content: io.BytesIO) -> None:
    torch.onnx.register_custom_op_symbolic("aten::_upsample_bicubic2d_aa", _resize_smoothly, OPSET)
    try:
        torch.onnx.export(
            model,
            (example,),
            content,
            opset_version=OPSET,
            input_names=["image"],
            output_names=OUTPUTS,
            dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "found"} for name in OUTPUTS}},
            dynamo=False,
        )
    except torch.onnx.errors.UnsupportedOperatorError as e:
        raise GDetKDError(
            f"The student has an operation that ONNX cannot save ({first_line(e)}). Export it to TorchScript."
        ) from e
    except (ImportError, torch.onnx.OnnxExporterError) as e:
        raise GDetKDError(
            f"The export to ONNX needs a package that is not installed ({e}). Run: pip install onnx"
        ) from e


def _resize_smoothly(graph: Any, image: Any, size: Any, align_corners: Any, scales: Any) -> Any:
    """Translate torch's bicubic interpolation with antialiasing, for which torch's exporter has no translation.

    Args:
        graph: the graph to extend, as for all symbolic functions of torch.onnx.
        image: (B, C, H, W).
        size: new height and width, a list of numbers or one tensor.
    """

    def constant(values: List[float], dtype: torch.dtype) -> Any:
        return graph.op("Constant", value_t=torch.tensor(values, dtype=dtype))

    if size.node().kind() == "prim::ListConstruct":
        numbers = [graph.op("Reshape", number, constant([1], torch.int64)) for number in size.node().inputs()]
        size = graph.op("Concat", *numbers, axis_i=0)
    shape = graph.op("Shape", image)
    unchanged = graph.op("Slice", shape, constant([0], torch.int64), constant([2], torch.int64))
    new_shape = graph.op(
        "Concat", unchanged, graph.op("Cast", size, to_i=torch.onnx.TensorProtoDataType.INT64), axis_i=0
    )
    none = constant([], torch.float32)
    return graph.op(
        "Resize",
        image,
        none,
        none,
        new_shape,
        mode_s="cubic",
        antialias_i=1,
        cubic_coeff_a_f=-0.5,  # as torch, which without antialiasing has -0.75
        exclude_outside_i=1,
        coordinate_transformation_mode_s="half_pixel",
    )


def _drop_defaults(node: CfgNode, defaults: CfgNode) -> None:
    """Drop keys with Detectron2's default values, in place, but keep VERSION. Versions of Detectron2 differ in keys."""
    for key in [key for key in node if key in defaults and key != "VERSION"]:
        if isinstance(node[key], CfgNode):
            _drop_defaults(node[key], defaults[key])
        if node[key] == defaults[key] or node[key] == {}:
            del node[key]


def write_plain_config(cfg: CfgNode, weights: str, output: Path) -> None:
    """Write the student's config for plain Detectron2, with the path of the weights.

    A backbone of torchvision or timm keeps its node of keys, which the user adds by `add_backbone_config`.

    Raises:
        GDetKDError: plain Detectron2 cannot build the detector from a yaml file.
    """
    plain = without_gdetkd_keys(cfg)
    if plain.MODEL.META_ARCHITECTURE == "FCOS":
        raise GDetKDError(
            "Plain Detectron2 cannot build FCOS from a yaml file. See docs/deploy.md, or export to .ts or .onnx."
        )
    is_url = "://" in weights
    plain.MODEL.WEIGHTS = weights if is_url else os.path.abspath(os.path.expanduser(weights))
    if node := node_of(cfg):
        plain.MODEL[node].WEIGHTS = ""  # the student's weights replace the ImageNet weights
        print("The config needs gdetkd.backbones.add_backbone_config(cfg) before it is merged: see docs/deploy.md.")
    _drop_defaults(plain, get_cfg())
    with written_whole(str(output)) as file:
        file.write(plain.dump())
    print(output)


def check_output(output: Path, inputs: Iterable[str]) -> None:
    """Check the output before the student is built.

    Args:
        inputs: files that the export reads.

    Raises:
        GDetKDError: the ending is unknown, the output is a folder or one of the inputs, or its folder cannot be made.
    """
    if output.suffix not in (".ts", ".pt", ".onnx", ".yaml"):
        raise GDetKDError(f"{output} has an unknown ending. Use .ts or .pt (TorchScript), .onnx or .yaml.")
    if output.is_dir():
        raise GDetKDError(f"--output {str(output)!r} is a folder. Name a file.")
    if output.resolve() in [Path(path).expanduser().resolve() for path in inputs]:
        raise GDetKDError(f"--output {str(output)!r} is a file that the export reads. Choose another name.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise GDetKDError(f"The folder of --output {str(output)!r} cannot be made ({e.strerror}).") from e


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="config of the student or of the distillation")
    parser.add_argument("--weights", required=True, help="the student's model_final.pth")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--image-size", type=int, nargs=2, default=(800, 1216), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE changes to the config")
    args = parser.parse_args()
    cfg = load_config(args.config_file, args.opts)
    configs = {args.config_file, *(place.file for place in places_of_keys(args.config_file).values())}
    check_output(args.output, [args.weights, *configs])
    on_cpu = cfg.clone()
    on_cpu.MODEL.DEVICE = "cpu"
    student = build_plain_student(on_cpu)
    checkpointer = StudentCheckpointer(student)
    checkpointer.load(args.weights)
    checkpointer.check_whole()
    for problem in checkpointer.check_settings(cfg):
        print(problem, file=sys.stderr)
    if args.output.suffix == ".yaml":
        write_plain_config(cfg, args.weights, args.output)
        return
    export(student, args.output, *args.image_size)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with explained_errors():
        main()
