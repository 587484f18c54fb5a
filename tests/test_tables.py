"""formats/tables.py: labelled sentences and label names, and what is said of bad lines."""

import re
from pathlib import Path

import pytest
from conftest import write_split

from formats import tables


def test_a_sentence_may_hold_the_separator_and_blank_lines_and_a_bom_are_skipped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff1 ||| one ||| two\r\n\r\n0 |||  three  \n".encode())
    assert tables.read_examples(path, 2) == ([1, 0], ["one ||| two", "three"])


@pytest.mark.parametrize("line, words", [
    ("no separator", "no ` ||| `"),
    ("x ||| a", "is not an integer"),
    ("1.5 ||| a", "is not an integer"),
    ("² ||| a", "is not an integer"),
    ("--1 ||| a", "is not an integer"),
    ("-1 ||| a", "out of range"),
    ("3 ||| a", "out of range"),
    ("1 |||   ", "sentence is empty"),
    ("1 |||    \t ", "sentence is empty"),
])
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, words):
    path = write_split(tmp_path / "a.txt", [(0, "fine")])
    path.write_text(path.read_text(encoding="utf-8") + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        tables.read_examples(path, 3, Path("names.json"))
    assert f"{path}:3: " in str(error.value)


def test_of_many_bad_lines_ten_are_shown_and_all_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("bad\n" * 25, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        tables.read_examples(path, 3)
    assert str(error.value).count("\n") == 10 and "15 more lines" in str(error.value)
    path.write_text("bad\n" * 11, encoding="utf-8")
    with pytest.raises(ValueError, match="and 1 more line with such a fault"):
        tables.read_examples(path, 3)


def test_an_empty_file_and_other_bytes_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="no sentence"):
        tables.read_examples(path, 3)
    path.write_bytes(b"0 ||| fine\n1 ||| caf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt:2: .*UTF-8"):
        tables.read_examples(path, 3)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[]", '["one"]', "[1, 2]", '"bad good"',
                                  '\ufeff\ufeff["bad", "good"]'])
def test_label_names_must_be_a_list_of_names(tmp_path, text):
    path = tmp_path / "names.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"names\.json"):
        tables.read_label_names(path)
