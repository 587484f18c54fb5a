"""formats/labels.py: labels to classes, by name and by number, and what is said of strange ones."""

import json
from pathlib import Path

import pytest
from conftest import write_split
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import labels
from formats.tables import Table, read_table


def table(*found: str, is_plain: bool = True, path: str = "train.txt") -> Table:
    return Table(Path(path), [f"text {i}" for i in range(len(found))], list(found), list(range(1, len(found) + 1)), "",
                 is_plain, columns=() if is_plain else ("text", "label"))


@pytest.mark.parametrize("written, want", [
    ("3.0", "3"), ("+3", "3"), ("03", "3"), ("3,0", "3"), ("3.", "3"), ("0", "0"), ("-0", "0"), ("-03", "-3"),
    ("00", "0"), ("2.5", "2.5"), ("good", "good"), ("²", "²"), ("1e3", "1e3"), ("--1", "--1"),
    ("1234567890", "1234567890")])
def test_a_whole_number_has_one_form(written, want):
    assert labels.canonical(written) == want


@pytest.mark.parametrize("found, names", [
    (["2", "0", "1"], ["0", "1", "2"]), (["10", "9", "-1"], ["-1", "9", "10"]),
    (["2.5", "10", "1"], ["1", "2.5", "10"]),
    (["2,5", "10", "1,5"], ["1,5", "2,5", "10"]), (["b", "a", "C"], ["C", "a", "b"]), (["坏", "好"], ["坏", "好"]),
    (["😀", "1", "a"], ["1", "a", "😀"]), (["1.0", "01", "2"], ["1", "2"])])
def test_classes_are_the_labels_that_occur_in_their_order(found, names):
    classes = labels.learned(table(*found))
    assert classes.names == names
    assert [classes.names[i] for i in classes.numbers(table(*found))] == [labels.canonical(label) for label in found]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=12, max_size=60))
def test_labels_0_to_c_are_themselves(found):
    found = [*range(max(found) + 1), *found]
    if max(found) == 0:
        return
    assert labels.learned(table(*map(str, found))).numbers(table(*map(str, found))) == found


def test_with_names_a_label_is_a_name_or_a_number():
    names = ["good", "bad", "fair"]
    by_name = labels.named(names, table("bad", "good"), Path("names.json"))
    assert by_name.numbers(table("fair", "bad")) == [2, 1], "the order is that of the names"
    assert by_name.written == names
    by_number = labels.named(names, table("1", "0"), Path("names.json"))
    assert by_number.numbers(table("2", "1.0")) == [2, 1] and by_number.written == ["0", "1", "2"]
    for first, later, words in (
            (["1", "0"], "3", "train.txt:1: the label 3 is out of range; labels are 0 to 2, one for each name in "
             "names.json"),
            (["1", "0"], "-1", "is out of range"), (["1", "0"], "bad", "'bad' is not an integer; labels are 0 to 2"),
            (["good", "bad"], "goood", "'goood' is none of the 3 in names.json: good, bad, fair; did you mean good"),
            (["good", "bad"], "0", "'0' is none of the 3")):
        with pytest.raises(ValueError) as error:
            labels.named(names, table(*first), Path("names.json")).numbers(table(later))
        assert words in str(error.value)


def test_names_that_are_numbers_are_the_labels_or_a_doubt():
    names = ["1", "2", "3"]
    assert labels.named(names, table("3", "1"), Path("n.json")).numbers(table("3", "1")) == [2, 0]
    with pytest.raises(ValueError, match=r"n\.json: the names are the numbers 1, 2, 3, and train\.txt has the label 0"):
        labels.named(names, table("0", "1"), Path("n.json"))
    usual = labels.named(["0", "1", "2"], table("0", "1"), Path("n.json"))
    assert usual.numbers(table("2")) == [2]
    with pytest.raises(ValueError, match="the label 3 is out of range; labels are 0 to 2"):
        usual.numbers(table("3"))


def test_a_label_that_training_does_not_have_is_refused_with_its_line_and_a_near_name():
    classes = labels.learned(table("positive", "negative"))
    with pytest.raises(ValueError, match=r"dev\.txt:2: the label postive is not in train\.txt, .*mean positive\?"):
        classes.numbers(table("negative", "postive", path="dev.txt"))


def test_a_column_of_many_values_is_no_column_of_labels():
    some = [f"L{i}" for i in range(6)]
    with pytest.raises(ValueError, match=r"6 different labels in 10 rows.*its columns are text, label: --label_column"):
        labels.learned(table(*some, *some[:4], is_plain=False))
    assert labels.learned(table(*some[:5], *some[:5])).names == some[:5], "half of them is no more than half"
    assert len(labels.learned(table(*some[:5], *some[:4])).names) == 5, "of nine rows nobody can say"
    assert len(labels.learned(table(*map(str, range(10)))).names) == 10, "label ||| sentence with 0 to 9"
    for bad in ("a\x1b[31m", "a ||| b"):
        with pytest.raises(ValueError, match=r"train\.txt:2: the label"):
            labels.learned(table("x", bad))


def test_how_many_of_each_are_said_but_for_plain_lines_with_numbers():
    found = table("b", "a", "b", is_plain=False)
    classes = labels.learned(found)
    assert labels.summary(classes, classes.numbers(found), found) == "labels :: a 1, b 2"
    for plain, said in ((table("0", "1"), ""), (table("1", "2"), "labels :: 1 1, 2 1"), (table("0", "2"),
                                                                                 "labels :: 0 1, 2 1")):
        classes = labels.learned(plain)
        assert labels.summary(classes, classes.numbers(plain), plain) == said
    many = table(*(f"L{i:02}" for i in range(25)), *["L07"] * 30, *(f"L{i:02}" for i in range(24)), is_plain=False)
    classes = labels.learned(many)
    assert labels.summary(classes, classes.numbers(many), many) == (
        "labels :: 25 classes, the largest L07 with 32, the rarest L24 with 1")


def test_a_stray_label_is_named_with_its_line():
    def said(*found):
        classes = labels.learned(table(*found))
        return labels.stray(classes, classes.numbers(table(*found)), table(*found))

    usual = ["positive", "negative"]
    assert said(*usual * 50) == ""
    assert said(*usual * 50, "postive") == (
        "rare labels: postive (once, train.txt:101, a misspelling of positive?); each is a class of its own")
    assert "rare labels: 7 (once, train.txt:1); " in said("7", *["1", "2"] * 9)
    twice = said(*usual * 2500, "Negative", "Negative")
    assert "Negative (2 times, train.txt:5001, a misspelling of negative?)" in twice
    assert said(*usual * 500, "other", "other") == "", "1 in 500 is a rare class and no accident"
    assert said(*[f"L{i}" for i in range(2000)] * 2) == "", "all are as frequent"
    assert "and 3 more" in said(*usual * 9, *(f"x{i}" for i in range(8)))


def test_numbers_and_names_come_from_a_file_too(tmp_path):
    path = write_split(tmp_path / "a.txt", [("very  good", "a fine film"), ("bad", "dull")])
    assert labels.learned(read_table(path)).names == ["bad", "very good"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "label": n}) + "\n" for n in (1, 2.0, "3")), encoding="utf-8")
    assert labels.learned(read_table(path)).names == ["1", "2", "3"]
