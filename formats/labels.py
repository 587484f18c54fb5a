"""Labels to class numbers: which classes there are, their order, and what is wrong with a label."""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config import InputError
from formats.rows import refuse
from formats.tables import SEPARATOR, Table

WHOLE = re.compile(r"([+-]?)0*([0-9]{1,9})([.,]0*)?")
NUMBER = re.compile(r"[+-]?[0-9]{1,9}([.,][0-9]+)?")


def canonical(label: str) -> str:
    """A whole number in its shortest form (3.0, +3 and 03 are 3); any other label as it is."""
    match = WHOLE.fullmatch(label)
    return label if not match else match[2] if match[1] != "-" or match[2] == "0" else f"-{match[2]}"


def is_whole(label: str) -> bool:
    """Is this canonical label a whole number?"""
    return WHOLE.fullmatch(label) is not None


@dataclass(frozen=True)
class Classes:
    """The classes of a run. `names` (C,): in the order of their numbers; `written` (C,): how the files write them,
    which is the names, or 0, 1, 2, ... `source`: the file that they come from; `is_learned`: it is the training file,
    and has no others; else `why` says what the source is."""

    names: list[str]
    written: list[str]
    source: Path
    is_learned: bool = True
    why: str = ""

    def numbers(self, table: Table) -> list[int]:
        """The class of each label of a table. Raises InputError that lists the first ten labels that are none."""
        number_of = {label: i for i, label in enumerate(self.written)}
        labels = [canonical(label) for label in table.labels or []]
        unknown = [pair for pair in zip(table.lines, labels, strict=True) if pair[1] not in number_of]
        refuse([f"{table.path}:{line}: {self.fault(label)}" for line, label in unknown[:10]], len(unknown))
        return [number_of[label] for label in labels]

    def fault(self, label: str) -> str:
        """What is wrong with a label that is none of the classes."""
        near = near_name(label, self.names)
        hint = f"; did you mean {near}?" if near else ""
        if self.is_learned:
            return f"the label {label} is not in {self.source}, so no model can learn it; check both files{hint}"
        if self.are_numbers and is_whole(label):
            return f"the label {label} is out of range; labels are 0 to {len(self.names) - 1}, {self.why} {self.source}"
        if self.are_numbers:
            return (f"the label {label[:30]!r} is not an integer; labels are 0 to {len(self.names) - 1}, {self.why} "
                    f"{self.source}")
        return (f"the label {label[:30]!r} is none of the {len(self.names)} in {self.source}: {listed(self.names)}"
                f"{hint}")

    @property
    def are_numbers(self) -> bool:
        """Do the files write the classes as 0, 1, 2, ...?"""
        return self.written == [str(i) for i in range(len(self.names))]


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")


def near_name(label: str, names: Sequence[str]) -> str:
    """The name that a label may be a misspelling of; "" where there is none, and for numbers."""
    if NUMBER.fullmatch(label):
        return ""
    known = {name.casefold(): name for name in names if name != label and not NUMBER.fullmatch(name)}
    near = difflib.get_close_matches(label.casefold(), known, n=1, cutoff=0.75)
    return known[near[0]] if near else ""


# --------------------------------------------------------------------------- which classes there are


def named(names: list[str], table: Table, source: Path, why: str = "one for each name in") -> Classes:
    """The classes with these names, where a table's labels are the names, or 0, 1, 2, ... in their place. The names'
    file is `source`.

    Raises InputError where nobody can know which is meant: names that are other numbers than 0, 1, 2, ..., and labels
    that are numbers and not all among them.
    """
    numbers = [str(i) for i in range(len(names))]
    there = dict.fromkeys(canonical(label) for label in table.labels or [])
    plain = [canonical(name) for name in names]
    if all(label in plain for label in there):
        return Classes(names, plain, source, False, why)
    if plain != numbers and all(map(is_whole, plain)) and all(map(is_whole, there)):
        other = next(label for label in there if label not in plain)
        raise InputError(f"{source}: the names are the numbers {listed(names)}, and {table.path} has the label "
                         f"{other}: is a label there a name, or the place of a name from 0? Write the names otherwise, "
                         "or the labels as they are in the names' file")
    by_number = any(is_whole(label) for label in there) and not any(label in plain for label in there)
    if by_number or all(map(is_whole, there)):
        return Classes(names, numbers, source, False, why)
    return Classes(names, plain, source, False, why)


