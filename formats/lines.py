"""Lines of text from a pipe or a file as they arrive: one that has been written is there at once, and memory does not
grow with the file."""

import codecs
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from types import TracebackType

from config import InputError
from formats.text import looks_chinese, utf_16_of

UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
LONGEST_LINE = 1 << 24  # bytes: what is longer is no text with a sentence a line, and would fill the memory
MOST_WAITING = 512  # lines that have been read and not taken yet


def read_lines(read: Callable[[], bytes], source: str, notice: Callable[[str], None]) -> Iterator[str]:
    """The lines of `source`, without their ends (those of Unix, Windows or the old Mac, in any mixture).

    `read()` gives the bytes that have arrived, and b"" at the end. The text is UTF-8, with or without a byte order
    mark, or UTF-16; where the first line that is not ASCII is not UTF-8, it is GB18030, which `notice` is
    told. Raises InputError, naming the line, for other bytes.
    """
    pieces, start = iter(read, b""), b""
    for piece in pieces:
        start += piece
        if not any(mark.startswith(start) for mark in (codecs.BOM_UTF8, *UTF16)):
            break  # it is known now whether there is a mark
    encoding = UTF16.get(start[:2])
    if not encoding and (without_mark := utf_16_of(start)):
        encoding = without_mark[0]
    if encoding:
        start = start[2:] if start[:2] in UTF16 else start
        raw_lines = _split(_to_utf8(chain([start], pieces), encoding))
    else:
        raw_lines = _split(chain([start.removeprefix(codecs.BOM_UTF8)], pieces))
    number = 0
    try:
        for number, raw in enumerate(raw_lines, 1):
            if len(raw) > LONGEST_LINE:
                raise InputError(f"{source}:{number}: a line of more than {LONGEST_LINE >> 20} MB; expected a sentence "
                                 "a line")
            if not encoding and not raw.isascii():
                encoding = "gb18030" if not _is(raw, "utf-8") and _is_chinese(raw) else "utf-8"
                if encoding == "gb18030":
                    notice(f"{source}: line {number} is not UTF-8; the text is read as GB18030")
            yield raw.decode("gb18030" if encoding == "gb18030" else "utf-8")
    except UnicodeDecodeError as error:
        known = {"utf-8": "UTF-8", "gb18030": "GB18030"}.get(error.encoding, "UTF-16")
        at = number + 1 if known == "UTF-16" else number  # its bytes are decoded before they are cut into lines
        raise InputError(f"{source}:{at}: the bytes {error.object[error.start:error.end]!r} are not {known}; save the "
                         "file as UTF-8") from None


def _is(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _is_chinese(raw: bytes) -> bool:
    """Is this line GB18030? Latin-1 would decode as such too, but does not look like Chinese."""
    return _is(raw, "gb18030") and looks_chinese(raw.decode("gb18030"))


def _to_utf8(pieces: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """UTF-16 as UTF-8. Raises UnicodeDecodeError behind the last character that is sound."""
    decoder = codecs.getincrementaldecoder(encoding)()
    for piece in chain(pieces, [b""]):
        try:
            yield decoder.decode(piece, final=not piece).encode("utf-8")
        except UnicodeDecodeError as error:
            yield bytes(error.object[:error.start]).decode(encoding).encode("utf-8")
            raise


def _split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of bytes that come in pieces; what stands behind the last line's end is a line too, if it is
    anything. A line is given out as soon as it ends, or is longer than LONGEST_LINE."""
    waiting: list[bytes] = []  # the pieces of a line that has not ended
    size, after_return = 0, False
    for piece in pieces:
        if after_return and piece:
            piece, after_return = piece.removeprefix(b"\n"), False  # the second half of \r\n
        if not piece:
            continue
        after_return = piece.endswith(b"\r")
        *ended, rest = re.split(rb"\r\n|\r|\n", piece)
        for line in ended:
            yield b"".join([*waiting, line])
            waiting, size = [], 0
        waiting.append(rest)
        size += len(rest)
        if size > LONGEST_LINE:
            yield b"".join(waiting)
            waiting, size = [], 0
    if size:
        yield b"".join(waiting)


class Arriving:
    """What an iterator gives, read by a thread of its own, so that its user can take what there is without waiting for
    more. Use it as a context manager."""

    def __init__(self, items: Iterator[str]):
        self._items = items
        self._queue: queue.Queue[str | Exception | None] = queue.Queue(MOST_WAITING)  # None: the end
        self._end: list[Exception | None] = []
        self._is_left = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)  # it may wait for a pipe for ever

    def __enter__(self) -> "Arriving":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_left.set()

    def _read(self) -> None:
        end = None
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except Exception as error:  # whoever takes the items gets it, behind those that came before
            end = error
        self._put(end)

    def _put(self, item: str | Exception | None) -> bool:
        while not self._is_left.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def take(self, most: int) -> list[str]:
        """Those that have arrived, `most` of them at most; waits for the first one. [] at the end. Raises what the
        iterator has raised."""
        found: list[str] = []
        while not self._end and len(found) < most:
            try:
                item = self._queue.get(block=not found, timeout=0.5)  # Windows acts on ^C between two waits
            except queue.Empty:
                if found:
                    break
                continue
            if isinstance(item, str):
                found.append(item)
            else:
                self._end.append(item)
        if not found and self._end[0] is not None:
            raise self._end[0]
        return found
