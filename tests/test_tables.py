"""Tables in every format: what was written comes back, how files are told apart, and what is said of bad lines."""

import csv
import gzip
import io
import json
import random
import re
import string
from pathlib import Path

import pytest
from conftest import write_split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats import delimited, labels, tables
from formats.tables import read_table

SLOWLY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, content: str | bytes, **more):
    return read_table(write(path, content), **more)


# --------------------------------------------------------------------------- label ||| sentence


def test_a_sentence_may_hold_the_separator_and_blank_lines_and_a_bom_are_skipped(tmp_path):
    table = read(tmp_path / "a.txt", "\ufeff1 ||| one ||| two\r\n\r\n0 |||  three  \n")
    assert (table.labels, table.texts, table.lines) == (["1", "0"], ["one ||| two", "three"], [1, 3])
    assert table.is_plain and table.encoding == "utf-8-sig"


@pytest.mark.parametrize("line, words", [
    ("no separator", "no ` ||| `"),
    ("x ||| a", "is not an integer"),
    ("1.5 ||| a", "is not an integer"),
    ("² ||| a", "is not an integer"),
    ("--1 ||| a", "is not an integer"),
    ("-1 ||| a", "out of range"),
    ("3 ||| a", "out of range"),
    ("  ||| a", "label is empty"),
    ("1 |||   ", "sentence is empty"),
    ("1 |||    \t ", "sentence is empty"),
])
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, words):
    path = write_split(tmp_path / "a.txt", [(0, "fine")])
    path.write_text(path.read_text(encoding="utf-8") + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        table = read_table(path)
        labels.Classes(["a", "b", "c"], ["0", "1", "2"], Path("names.json"), False, "as in").numbers(table)
    assert f"{path}:3: " in str(error.value)


@pytest.mark.parametrize("name, line", [("a.txt", "bad"), ("a.csv", '"x",'), ("a.jsonl", "{")])
def test_of_many_bad_lines_ten_are_shown_and_all_counted(tmp_path, name, line):
    good = "text,label\n" if name == "a.csv" else ""
    for n, words in ((25, "15 more lines"), (11, "and 1 more line with such a fault")):
        with pytest.raises(ValueError, match=words) as error:
            read(tmp_path / name, good + (line + "\n") * n)
        assert str(error.value).count("\n") == 10


def test_an_empty_file_and_other_bytes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no sentence"):
        read(tmp_path / "a.txt", b"\n \n")
    with pytest.raises(ValueError, match=r"a\.txt:2: .*UTF-8"):
        read(tmp_path / "a.txt", b"0 ||| fine\n1 ||| caf\xe9\n")
    for name, content in (("a.csv", "\n\n"), ("b.csv", "text,label\n"), ("a.jsonl", "\n"), ("a.tsv", "")):
        with pytest.raises(ValueError, match=rf"{name}: there is no row"):
            read(tmp_path / name, content)


def test_lines_to_predict_are_one_text_each_and_a_blank_one_is_an_empty_text(tmp_path):
    table = read(tmp_path / "a.txt", "one, two\n\n three\n", labelled=False)
    assert (table.texts, table.labels, table.lines) == (["one, two", "", "three"], None, [1, 2, 3])
    table = read(tmp_path / "a.txt", "1 ||| one\n\n0 ||| three\n", labelled=False)
    assert (table.texts, table.labels, table.lines) == (["one", "three"], ["1", "0"], [1, 3])
    assert read(tmp_path / "a.csv", "text,label\none,\n,x\n", labelled=False).labels == ["", "x"]
    assert read(tmp_path / "b.csv", "text,label\none,\nx,\n", labelled=False).labels is None, "no row has one"
    assert read(tmp_path / "a.csv", "text,label\none,\n,x\n", labelled=False).texts == ["one", ""]
    assert read(tmp_path / "a.csv", "text\none, two\n\nthree\n", labelled=False).texts == ["one, two", "three"]


# --------------------------------------------------------------------------- what was written comes back

ALPHABET = string.ascii_letters + string.digits + " .!?;,|\t'\"\\\n%&äß好看电影😀👍🏽é\u2028"
TEXTS = st.text(ALPHABET, min_size=1, max_size=60).filter(lambda s: s.strip() and "\r" not in s)
LABELS = ["positive", "negative", "好", "坏", "😀", "1", "2", "3,5", "-1", "sehr gut", "a/b", "N/A"]
ROWS = st.lists(st.tuples(TEXTS, st.sampled_from(LABELS)), min_size=1, max_size=25)


def expected(rows):
    return [text.strip() for text, _ in rows], [label for _, label in rows]


def found(table):
    return table.texts, table.labels


def written(rows, header=("text", "label"), **how) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, **how)
    writer.writerows([*([header] if header else []), *rows])
    return out.getvalue()


