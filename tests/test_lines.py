"""Lines from pipes and files, as they arrive."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import InputError
from formats import lines

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\ufeff"), max_size=8)


def read(pieces, said=None):
    pieces = iter([*pieces, b""])
    return list(lines.read_lines(lambda: next(pieces), "in.txt", (said if said is not None else []).append))


@given(st.lists(st.tuples(TEXT, st.sampled_from(["\n", "\r\n", "\r"])), max_size=6), st.sampled_from(
    ["utf-8", "utf-8-sig", "utf-16"]), st.integers(1, 5))
def test_lines_come_back_however_their_bytes_arrive(rows, encoding, size):
    rows = [(text, end) for text, end in rows]
    whole = "".join(text + end for text, end in rows)
    raw = whole.encode(encoding)
    expected = whole.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not expected[-1]:
        expected.pop()  # behind the last end there is no line
    assert read([raw[i:i + size] for i in range(0, len(raw), size)]) == expected


def test_gb18030_is_found_at_the_first_line_that_is_not_ascii_and_said():
    said = []
    assert read(["plain\n不好\n好".encode("gb18030")], said) == ["plain", "不好", "好"]
    assert len(said) == 1 and "line 2" in said[0] and "GB18030" in said[0]
    assert read(["不好\n".encode()], said) == ["不好"] and len(said) == 1


@pytest.mark.parametrize("raw, at", [(b"a\ncaf\xe9\n", 2), ("é\nx\n".encode() + b"\xff\n", 3),
                                     ("a\n".encode("utf-16") + b"\x00\xd8a\x00", 2)])
def test_bytes_of_another_encoding_are_named_with_their_line(raw, at):
    with pytest.raises(InputError, match=f"^in.txt:{at}: the bytes .* are not"):
        read([raw])


def test_a_line_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(lines, "LONGEST_LINE", 1 << 20)
    with pytest.raises(InputError, match="in.txt:2: a line of more than 1 MB"):
        read([b"x\n", *[b"y" * 999_999] * 3])


def test_a_line_is_there_before_the_next_one_is_written():
    out, into = os.pipe()
    found = lines.read_lines(lambda: os.read(out, 99), "pipe", print)
    with lines.Arriving(found) as arriving:
        for text in ("a\n", "b\r", "c\r\n"):
            os.write(into, text.encode())
            assert arriving.take(9) == [text.strip()]  # it would wait for ever for a second one
        os.write(into, b"d\xff\n")
        os.close(into)
        with pytest.raises(InputError, match="pipe:4: "):
            arriving.take(9)
    os.close(out)


def test_what_is_read_ahead_is_bounded(monkeypatch):
    monkeypatch.setattr(lines, "MOST_WAITING", 3)
    seen = []
    with lines.Arriving(seen.append(i) or str(i) for i in range(1000)) as arriving:
        assert arriving.take(1) == ["0"]
        assert len(seen) <= 6
    arriving._thread.join(5)
    assert not arriving._thread.is_alive(), "nobody takes the rest: the reader ends"
