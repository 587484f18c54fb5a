"""Bytes to text: gzip, encodings, lines."""

import gzip
import re
import zlib
from pathlib import Path

from config import InputError

GZIP = b"\x1f\x8b"
NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file; of one that is compressed with gzip, those inside. Raises InputError for a damaged one."""
    raw = Path(path).read_bytes()
    try:
        return gzip.decompress(raw) if raw.startswith(GZIP) else raw
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: it begins like a gzip file, and cannot be decompressed ({error})") from None


def read_text(path: str | Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises InputError, naming the line, for other bytes."""
    return decode(Path(path).read_bytes(), path)


def decode(raw: bytes, path: str | Path) -> str:
    """`read_text` of bytes that are already here; `path` is for the message."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(split_lines(raw[: error.start].decode("utf-8-sig")))
        raise InputError(f"{path}:{line}: the bytes {raw[error.start:error.end]!r} are not UTF-8; save the file as "
                         "UTF-8") from None


def decode_any(raw: bytes, path: str | Path) -> tuple[str, str]:
    """The text, and its encoding: utf-8, utf-8-sig, utf-16 or gb18030, tried in this order. `path` is for the message.

    Text in any other encoding would decode as UTF-16 or GB18030 too, often without an error. So UTF-16 needs its byte
    order mark, or a zero in every second byte, and GB18030 a text that looks like Chinese. Raises InputError, naming
    the line, for bytes that fit none, and for a file that begins in UTF-8 and goes on otherwise.
    """
    for encoding in utf_16_of(raw):
        try:
            return raw.decode(encoding), "utf-16"
        except UnicodeDecodeError as error:
            line = len(split_lines(raw[: error.start].decode(encoding, "replace")))
            raise InputError(f"{path}:{line}: the file begins as UTF-16, and the bytes {raw[error.start:error.end]!r} "
                             "are not; save the file as UTF-8") from None
    try:
        return raw.decode("utf-8-sig"), "utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8"
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig")
    if not _is_surely_utf_8(before):
        try:
            text = raw.decode("gb18030")
        except UnicodeDecodeError:
            pass
        else:
            if looks_chinese(text):
                return text, "gb18030"
    return decode(raw, path), "utf-8"  # which says what is wrong with it


def utf_16_of(raw: bytes) -> list[str]:
    """The UTF-16 that these bytes must be in, or []."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return ["utf-16"]
    start = raw[:4096]
    even, odd = start[::2].count(0), start[1::2].count(0)
    most = 0.8 * (len(start) // 2)
    if most and (even >= most or odd >= most) and min(even, odd) < 0.1 * most:
        return ["utf-16-be" if even > odd else "utf-16-le"]
    return []


def _is_surely_utf_8(text: str) -> bool:
    """Has this beginning of a file, which is valid UTF-8, so many characters of several bytes that this is no chance?
    (One Chinese character in twelve, such as 目, is valid UTF-8 as GB18030 writes it; several in a row hardly ever.)
    """
    return sum(1 if char < "\u0800" else 2 for run in NOT_ASCII.findall(text) for char in run) >= 4


def looks_chinese(text: str) -> bool:
    """False for text in Latin-1 and the like: there, single letters with an accent stand inside of words."""
    if re.search("[\ue000-\uf8ff]", text):  # no character has these numbers
        return False
    han = re.findall("[\u4e00-\u9fff]", text)
    usual = sum(b"\xb0" <= char.encode("gb2312", "replace")[:1] <= b"\xd7" for char in han)
    if 2 * usual < len(han):  # Japanese and Korean bytes decode to rare characters; level 1 of GB2312 is the usual ones
        return False
    runs = list(NOT_ASCII.finditer(text))
    alone = sum(len(m[0]) == 1 and (text[m.start() - 1 : m.start()].isalpha() or text[m.end() : m.end() + 1].isalpha())
                for m in runs)
    return alone <= sum(len(m[0]) for m in runs if len(m[0]) > 1)


def split_lines(text: str) -> list[str]:
    """The lines of a text with the line ends of Unix, Windows or the old Mac, in any mixture. (str.splitlines would
    also cut at characters that a sentence may hold, such as U+2028.)"""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, each with its number from 1."""
    return [(number, line) for number, line in enumerate(split_lines(text), 1) if line.strip()]
