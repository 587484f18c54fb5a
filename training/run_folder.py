"""The folder of a run: its names, its lock, the description of the run, its result. Everything in it is checked before
it is trusted: it may be damaged, half-replaced, or somebody else's.

Nothing here imports torch.
"""

import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any

from config import InputError, RunConfig, integers, names_in, options, value_type
from formats import files
from training import logs

LOGS = tuple(logs.FILES.values())
TABLES = tuple(logs.TABLES.values())  # of --logger csv
PREDICTIONS = ("dev-predictions.txt", "test-predictions.txt")
CURVES, CONFUSION = PICTURES = ("curves.png", "confusion.png")
SPLITS = ("train-split.jsonl", "dev-split.jsonl")  # where dev was held out of the training file
INSPECTED = ("inspect.md", "inspect.json")  # what --option inspect leaves behind
FOLDERS = ("last", "best", ".best.old", ".best.tmp", "loggers")
ROOT = Path(__file__).resolve().parent.parent
RUN_FILE, RESULT, LOCK = "args.json", "result.json", ".lock"


class RunFolder:
    """A run's folder by its path. A folder with `args.json` is a run, and one with its `result.json` a finished one."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.args, self.result, self.lock_file = (self.path / name for name in (RUN_FILE, RESULT, LOCK))
        self.best, self.last, self.loggers = (self.path / name for name in ("best", "last", "loggers"))
        self.steps, self.epochs = (self.path / logs.FILES[kind] for kind in (logs.StepRecord, logs.EpochRecord))

    def __str__(self) -> str:
        return str(self.path)

    def predictions(self, split: str) -> Path:
        """Where the predictions for a split go by default."""
        return self.path / f"{split}-predictions.txt"

    def split(self, name: str) -> Path:
        """Where train and dev are kept, where dev was held out of the training file."""
        return self.path / f"{name}-split.jsonl"

    def has_run(self) -> bool:
        return self.args.is_file()

    def check(self) -> None:
        """Raises OSError where a link, a device or a pipe stands in the place of a file of the run: it may come from
        somebody else, and would lead out of the folder. The folder itself may be a link."""
        for name in (RUN_FILE, *LOGS, *TABLES, RESULT, *PREDICTIONS, *SPLITS, *PICTURES, LOCK):
            files.check_plain(self.path / name)
        for name in FOLDERS:
            files.check_plain(self.path / name, is_folder=True)
            if name != self.loggers.name:
                files.check_tree(self.path / name)
        for path in self.loggers.glob("*"):  # deeper, wandb itself makes links, and nothing there is read or replaced
            files.check_plain(path, is_folder=path.is_dir())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process works in the folder. Raises OSError when another one does; a killed one leaves no lock."""
        with files.locked(self.lock_file) as is_ours:
            if not is_ours:
                raise OSError(f"{self.path}: another process is training in this folder; wait for it, or choose "
                              "another --output_dir")
            yield

    # ----------------------------------------------------------------------- args.json

    def describe(self, described: dict[str, Any]) -> dict[str, Any]:
        """Write args.json, with which the folder is this run's: a result.json that another command (lr_find) left there
        is removed, or it would pass for the run's own. Returns what the file holds: what was described, the run's id,
        and the sha256 of it all."""
        self.result.unlink(missing_ok=True)
        described = with_digest({**described, "id": uuid.uuid4().hex})
        files.write_json(self.args, described)
        return described

    def description(self, known: dict[str, Any]) -> dict[str, Any]:
        """args.json: with `options` that the parser would accept too, `given`, `files`, `device` and `versions`,
        and with `splits` where dev was held out.

        `known`: what a state of the run says of it (`id` and `options`), or {}. The folder has been checked: `check`.
        Raises InputError for a file that is damaged or was changed, naming the options where `known` has them.
        """
        path = self.args
        described = files.read_json(path)
        saved_options, inputs = described.get("options"), described.get("files")
        if not isinstance(saved_options, dict) or not isinstance(inputs, dict) or (
                not {"given", "device"} <= described.keys()):
            raise InputError(f"{path}: this is not what a run writes (no options, files, given and device)")
        saved = json.loads(json.dumps(known.get("options", {})))  # tuples become lists
        extended = {change.get("option") for change in changes_of(described)}  # since that state was saved
        edited = [f"--{name} is {saved_options.get(name)}, and was {saved[name]}" for name in saved.keys() - extended
                  if known.get("id") == described.get("id") and saved_options.get(name) != saved[name]]
        if edited or has_changed(described):
            raise InputError(f"{path}: it was changed after the run began{': ' if edited else ''}{'; '.join(edited)}; "
                             "put it back as it was, or start another run")
        if fault := fault_of(saved_options, options()):
            raise InputError(f"{path}: {fault}")
        given, versions = described["given"], described.get("versions", {})
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given) or (
                not isinstance(versions, dict) or not isinstance(described["device"], str)):
            raise InputError(f"{path}: `given`, `device` or `versions` is not what a run writes")
        splits = described.get("splits", {})
        if not isinstance(splits, dict) or not all(
                f"{name}-split.jsonl" in SPLITS and isinstance(digest, str) for name, digest in splits.items()):
            raise InputError(f"{path}: `splits` is {splits!r}, expected the sha256 of train and dev")
        for name, file in inputs.items():
            if not isinstance(file, dict) or not isinstance(file.get("path"), str) or "\0" in file["path"] or (
                    not isinstance(file.get("sha256", ""), str)):
                raise InputError(f"{path}: the {name} file is {file!r}, expected its path and its sha256")
            at = Path(file["path"])
            if at.exists() and not at.is_file() and not (at.is_dir() and name in ("weights", "tokenizer", "adapter")):
                raise InputError(f"{path}: the {name} file is {at}, which is not a regular file")
        return described

    def extend(self, described: dict[str, Any], changes: dict[str, Any], step: int) -> dict[str, Any]:
        """Write args.json anew with other values of some options, from this step of the run on; returns what it holds.
        The result and the pictures, which are those of the shorter run, go first: a kill in between leaves a run that
        can be resumed."""
        for name in (RESULT, *PICTURES):
            (self.path / name).unlink(missing_ok=True)
        new = [{"option": name, "from": described["options"].get(name), "to": value, "step": step}
               for name, value in changes.items()]
        described = with_digest({**described, "options": {**described["options"], **changes},
                                 "given": sorted({*described["given"], *changes}),
                                 "extended": [*changes_of(described), *new]})
        files.write_json(self.args, described)
        return described

    # ----------------------------------------------------------------------- result.json

    def save_result(self, result: dict[str, Any]) -> None:
        """Write result.json, the last file of a run. Its own checksum is in it: a series takes over the results of its
        runs."""
        files.write_json(self.result, with_digest(result))

    def is_finished(self) -> bool:
        """Has the run in this folder, or the series of --seeds or --folds, written its result? That of another command,
        such as lr_find, does not count, and for a run no series' result."""
        files.check_plain(self.result)
        if not self.result.is_file():
            return False
        options = files.read_json(self.args).get("options")
        is_series = isinstance(options, dict) and asks_for_series(options)
        return ("runs" if is_series else "best_epoch") in files.read_json(self.result)

    def read_result(self) -> dict[str, Any]:
        """The result.json of a finished run or series. Raises InputError for one that was changed, and for one that no
        run writes."""
        path = self.result
        result = files.read_json(path)
        if has_changed(result):
            raise InputError(f"{path}: it was changed after the run wrote it (sha256); move it away, and resume the "
                             "run")
        if not (_is_of_series(result) if "runs" in result else _is_of_run(result)):
            raise InputError(f"{path}: this is not what a run writes; move it away, and resume the run")
        return result

    def known_manifest(self) -> tuple[str | None, bool]:
        """The sha256 that a finished run's best/manifest.json has, and whether the run has one at all: an older version
        wrote none."""
        if not self.has_run():
            return None, False
        digest = self.read_result().get("best_manifest") if self.is_finished() else None
        return digest, "id" in files.read_json(self.args)

    # ----------------------------------------------------------------------- going on with it

    def resume_command(self, config: RunConfig) -> str:
        """The command that resumes the run. Output files outside the folder are named again, see `outside`."""
        words = ["python", "run_llama.py", "--resume", str(self.path)]
        for name in self.outside(config):
            words += option_words(name, getattr(config, name))
        return shlex.join(words)

    def outside(self, config: RunConfig) -> list[str]:
        """Those of --dev_out and --test_out that are not in the folder: a run folder may be somebody else's, and only
        what is typed may write elsewhere."""
        inside = self.path.resolve()
        return [name for name in ("dev_out", "test_out")
                if getattr(config, name) and inside not in Path(getattr(config, name)).resolve().parents]


