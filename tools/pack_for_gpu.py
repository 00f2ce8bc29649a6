#!/usr/bin/env python
"""Pack what tools/run_on_gpu.sh needs on a machine with a GPU, but without a network: `make gpu-pack`.

That machine has Python 3.12 on Linux x86-64, torch, torchvision and NumPy. The pack is the folder build/gpu:

- site.tar.gz: the other packages, as requirements.txt pins them.
- datasets/: the training images of the quickstart. Drawing them needs OpenCV, which is too large for the pack.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Collection, List

from gdetkd.data.shapes import FOLDER, make_shapes
from gdetkd.errors import GDetKDError
from gdetkd.program import explained_errors

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "build" / "gpu"
TARGET = ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28"]
# What tests/cuda and benchmarks/gpu.py import, directly or not, beside what torch and torchvision bring.
PACKAGES = (
    "absl-py antlr4-python3-runtime cloudpickle contourpy cycler defusedxml execnet fonttools fvcore hydra-core "
    "iniconfig iopath kiwisolver matplotlib omegaconf packaging pluggy portalocker protobuf pycocotools pygments "
    "pyparsing pytest pytest-xdist python-dateutil pyyaml tabulate tensorboard termcolor tqdm yacs"
).split()
DETECTRON2 = "pb1-detectron2"
MOST_MEGABYTES = 48  # leaves room for the repository where both may have 64


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return parser.parse_args()


def pins_of(lock: str, names: Collection[str]) -> str:
    """Return the parts of a lock file that pin the named packages, with their hashes.

    Raises:
        GDetKDError: the lock file lacks a package.
    """
    pins = [part for part in re.split(r"(?m)^(?=\w)", lock) if part.partition("==")[0] in names]
    lacking = sorted(set(names) - {pin.partition("==")[0] for pin in pins})
    if lacking:
        raise GDetKDError(f"requirements.txt does not pin {', '.join(lacking)}. Correct PACKAGES in {__file__}.")
    return "".join(pins)


def install(names: Collection[str], site: Path, options: List[str]) -> None:
    """Install pinned packages, without their dependencies, into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "requirements.txt"
        pins.write_text(pins_of((ROOT / "requirements.txt").read_text(), names))
        command = [sys.executable, "-m", "uv", "pip", "install", "--target", str(site), "--no-deps"]
        command += ["--require-hashes", "--no-build-isolation-package", DETECTRON2, *options, "-r", str(pins)]
        # The packaged Detectron2 v0.6 has no C++ sources: see tools/build_without_extension.
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools" / "build_without_extension")}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)


def main() -> None:
    parse_arguments()
    shutil.rmtree(PACK, ignore_errors=True)
    PACK.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as site:
        install(PACKAGES, Path(site), TARGET)
        # Its files are plain Python, but uv labels what it builds with the Python that builds it.
        install([DETECTRON2], Path(site), [])
        with tarfile.open(PACK / "site.tar.gz", "w:gz") as archive:
            archive.add(site, ".")
    make_shapes(str(PACK / "datasets" / FOLDER), ("student",))
    megabytes = sum(path.stat().st_size for path in PACK.rglob("*") if path.is_file()) / 1e6
    if megabytes > MOST_MEGABYTES:
        raise GDetKDError(f"{PACK} has {megabytes:.0f} MB, but at most {MOST_MEGABYTES} are allowed. Pack less.")
    print(f"{PACK}: {megabytes:.1f} MB. Copy the repository with this folder, and run there: bash tools/run_on_gpu.sh")


if __name__ == "__main__":
    with explained_errors():
        main()
