"""What the scripts of the campaign share: the program in a process of its own, its faults on demand, and the checks.

A case is one call of `run_llama.main` in a forked process (where there is no fork, in a new one): what it does to
memory, streams and modules ends with it. The process looks at its own file calls (Python's audit events), so that a
write outside the run folder is seen wherever it goes.
"""

import argparse
import builtins
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has no other way to end a process either
CAN_FORK = sys.platform.startswith("linux")  # elsewhere torch's libraries do not survive a fork
PROGRAMS = {"git", "uname", "file", "cc"}  # describe the run, and compile fused.c for a large model
TIMEOUT = 60  # seconds; a healthy case takes one
MEMORY = 4 << 30  # bytes that a case may ask for, so that a huge number in a file ends the case and not the machine


def import_program() -> None:
    """Everything that a case needs, once, in the process that is forked: run_llama imports a command when it is asked
    for."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import sklearn.feature_extraction.text
    import sklearn.linear_model
    import sklearn.metrics  # noqa: F401
    import tokenizers  # noqa: F401
    import torch

    import run_llama  # noqa: F401
    from commands import evaluate, finetune, generate, lr_find, predict, prompt, verify_resume  # noqa: F401
    from training import checks, diagnosis  # noqa: F401

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the first optimizer imports half of torch


# --------------------------------------------------------------------------- faults at a chosen write


class Fault:
    """Counts the write-like calls of a process, and at the call number `at` kills it or fills the disk.

    Write-like are: creating a file, each write to one, fsync, rename, remove, truncate, making a folder, and what
    safetensors and tokenizers write themselves. A write is cut in the middle: half of its bytes are in the file.
    With `stays` the disk is full from then on, for every call that takes room; else for this call alone.
    """

    def __init__(self, kind: str, at: int = -1, stays: bool = False):
        self.kind, self.at, self.stays, self.calls = kind, at, stays, []

    def reach(self, what: str, path, half: Callable[[], None] = lambda: None) -> bool:
        """Called before a write. True: the caller raises its own error for a full disk."""
        number, name = len(self.calls), os.path.basename(os.fsdecode(path)) if not isinstance(path, int) else ""
        self.calls.append(f"{what} {re.sub(r'tmp[A-Za-z0-9_]{4,}', 'tmp', re.sub(r'[0-9]+', 'N', name))}".strip())
        full = self.stays and number > self.at >= 0 and what in ("create", "write", "save", "mkdir")
        if number != self.at and not full:
            return False
        half()
        if self.kind == "kill":
            os.kill(os.getpid(), SIGKILL)
            time.sleep(60)  # the signal is on its way
        return self.kind == "full"

    def check(self, what: str, path, half: Callable[[], None] = lambda: None) -> None:
        if self.reach(what, path, half):
            raise OSError(28, "No space left on device", None if isinstance(path, int) else os.fsdecode(path))

    def install(self) -> None:
        """For the rest of this process's life."""
        import safetensors.torch

        for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "truncate", "fsync"):
            setattr(os, name, self._checked(name, getattr(os, name)))
        if hasattr(os, "sendfile"):
            send = os.sendfile

            def sendfile(target, source, offset, count):
                self.check("write", "", lambda: send(target, source, offset, count // 2))
                return send(target, source, offset, count)
            os.sendfile = sendfile
        real_open, save_file = io.open, safetensors.torch.save_file

        def watched_open(file, mode="r", *arguments, **more):
            if isinstance(file, int) or not set(mode) & set("wax+") or os.fsdecode(file).startswith("/dev/"):
                return real_open(file, mode, *arguments, **more)
            if set(mode) & set("wax"):
                self.check("create", file)
            return WatchedFile(real_open(file, mode, *arguments, **more), self, file)

        def watched_save(tensors, path, *arguments, **more):
            def half():
                save_file(tensors, path, *arguments, **more)
                real_truncate(path, os.path.getsize(path) // 2)
            if self.reach("save", path, half):
                raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device "
                                                  "(os error 28)")
            save_file(tensors, path, *arguments, **more)

        real_truncate = os.truncate
        builtins.open = io.open = watched_open
        safetensors.torch.save_file = watched_save

    def _checked(self, name: str, call: Callable) -> Callable:
        def checked(path, *arguments, **more):
            self.check(name, path)
            return call(path, *arguments, **more)
        return checked


class WatchedFile:
    """A file whose writes are counted."""

    def __init__(self, file, fault: Fault, path):
        self.file, self.fault, self.path = file, fault, path

    def write(self, data):
        def half():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
        self.fault.check("write", self.path, half)
        return self.file.write(data)

    def truncate(self, *size):
        self.fault.check("truncate", self.path)
        return self.file.truncate(*size)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __iter__(self):
        return iter(self.file)


# --------------------------------------------------------------------------- a look at the process's own file calls


class Watch:
    """Notes every file call that changes something outside the `allowed` folders and files, and every program that is
    started."""

    def __init__(self, allowed: Iterable[str]):
        self.allowed = [os.path.realpath(path) for path in allowed]
        self.outside, self.programs = [], []

    def hook(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not isinstance(path, int) and path is not None:
                self.look(event, path)
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.symlink", "os.link"):
            names = arguments[:2] if event == "os.rename" else arguments[1:2] if "link" in event else arguments[:1]
            for path in names:
                if event == "os.mkdir" and os.path.isdir(path):
                    continue  # as makedirs(exist_ok=True) does it
                folder, name = os.path.split(os.fsdecode(path))
                inside = arguments[-1] if event in ("os.remove", "os.rmdir") else -1  # shutil.rmtree's: an open folder
                here = os.path.realpath(folder or (f"/proc/self/fd/{inside}" if inside != -1 else "."))
                self.look(event, os.path.join(here, name), follow=False)
        elif event in ("os.truncate", "os.chmod", "os.chown", "os.utime"):
            if not isinstance(arguments[0], int):
                self.look(event, arguments[0])
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            self.programs.append(os.path.basename(os.fsdecode(arguments[0])))

    def look(self, event: str, path, follow: bool = True) -> None:
        path = os.fsdecode(path)
        real = os.path.realpath(path) if follow else path
        if real in ("/dev/null", "/dev/full", "/dev/tty") or real.startswith(("/dev/pts/", "/proc/self/fd")):
            return
        if not any(real == place or real.startswith(place + os.sep) for place in self.allowed):
            self.outside.append(f"{event} {real}")


# --------------------------------------------------------------------------- one call of the program


@dataclass
class Ran:
    """What one call left: `code` is negative for a signal; `writes` are its write-like calls, where it was counted."""

    code: int
    out: str
    err: str
    seconds: float
    hung: bool = False
    outside: list[str] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)

    def faults(self, codes: tuple[int, ...] = (0, 2, 3)) -> list[str]:
        """What no input may ever cause, in words."""
        found, both = [], self.out + self.err
        last = self.err.strip().splitlines()[-1:] or [""]
        if self.hung:
            found.append(f"no end within {self.seconds:.0f} s")
        elif "Traceback (most recent call last)" in both:
            found.append(f"a traceback: {last[0]}")
        elif self.code not in codes:
            found.append(f"exit code {self.code}: {last[0]}")
        elif self.code == 2 and "error: " not in self.err:
            found.append(f"exit code 2 without a message: {last[0]}")
        if "panicked at" in both:
            found.append("a panic of a library on stderr")
        if "\x1b" in both or "\x07" in both:
            found.append("a control character reached the terminal")
        found += [f"a write outside: {what}" for what in sorted(set(self.outside))[:3]]
        found += [f"a program was started: {name}" for name in sorted(set(self.programs) - PROGRAMS)]
        return [shown(what) for what in found]

    def warnings(self) -> set[str]:
        return {line for line in self.err.splitlines() if line.startswith("warning: ")}


def shown(text: str, most: int = 300) -> str:
    """A text that is safe to print."""
    return text.encode("unicode_escape").decode("ascii")[:most]


def call(argv: list[str], cwd: Path, *, allowed: Iterable[Path] = (), fault: dict | None = None, stdin: str = "",
         timeout: float = TIMEOUT, kill_after: float | None = None) -> Ran:
    """Run the program with `argv` in the folder `cwd`. `allowed`: where it may write, beside the temporary folder.
    `fault`: the arguments of a Fault. `kill_after`: SIGKILL from outside after so many seconds."""
    with tempfile.TemporaryDirectory(prefix="campaign-") as work:
        spec = {"argv": [str(word) for word in argv], "cwd": str(cwd), "fault": fault, "work": work, "stdin": stdin,
                "allowed": [str(path) for path in allowed]}
        begin = time.monotonic()
        pid = _start(spec)
        hung, killed, status = False, False, None
        while status is None:
            done, status = pid.poll()
            passed = time.monotonic() - begin
            if not done:
                status = None
                if not killed and (passed > timeout or (kill_after is not None and passed > kill_after)):
                    hung, killed = passed > timeout, True
                    pid.kill()
                time.sleep(0.002 if kill_after is not None else 0.005)
        texts = [Path(work, name).read_text(encoding="utf-8", errors="replace") if Path(work, name).exists() else ""
                 for name in ("out", "err")]
        report = Path(work, "report.json")
        text = report.read_text(encoding="utf-8") if report.exists() else ""
        more = json.loads(text or "{}")  # a process that was killed wrote none
        return Ran(status, *texts, time.monotonic() - begin, hung, **more)


class _Forked:
    def __init__(self, pid: int):
        self.pid = pid

    def poll(self) -> tuple[bool, int | None]:
        done, status = os.waitpid(self.pid, os.WNOHANG)
        return bool(done), os.waitstatus_to_exitcode(status) if done else None

    def kill(self) -> None:
        os.killpg(self.pid, SIGKILL)


class _Started:
    def __init__(self, spec: dict):
        self.process = subprocess.Popen([sys.executable, __file__, json.dumps(spec)])

    def poll(self) -> tuple[bool, int | None]:
        code = self.process.poll()
        return code is not None, code

    def kill(self) -> None:
        self.process.kill()


def _start(spec: dict):
    if not CAN_FORK:
        return _Started(spec)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            _child(spec)
        finally:
            os._exit(98)
    try:
        os.setpgid(pid, pid)
    except OSError:
        pass  # the child was faster
    return _Forked(pid)


def _child(spec: dict) -> None:
    """The case itself, in its own process; never returns."""
    work = Path(spec["work"])
    (work / "in").write_text(spec["stdin"], encoding="utf-8")
    for number, name, how in ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY | os.O_CREAT),
                              (2, "err", os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(work / name, how, 0o644), number)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), line_buffering=True) for n in (1, 2))
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.chdir(spec["cwd"])
    temporary = work / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"] = os.environ["XDG_CACHE_HOME"] = tempfile.tempdir = str(temporary)
    _limit_memory()
    import run_llama

    fault = Fault(**spec["fault"]) if spec["fault"] else None
    watch = Watch([*spec["allowed"], str(temporary)])
    write_report = (work / "report.json").open("w", encoding="utf-8")
    sys.addaudithook(watch.hook)
    if fault:
        fault.install()
    code = 1
    try:
        code = run_llama.main(spec["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        json.dump({"outside": watch.outside, "programs": watch.programs, "writes": fault.calls if fault else []},
                  write_report)
        write_report.flush()
        os._exit(code)


def _limit_memory() -> None:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return  # only Linux says what is used already
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# --------------------------------------------------------------------------- the sandbox

# Everything that has a state of its own, as in tests/test_resume.py: moments, moving average, dropout's and the
# augmentation's random numbers, a schedule that looks back, a sampler, accumulation and evaluations inside an epoch.
TRAINING = ("--batch_size 8 --grad_accum 2 --epochs 2 --lr 3e-3 --eval_every 0.5 --ema 0.5 --dropout 0.1 "
            "--aug_delete 0.1 --aug_replace 0.1 --scheduler plateau --plateau_patience 1 --sampler balanced "
            "--patience 0 --save_every 2 --keep_state --device cpu").split()


class Sandbox:
    """A folder with a tiny model, tiny data, somebody else's files, a finished and a stopped run. `fresh()` gives a
    new empty folder to work in; everything else must stay as it is."""

    def __init__(self, folder: Path, n_train: int = 64):
        import tiny

        self.folder = folder.resolve()
        self.base = self.folder / "base"
        self.base.mkdir(parents=True)
        draw = random.Random(0)
        self.data = {}
        for name, n in (("train", n_train), ("dev", 24), ("test", 20)):
            rows = tiny.labelled_sentences(draw, n)
            self.data[name] = self.base / f"toy-{name}.txt"
            self.data[name].write_text("".join(f"{label} ||| {text}\n" for label, text in rows), encoding="utf-8")
            if name == "train":
                self.model = tiny.write_model(self.base / "model", [text for _, text in rows])
        self.data["label_names"] = self.base / "toy-labels.json"
        self.data["label_names"].write_text('["bad", "good"]', encoding="utf-8")
        (self.base / "lines.txt").write_text("a very good film\nthe film is dull\n\nmixed\n", encoding="utf-8")
        (self.base / "victim.txt").write_text("somebody else's file\n" * 20, encoding="utf-8")
        (self.base / "victim-folder").mkdir()
        (self.base / "victim-folder/precious.txt").write_text("precious\n", encoding="utf-8")
        self.n_fresh = 0
        self.straight: dict[tuple, Path] = {}
        self.kept: dict[str, tuple] = {}

    def inputs(self) -> list[str]:
        return ["--pretrained_model_path", str(self.model),
                *(word for name, path in self.data.items() for word in (f"--{name}", str(path)))]

    def finetune(self, *more: str) -> list[str]:
        return ["--option", "finetune", *self.inputs(), *TRAINING, *more, "--output_dir", "run"]

    def fresh(self) -> Path:
        self.n_fresh += 1
        folder = self.folder / f"case-{self.n_fresh}"
        folder.mkdir()
        return folder

    def done(self, *more: str) -> Path:
        """The folder `run` of the undisturbed run with these options; it is run once."""
        if more not in self.straight:
            place = self.fresh()
            ran = call(self.finetune(*more), place, allowed=[place])
            assert ran.code == 0 and not ran.faults(), (ran.code, ran.err)
            self.straight[more] = place / "run"
        return self.straight[more]

    def stopped(self, at: str = "mkdir .step-N-N.tmp", number: int = 4) -> Path:
        """The folder `run` of a run that was killed in the middle: at the fifth making of a state."""
        key = ("stopped", at, number)
        if key not in self.straight:
            place = self.fresh()
            counted = call(self.finetune(), place, allowed=[place], fault={"kind": "count"}).writes
            shutil.rmtree(place / "run")
            places = [i for i, what in enumerate(counted) if what == at]
            ran = call(self.finetune(), place, allowed=[place], fault={"kind": "kill", "at": places[number]})
            assert ran.code == -SIGKILL, ran.err
            self.straight[key] = place / "run"
        return self.straight[key]

    def keep(self) -> None:
        """Remember every file outside the cases, for `changes`."""
        self.kept = self._listing()

    def _listing(self) -> dict[str, tuple]:
        places = [self.base, *(path.parent for path in self.straight.values())]
        return {name: what for place in places for name, what in listing(place).items()}

    def changes(self) -> list[str]:
        """What is not as `keep` found it; it is put back."""
        now = self._listing()
        found = sorted(name for name in self.kept.keys() | now.keys() if self.kept.get(name) != now.get(name))
        for name in found:
            path = Path(name)
            if path.is_symlink() or path.is_file():
                path.unlink()
            if name in self.kept:
                kind, content = self.kept[name]
                if kind == "file":
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
            elif path.is_dir():
                shutil.rmtree(path)
        return [f"changed outside: {name}" for name in found]


def listing(folder: Path) -> dict[str, tuple]:
    """Every path below a folder with its kind and its content (bytes, or a link's target)."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(where, name)
            if os.path.islink(path):
                found[path] = ("link", os.readlink(path))
            elif os.path.isdir(path):
                found[path] = ("folder", None)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[path] = ("file", file.read())
            else:
                found[path] = ("other", None)
    return found


# --------------------------------------------------------------------------- the end of a run


def log_lines(path: Path) -> list[dict]:
    """A log without its times; raises ValueError for a line that is not JSON."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def _without_times(value):  # nor the checksum over them
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in ("seconds", "train_seconds", "sha256")}
    return value


