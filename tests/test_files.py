"""formats/files.py: a file is the old one or the new one, and JSON comes back."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import files


def test_a_writer_that_fails_half_way_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")

    def half(temporary):
        temporary.write_text("ne", encoding="utf-8")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        files.write_atomically(path, half)
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["file"]
    files.write_atomically(path, lambda temporary: temporary.write_text("new", encoding="utf-8"))
    assert path.read_text(encoding="utf-8") == "new" and os.listdir(tmp_path) == ["file"]


@settings(max_examples=30, deadline=None)
@given(value=st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)))
def test_json_comes_back_as_it_was_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value
