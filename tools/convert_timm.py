#!/usr/bin/env python
"""Get timm's ImageNet weights as a file for MODEL.TIMM.WEIGHTS.

python tools/convert_timm.py mobilenetv4_conv_small weights/mobilenetv4.pth
python tools/convert_timm.py tf_efficientnet_lite0 weights/lite0.pth --input efficientnet-lite0-57934424.pth

The tool downloads the weights unless --input names a file. It reads three kinds of files:

- a .safetensors file of timm, as the Hugging Face hub has them,
- a file of torch with timm's names,
- a file with the names of EfficientNet-PyTorch ("_blocks.0._bn1.weight"), for timm's tf_efficientnet models. The
  models without "tf_" pad images in another way.

docs/backbones.md says which images the weights expect.
"""

import argparse
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from gdetkd.program import explained_errors
from gdetkd.safe_load import read_weights
from gdetkd.weights_layout import with_model

import timm  # isort: skip
import torch
from torch import nn

# Names of EfficientNet-PyTorch outside of the blocks, and timm's.
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# Names in a block that widens the channels first, and in a block that does not.
INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}


def read(path: Path) -> Dict[str, torch.Tensor]:
    """Return the tensors of a file, without running code that it may hold."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # timm brings it

        return load_file(str(path))
    return with_model(read_weights(str(path)), str(path))["model"]


def with_timms_names(weights: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Return the tensors of a file of EfficientNet-PyTorch under timm's names. Other files stay as they are."""
    if "_conv_stem.weight" not in weights:
        return weights
    names = dict(_renames(model))
    return {names.get(name.rpartition(".")[0], "") + "." + name.rpartition(".")[2]: weights[name] for name in weights}


def _renames(model: nn.Module) -> Iterator[Tuple[str, str]]:
    """Yield pairs of names of modules: EfficientNet-PyTorch's and timm's. Timm groups the blocks by stage."""
    yield from OUTSIDE.items()
    blocks = [(f"blocks.{s}.{b}", block) for s, stage in enumerate(model.blocks) for b, block in enumerate(stage)]
    for index, (name, block) in enumerate(blocks):
        inside = INVERTED if hasattr(block, "conv_pwl") else SEPARABLE
        yield from ((f"_blocks.{index}.{given}", f"{name}.{own}") for given, own in {**inside, **SQUEEZE}.items())


def load(name: str, path: Optional[Path]) -> Dict[str, torch.Tensor]:
    """Return the weights of a model under timm's names, complete except for the classifier.

    Raises:
        SystemExit: timm has no such model, or the file belongs to another model.
    """
    if not timm.is_model(name):
        sys.exit(f"timm has no model {name!r}. Choose one of timm.list_models().")
    model = timm.create_model(name, pretrained=path is None)
    if path is None:
        return model.state_dict()
    given = read(path)
    if "_conv_stem.weight" in given and not name.startswith("tf_"):
        sys.exit(
            f"{path} is a file of EfficientNet-PyTorch, and {name} pads images in another way, which spoils its "
            f"weights. Convert the file for tf_{name.partition('.')[0]}."
        )
    weights, own = with_timms_names(given, model), model.state_dict()
    classifier = model.get_classifier()
    head = {name for name, module in model.named_modules() if module is classifier}
    wrong: List[str] = [
        tensor
        for tensor in own
        if tensor.rpartition(".")[0] not in head
        and not tensor.endswith("num_batches_tracked")
        and (tensor not in weights or weights[tensor].shape != own[tensor].shape)
    ]
    if wrong:
        sys.exit(f"{path} lacks {len(wrong)} of the {len(own)} tensors of {name}, such as {wrong[0]}.")
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the value of MODEL.TIMM.NAME")
    parser.add_argument("output", type=Path, help="the weights file to write")
    parser.add_argument("--input", type=Path, help="a weights file, instead of a download")
    args = parser.parse_args()
    weights = load(args.name, args.input)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": weights}, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, for MODEL.TIMM.WEIGHTS")


if __name__ == "__main__":
    with explained_errors():
        main()
