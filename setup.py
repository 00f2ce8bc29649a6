"""Install gdetkd into an environment that has torch and Detectron2. No version of these two is pinned."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGES = "projects/GDetKD"

setup(
    name="gdetkd",
    version=re.search(r'__version__ = "(.+)"', (ROOT / PACKAGES / "gdetkd/__init__.py").read_text()).group(1),
    description="G-DetKD for Detectron2: a small object detector learns from a big one",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    package_dir={"": PACKAGES},
    packages=find_packages(PACKAGES),
    package_data={"gdetkd": ["py.typed", "figures/*.html"]},
    # torch and Detectron2 are not listed, because their installation depends on the machine. `import gdetkd` says which
    # of them is missing.
    install_requires=["defusedxml", "jinja2", "matplotlib", "tqdm"],
    extras_require={
        "quickstart": ["opencv-python-headless"],
        "instaboost": ["instaboostfast"],
        "eval": ["faster-coco-eval"],
        "timm": ["timm>=1.0.22"],
        "slurm": ["submitit"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
    },
)