@SLOWLY
@given(ROWS, st.sampled_from(",;\t|"), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
       st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "gb18030"]), st.sampled_from(["\n", "\r\n"]), st.booleans(),
       st.booleans())
def test_what_pythons_csv_writes_comes_back(tmp_path, rows, delimiter, quoting, encoding, end, is_gz, has_index):
    header = ("", "text", "label") if has_index else ("text", "label")
    cells = [(str(i), *row) for i, row in enumerate(rows)] if has_index else rows
    if encoding == "gb18030":  # enough for a file that is surely Chinese
        last = ("这部电影很好看，值得一看" * 20, "好")
        cells, rows = [*cells, (*cells[0][:-2], *last)], [*rows, last]
    raw = written(cells, header, delimiter=delimiter, quoting=quoting, lineterminator=end).encode(encoding)
    path = tmp_path / ("a.csv.gz" if is_gz else "a.csv")
    table = read(path, gzip.compress(raw) if is_gz else raw)
    assert found(table) == expected(rows)
    assert table.encoding == encoding or raw.isascii()
    mark = "tab" if delimiter == "\t" else f"`{delimiter}`"
    assert f"delimiter {mark}, " in table.description and table.description.endswith("text in text, label in label")


@SLOWLY
@given(ROWS)
def test_each_format_gives_the_same(tmp_path, rows):
    cells = [{"id": i, "text": text, "label": label} for i, (text, label) in enumerate(rows)]
    lines = "".join(json.dumps(cell, ensure_ascii=i % 2 == 0) + "\n" for i, cell in enumerate(cells))
    formats = {"a.jsonl": lines, "b.ndjson": lines, "c": lines, "d.tsv": written(rows, delimiter="\t"),
               "e.csv": written(rows)}
    for name, content in formats.items():
        assert found(read(tmp_path / name, content)) == expected(rows), name
        assert found(read(tmp_path / f"{name}.gz", gzip.compress(content.encode()))) == expected(rows), name
    one_line = [(" ".join(text.split()), label) for text, label in rows]
    plain = "".join(f"{label} ||| {text}\n" for text, label in one_line)
    for name in ("f.txt", "g"):
        assert found(read(tmp_path / name, plain)) == expected(one_line), name


@SLOWLY
@given(st.lists(st.tuples(TEXTS, st.integers(1, 5)), min_size=1, max_size=20), st.booleans())
def test_what_pyarrow_writes_comes_back(tmp_path, rows, as_number):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"text": [text for text, _ in rows], "stars": [n if as_number else str(n) for _, n in rows],
               "tags": [["nested"]] * len(rows), "when": [None] * len(rows)}
    for name in ("a.parquet", "b"):
        parquet.write_table(pyarrow.table(columns), tmp_path / name)
        table = read_table(tmp_path / name)
        assert found(table) == ([text.strip() for text, _ in rows], [str(n) for _, n in rows])
        assert table.lines == list(range(1, len(rows) + 1))


def spreadsheet(rows, end="\r\n", empty_column=True, bom=True) -> bytes:
    """By hand, as a spreadsheet with a German setting saves it: semicolons, quotes only where needed, doubled inside,
    line ends in them, a delimiter behind the last column."""
    def cell(value):
        return '"' + value.replace('"', '""') + '"' if any(c in value for c in ';"\n\r') else value

    tail = ";" if empty_column else ""
    lines = [f"Kommentar;Bewertung{tail}", *(f"{cell(text)};{cell(label)}{tail}" for text, label in rows)]
    return (("\ufeff" if bom else "") + "".join(line + end for line in lines)).encode()


@SLOWLY
@given(st.lists(st.tuples(TEXTS, st.sampled_from(["3,5", "2", "4,25", "-1,5"])), min_size=1, max_size=20),
       st.booleans(), st.booleans(), st.sampled_from(["\r\n", "\n", "\r"]))
