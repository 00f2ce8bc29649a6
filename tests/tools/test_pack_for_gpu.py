"""The pack for a machine with a GPU takes its packages from requirements.txt."""

import runpy
from pathlib import Path

import pytest

from gdetkd.errors import GDetKDError

ROOT = Path(__file__).resolve().parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "pack_for_gpu.py"))
LOCK = """\
alpha==1.0 \\
    --hash=sha256:12
    # via beta
beta==2.0 ; python_full_version < '3.12' \\
    --hash=sha256:34
beta==3.0 \\
    --hash=sha256:56
"""


def test_pins_are_taken_with_their_hashes_and_markers():
    assert TOOL["pins_of"](LOCK, ["beta"]) == LOCK[LOCK.index("beta==") :]
    with pytest.raises(GDetKDError, match="does not pin alphabet, gamma. Correct PACKAGES"):
        TOOL["pins_of"](LOCK, ["alphabet", "beta", "gamma"])


def test_every_package_of_the_pack_is_pinned():
    names = [*TOOL["PACKAGES"], TOOL["DETECTRON2"]]
    pins = TOOL["pins_of"]((ROOT / "requirements.txt").read_text(), names)
    assert pins.count("--hash=") >= len(names)
    assert not {"torch", "torchvision", "numpy"} & {pin.partition("==")[0] for pin in pins.splitlines()}
