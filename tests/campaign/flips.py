"""Flipped bits: each is noticed, or without effect on any answer.

    python tests/campaign/flips.py --n 200 --seed 0

One bit in one file of a finished run (then evaluate, predict, and a resume, which finds it finished) or of a stopped
one (then resume, evaluate, predict). Noticed is: exit code 2 with a message, or a warning that the undamaged run does
not give. Without effect is: the same predictions, scores and probabilities, the same end of the resumed run. Anything
else is a failure: an answer that has changed and nobody was told.
"""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from common import Ran, Sandbox, Tally, call, differences, draw_of, main


def commands(sandbox: Sandbox, kind: str) -> list[list[str]]:
    ask = [["--option", "evaluate", "--run", "run"],
           ["--option", "predict", "--run", "run", "--input", str(sandbox.base / "lines.txt")]]
    resume = ["--resume", "run"]
    return [*ask, resume] if kind == "finished" else [resume, *ask]


def answers(place: Path, ran: Ran) -> tuple:
    """What a person takes from a call: its results on stdout, and the predictions' files."""
    files = {p.name: p.read_bytes() for p in place.glob("run/*-predictions.txt")}
    return ran.code, ran.out, files


def run(tally: Tally, cases: Iterable[int], sandbox: Sandbox) -> None:
    healthy = {}
    for kind, folder in (("finished", sandbox.done()), ("stopped", sandbox.stopped())):
        place = sandbox.fresh()
        shutil.copytree(folder, place / "run")
        files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
        files = [path for path in files if not any(part.startswith(".") for part in path.parts)]
        ran = []
        for argv in commands(sandbox, kind):
            one = call(argv, place, allowed=[place / "run"])
            ran.append((one, answers(place, one)))
        assert [one.code for one, _ in ran] == ([0, 0, 2] if kind == "finished" else [0, 0, 0])
        healthy[kind] = files, ran
    tally.counts["files"] = sum(len(files) for files, _ in healthy.values())
    for case in cases:
        one_flip(tally, case, sandbox, healthy)


def one_flip(tally: Tally, case: int, sandbox: Sandbox, healthy: dict) -> None:
    draw, kind = draw_of(tally.seed, case), ("finished", "stopped")[case % 2]
    files, expected = healthy[kind]
    name = files[case // 2 % len(files)]
    place = sandbox.fresh()
    shutil.copytree(sandbox.done() if kind == "finished" else sandbox.stopped(), place / "run")
    data = bytearray((place / "run" / name).read_bytes())
    if name.suffix == ".safetensors" and draw.random() < 0.5:  # the last bits matter least, the exponents most
        byte = draw.randrange(len(data) // 8 * 6 // 4, len(data) // 4) * 4 + 3 if len(data) > 64 else 0
        byte = min(byte, len(data) - 1)
    else:
        byte = draw.randrange(len(data))
    bit = draw.randrange(8)
    data[byte] ^= 1 << bit
    (place / "run" / name).write_bytes(data)
    tally.count("flips")
    noticed, silent, found = False, [], []
    for argv, (good, good_answers) in zip(commands(sandbox, kind), expected, strict=True):
        ran = call(argv, place, allowed=[place / "run"])
        found += ran.faults()
        told = ran.code == 2 and good.code != 2 or bool(ran.warnings() - good.warnings())
        noticed |= told
        changed = answers(place, ran) != good_answers if argv[0] == "--option" else ran.code != good.code
        if changed and not told and not (noticed and argv[0] == "--option"):
            silent.append(f"{argv[:2]} answers otherwise, without a word")
        if argv[0] == "--resume" and good.code == 0 and ran.code == 0 and not told:
            silent += [f"another end without a word: {what}" for what in differences(place / "run", sandbox.done())]
        if ran.code == 2 and good.code != 2:
            break
    tally.count("silent" if silent else "noticed" if noticed else "without effect")
    if silent or found:
        tally.fail(case, f"{kind}, {name}, byte {byte}, bit {bit}: {'; '.join([*silent, *found][:3])}")
    else:
        shutil.rmtree(place)


if __name__ == "__main__":
    sys.exit(main("flips", __doc__, run, 200))