def differences(run: Path, straight: Path) -> list[str]:
    """What tells the end of a run from that of the straight one: logs without times, best/, predictions, the last
    state's tensors, the result. Works for a series of runs too. Empty: identical."""
    found = []
    for at in [straight, *sorted(path.parent for path in straight.glob("*/args.json"))]:
        found += _differences(run / at.relative_to(straight), at)
    return found


def _differences(run: Path, straight: Path) -> list[str]:
    def same(name: str, read: Callable[[Path], object]) -> bool:
        try:
            return read(run / name) == read(straight / name)
        except (OSError, ValueError, UnicodeDecodeError):
            return False

    best = sorted({path.name for folder in (run, straight) for path in (folder / "best").glob("*")})
    plain = [f"best/{name}" for name in best] + ["dev-predictions.txt", "test-predictions.txt"]
    plain = [name for name in plain if (run / name).exists() or (straight / name).exists()]
    found = [name for name in plain if not same(name, Path.read_bytes)]
    logs = [name for name in ("steps.jsonl", "epochs.jsonl") if (straight / name).exists()]
    found += [name for name in logs if not same(name, log_lines)]
    found += [] if same("result.json", lambda p: _without_times(json.loads(p.read_text(encoding="utf-8")))) else [
        "result.json"]
    states = [sorted(p.read_bytes() for p in folder.glob("last/*/tensors.safetensors")) for folder in (run, straight)]
    if states[0] != states[1]:
        found.append(f"last/ ({len(states[0])} states)")
    found += [f"litter: {p.relative_to(run)}" for p in run.rglob("*")
              if p.name.startswith(".") and p.name not in (".lock",) and not (straight / p.relative_to(run)).exists()]
    return found