def test_a_spreadsheets_quirks_come_back(tmp_path, rows, empty_column, bom, end):
    path = write(tmp_path / "Mappe1.csv", spreadsheet(rows, end, empty_column, bom))
    table = read_table(path, "Kommentar", "Bewertung")
    assert found(table) == expected(rows)
    assert "delimiter `;`" in table.description
    excel = write(tmp_path / "excel.csv", b"sep=;\r\n" + spreadsheet(rows, end, empty_column, False))
    assert found(read_table(excel, "kommentar", "BEWERTUNG")) == expected(rows)


def test_the_line_is_that_where_a_row_begins(tmp_path):
    table = read(tmp_path / "a.csv", 'text,label\n"one\ntwo\n\nthree",1\n\nfour,2\n"five ""x""",1\n')
    assert table.texts == ["one\ntwo\n\nthree", "four", 'five "x"'] and table.lines == [2, 7, 8]
    table = read(tmp_path / "b.csv", b"sep=;\r\ntext;label\r\nx;1\r\n\r\ny;2\r\n")
    assert table.lines == [3, 5]


# --------------------------------------------------------------------------- delimiter, quoting, header


@pytest.mark.parametrize("content, texts, said", [
    ("ein Film;3,5\nzwei Filme;2,0\nzwei davon;3,5\n", ["ein Film", "zwei Filme", "zwei davon"], "`;`, no header"),
    ('1,"good; really"\n0,"bad; it is"\n1,"fair; so so"\n', ["good; really", "bad; it is", "fair; so so"], "`,`, no"),
    ('text\tlabel\n"Good film\t1\ngreat" movie\t0\n', ['"Good film', 'great" movie'], "quotes are plain characters"),
    ('text,label\n"say \\"hi, you\\" now",1\nno,0\n', ['say "hi, you" now', "no"], r'quotes written as \"'),
    ("text,label\n\n\nfine,1\n \nbad,0\n", ["fine", "bad"], "delimiter `,`"),
    ("label|sentence\n1|a fine film, really; so\n0|b, c, d\n", ["a fine film, really; so", "b, c, d"], "`|`"),
    ("id,q,y\n1,what a long and fine sentence this is,a\n2,another one that is quite as long,b\n3,and a third one of "
     "this kind,a\n4,the fourth is rather short,b\n", ["what a long and fine sentence this is",
                                       "another one that is quite as long", "and a third one of this kind",
                                       "the fourth is rather short"], "text in q, label in y"),
])
def test_delimiter_quoting_and_header_are_found_out(tmp_path, content, texts, said):
    table = read(tmp_path / "a.csv", content)
    assert table.texts == texts and said in table.description


def test_pythons_own_sniffer_would_be_wrong_where_ours_is_right():
    """The reason for ours: sentences have letters that are as regular as delimiters."""
    draw = random.Random(0)
    wrong = 0
    for i in range(50):
        words = ["good", "bad", "the film", "an end", *(["it, really", 'a "b"', "so; no"] if i % 2 else [])]
        rows = [(" ".join(draw.choice(words) for _ in range(5)), draw.choice(["pos", "neg"])) for _ in range(8)]
        delimiter = draw.choice(",;\t|")
        content = written(rows, delimiter=delimiter)
        assert delimited.find_delimiter(content, []) == delimiter
        try:
            wrong += csv.Sniffer().sniff(content).delimiter != delimiter
        except csv.Error:
            wrong += 1
    assert wrong


# --------------------------------------------------------------------------- columns


@pytest.mark.parametrize("header, text, label", [
    ("review,sentiment", "review", "sentiment"), ("Label,Text", "Text", "Label"), ("id,Sentence,label,idx", "Sentence",
    "label"), ("评论,标签", "评论", "标签"), ("text,comment,label,stars", "text", "label"), ("TWEET,Target", "TWEET",
    "Target"), ("label,文本", "文本", "label"), ("stars,review_text", "review_text", "stars"), ("说明,类别", "说明",
    "类别"), ("message,what", "message", "what")])