def option_words(name: str, value: Any) -> list[str]:
    """An option with its value as one types it: ["--milestones", "2,3"], ["--plan"]; [] where one types nothing."""
    if value is None or value is False:
        return []
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [f"--{name}"] + ([] if value is True else [text])


# --------------------------------------------------------------------------- making one


def open_run(config: RunConfig) -> RunFolder:
    """Make the run's folder and return it.

    The default name is runs/<option>-<epochs>-<lr>, with -2, -3, ... behind it when that exists. An --output_dir
    that holds a run, or a file that this command would write, is refused without --overwrite, and then emptied of
    those. Raises FileExistsError or OSError with what to do.
    """
    try:
        if config.output_dir is None:
            base = Path("runs") / f"{config.option}-{config.epochs}-{config.lr}"
            path = next(path for n in itertools.count(1)
                        if _made(path := base if n == 1 else base.with_name(f"{base.name}-{n}")))
        else:
            path = Path(config.output_dir)
            path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{config.output_dir or 'runs'}: no run can be written here ({error.strerror}); choose another "
                      "--output_dir") from None
    folder = RunFolder(path)
    folder.check()
    if any((path / name).exists() for name in (RUN_FILE, *FOLDERS)):
        if not config.overwrite:
            raise FileExistsError(f"{path}: there is a run in this folder already; --overwrite replaces it, or "
                                  "choose another --output_dir")
        with folder.lock():
            if asks_for_series(options_in(folder)):
                _remove_series(path)
            _remove_run(path)
    elif in_the_way := _in_the_way(path, config):
        if not config.overwrite:
            raise FileExistsError(f"{path / in_the_way}: there is such a file already, and this would replace it; "
                                  "--overwrite allows that, or choose another --output_dir")
    elif config.output_dir is not None:
        with folder.lock():  # what a start left that was killed before its args.json was there
            for temporary in path.glob(".*.tmp"):
                if re.fullmatch(rf"\.({re.escape(RUN_FILE)}\.)?\d+\.tmp", temporary.name):
                    temporary.unlink(missing_ok=True)
    return folder