def half_written(run: Path) -> list[str]:
    """Files under a final name that are not whole. The logs are appended to: the last line of one may be cut."""
    from safetensors import safe_open

    found = []
    for path in sorted(run.rglob("*")):
        inside = path.relative_to(run).parts
        if not path.is_file() or any(part.startswith(".") for part in inside):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    for name in file.keys():
                        file.get_tensor(name)
            elif path.name.endswith("-predictions.txt") and not path.read_bytes().endswith(b"\n"):
                raise ValueError("its last line is cut")
        except Exception as error:
            found.append(f"half-written: {path.relative_to(run)} ({shown(str(error), 80)})")
    return found


def reseal(run: Path, changed: Path) -> None:
    """Make every checksum in a run folder fit a file that was changed, as an attacker would: what reads the file is to
    hold without them."""
    from training.run_folder import with_digest

    value = read_or_none(changed)
    if changed.name in ("args.json", "result.json") and isinstance(value, dict) and "sha256" in value:
        changed.write_text(json.dumps(with_digest(value)), encoding="utf-8")
    if changed.name == "args.json":  # the states know the options too; those of older versions do not
        for state in run.glob("last/*/state.json"):
            values = json.loads(state.read_text(encoding="utf-8"))
            values["dict"] = [pair for pair in values["dict"] if pair[0] != "run"]
            state.write_text(json.dumps(values), encoding="utf-8")
            reseal_manifest(state)
    known = reseal_manifest(changed)
    if changed.parent.name == "best" and known:  # the newest state knows the manifest of best/
        for state in run.glob("last/*/state.json"):
            state.write_text(state.read_text(encoding="utf-8").replace(*known), encoding="utf-8")
            reseal_manifest(state)