def test_columns_are_found_by_their_names(tmp_path, header, text, label):
    names = header.split(",")
    rows = [{name: f"{name} {i}" for name in names} for i in range(3)]
    table = read(tmp_path / "a.csv", written([list(row.values()) for row in rows], names))
    assert found(table) == ([row[text] for row in rows], [row[label] for row in rows])
    table = read(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert found(table) == ([row[text] for row in rows], [row[label] for row in rows])


def test_typed_columns_go_before_names_and_two_are_joined(tmp_path):
    path = write(tmp_path / "a.csv", 'title,text,label,stars,"a,b"\nT1,one,x,5,q\nT2,,y,4,r\n')
    assert found(read_table(path, "title", "stars")) == (["T1", "T2"], ["5", "4"])
    assert found(read_table(path, "title,text", "LABEL")) == (["T1 one", "T2"], ["x", "y"])
    assert read_table(path, "text,title,stars").texts == ["one T1 5", "T2 4"]
    assert read_table(path, "a,b").texts == ["q", "r"], "one column of that name"
    bare = write(tmp_path / "b.csv", "x,one thing,5\ny,two things,4\nx,three,5\n")
    assert found(read_table(bare, "2", "1")) == (["one thing", "two things", "three"], ["x", "y", "x"])
    assert read_table(bare, "2,3", "1").texts[0] == "one thing 5"
    plain = write(tmp_path / "c.txt", "1 ||| a\n0 ||| b\n")
    assert found(read_table(plain, "title", "stars")) == (["a", "b"], ["1", "0"]), "no table: nothing to choose"
    excels = write(tmp_path / "e.txt", "Text\tLabel\r\nein Film\tgut\r\n".encode("utf-16"))
    assert found(read_table(excels)) == (["ein Film"], ["gut"])
    named = write(tmp_path / "d.txt", "title\tstars\na\t1\nb\t2\n")
    assert found(read_table(named, "title", "stars")) == (["a", "b"], ["1", "2"])


@pytest.mark.parametrize("content, more, words", [
    ("review,comment,label\nlong text one,long text two,1\nlong text 3,long text 4,0\n", {},
     ["which column has the texts?", "--text_column NAME --label_column NAME", "review, for example 'long text one'"]),
    ("text,stars,rating\na b c,1,2\nd e f,2,1\ng h i,1,2\nj k l,2,1\n", {},
     ["which column has the labels?", "rating, for example '2'"]),
    ("text,lable\na,1\n", {"label_column": "label"}, ["--label_column label: there is no such column", "text, lable",
                                                      "did you mean lable?"]),
    ("text,label\na,1\n", {"text_column": "text,titel"}, ["--text_column titel: there is no such column"]),
    ("text,label\na,1\n", {"text_column": "label", "label_column": "label"}, ["both name the column label"]),
    ("text,text,label\na,b,1\n", {"text_column": "text"}, ["2 columns are called so"]),
    ("1,what a film\n0,what a dull film\n1,another\n", {"text_column": "text"}, ["the file has no header"]),
    ("text\na\nb\n", {}, ["which column has the labels?"]),
])
def test_a_doubt_about_columns_is_an_error_that_shows_them(tmp_path, content, more, words):
    with pytest.raises(ValueError, match=r"a\.csv: ") as error:
        read(tmp_path / "a.csv", content, **more)
    for word in words:
        assert word in str(error.value)


# --------------------------------------------------------------------------- bad lines


@pytest.mark.parametrize("name, content, words", [
    ("a.csv", 'text,label\na,1\n"b\nc",0\nd,e,1\nf\n', ["a.csv:5: 3 columns, and most rows have 2",
                                                      "a.csv:6: 1 column, "]),
    ("a.csv", "text,label\na,1\n,0\n", ["a.csv:3: the text in 'text' is empty"]),
    ("a.csv", "text,label\na, \nb,0\n", ["a.csv:2: the label in 'label' is empty"]),
    ("a.tsv", "text\tlabel\na\t1\nb\n", ["a.tsv:3: 1 column, and most rows have 2"]),
    ("a.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b"}\n', ["a.jsonl:3: there is no 'label' in this row"]),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", \n', ["a.jsonl:2: not JSON"]),
    ("a.jsonl", '{"text": "a", "label": 1}\n["b", 1]\n', ["a.jsonl:2: a JSON list; expected one object a line"]),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": null, "label": 1}\n', ["a.jsonl:2: there is no 'text'"]),
    ("a.parquet", "no parquet", ["a.parquet: "]),
    ("a.csv.gz", b"\x1f\x8bdamaged", ["a.csv.gz: it begins like a gzip file"]),
])
def test_a_bad_row_is_named_with_its_line(tmp_path, name, content, words):
    with pytest.raises(ValueError) as error:
        read(tmp_path / name, content)
    for word in words:
        assert word in str(error.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet: .*pip install pyarrow"):
        read(tmp_path / "a.parquet", "PAR1")


@SLOWLY
@given(st.binary(max_size=300), st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.txt", "a", "a.csv.gz", "a.parquet"]),
       st.booleans())
def test_no_bytes_give_anything_but_a_table_or_a_message(tmp_path, raw, name, labelled):
    try:
        table = read(tmp_path / name, raw, labelled=labelled)
    except ValueError as error:
        assert "a" in str(error)
    else:
        assert len(table.texts) == len(table.lines) and (table.labels is None or len(table.labels) == len(table.texts))


# --------------------------------------------------------------------------- encodings

CHINESE = "文本,标签\n这部电影很好看，值得一看,好\n难看的电影,坏\n"


@pytest.mark.parametrize("encoding, said", [("utf-8", "utf-8"), ("utf-8-sig", "utf-8-sig"), ("utf-16", "utf-16"),
                                            ("gb18030", "gb18030")])
def test_the_encoding_is_found_out(tmp_path, encoding, said):
    table = read(tmp_path / "a.csv", CHINESE.encode(encoding))
    assert table.texts[1] == "难看的电影" and table.labels == ["好", "坏"] and table.encoding == said
    assert f", {said}, " in table.description


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_its_mark_is_told_by_its_zeros(tmp_path, encoding):
    table = read(tmp_path / "a.csv", "text,label\na fine film,good\ndull,bad\n".encode(encoding))
    assert table.texts == ["a fine film", "dull"] and table.encoding == "utf-16"


def test_a_word_in_gb18030_that_is_valid_utf_8_is_no_utf_8_file(tmp_path):
    raw = "1 ||| 目\n0 ||| 难看\n".encode("gb18030")
    assert raw[:8].decode("utf-8") == "1 ||| \u013f"
    assert read(tmp_path / "a.txt", raw).texts == ["目", "难看"]


def test_two_encodings_in_one_file_are_one_message_with_the_line(tmp_path):
    first, later = "".join(f"1 ||| 好看的电影 {i}\n" for i in range(9)).encode(), "0 ||| 难看的电影\n".encode("gb18030")
    with pytest.raises(ValueError, match=r"a\.txt:10: the bytes .* are not UTF-8; save the file as UTF-8") as error:
        read(tmp_path / "a.txt", first + later)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"a\.txt:2: the bytes .* not UTF-8"):  # Latin-1, which GB18030 would take
        read(tmp_path / "a.txt", "1 ||| ein Film\n0 ||| für alle schöne Bücher\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt:1: the file begins as UTF-16"):
        read(tmp_path / "a.txt", b"\xff\xfe1\x00 \x00|")


