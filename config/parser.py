"""The argument parser, which is made from the fields of `RunConfig`."""

import argparse
import difflib
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field
from typing import Any, NoReturn

from config.run import COMMANDS, RunConfig, contradiction, options
from config.words import shown


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage of every option in front of it. Exit code 2."""
        self.exit(2, f"{self.prog}: error: {shown(message)}\n")


def integers(text: str) -> tuple[int, ...]:
    """10,25,40 as a tuple; raises ValueError, which argparse reports, for anything else."""
    return tuple(int(part) for part in text.split(","))


integers.__name__ = "list of whole numbers"  # argparse says: invalid list of whole numbers value


def value_type(f: Field[Any]) -> Callable[[str], Any]:
    """What reads the option's value."""
    types: dict[str, Callable[[str], Any]] = {"tuple[str": str, "tuple": integers, "int": int, "float": float}
    return next((read for name, read in types.items() if name in str(f.type)), str)


def takes_several(f: Field[Any]) -> bool:
    """Does the option take several words, as --run RUN RUN?"""
    return "tuple[str" in str(f.type)


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of every option. Its help has those that the command uses; without one, those used most."""
    parser = _Parser(
        prog="run_llama.py", usage=f"python run_llama.py --option {command or 'COMMAND'} [options]",
        description="Fine-tune, evaluate and prompt a LLaMA that you can read. "
        + (f"All that --option {command} uses:" if command else "What people use most:"),
        epilog=("" if command else "All that a command uses: python run_llama.py --option COMMAND --help, such as "
                "--option finetune --help. ") + "- and _ are interchangeable in every option. More: README.md",
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(f.metadata["group"] for f in options())}
    for f in options():
        meta, text = f.metadata, f.metadata["help"].replace("%", "%%")
        keywords: dict[str, Any] = {"action": "store_true"}
        if f.type is not bool:
            read, choices = value_type(f), meta.get("choices") or None
            keywords = {"type": read, "choices": choices}
            if takes_several(f):
                keywords |= {"nargs": "+", "action": "extend"}
            if not choices:
                keywords["metavar"] = meta.get("metavar") or read.__name__.upper()
            if f.default is not None and meta.get("show_default", True):
                text += f" (default: {f.default})"
        if not command and "finetune" not in meta["only"]:
            text = f"{', '.join(meta['only'])}: {text}"
        is_shown = command in meta["only"] if command else meta["common"]
        groups[meta["group"]].add_argument(f"--{f.name}", help=text if is_shown else argparse.SUPPRESS, **keywords)
    return parser


MEANT = {other: f.name for f in options() for other in f.metadata["also"].split()}  # what other programs call them
ALIASES = {"max_length": "max_sentence_len"}


def _underscores(argument: str) -> str:
    """`--label-names=x` to `--label_names=x`; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    return "--" + ALIASES.get(name, name) + equals + value


def _commands_in(words: list[str]) -> list[str]:
    """The values of --option, which may stand behind --help; known ones or not."""
    values = [after for word, after in itertools.pairwise(words) if word == "--option"]
    return values + [word.partition("=")[2] for word in words if word.startswith("--option=")]


def which_command(given: Iterable[str]) -> str:
    """What to say where options were typed and --option was not: the commands that use all of them."""
    names = sorted(given)
    uses = {f.name: f.metadata["only"] for f in options()}
    commands = [command for command in COMMANDS if all(command in uses[name] for name in names)]
    typed = _listed([f"--{name}" for name in names], "and")
    if not commands:
        return f"no --option uses {typed} together: type --option and the one that you want, see --help"
    return (f"{typed} {'belongs' if len(names) == 1 else 'belong'} to --option {_listed(commands, 'or')}: type "
            f"{'it' if len(commands) == 1 else 'one of them'}")


def _listed(words: list[str], conjunction: str) -> str:
    """a, b and c"""
    return f" {conjunction} ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def parse_args(argv: list[str] | None = None, needs_command: bool = False) -> RunConfig:
    """The command line as a `RunConfig`. Bad values print one line to stderr and exit with code 2; so does a missing
    --option where `needs_command` (--resume is enough: it says what the run is)."""
    argv = sys.argv[1:] if argv is None else argv
    words = [_underscores(a) for a in argv]
    commands = _commands_in(words)
    asked = next((command for command in commands if command in COMMANDS), None)
    parser = make_parser(asked if {"-h", "--help"} & {*words} else None)
    for command in commands:
        if command not in COMMANDS and (near := difflib.get_close_matches(command, COMMANDS, n=1)):
            parser.error(f"--option {command}: did you mean --option {near[0]}?")
    for word, after in itertools.pairwise(words):
        if word == "--space" and after.startswith("--") and "=" in after:
            parser.error('--space: its parts have no dashes: --space "lr=log:1e-4..1e-3 batch_size=16|32"')
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].partition("=")[0]
        if getattr(namespace, "space", None) and not name.startswith("-"):
            parser.error(f"{unknown[0]} stands behind --space and is no option; put the whole space in quotes: "
                         f'--space "{namespace.space} {unknown[0]}"')
        meant = MEANT.get(name.lstrip("-").replace("-", "_"))
        if not meant and (near := difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.8)):
            parser.error(f"unknown option {name}: did you mean --option {near[0]}?")
        known = [*(f.name for f in options()), *ALIASES]
        near = [meant] if meant else difflib.get_close_matches(name.lstrip("-"), known, n=1)
        hint = f"did you mean --{near[0]}?" if near else "see --help"
        parser.error(f"unknown option {name}: {hint}")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                             for name, value in vars(namespace).items()}
    words_of = [(name, word) for name, typed in given.items()
                for word in (typed if isinstance(typed, tuple) else (typed,))]
    for name, value in words_of:
        if value == "" and name != "prefix":
            parser.error(f"--{name} is empty")
        try:
            str(value).encode("utf-8")
        except UnicodeEncodeError:
            parser.error(f"--{name}: these bytes are not UTF-8")
        if "\0" in str(value):
            parser.error(f"--{name}: there is a zero byte in it")
    for f in options():
        check = f.metadata.get("check")
        if check and f.name in given and not check.holds(given[f.name]):
            value = given[f.name]
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            parser.error(f"--{f.name} {text}: it must be {check.words}")
    if needs_command and not {"option", "resume"} & given.keys():
        parser.error(which_command(given))
    config = RunConfig(**given, given=frozenset(given))
    if fault := contradiction(config):
        parser.error(fault)
    return config
