"""mmdetection's configs are parsed and never run."""

import pytest

from gdetkd.errors import GDetKDError
from gdetkd.mmdetection.config_text import Unreadable, read_config_file, read_config_text

VALUES = {
    "3": 3,
    "-1.5": -1.5,
    "'text'": "text",
    "None": None,
    "[1, (2, [3])]": (1, (2, (3,))),
    "dict(a=1, b=dict(c=[2]))": {"a": 1, "b": {"c": (2,)}},
    "{'a': 1, 2: [3]}": {"a": 1, "2": (3,)},
    "1.0 / 8 + 2 * 3 - 1": 5.125,
    "'data/' + 'coco'": "data/coco",
    "[1] + [2]": (1, 2),
    "known": {"mean": (1, 2)},
    "dict(type='Normalize', **known)": {"type": "Normalize", "mean": (1, 2)},
    "{**known, 'to_rgb': True}": {"mean": (1, 2), "to_rgb": True},
}


@pytest.mark.parametrize("text", VALUES)
def test_plain_values(text):
    config = read_config_text(f"import os\nknown = dict(mean=[1, 2])\nvalue = {text}\n", "the text")
    assert config["value"] == VALUES[text]


@pytest.mark.parametrize(
    "statement",
    [
        "norm.update(mean=[3, 4])",
        "norm['mean'] = [3, 4]",
        "norm.mean = 3",
        "norm += 1",
        "del norm",
        "if True:\n  norm = 3",
    ],
)
def test_what_changes_a_value_makes_it_and_all_that_share_it_unreadable(statement):
    """mmdetection runs such lines. A value from before them would be wrong."""
    text = f"norm = dict(mean=[1, 2])\nmodel = dict(norm=norm)\nother = 5\n{statement}\nlater = dict(norm=norm)\n"
    config = read_config_text(f'"""Text."""\nimport os\n{text}', "the text")
    assert config["norm"] == Unreadable("the text, line 6 changes 'norm' by more than an assignment")
    assert isinstance(config["model"], Unreadable) and isinstance(config["later"], Unreadable)
    assert config["other"] == 5


PROGRAMS = [
    "__import__('os').system('touch {target}')",
    "open('{target}', 'w')",
    "[open('{target}', 'w') for _ in [1]]",
    "(lambda: open('{target}', 'w'))()",
    "f\"{{open('{target}', 'w')}}\"",
    "dict(a=open('{target}', 'w'))",
    "dict([('a', 1)])",
    "dict(**3)",
    "{{1.5: 2}}",
    "unknown",
    "'a' * 10**9",
    "[0] * 3",
    "1 / 0",
    "1e308 * 10 ** 5",
    "'a' + 1",
    "-'a'",
    "b'bytes'",
    "{{{{_base_.model}}}}",
]


@pytest.mark.parametrize("text", PROGRAMS)
def test_what_is_more_than_plain_values_is_left_out_and_not_run(text, tmp_path):
    source = f"ok = 1\nvalue = {text.format(target=tmp_path / 'pwned')}\nlater = [value]\n"
    config = read_config_text(source, "the text")
    assert config["value"] == Unreadable("the text, line 2 is more than plain values")
    assert isinstance(config["later"], Unreadable) and config["ok"] == 1
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("text", ["model = dict(", "\0", "(" * 500 + ")" * 500, "model = " + "-" * 20000 + "1"])
def test_a_text_that_is_no_python(text):
    with pytest.raises(GDetKDError, match="The text is not valid Python.*--config"):
        read_config_text(text, "The text")


def test_texts_of_several_files_are_merged_in_order():
    """Checkpoints of early 2.x hold them like this."""
    text = (
        "configs/_base_/models/faster.py\nmodel = dict(neck=dict(a=1, b=2), head=dict(c=3))\n"
        "/home/me/own.py\n_base_ = ['./_base_/models/faster.py']\nx = dict(b=4)\n"
        "model = dict(neck=x, head=dict(_delete_=True, d=5))\n"
    )
    assert read_config_text(text, "the text")["model"] == {"neck": {"a": 1, "b": 4}, "head": {"d": 5}}


def test_a_file_builds_on_its_bases(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.py").write_text("model = dict(neck=dict(a=1, b=2))\nhidden = range(3)\n")
    (tmp_path / "base" / "data.py").write_text("data = [1]\nchanged = dict(a=open('x'))\n")
    (tmp_path / "middle.py").write_text("_base_ = ['base/model.py', 'base/data.py']\nchanged = dict(b=1)\n")
    (tmp_path / "own.py").write_text("_base_ = './middle.py'\nmodel = dict(neck=dict(b=3))\n")
    config = read_config_file(tmp_path / "own.py")
    assert config["model"] == {"neck": {"a": 1, "b": 3}} and config["data"] == (1,)
    # A change to an unknown value does not make it known.
    assert isinstance(config["changed"], Unreadable) and "data.py, line 2" in config["changed"].place


@pytest.mark.parametrize(
    "text, match",
    [
        ("_base_ = 'own.py'", "own.py' includes itself"),
        ("_base_ = 'gone.py'", "gone.py', which .*own.py' names in `_base_`.*cannot be read.*whole configs folder"),
        ("_base_ = 3", "a `_base_` that is no path"),
        ("_base_ = [open('x')]", "a `_base_` that is no path"),
    ],
)
def test_bases_that_cannot_be_read(tmp_path, text, match):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(GDetKDError, match=match):
        read_config_file(tmp_path / "own.py")