# --------------------------------------------------------------------------- the labels' names


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[]", '["one"]', "[1, 2]", '"bad good"',
                                  '\ufeff\ufeff["bad", "good"]'])
def test_label_names_must_be_a_list_of_names(tmp_path, text):
    path = tmp_path / "names.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"names\.json"):
        tables.read_label_names(path)


def test_rows_between_two_plain_quotes_stay_rows(tmp_path):
    text = 'label\ttext\n1\tfine film\n1\t"This is great.\n0\tso so it was\n0\tIt really is."\n1\tlast one here\n'
    assert read(tmp_path / "a.tsv", text).labels == ["1", "1", "0", "0", "1"]
    quoted = 'label\ttext\n1\t"two\nlines"\n0\tone line\n'
    assert read(tmp_path / "b.tsv", quoted).texts == ["two\nlines", "one line"]


def test_the_first_row_is_no_header_where_its_label_comes_again(tmp_path):
    rows = "topic,what is the subject here\nother,another subject there\ntopic,and this one\nother,the last one\n"
    found = read(tmp_path / "a.csv", rows, text_column="2", label_column="1")
    assert found.labels == ["topic", "other", "topic", "other"]
    pandas = ",0,1\n0,a fine film,good\n1,a bad film,bad\n2,one more film,good\n"
    assert read(tmp_path / "b.csv", pandas, text_column="0", label_column="1").labels == ["good", "bad", "good"]


def test_an_old_macs_table_may_be_long(tmp_path):
    pair = "a sentence of some length it is,good\rand another one of the kind,bad\r"
    rows = "text,label\r" + pair * 20_000
    assert len(read(tmp_path / "a.csv", rows).texts) == 40_000
