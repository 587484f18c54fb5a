"""Full disks: one message that names the path, exit code 2, and nothing lost.

    python tests/campaign/full_disk.py --n 100 --seed 0

ENOSPC at every kind of write (in the middle of it), for this one call or from then on, in a run, a resume, a series,
evaluate, lr_find and generate. Then: no traceback, exit code 2 and a message with the path; no half-written file under
a final name; and with room again a resume ends as the undisturbed run. On Linux, where this user may mount one, also a
tmpfs that is too small.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from common import Sandbox, Tally, call, differences, draw_of, half_written, main

WAYS = ("run", "run", "run", "resume", "series", "evaluate", "lr_find", "generate", "small disk")
SERIES = ("--seeds", "2", "--epochs", "1")


def run(tally: Tally, cases: Iterable[int], sandbox: Sandbox) -> None:
    counted: dict[str, tuple[list[str], dict[str, bytes]]] = {}
    for case in cases:
        way = WAYS[case % len(WAYS)]
        (small_disk if way == "small disk" else full)(tally, case, way, sandbox, counted)
    tally.counts["kinds of write"] = len({kind for writes, _ in counted.values() for kind in writes})


def prepare(way: str, sandbox: Sandbox) -> tuple[Path, list[str], Path | None]:
    """A folder to work in, the command, and the run whose end it is to have, if it has one."""
    place = sandbox.fresh()
    if way == "resume":
        shutil.copytree(sandbox.stopped(), place / "run")
        return place, ["--resume", "run"], sandbox.done()
    if way == "evaluate":
        shutil.copytree(sandbox.done(), place / "run")
        return place, ["--option", "evaluate", "--run", "run"], sandbox.done()
    if way == "lr_find":
        return place, ["--option", "lr_find", *sandbox.inputs(), "--lr_steps", "10", "--output_dir", "run"], None
    if way == "generate":
        return place, ["--pretrained_model_path", str(sandbox.model), "--max_new_tokens", "5"], None
    more = SERIES if way == "series" else ()
    return place, sandbox.finetune(*more), sandbox.done(*more)


def full(tally: Tally, case: int, way: str, sandbox: Sandbox, counted: dict) -> None:
    if way not in counted:
        place, argv, _ = prepare(way, sandbox)
        writes = call(argv, place, allowed=[place], fault={"kind": "count"}).writes
        counted[way] = writes, {path.name: path.read_bytes() for path in place.glob("generated-*.txt")}
    draw = draw_of(tally.seed, case)
    place, argv, straight = prepare(way, sandbox)
    writes, texts = counted[way]
    kinds = list(dict.fromkeys(writes))
    kind = kinds[(case // len(WAYS) * WAYS.count(way) + case % len(WAYS)) % len(kinds)]
    at = draw.choice([i for i, what in enumerate(writes) if what == kind])
    ran = call(argv, place, allowed=[place], fault={"kind": "full", "at": at, "stays": draw.random() < 0.5})
    tally.count("full disks")
    if cut := [name for name, text in texts.items() if (place / name).exists() and (place / name).read_bytes() != text]:
        tally.fail(case, f"{way}, write {at} ({kind}): half-written: {', '.join(cut)}")
    judge(tally, case, f"{way}, write {at} ({kind})", ran, place, argv, straight, sandbox)


def judge(tally: Tally, case: int, what: str, ran, place: Path, argv: list[str], straight: Path | None,
          sandbox: Sandbox) -> None:
    found = ran.faults((0, 2))
    if ran.code == 2 and not found and not any(str(p) in ran.err for p in (place, sandbox.folder, "run", "generated")):
        found = [f"the message names no path: {ran.err.strip().splitlines()[-1]}"]
    found += half_written(place)
    tally.count("refused" if ran.code == 2 else "went on" if ran.code == 0 else "crashed")
    if straight and not found:
        if (place / "run/args.json").exists() and "evaluate" not in argv:
            argv = ["--resume", "run"]
        after = call(argv, place, allowed=[place])
        if after.faults((0, 2)) or (after.code and "finished" not in after.err):
            found = [f"afterwards: exit code {after.code}, {after.err.strip().splitlines()[-1:]}"]
        else:
            found = [f"another end: {what}" for what in differences(place / "run", straight)]
    if found:
        tally.fail(case, f"{what}: {'; '.join(found[:4])}")
    elif place.exists():
        shutil.rmtree(place, ignore_errors=True)


def small_disk(tally: Tally, case: int, way: str, sandbox: Sandbox, counted: dict) -> None:
    """A run in a tmpfs of some kilobytes, and its resume in the same one, larger."""
    draw, (place, argv, straight) = draw_of(tally.seed, case), prepare("run", sandbox)
    mounted = place / "disk"
    mounted.mkdir()
    size = f"size={draw.choice((4, 40, 100, 200, 300, 400, 600, 800))}k"
    try:
        made = sys.platform.startswith("linux") and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(mounted)], capture_output=True).returncode
    except OSError:
        made = False
    if not made:
        tally.count("small disks skipped")
        return
    try:
        ran = call(argv, mounted, allowed=[mounted])
        tally.count("small disks")
        subprocess.run(["mount", "-o", "remount,size=64m", str(mounted)], check=True)
        judge(tally, case, f"a disk of {size}", ran, mounted, argv, straight, sandbox)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


if __name__ == "__main__":
    sys.exit(main("full_disk", __doc__, run, 100))