def learned(table: Table) -> Classes:
    """The classes that occur in a training table: numbers in their order, else the names in theirs.

    Raises InputError for one class alone, for a label that no name can be, and where half of the labels or more are
    different: then they are no labels.
    """
    labels = [canonical(label) for label in table.labels or []]
    counts = Counter(labels)
    if len(counts) < 2:
        raise InputError(f"{table.path}: all labels are {labels[0]}; a classifier needs two classes or more")
    if len(labels) >= 10 and 2 * len(counts) > len(labels) and not _is_classic(counts, table):
        columns = f" (its columns are {', '.join(table.columns)}: --label_column NAME)" if table.columns else ""
        raise InputError(f"{table.path}: {len(counts)} different labels in {len(labels)} rows, such as "
                         f"{listed(list(counts)[:3])}: that is no column of classes{columns}")
    refuse([f"{table.path}:{line}: the label {label[:30]!r} has characters that cannot be shown, or ` ||| `; write it "
            "otherwise" for line, label in zip(table.lines, labels, strict=True)
            if not label.isprintable() or SEPARATOR in label])
    if all(map(NUMBER.fullmatch, counts)):
        names = sorted(counts, key=lambda label: (float(label.replace(",", ".")), label))
    else:
        names = sorted(counts)
    return Classes(names, names, table.path)


def _is_classic(counts: Counter[str], table: Table) -> bool:
    """`label ||| sentence` lines with the labels 0, 1, 2, ..., all of which occur."""
    return table.is_plain and counts.keys() == {str(i) for i in range(len(counts))}


# --------------------------------------------------------------------------- what is said of them


def summary(classes: Classes, numbers: Sequence[int], table: Table) -> str:
    """`labels :: negative 120, positive 130`; of more than 20 classes their number, the largest and the rarest. "" for
    `label ||| sentence` lines with the labels 0, 1, 2, ..., all of which occur or have a name."""
    if table.is_plain and classes.are_numbers:
        return ""
    counts = Counter(numbers)
    if len(classes.names) <= 20:
        return "labels :: " + ", ".join(f"{name} {counts[i]}" for i, name in enumerate(classes.names))
    most, rarest = counts.most_common(1)[0], min(counts.items(), key=lambda item: item[1])
    return (f"labels :: {len(classes.names)} classes, the largest {classes.names[most[0]]} with {most[1]}, the rarest "
            f"{classes.names[rarest[0]]} with {rarest[1]}")


def stray(classes: Classes, numbers: Sequence[int], table: Table) -> str:
    """A line on labels that occur once, or in fewer than 1 of 1,000 sentences while others are frequent: each with its
    first line, and the label that it may be a misspelling of. "" where there are none."""
    counts = Counter(numbers)
    usual = len(numbers) / len(counts)  # sentences of a class, if all had as many
    rare = [i for i in sorted(counts, key=lambda i: (counts[i], i))
            if counts[i] == 1 or 1000 * counts[i] < len(numbers) and 10 * counts[i] < usual]
    said = []
    for i in rare[:5]:
        label, line = classes.written[i], table.lines[list(numbers).index(i)]
        others = [classes.written[k] for k in counts if counts[k] > counts[i]]
        near = near_name(label, others)
        said.append(f"{label} ({'once' if counts[i] == 1 else f'{counts[i]} times'}, {table.path}:{line}"
                    f"{f', a misspelling of {near}?' if near else ''})")
    more = f", and {len(rare) - 5} more" if len(rare) > 5 else ""
    return f"rare labels: {', '.join(said)}{more}; each is a class of its own" if rare else ""
