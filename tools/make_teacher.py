#!/usr/bin/env python
"""Train a teacher, and write its weights to a file that loads without running code.

python tools/make_teacher.py --config-file configs/quickstart/teacher-FasterRCNN.yaml --output teacher.pth
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from gdetkd.config_file import load_config
from gdetkd.data.shapes import make_shapes_for
from gdetkd.safe_load import read_weights

TRAIN_NET = Path(__file__).resolve().parents[1] / "train_net.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", required=True, help="the weights file to write")
    args = parser.parse_args()
    cfg = load_config(args.config_file, [])
    make_shapes_for(cfg)
    subprocess.run([sys.executable, str(TRAIN_NET), "--config-file", args.config_file, "--resume"], check=True)
    weights = read_weights(str(Path(cfg.OUTPUT_DIR) / "model_final.pth"))["model"]
    torch.save({"model": weights}, args.output)
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