def read_or_none(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return None


def reseal_manifest(changed: Path) -> tuple[str, str] | None:
    """Put size and sha256 of a file into the manifest beside it; the manifest's own sha256 before and after."""
    path = changed.with_name("manifest.json")
    manifest = read_or_none(path)
    if changed == path or not isinstance(manifest, dict):
        return None
    before, data = hashlib.sha256(path.read_bytes()).hexdigest(), changed.read_bytes()
    manifest["files"][changed.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return before, hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------- counting, and the command line


@dataclass
class Tally:
    """The counts of a script, and a line for each failure with the command that repeats it."""

    name: str
    seed: int
    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def count(self, what: str, n: int = 1) -> None:
        self.counts[what] += n

    def fail(self, case: int, what: str) -> None:
        self.counts["failed"] += 1
        self.failures.append(f"{shown(what, 600)}  [python tests/campaign/{self.name}.py --seed {self.seed} "
                             f"--only {case}]")


def draw_of(seed: int, case: int) -> random.Random:
    """The random numbers of one case, which are the same whatever ran before it."""
    return random.Random(f"{seed}-{case}")


def main(name: str, doc: str, run: Callable[[Tally, Iterable[int], Sandbox], None], n: int) -> int:
    """The command line of a script. `run(tally, cases, sandbox)` does the cases with these numbers."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=n, help=f"how many cases (default: {n})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this case alone")
    parser.add_argument("--keep", help="a new folder to work in, which stays; else a temporary one")
    parser.add_argument("--write", action="store_true", help=f"write benchmarks/results/campaign-{name}.json")
    asked = parser.parse_args()
    tally, begin = Tally(name, asked.seed), time.monotonic()
    cases = range(asked.n) if asked.only is None else [asked.only]
    import_program()
    with tempfile.TemporaryDirectory(prefix="campaign-") as temporary:
        run(tally, cases, Sandbox(Path(asked.keep or temporary)))
    for line in tally.failures:
        print(line)
    counts = {"seed": asked.seed, "cases": len(cases), **dict(sorted(tally.counts.items())),
              "failed": len(tally.failures), "seconds": round(time.monotonic() - begin)}
    print(", ".join(f"{key} {value}" for key, value in counts.items()))
    if asked.write:
        path = ROOT / "benchmarks/results" / f"campaign-{name}.json"
        path.write_text(json.dumps({**counts, "failures": tally.failures}, indent=1) + "\n", encoding="utf-8")
    return 1 if tally.failures else 0


if __name__ == "__main__":  # the case of another process, where there is no fork
    import_program()
    _child(json.loads(sys.argv[1]))
