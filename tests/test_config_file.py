"""The error for a mistake in a config file or in KEY VALUE words names the file, the line and the nearest key."""

import textwrap

import pytest

from conftest import make_cfg
from gdetkd.config_file import merge_config_file, merge_words
from gdetkd.config_places import places_of_keys
from gdetkd.errors import GDetKDError


@pytest.mark.parametrize(
    "text, message",
    [
        ("SOLVER:\n  BASE_RL: 0.1\n", "line 2: 'SOLVER.BASE_RL' is no config key. Did you mean 'SOLVER.BASE_LR'?"),
        ("SOLVR: {BASE_LR: 0.1}\n", "line 1: 'SOLVR.BASE_LR' is no config key. Did you mean 'SOLVER.BASE_LR'?"),
        (
            "# one\n\nINPUT: {MIN_SIZE_TRAIN: (160,), MIN_SIZE_TEST: 160}\n",
            "line 3: 'INPUT.\\)' is no config key.*\"\\(160,\\)\"",
        ),
        (
            "SOLVER:\n  STEPS: 1\n",
            "line 2: SOLVER.STEPS is 1 \\(type int\\), but it must be of type tuple, for example \\(30000,\\)",
        ),
        ("SOLVER: 5\n", "line 1: SOLVER is 5 \\(type int\\), but it must be a group of keys"),
        ("MODEL:\n  MASK_ON: 'yes'\n", "line 2: MODEL.MASK_ON is 'yes' \\(type str\\), but it must be of type bool"),
        ("MODEL:\n  FORK: {HEADS: 3}\n", "line 2: 'MODEL.FORK.HEADS' is no config key"),
        (
            "MODEL:\n  MASK_ON: True\nSOLVER: {BASE_LR: 0.1}\nMODEL:\n  WEIGHTS: a.pth\n",
            "line 4: MODEL was given before, in line 1. YAML would keep only the last one",
        ),
        ("SOLVER:\n  BASE_LR: 0.1\n  BASE_LR: 0.2\n", "line 3: BASE_LR was given before, in line 2"),
        ("DISTILL:\n  HEAD_TRANSFER:\n", "line 2: DISTILL.HEAD_TRANSFER has no value. Give one, or remove the line"),
        ("SOLVER:\n", "line 1: SOLVER has no keys. Add keys below it, or remove the line"),
        ("DATASETS:\n  REGISTER:\n  - {name: a, kind: voc, name: b}\n", "line 3: name was given before, in line 3"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(GDetKDError, match=f"The config '.*own.yaml', {message}"):
        merge_config_file(make_cfg({}), str(path))


def test_an_anchor_may_be_used_often(tmp_path):
    nested = "".join(f"- &x{number} [{', '.join([f'*x{number - 1}'] * 9)}]\n" for number in range(1, 30))
    (tmp_path / "own.yaml").write_text(f"SOLVER:\n  STEPS:\n  - &x0 []\n{textwrap.indent(nested, '  ')}")
    assert places_of_keys(str(tmp_path / "own.yaml"))["SOLVER.STEPS"].line == 2


def test_a_mistake_in_a_base_is_named_with_the_base(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER:\n  GAMA: 0.1\n")
    (tmp_path / "own.yaml").write_text("_BASE_: base.yaml\nSOLVER: {BASE_LR: 0.5}\n")
    with pytest.raises(GDetKDError, match="base.yaml', line 2: 'SOLVER.GAMA' is no config key. .*'SOLVER.GAMMA'"):
        merge_config_file(make_cfg({}), str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("SOLVER.BASE_LR: 0.1\n", "the key 'SOLVER.BASE_LR'. In a file, keys are nested"),
        (
            "MODEL: {WEIGHT: a.pkl, RESNETS: {NORM: BN, FORK: 1}}\n",
            "keys of Detectron2's first version .*Set VERSION: 2",
        ),
    ],
)
def test_other_mistakes_in_a_file_are_named(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(GDetKDError, match=message):
        merge_config_file(make_cfg({}), str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    "path, message",
    [
        ("", "Name one with --config-file"),
        ("no.yaml", "'no.yaml'.*current folder"),
        ("lazy.py", "'lazy.py' is a LazyConfig, which only a teacher may have.*yaml"),
    ],
)
def test_a_missing_file_is_named(path, message):
    with pytest.raises(GDetKDError, match=message):
        merge_config_file(make_cfg({}), path)


@pytest.mark.parametrize(
    "words, message",
    [
        (["SOLVER.BASE_LR"], "the command line must give pairs of KEY VALUE, but has 1 words: SOLVER.BASE_LR"),
        (["SOLVER.BASE_RL", "0.1"], "the command line: 'SOLVER.BASE_RL' is no config key. .*'SOLVER.BASE_LR'"),
        (["SOLVER.STEPS", "1"], "the command line: SOLVER.STEPS is '1' \\(type str\\), but it must be of type tuple"),
        (["TEST.KEEP_BEST", "None"], "the command line: TEST.KEEP_BEST has no value"),
        (["SOLVER.IMS_PER_BATCH", "four"], "SOLVER.IMS_PER_BATCH is 'four' \\(type str\\), but it must be of type int"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(words, message):
    with pytest.raises(GDetKDError, match=message):
        merge_words(make_cfg({}), words)


def test_a_key_that_detectron2_leaves_without_a_value_may_be_reset():
    cfg = make_cfg({"SOLVER.WEIGHT_DECAY_BIAS": 0.0})
    merge_words(cfg, ["SOLVER.WEIGHT_DECAY_BIAS", "None"])
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None


@pytest.mark.parametrize("key", ["DISTILL.LOSSES", "DATASETS.TRAIN", "DATASETS.TEST", "LOG.WRITERS"])
def test_a_single_name_becomes_a_list_of_one(tmp_path, key):
    section, name = key.split(".")
    from_words, from_file = make_cfg({}), make_cfg({})
    merge_words(from_words, [key, "one"])
    (tmp_path / "own.yaml").write_text(f"{section}:\n  {name}: one\n")
    merge_config_file(from_file, str(tmp_path / "own.yaml"))
    assert from_words[section][name] == from_file[section][name] == ("one",)
    merge_words(from_words, [key, "('one', 'two')"])
    assert from_words[section][name] == ("one", "two")


def test_files_are_merged_as_detectron2_merges_them(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {BASE_LR: 0.5, STEPS: [1, 2]}\n")
    (tmp_path / "own.yaml").write_text("_BASE_: base.yaml\nSOLVER:\n  STEPS: (3,)\nVERSION: 2\n")
    found, expected = make_cfg({}), make_cfg({})
    merge_config_file(found, str(tmp_path / "own.yaml"))
    expected.merge_from_file(str(tmp_path / "own.yaml"))
    assert found == expected and found.SOLVER.STEPS == (3,) and found.SOLVER.BASE_LR == 0.5