def _made(path: Path) -> bool:
    try:
        path.mkdir(parents=True)
        return True
    except FileExistsError:
        if path.is_dir():
            return False
        raise


def options_in(folder: RunFolder) -> dict[str, Any]:
    """The options of the run in a folder; {} where they cannot be read."""
    try:
        found = files.read_json(folder.args).get("options")
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def asks_for_series(options: dict[str, Any]) -> bool:
    """Do these options ask for several runs, one after another?"""
    return bool(options.get("seeds") or options.get("folds") and options.get("fold") is None)


def _remove_series(path: Path) -> None:
    """Remove the runs of the series in a folder; what else is in theirs stays."""
    for member in sorted(path.glob("*-*")):
        if re.fullmatch(r"(seed|fold)-\d+", member.name) and (member / RUN_FILE).is_file():
            folder = RunFolder(member)
            folder.check()
            with folder.lock():
                _remove_run(member)
            with suppress(OSError):
                folder.lock_file.unlink()
                member.rmdir()


def _remove_run(path: Path) -> None:
    """Remove the files of the run in a folder. After a kill in between, this must still be seen to be a run, but not a
    finished one: result.json goes first, args.json last."""
    tables = _tables_of(options_in(RunFolder(path)).get("logger"))
    (path / RESULT).unlink(missing_ok=True)
    for name in FOLDERS:
        if (path / name).exists():
            gone = path / f".{name.strip('.')}.gone.tmp"
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(path / name, gone)
            shutil.rmtree(gone, ignore_errors=True)
    files.remove_temporary_files(path)
    for name in (*LOGS, *tables, *PREDICTIONS, *SPLITS, *PICTURES, *INSPECTED, RUN_FILE):
        (path / name).unlink(missing_ok=True)


def _in_the_way(path: Path, config: RunConfig) -> str:
    """The name of a file that a run with these options would replace; "" where there is none. The result.json of an
    lr_find makes way for a fine-tuning run: it says nothing that the others do not have."""
    names = {"lr_find": (RESULT, "lr_find.csv", "lr_find.png"), "verify_resume": (RESULT,)}
    of_a_run = (RESULT, *LOGS, *_tables_of(config.logger), *PREDICTIONS, *SPLITS, *PICTURES)
    for name in names.get(config.option, of_a_run):
        if (path / name).exists() and not (
                name == RESULT and config.option == "finetune" and _is_of_lr_find(path / name)):
            return name
    return ""


def _tables_of(logger: Any) -> tuple[str, ...]:
    """The tables that a run with this --logger writes: without csv, they are somebody else's."""
    return TABLES if isinstance(logger, str) and "csv" in names_in(logger) else ()


def _is_of_lr_find(result: Path) -> bool:
    try:
        return "steepest" in files.read_json(result)
    except ValueError:
        return False


# --------------------------------------------------------------------------- what args.json and result.json hold


