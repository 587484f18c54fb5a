"""Kills: a run that is killed anywhere and resumed ends as the undisturbed one, to the bit.

    python tests/campaign/kills.py --n 200 --seed 0

SIGKILL at every kind of write (in the middle of it) and at random moments, once or in chains, in a new run, in one
that replaces another (--overwrite), and in a series (--seeds 2); then --resume, and the end is compared: the logs
without times, best/, the predictions, the last state, the result. --n counts the kills at least; a chain has several.
"""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from common import SIGKILL, Sandbox, Tally, call, differences, draw_of, main

WAYS = ("write", "write", "write", "moment", "chain", "overwrite finished", "overwrite stopped", "seeds")
SERIES = ("--seeds", "2", "--epochs", "1")
OTHER_SEED = ("--seed", "7")


def run(tally: Tally, cases: Iterable[int], sandbox: Sandbox) -> None:
    straight = sandbox.done()
    place = sandbox.fresh()
    ran = call(sandbox.finetune(), place, allowed=[place], fault={"kind": "count"})
    kinds = list(dict.fromkeys(ran.writes))
    assert not differences(place / "run", straight)
    tally.counts["kinds of write"] = len(kinds)
    for case in cases:
        if len(cases) > 1 and tally.counts["kills"] >= len(cases):
            return
        one(tally, case, sandbox, ran.writes, kinds, ran.seconds)


def one(tally: Tally, case: int, sandbox: Sandbox, writes: list[str], kinds: list[str], seconds: float) -> None:
    draw, place = draw_of(tally.seed, case), sandbox.fresh()
    way = WAYS[case % len(WAYS)]
    series = SERIES if way == "seeds" else ()
    first, expected = sandbox.finetune(*series), [sandbox.done(*series)]
    again = first
    if way.startswith("overwrite"):
        old = sandbox.done(*OTHER_SEED) if way == "overwrite finished" else sandbox.stopped()
        first = sandbox.finetune(*(() if old == sandbox.done(*OTHER_SEED) else OTHER_SEED), "--overwrite")
        new = sandbox.done(*(() if old == sandbox.done(*OTHER_SEED) else OTHER_SEED))
        # Killed before the old run was touched, it is still the old one: finished, or to be resumed to its own end.
        expected = [new, sandbox.done(*OTHER_SEED) if way == "overwrite finished" else sandbox.done()]
        again = first
        shutil.copytree(old, place / "run")
    argv, n_kills, said, most = first, 0, [], draw.randrange(2, 7) if way == "chain" else 1
    while True:
        fault, after, what = None, None, ""
        if n_kills < most:
            if way == "moment" or (way == "chain" and draw.random() < 0.3):
                after = draw.uniform(0, 1.1 * seconds)
                what = f"after {after:.2f} s"
            else:
                at = draw.randrange(len(writes) if way != "chain" else len(writes) // 2)
                if way == "write":
                    sweep = [i for i, kind in enumerate(writes) if kind == kinds[case % len(kinds)]]
                    at = draw.choice(sweep)
                elif way.startswith("overwrite"):
                    at = draw.randrange(60)
                fault, what = {"kind": "kill", "at": at}, f"write {at}"
        ran = call(argv, place, allowed=[place], fault=fault, kill_after=after)
        if ran.code == -SIGKILL and not ran.hung:
            n_kills += 1
            said.append(what)
            tally.count("kills")
            argv = ["--resume", "run"]
            continue
        if ran.hung or ran.faults():
            tally.fail(case, f"{way}, killed at {said}, {what}: {'; '.join(ran.faults())}")
            return
        if ran.code == 0 or "finished" in ran.err:
            break
        lost = "there is no run here", *(("there is no whole state",) if way.startswith("overwrite") else ())
        if any(what in ran.err for what in lost) and argv != again:
            argv = again  # killed before args.json, or in the middle of replacing: it said that nothing is there
            most = n_kills
            continue
        tally.fail(case, f"{way}, killed at {said}: exit code {ran.code}: {ran.err.strip().splitlines()[-1:]}")
        return
    tally.count("chains" if n_kills > 1 else "single kills" if n_kills else "ended before the kill")
    found = [differences(place / "run", straight) for straight in expected]
    if [] in found and is_the_run(place / "run", expected[found.index([])]):
        tally.count("identical")
        shutil.rmtree(place)
    else:
        tally.count("different")
        tally.fail(case, f"{way}, killed at {said}: another end: {min(found, key=len)[:4]}")


def is_the_run(run: Path, straight: Path) -> bool:
    """Does args.json describe the run whose end it is?"""
    import json

    options = [json.loads((folder / "args.json").read_text(encoding="utf-8"))["options"] for folder in (run, straight)]
    return options[0]["seed"] == options[1]["seed"]


if __name__ == "__main__":
    sys.exit(main("kills", __doc__, run, 200))
