"""--option predict: the class of each line of a file or of stdin, or of each row of a table; stdout has the answers
and nothing else. A line that is written to an open pipe is answered at once."""

import gzip
import itertools
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from tqdm import tqdm

from commands import answers, ensemble, results
from config import InputError, RunConfig
from formats import lines, tables
from formats.columns import Usual
from formats.labels import canonical, is_whole
from training import logs, streams

AT_ONCE = 512  # texts that are answered together, where so many have arrived


def run(config: RunConfig) -> int:
    if streams.stdout_is_closed:
        raise InputError("standard output is closed, and it is where --option predict writes; send it to a file")
    results.check_outputs(config)
    if not config.input:
        raise InputError("--option predict needs --input FILE, with a sentence a line; - is stdin")
    is_file = config.input != "-" and Path(config.input).is_file()
    answering = ensemble.Answering(config, is_file)
    names = answering.names
    source = "stdin" if config.input == "-" else config.input
    labels = Labels(source, names)
    n_read = 0
    with ExitStack() as stack:
        if tables.kind_by_name(Path(config.input)) not in ("", "plain"):  # all others have lines
            take = rows_of_table(config.input, config, labels, answering.columns)
        else:
            if config.text_column or config.label_column:
                raise InputError(f"--text_column and --label_column name columns of a table, and {source} has lines; a "
                                 "table ends in .csv, .tsv, .jsonl or .parquet (and .gz)")
            take = lines_of_text(config.input, source, labels, stack)
        is_silent = config.input == "-" or sys.stdout.isatty()  # the answers show how far it is
        bar = stack.enter_context(tqdm(desc="predict", unit=" texts", leave=False, file=sys.stderr,
                                       disable=True if is_silent else None))
        for texts, probabilities in answering.answers(take):
            if not n_read and config.output_format == "csv":
                sys.stdout.write(answers.csv_header(names, config.top_k))
            for text, row in zip(texts, probabilities.tolist(), strict=True):
                one = answers.answer(row, names, config.top_k, config.threshold)
                labels.score(one)
                sys.stdout.write(answers.LINES[config.output_format](text, one, config.top_k is not None))
            sys.stdout.flush()
            n_read += len(texts)
            bar.update(len(texts))
    if not n_read:
        raise InputError(f"{source}: there is no sentence in it; write one a line")
    answering.warn_of_cuts(source)
    labels.report(n_read, config.threshold is not None)
    return 0


# --------------------------------------------------------------------------- the labels that the input carries


class Labels:
    """The true labels of the texts, as far as the input has them, and how many answers are right."""

    def __init__(self, source: str, names: list[str]):
        self.source = source
        self.numbers = {canonical(name): i for i, name in enumerate(names)}
        if not all(map(is_whole, self.numbers)):  # else 1 could be a name, or the second class
            self.numbers = {**{str(i): i for i in range(len(names))}, **self.numbers}
        self.known: deque[int | None] = deque()  # of the texts that are not answered yet
        self.n_labelled = self.n_unknown = self.n_right = self.n_unsure = 0

    def add(self, label: str | None) -> bool:
        """Note the label of the next text, a class's name or number; None where it has none. Is it a class's?"""
        number = None if label is None else self.numbers.get(canonical(label.strip()))
        self.known.append(number)
        self.n_labelled += number is not None
        self.n_unknown += label is not None and number is None
        return number is not None

    def split(self, line: str) -> str:
        """The sentence of a line. What stands in front of ` ||| ` is no part of it where it is a label of the run."""
        label, separator, sentence = line.partition(tables.SEPARATOR)
        return sentence if self.add(label if separator else None) else line

    def score(self, found: answers.Answer) -> None:
        """The answer to the next text."""
        label = self.known.popleft()
        self.n_right += label is not None and label == found.label
        self.n_unsure += label is not None and found.label < 0

    def report(self, n: int, has_threshold: bool) -> None:
        """What the labels of n texts say, on stderr; nothing where there are none."""
        if self.n_unknown:
            logs.warn(f"{self.source}: {self.n_unknown} of {n} have a label that the run does not know; they are not "
                      "scored")
        if not self.n_labelled:
            return
        logs.notice(f"{self.source}: {self.n_labelled} of {n} have a label, which is not part of the sentence")
        n_sure = self.n_labelled - self.n_unsure
        share = f" ({self.n_right / n_sure:.3f})" if n_sure else ""
        unsure = f", {self.n_unsure} unsure" if has_threshold else ""
        logs.notice(f"scored :: {self.n_right} of {n_sure} right{share}{unsure}")


# --------------------------------------------------------------------------- the texts


def rows_of_table(path: str, config: RunConfig, labels: Labels, usual: Usual) -> Callable[[], list[str]]:
    """Gives the texts of a table, up to AT_ONCE a call, and [] at the end. `usual`: the run's own columns."""
    table = tables.read_table(path, config.text_column, config.label_column, labelled=False, usual=usual)
    logs.notice(f"{path}: {table.description}")

    def texts() -> Iterator[str]:
        for i, text in enumerate(table.texts):
            if table.is_plain and table.labels is None:
                yield labels.split(text)
            else:
                labels.add(table.labels[i] or None if table.labels else None)
                yield text

    rest = texts()
    return lambda: list(itertools.islice(rest, AT_ONCE))


def lines_of_text(path: str, source: str, labels: Labels, stack: ExitStack) -> Callable[[], list[str]]:
    """Gives the sentences of a file, AT_ONCE a call, or of a pipe (- is stdin) those that have arrived, waiting for the
    first; [] at the end."""
    if path == "-":
        with suppress(OSError, ValueError, AttributeError):  # else nothing yet would look like the end
            os.set_blocking(sys.stdin.fileno(), True)
        read = partial(read_stdin, 1 << 16)
    elif path.lower().endswith(".gz"):
        read = partial(read_compressed, stack.enter_context(gzip.open(path)), path)
    else:
        file = stack.enter_context(open(path, "rb", buffering=0))
        read = partial(os.read, file.fileno(), 1 << 16)
    found = lines.read_lines(read, source, logs.notice)
    if path != "-" and Path(path).is_file():  # always the same batches, so that the same file gives the same last digit
        return lambda: [labels.split(line) for line in itertools.islice(found, AT_ONCE)]
    arriving = stack.enter_context(lines.Arriving(found))
    return lambda: [labels.split(line) for line in arriving.take(AT_ONCE)]


def read_compressed(file: gzip.GzipFile, path: str) -> bytes:
    """The next bytes of a file that is compressed, b"" at its end."""
    try:
        return file.read1(1 << 16)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: it cannot be decompressed ({error})") from None


def read_stdin(size: int) -> bytes:
    """What has arrived at stdin, b"" at its end. Raises OSError where it cannot be read; a closed one is empty.

    Unbuffered: the interpreter could not end while a thread waits inside a buffer's lock."""
    try:
        return sys.stdin.buffer.raw.read(size) or b""  # type: ignore[union-attr]  # of a BufferedReader
    except OSError as error:
        raise OSError(f"stdin: it cannot be read ({error.strerror}); give --input a file, or pipe the sentences into "
                      "this") from None