def environment(config: RunConfig, device: str, inputs: dict[str, Any], c_compiler: str) -> dict[str, Any]:
    """What args.json says of a run: every option, the versions, the git commit (see `code_state`), the device and the
    data's checksums. `inputs`: the path and sha256 of each file that is read; `c_compiler`: what compiled fused.c, or
    "not used"."""
    from importlib.metadata import version

    packages = ("torch", "numpy", "scikit-learn", "safetensors", "gguf", "tokenizers", "sentencepiece")
    commit, dirty = code_state(ROOT)
    return {
        "options": {k: v for k, v in asdict(config).items() if k != "given"}, "given": sorted(config.given),
        "files": inputs, "device": device, "git_commit": commit, "dirty": dirty,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages},
                     "c_compiler": c_compiler},
        "platform": platform.platform(),
    }


def code_state(root: Path) -> tuple[str | None, bool | None]:
    """The git commit of the code in `root`, and whether a tracked .py or .c file differs from it. (None, None) where
    there is no git, and where the repository around `root` is another one."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True, timeout=5).stdout

    with suppress(OSError, subprocess.SubprocessError, ValueError):
        place, commit = git("rev-parse", "--show-prefix", "HEAD").splitlines()
        if not place:
            changed = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.c")
            return commit, bool(changed)
    return None, None


def changes_of(described: dict[str, Any]) -> list[dict[str, Any]]:
    """What was changed when the run was gone on with, as an args.json has it under `extended`."""
    found = described.get("extended", [])
    return [change for change in found if isinstance(change, dict)] if isinstance(found, list) else []


def options_of(described: dict[str, Any]) -> dict[str, Any]:
    """The options that an args.json holds; one that is newer than the file has its default, or what runs did
    before there was that option."""
    saved = {f.name: described["options"].get(f.name, f.metadata.get("earlier", f.default))
             for f in fields(RunConfig) if f.metadata}
    saved["milestones"] = tuple(saved["milestones"]) if saved["milestones"] else None
    return saved


def fault_of(saved: dict[str, Any], fields_of_options: list[Field]) -> str:
    """What is wrong with the options of a saved run, by the checks that typed ones go through; "" when it is nothing.
    Options that are newer than the run are not there."""
    known = {f.name: f for f in fields_of_options}
    for name, value in saved.items():
        if name not in known:
            return f"this version has no --{name}"
        f = known[name]
        if value is None and f.default is None:
            continue
        kind = bool if f.type is bool else list if value_type(f) is integers else value_type(f)
        is_right = type(value) in ((int, float) if kind is float else (kind,))
        if kind is list:
            is_right = is_right and value and all(type(item) is int for item in value)
        if not is_right:
            return f"--{name} is {value!r}, expected {'a ' if kind is not int else 'an '}{kind.__name__}"
        choices, check = f.metadata.get("choices"), f.metadata.get("check")
        if choices and value not in choices:
            return f"--{name} is {value!r}; it can be {', '.join(choices)}"
        if check and not check.holds(value):
            return f"--{name} is {value!r}; it must be {check.words}"
        if kind is str and (not value and name != "prefix" or "\0" in value):
            return f"--{name} is {value!r}"
    return ""


def with_digest(values: dict[str, Any]) -> dict[str, Any]:
    """The same values, and under `sha256` the checksum of them all: a digit that is changed later is noticed."""
    plain = {k: v for k, v in values.items() if k != "sha256"}
    return {**plain, "sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def has_changed(values: dict[str, Any]) -> bool:
    """Are these values with a checksum (see `with_digest`) others than it was made of? Those of an older version have
    none."""
    return "sha256" in values and with_digest(values)["sha256"] != values["sha256"]


def _is_of_series(result: dict[str, Any]) -> bool:
    """Is this the result.json of --seeds or --folds? It names its runs' folders, which are inside the series' own."""
    runs = result["runs"]
    return bool(isinstance(runs, list) and runs and all(isinstance(n, str) and Path(n).name == n for n in runs))


def _is_of_run(result: dict[str, Any]) -> bool:
    """Is this the result.json of a run? Only what other commands read of it is looked at."""
    def number(value: Any) -> bool:
        return type(value) in (int, float)

    scores = [result[name] for name in ("dev", "test") if name in result]
    found = result.get("baselines", {})
    return bool(
        isinstance(result.get("stopped"), str) and isinstance(result.get("best_manifest"), str | None)
        and number(result.get("best_epoch")) and "dev" in result
        and all(isinstance(s, dict) and number(s.get("acc")) for s in scores)
        and isinstance(found, dict)
        and all(isinstance(f, dict) and all(number(f.get(k)) for k in ("majority", "tfidf")) for f in found.values()))
