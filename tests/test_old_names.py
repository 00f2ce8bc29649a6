"""Test that config files and command lines of earlier versions are still understood."""

import pytest
import yaml

from conftest import as_an_earlier_version_wrote_it, make_cfg
from gdetkd.config_file import load_config, merge_config_file, merge_words
from gdetkd.dotted_keys import flat_config
from gdetkd.errors import GDetKDError
from gdetkd.old_names import REMOVED_KEYS, RENAMED_KEYS

OLD_NAMES = {new: old for old, new in RENAMED_KEYS.items()}
VALUES = {"DISTILL.INSIGHT.PERIOD": 7, "DISTILL.INSIGHT.IMAGES": 5, "DISTILL.INSIGHT.BASELINE": "my/run"}
PERIOD = "DISTILL.INSIGHT.PERIOD"


def nested(keys):
    """Return a mapping by dotted keys as the text of a yaml file."""
    content = {}
    for key, value in keys.items():
        node = content
        *groups, name = key.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return yaml.safe_dump(content)


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_a_removed_key_does_nothing(tmp_path, key):
    cfg = make_cfg({})
    before = cfg.dump()
    merge_words(cfg, [key, "True"])
    (tmp_path / "old.yaml").write_text(nested({key: True}))
    merge_config_file(cfg, str(tmp_path / "old.yaml"))
    assert cfg.dump() == before


def test_each_renamed_key_is_tested():
    assert set(OLD_NAMES) == set(VALUES)


@pytest.mark.parametrize("new", VALUES)
def test_the_value_of_a_renamed_key_goes_to_the_new_name_with_a_warning(tmp_path, caplog, new):
    old, value = OLD_NAMES[new], VALUES[new]
    from_file, from_words, expected = make_cfg({}), make_cfg({}), make_cfg({new: value})
    path = tmp_path / "old.yaml"
    path.write_text(nested({old: value}))
    merge_config_file(from_file, str(path))
    merge_words(from_words, [old, str(value)])
    assert from_file == from_words == expected != make_cfg({})
    assert f"old.yaml', line 2: {old} is called {new} now, which gets the value {value!r}" in caplog.text
    assert f"the command line: {old} is called {new} now, which gets the value '{value}'" in caplog.text


def test_the_config_of_a_run_of_an_earlier_version_is_loaded_and_warns_once(tmp_path, caplog):
    expected = make_cfg({**VALUES, "DISTILL.LOSSES": ("CKD",)})
    path = tmp_path / "config.yaml"
    path.write_text(as_an_earlier_version_wrote_it(expected.dump()))
    assert PERIOD not in path.read_text() and "INSIGHT" not in path.read_text()
    for _ in range(2):  # as a comparison does
        assert flat_config(load_config(str(path), []).dump()) == flat_config(expected.dump())
    assert len(caplog.messages) == len(RENAMED_KEYS)


@pytest.mark.parametrize("base, own", [("old", "new"), ("new", "old"), ("old", "old")])
def test_a_file_overrides_its_base_by_either_name(tmp_path, caplog, base, own):
    names = {"old": OLD_NAMES[PERIOD], "new": PERIOD}
    (tmp_path / "base.yaml").write_text(nested({names[base]: 2}))
    (tmp_path / "own.yaml").write_text("_BASE_: base.yaml\n" + nested({names[own]: 3}))
    cfg = make_cfg({})
    merge_config_file(cfg, str(tmp_path / "own.yaml"))
    assert cfg.DISTILL.INSIGHT.PERIOD == 3
    without_effect = f"base.yaml', line 2: {names['old']} has no effect, because its new name {PERIOD} is set"
    assert (without_effect in caplog.text) == (own == "new")


@pytest.mark.parametrize("own, expected", [("", 3), ("own", 4)])
def test_the_last_base_counts_by_either_name(tmp_path, own, expected):
    """The new name stands in the first base of two, and the old name in the last."""
    (tmp_path / "first.yaml").write_text(nested({PERIOD: 2}))
    (tmp_path / "last.yaml").write_text(nested({OLD_NAMES[PERIOD]: 3}))
    (tmp_path / "own.yaml").write_text("_BASE_: [first.yaml, last.yaml]\n" + (nested({PERIOD: 4}) if own else ""))
    cfg = make_cfg({})
    merge_config_file(cfg, str(tmp_path / "own.yaml"))
    assert cfg.DISTILL.INSIGHT.PERIOD == expected


def test_the_new_name_counts_if_one_file_has_both(tmp_path, caplog):
    (tmp_path / "own.yaml").write_text(nested({PERIOD: 3, OLD_NAMES[PERIOD]: 2}))
    cfg = make_cfg({})
    merge_config_file(cfg, str(tmp_path / "own.yaml"))
    assert cfg.DISTILL.INSIGHT.PERIOD == 3 and "Remove the old name" in caplog.text


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
def test_the_last_word_counts_by_either_name(order):
    names = {"old": OLD_NAMES[PERIOD], "new": PERIOD}
    cfg = make_cfg({})
    merge_words(cfg, [names[order[0]], "2", names[order[1]], "3"])
    assert cfg.DISTILL.INSIGHT.PERIOD == 3


def test_words_override_a_file_by_either_name(tmp_path):
    for in_file, word in ((OLD_NAMES[PERIOD], PERIOD), (PERIOD, OLD_NAMES[PERIOD])):
        (tmp_path / "own.yaml").write_text(nested({in_file: 2}))
        assert load_config(str(tmp_path / "own.yaml"), [word, "3"]).DISTILL.INSIGHT.PERIOD == 3


@pytest.mark.parametrize(
    "text, message",
    [
        (nested({OLD_NAMES[PERIOD]: "often"}), f"line 2: {PERIOD} is 'often' .*must be of type int"),
        (nested({OLD_NAMES[PERIOD]: 2, "DISTILL.INSIGHT": 5}), "DISTILL.INSIGHT is 5 .*must be a group of keys"),
        ("MODEL: {WEIGHT: a.pkl}\n" + nested({OLD_NAMES[PERIOD]: 2}), f"{OLD_NAMES[PERIOD]} was renamed to {PERIOD}"),
    ],
)
def test_a_mistake_at_a_renamed_key(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(GDetKDError, match=f"own.yaml.*{message}"):
        merge_config_file(make_cfg({}), str(tmp_path / "own.yaml"))


def test_detectron2s_own_merge_names_the_new_key():
    with pytest.raises(KeyError, match=f"{OLD_NAMES[PERIOD]} was renamed to {PERIOD}"):
        make_cfg({OLD_NAMES[PERIOD]: 2})


def test_detectron2s_key_of_a_similar_name_stays():
    """Detectron2 draws the ground truth and the proposals every so many iterations, at the top of its config."""
    name = OLD_NAMES[PERIOD].rpartition(".")[2]
    cfg = make_cfg({})
    merge_words(cfg, [name, "9"])
    assert cfg[name] == 9 and cfg.DISTILL.INSIGHT.PERIOD == 0
