"""Every config for a CPU builds, and its teacher fits its student. test_recipes.py tests the configs for GPUs."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from conftest import FAMILIES
from gdetkd import add_gdetkd_config
from gdetkd.config import plain_config

CONFIGS = Path(__file__).parents[1] / "configs"
PAIRS = sorted(path for path in CONFIGS.glob("*/*-*.yaml") if path.stem.split("-")[0] in FAMILIES)
TEACHERS = sorted(path for folder in ("quickstart", "BCCD") for path in (CONFIGS / folder).glob("teacher-*.yaml"))


def load(path):
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def name(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", PAIRS, ids=name)
def test_pair_builds(path, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    cfg = load(path)
    weights = tmp_path / "teacher.pth"
    torch.save({"model": build_model(plain_config(load(cfg.DISTILL.TEACHER.CONFIG_FILE))).state_dict()}, weights)
    cfg.DISTILL.TEACHER.WEIGHTS = str(weights)
    model = build_model(cfg)
    teacher, student = path.stem.split("-")
    assert set(model.losses) == set(cfg.DISTILL.LOSSES) >= {"SGFI", "CKD"}
    # The name of the student may have a suffix, such as "_PKD".
    family = next(family for family in FAMILIES if f"{student}_".startswith(f"{family}_"))
    assert type(model.student).__name__ == FAMILIES[family][0]
    assert type(model.teacher.model).__name__ == FAMILIES[teacher][0]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/mobilenetv2-*.yaml")), ids=name)
def test_students_of_mobilenetv2_have_the_sizes_that_their_comments_give(path):
    model = build_model(plain_config(load(path)))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(millions, 2) == (1.07 if "tiny" in path.stem else 2.98)


@pytest.mark.parametrize("path", TEACHERS, ids=name)
def test_teacher_starts_from_scratch_or_from_weights_that_exist_or_that_another_teacher_writes(path):
    weights = load(path).MODEL.WEIGHTS
    written_by_others = {f"{load(other).OUTPUT_DIR}/model_final.pth" for other in TEACHERS if other != path}
    assert weights == "" or weights in written_by_others or (CONFIGS.parent / weights).exists()


def test_every_pair_of_the_quickstart_has_a_row_in_the_docs():

    page = (CONFIGS.parent / "docs" / "detector-families.md").read_text()
    for path in [path for path in PAIRS if path.parent.name == "quickstart"]:
        assert f"(../{path.relative_to(CONFIGS.parent)})" in page, f"{path.stem} has no row"
