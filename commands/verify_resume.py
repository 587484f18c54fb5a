"""--option verify_resume: the proof that a run can be killed at any moment and go on as if nothing had happened."""

import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from commands import results
from config import InputError, RunConfig
from formats import files
from training import logs, run_folder
from training.run_folder import RESULT, RunFolder
from training.signals import SIGNALS, stoppable
from training.streams import without_readers

PROGRAM = Path(__file__).resolve().parent.parent / "run_llama.py"


@without_readers()
def run(config: RunConfig) -> int:
    results.check_outputs(config)
    return verify_resume(config, run_folder.open_run(config).path, PROGRAM)


def verify_resume(config: RunConfig, folder: Path, program: Path, kills: int = 3) -> int:
    """Run once straight, once killed after `kills` random steps and resumed; compare the best weights, the last state
    (weights, optimizer, random numbers), and steps.jsonl.

    Returns 0 when they are the same to the bit, 1 when not. A signal ends this program and the one that it runs.
    Raises InputError when the run fails by itself, and when it cannot be killed.
    """
    places = {"option", "output_dir", "resume", "dev_out", "test_out", "keep_state"}  # each of the two runs has its own
    words = [word for name in config.given - places for word in run_folder.option_words(name, getattr(config, name))]
    base, begin = [sys.executable, str(program)], ["--option", "finetune", "--keep_state"]
    straight, stopped = RunFolder(folder / "straight"), RunFolder(folder / "stopped")

    def steps_done() -> int:
        return stopped.steps.read_bytes().count(b"\n") if stopped.steps.exists() else 0

    def run(*arguments: str, kill_after: float = math.inf) -> bool:
        """One process; killed once its steps.jsonl has `kill_after` lines. Was it killed, and did not end by itself?"""
        with tempfile.TemporaryFile() as errors:  # a pipe that nobody reads would fill up and stop the process
            process = subprocess.Popen([*base, *arguments], stdout=subprocess.DEVNULL, stderr=errors)
            try:
                while process.poll() is None and steps_done() < kill_after:
                    SIGNALS.check()
                    time.sleep(0.02)
            finally:
                is_killed = process.poll() is None
                process.kill()
                code = process.wait()
            errors.seek(0)
            said = errors.read().decode("utf-8", errors="replace").strip()
        if code in (0, 3):
            return False
        if not is_killed:
            raise InputError(f"the run itself failed:\n{said.splitlines()[-1] if said else f'exit code {code}'}")
        return True

    with stoppable():
        logs.say("verify :: the straight run")
        run(*begin, *words, "--output_dir", str(straight))
        n_steps = len(_steps(straight))
        killed_at: list[int] = []
        moments = range(1, max(2, n_steps))
        for moment in sorted(random.Random(config.seed).sample(moments, min(kills, len(moments)))):
            start = ["--resume", str(stopped)] if killed_at else [*begin, *words, "--output_dir", str(stopped)]
            # A resumed run has the lines of the one before, until it cuts them off: only a later one is its own.
            if not run(*start, kill_after=max(moment, steps_done() + 1)):
                logs.warn(f"it was finished before it could be killed after step {moment}")
                break
            killed_at.append(steps_done())
            logs.say(f"verify :: killed after step {killed_at[-1]} of {n_steps}")
        if not stopped.result.exists():
            run("--resume", str(stopped))
    best = [files.sha256(one.best / "model.safetensors") for one in (straight, stopped)]
    same = {"weights": best[0] == best[1],
            "state": _state(straight) == _state(stopped), "steps": _steps(straight) == _steps(stopped)}
    said = {name: "identical" if is_same else "DIFFERENT" for name, is_same in same.items()}
    logs.say(f"verify :: best weights {said['weights']}, last state {said['state']}, steps.jsonl {said['steps']} "
             f"({n_steps} steps)")
    files.write_json(folder / RESULT, {**{f"same_{name}": is_same for name, is_same in same.items()},
                                        "killed_at": killed_at})
    if not killed_at:
        raise InputError("nothing is proved: the run was finished before it could be killed; give it more --epochs")
    return 0 if all(same.values()) else 1


def _state(run: RunFolder) -> list[str]:
    """The checksum of the tensors in the state that a finished run leaves."""
    return [files.sha256(path) for path in run.last.glob("step-*/tensors.safetensors")]


def _steps(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of a run's steps.jsonl, without their times."""
    lines = [json.loads(line) for line in run.steps.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
