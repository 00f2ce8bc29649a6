"""Files that are written whole, and files whose lines a kill or a full disk cut."""

import json

from gdetkd.files import kept_value, mend_last_line, read_json_lines


def test_cut_lines_are_left_out_wherever_they_are(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"a": 1}\n{"a": [1, {"b": 2}{"a": 2}\n3\n{"a": 3}\n{"a": {}')
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}]


def test_the_last_line_is_completed_or_removed(tmp_path):
    path = tmp_path / "lines.jsonl"
    mend_last_line(path)
    assert not path.exists()
    for content, left in (("{}\n{", "{}\n"), ("{}\n[]\n", "{}\n[]\n"), ("{", ""), ("", ""), ("{}\n{}", "{}\n{}\n")):
        path.write_text(content)
        mend_last_line(path)
        assert path.read_text() == left


def test_a_kept_value_belongs_to_its_key(tmp_path):
    path, values = tmp_path / "folder" / "kept.json", iter("abcd")

    def kept(key):
        return kept_value(path, key, lambda: next(values))

    assert [kept({"x": (1, 2)}), kept({"x": (1, 2)}), kept({"x": (1, 3)})] == ["a", "a", "b"]
    assert json.loads(path.read_text()) == {"value": "b", "key": {"x": [1, 3]}}
    for broken in ('{"value": "b", "ke', "[]"):
        path.write_text(broken)
        assert kept({"x": (1, 3)}) in "cd"
