"""The options of a run as a person's log has them: on a command line, or in the heading above it."""

import itertools
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass

from config import options
from formats.past_run import FLAGS, NAMES, NUMBER, option_name, plain

LOOKED_AT = 2000  # characters in front of a program's name
NUMERIC = {f.name for f in options() if f.type in (int, float) or str(f.type).startswith(("int", "float"))}
CHOICES = {f.name: f.metadata["choices"] for f in options() if f.metadata.get("choices")}

PROGRAM = re.compile(r"(?:^|[\s`/\\\"'>!])([\w.-]{1,80}\.py)(?![\w.])")
# The prompts that have words of their own: `PS C:\x>`, and the arrow of a zsh with a folder and a branch behind it.
PROMPT = re.compile(r"\s*(?:PS [^>]{1,200}>|[➜❯→λ](?:\s+\S{1,80})?(?:\s+git:\(\S{1,80}\))?(?:\s+[✗✔±*])?(?=\s))")
LOOP = re.compile(r"(?:^|[\s>])for\s+[%\w]{1,40}\s+in\s.{1,500}?[;)]\s*do\s")
# What starts a program, and what is said behind its name: `uv run python`, `accelerate launch`.
LAUNCHERS = {"nohup", "time", "srun", "sudo", "exec", "env", "nice", "torchrun", "deepspeed", "then", "do", "stdbuf",
             "caffeinate", "uv", "poetry", "pipenv", "pdm", "hatch", "conda", "mamba", "micromamba", "accelerate"}
TWO_WORDS = {"run": {"uv", "poetry", "pipenv", "pdm", "hatch", "conda", "mamba", "micromamba"},
             "launch": {"accelerate"}}
TRAINERS = re.compile(r"run|train|tune|classif|main|llama|bert|experiment", re.IGNORECASE)
OTHERS = re.compile(r"eval|plot|predict|test|prepar|generat|report|download|infer", re.IGNORECASE)
# What a shell puts in: $lr, ${lr}, $(cat x), %LR%, {lr}
PUT_IN = re.compile(r"[$]|%\w+%|%%?[A-Za-z]$|\{.*\}")

IN_HEADING = re.compile(r"(?:--([A-Za-z][\w-]{0,40})(?:\s?=\s?|\s|$)|(?<![\w-])([A-Za-z][\w-]{0,40})\s?=\s?)"
                        r"([^\s,;()|`*]{0,80})")


@dataclass(frozen=True)
class Command:
    """python run_llama.py --lr 1e-5 ...

    `unknown`: the options whose values a shell put in, with what stands there instead, {"lr": "$lr"}. `is_loop`: it may
    have started several runs. `starts_a_run`: it trains; one that evaluates or plots is no run's own.
    """

    options: dict[str, str]
    unknown: dict[str, str]
    is_loop: bool = False
    starts_a_run: bool = True


def program_in(line: str) -> re.Match[str] | None:
    """The program of a command line (its group 1), behind which the arguments begin: nothing but a prompt, a loop, an
    interpreter and settings stand in front of it. None where the line is prose."""
    found = PROGRAM.search(line[:LOOKED_AT]) if ".py" in line else None
    if not found:
        return None
    front = line[: found.start(1)]
    if prompt := PROMPT.match(front):
        front = front[prompt.end():]
    if loop := LOOP.search(front):
        front = front[loop.end():]
    front = front.rpartition("&&")[2]
    before, is_launched = "", False
    for word in front.split():
        bare = word.strip("`*_|\"'").lower()
        is_launcher = (bare in LAUNCHERS or before in TWO_WORDS.get(bare, ())
                       or re.search(r"python[\d.]*(\.exe)?$", bare) is not None)
        is_setting = is_launched and (bare.startswith("-") or before.startswith("-"))  # -u, -n 10, -W ignore
        if not (is_launcher or is_setting or _may_stand_in_front(bare)):
            return None
        before, is_launched = bare, is_launched or is_launcher
    return found


def _may_stand_in_front(word: str) -> bool:
    """A prompt, a path, a setting NAME=value, a number of a list: nothing that prose is made of."""
    return bool(not re.search(r"\w", word) or word.endswith(("$", "#", ">", "%", "!", ":", "/", "\\")) or "=" in word
                or (word.startswith("(") and word.endswith(")")) or re.fullmatch(r"\d+[.)]?", word)
                or word == "%run" or word.startswith("--"))


def command_of(line: str) -> Command | None:
    """The options of a command line that is, but for a prompt, the whole line. One that has no option at all, such as
    `python data/prepare.py movies`, starts no run, and is None."""
    program = program_in(line)
    if program is None or "--" not in line[program.end(1):]:
        return None
    words = _words(line[program.end(1):])
    found: dict[str, str] = {}
    unknown: dict[str, str] = {}
    kind = ""
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not re.match(r"--\w", word):
            continue
        typed, equals, value = word.partition("=")
        option = option_name(typed)
        has_value = bool(equals)
        if not equals:
            value = "on"
            if option not in FLAGS and i < len(words) and not words[i].startswith("--"):
                value, has_value = words[i], True
                i += 1
        kind = value if typed == "--option" else kind
        found.pop(option, None)
        unknown.pop(option, None)
        if PUT_IN.search(value) or not has_value and option in NUMERIC:
            unknown[option] = value if has_value else "nothing"
        else:
            found[option] = plain(value)
    if not found and not unknown:
        return None
    is_trainer = kind == "finetune" or not kind and bool(TRAINERS.search(program[1])) and not OTHERS.search(program[1])
    return Command(found, unknown, bool(unknown) or LOOP.search(line[:program.end(1)]) is not None, is_trainer)


def _words(text: str) -> list[str]:
    """The words of a command line up to where a shell would end it: at ; | & > < or a comment. A backslash is a part of
    a path, as in Windows; a backtick ends the code in a Markdown line."""
    text = re.split(r"\s#|`", text, maxsplit=1)[0]
    text = re.sub(r"\s[12](?=>)", " ", text)  # 2> and 2>&1
    words = re.split(r"[;|&<>]", text, maxsplit=1)[0].split()
    if re.search(r"[\"']", text):
        with suppress(ValueError):  # a quote that is not closed
            split = shlex.shlex(text, posix=True, punctuation_chars=";|&<>")
            split.whitespace_split, split.escape, split.commenters = True, "", ""
            words = list(itertools.takewhile(lambda word: not word or word.strip(";|&<>"), split))
    return words


def options_in(text: str) -> dict[str, str]:
    """The options that a heading names: `lr=1e-5`, `--lr 1e-5`, `lr = 1e-5`. A number alone says nothing, nor does an
    option with a value that it cannot have, or with two."""
    text = re.sub(r"[/+&](?=[A-Za-z][\w-]{0,40}\s?=)", " ", text)  # lr=1e-5/epochs=3
    found: dict[str, set[str]] = {}
    for dashed, typed, value in IN_HEADING.findall(text):
        name = option_name(dashed or typed)
        if name not in NAMES.values():
            continue
        own = "on" if dashed and name in FLAGS else plain(value.rstrip(".:?!\"'”’]}>").lstrip("\"'“‘[{<"))
        if _can_have(name, own):
            found.setdefault(name, set()).add(own)
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def _can_have(name: str, value: str) -> bool:
    """Is this a value that the option takes, as far as its kind tells?"""
    if name in FLAGS:
        return value in ("on", "off")
    if name in NUMERIC:
        return re.fullmatch(NUMBER, value) is not None
    return bool(value) and value in CHOICES.get(name, (value,)) and not PUT_IN.search(value)
