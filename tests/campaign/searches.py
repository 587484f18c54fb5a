"""Searches that are killed, and searches by several processes, each in a process of its own.

    python tests/campaign/searches.py --kills 20 --repeats 5 --seed 0

Kills: SIGKILL at random moments, the search started again each time; every trial that was finished is kept, none is
doubled, the total is exact, and the table and the end are those of the search that was never killed. Processes: two and
four, on one SQLite file and on one journal; the total is exact, none is lost. Prints what it counted, and fails where
something differs.
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import conftest  # noqa: E402
import tiny  # noqa: E402

N_TRIALS = 12
ENDS = ("leader", "finalist", "again", "winner ::", "test acc", "pruned ::", "repeat ::")


def command(place: Path, *more: str) -> list[str]:
    files = [word for name in ("train", "dev", "test") for word in (f"--{name}", str(place / f"toy-{name}.txt"))]
    return [sys.executable, str(ROOT / "run_llama.py"), "--option", "search", "--pretrained_model_path",
            str(place / "tiny"), *files, "--epochs", "3", "--patience", "0", "--device", "cpu", "--dtype", "float32",
            "--space", "lr=log:1e-4..3e-2 batch_size=8|16|32", "--finalists", "2", "--final_seeds", "2", *more]


def table(folder: Path) -> list[dict[str, str]]:
    """trials.csv without times."""
    with open(folder / "trials.csv", encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def end_of(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith(ENDS)]


def written(folder: Path) -> int:
    """How many bytes the logs of all the runs have."""
    return sum(path.stat().st_size for path in folder.glob("*/steps.jsonl"))


def kills(place: Path, n: int, draw: random.Random) -> None:
    words = command(place, "--trials", str(N_TRIALS), "--output_dir", "all")
    (place / "straight").mkdir()
    straight = subprocess.run(words, cwd=place / "straight", capture_output=True, text=True, check=True)
    (place / "killed").mkdir()
    folder, finished, n_killed = place / "killed/all", set(), 0
    while n_killed < n:
        one = subprocess.Popen(words, cwd=place / "killed", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        before = written(folder)  # the start takes most of the time of a tiny search: kill it behind that
        while one.poll() is None and written(folder) == before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.5))
        was_over = one.poll() is not None
        one.kill()
        one.communicate()
        now = {path.parent.name for path in folder.glob("*/result.json")}
        assert finished <= now, f"lost: {finished - now}"
        finished = now
        n_killed += not was_over
        if was_over:
            break
    done = subprocess.run(words, cwd=place / "killed", capture_output=True, text=True, check=True)
    for own, other in zip(table(folder), table(place / "straight/all"), strict=True):
        assert own == other, (own, other)
    assert end_of(done.stdout) == end_of(straight.stdout), (done.stdout, straight.stdout)
    assert len(table(folder)) == len([*folder.glob("trial-*")]) == N_TRIALS
    print(f"kills: {n_killed}, the same end; {len(finished)} runs were finished when the last one came", flush=True)


def processes(place: Path, n: int, storage: str, repeats: int) -> None:
    for i in range(repeats):
        name = f"{n}-{storage.partition('.')[2] or 'sqlite'}-{i}"
        (place / name).mkdir()
        words = command(place, "--trials", str(N_TRIALS), "--output_dir", "all",
                        *(["--storage", storage] if storage else []))
        running = [subprocess.Popen(words, cwd=place / name, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                   for _ in range(n)]
        said = [one.communicate() for one in running]
        assert [one.returncode for one in running] == [0] * n, said
        tried = sorted(line.split()[1] for out, _ in said for line in out.splitlines() if line.startswith("trial "))
        assert tried == sorted(str(number) for number in range(N_TRIALS)), tried
        assert [row["state"] in ("complete", "pruned") for row in table(place / name / "all")] == [True] * N_TRIALS
        assert len([*(place / name / "all").glob("final-*")]) == 4
    print(f"{n} processes on {storage or 'SQLite'}: {repeats} times {N_TRIALS} trials, none lost, none doubled",
          flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--kills", type=int, default=20)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--seed", type=int, default=0)
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tiny.write_model(place / "tiny", [s for _, s in conftest.tiny_sentences(200, 0)] * 3)
        for seed, (name, n) in enumerate({"train": 96, "dev": 30, "test": 33}.items()):
            conftest.write_split(place / f"toy-{name}.txt", conftest.tiny_sentences(n, seed))
        kills(place, asked.kills, random.Random(asked.seed))
        for n in (2, 4):
            for storage in ("", "trials.journal"):
                processes(place, n, storage, asked.repeats)


if __name__ == "__main__":
    main()
