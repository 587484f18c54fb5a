"""Command lines at random: no traceback, exit code 0, 2 or 3, no write where it does not belong, an end.

    python tests/campaign/command_lines.py --n 500 --seed 0

Some options of the parser with values from a pool of good, borderline and bad ones, tiny data and --epochs 1.
verify_resume is left out: it starts the whole program again several times.
"""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from common import Sandbox, Tally, call, draw_of, main

WHAT = ("finetune", "finetune", "finetune", "evaluate", "predict", "lr_find", "generate", "prompt", "resume")
BAD = ("", " ", "nan", "inf", "-inf", "1e-310", "1e310", "-1", "0", "abc", "1,2", "None", "9" * 400, "0x10", "1_0",
       "\x1b[31mred", "a\nb", "é", "--", "-", "1e-9", "9223372036854775808", "-0.0", "1e300")
# Work that is asked for is done, so these are given small numbers only: else a case would rightly last for days.
SMALL = {"seeds": ("2", "1", "0"), "folds": ("2", "3", "1"), "lr_steps": ("10", "11", "9"), "lr_repeats": ("1", "2"),
         "fold": ("0", "1", "5"), "max_new_tokens": ("1", "5", "1000")}
FLOATS = ("0.1", "1e-3", "0.5", "1", "1.0", "0", "1e-9", "1e-310", "1e300", "2.5", "0.999999", "1e-45")
INTEGERS = ("1", "2", "3", "7", "64", "1000000000", "0", "2147483648", "9223372036854775807")
PATHS = ("toy-train.txt", "toy-dev.txt", "lines.txt", "no-such-file", "model", "model/tokenizer.json", "/dev/null",
         "model/model.safetensors", "toy-labels.json", "../base/toy-dev.txt", "a" * 300, "run", ".", "\x1b[31m.txt")
TYPED_OUTPUTS = ("dev_out", "test_out", "output_dir", "generated_sentence_low_temp_out",
                 "generated_sentence_high_temp_out")
OUTPUTS = ("here/out.txt", "here/sub/folder/out.txt", "here", "/dev/null", "/dev/full", "here/" + "b" * 300,
           "run/args.json/x", "here/\x1b[31mred.txt", "run")


def value(draw, option, sandbox: Sandbox) -> str:
    if option.name in SMALL:
        return draw.choice(SMALL[option.name])
    if option.name in TYPED_OUTPUTS:
        return draw.choice(OUTPUTS)
    if draw.random() < 0.15:
        return draw.choice(BAD)
    if option.metadata.get("choices"):
        return draw.choice(option.metadata["choices"])
    if option.metadata.get("metavar") in ("FILE", "PATH", "RUN", "NAME"):
        name = draw.choice(PATHS)
        return name if name.startswith(("/", "run")) else str(sandbox.base / name)
    kind = str(option.type)
    if "tuple" in kind:
        return draw.choice(("1,2", "2", "3,2", "1,1000000000", "a"))
    if option.name == "device":
        return draw.choice(("cpu", "cpu", "cuda", "cuda:7", "mps", "meta", "tpu", "cpu:3"))
    if "int" in kind or "float" in kind:
        return draw.choice(INTEGERS if "int" in kind else FLOATS)
    return draw.choice(("plain text", "{labels}", "{", "%s"))


def command_line(draw, sandbox: Sandbox) -> list[str]:
    from config import options

    what = draw.choice(WHAT)
    argv = ["--resume", "run"] if what == "resume" else ["--option", what]
    if what in ("evaluate", "predict"):
        argv += ["--run", "run"]
    if what == "predict":
        argv += ["--input", str(sandbox.base / "lines.txt")]
    if what in ("finetune", "lr_find", "prompt", "generate"):
        argv += sandbox.inputs()
    if what in ("finetune", "lr_find"):
        argv += ["--output_dir", "run"]
    others = [f for f in options() if f.name not in ("option", "epochs", "resume")]
    for option in draw.sample(others, draw.choice((1, 1, 2, 3, 5, 8))):
        if option.type is bool:
            argv.append(f"--{option.name}")
        elif draw.random() < 0.03:
            argv.append(f"--{option.name}")  # its value is forgotten
        else:
            argv += [f"--{option.name}", value(draw, option, sandbox)]
    if what in ("finetune", "lr_find"):
        argv += ["--epochs", "1"]
    if what == "lr_find" and "--lr_steps" not in argv:
        argv += ["--lr_steps", "10"]
    if what == "generate" and "--max_new_tokens" not in argv:
        argv += ["--max_new_tokens", "5"]
    if draw.random() < 0.05:
        argv.append(draw.choice(("--no_such_option", "stray", "--lr=", "--learning-rate=1", "-h", "--help")))
    return argv


def run(tally: Tally, cases: Iterable[int], sandbox: Sandbox) -> None:
    finished, stopped = sandbox.done(), sandbox.stopped()
    sandbox.keep()
    for case in cases:
        draw, place = draw_of(tally.seed, case), sandbox.fresh()
        argv = command_line(draw, sandbox)
        (place / "here").mkdir()
        folder = {"--resume": stopped, "evaluate": finished, "predict": finished}.get(
            argv[0] if argv[0] == "--resume" else argv[1])
        if folder or draw.random() < 0.05:
            shutil.copytree(folder or finished, place / "run")
        ran = call(argv, place, allowed=allowed(argv, place))
        tally.count(f"exit code {ran.code}" if not ran.hung else "hung")
        found = ran.faults() + sandbox.changes()
        if found:
            tally.fail(case, f"{' '.join(word[:80] for word in argv if str(sandbox.base) not in word)}: "
                             f"{'; '.join(found[:3])}")
        shutil.rmtree(place)


def allowed(argv: list[str], place: Path) -> list[Path]:
    """Where this command line may write: its run folder, what was typed, and the outputs that are named in the help."""
    places = [place / "run", place / "here"]
    if not {"evaluate", "predict", "--resume"} & set(argv):
        places.append(place)  # runs/..., generated-sentence-temp-0.txt, NAME-dev-prompting-output.txt
    return places


if __name__ == "__main__":
    sys.exit(main("command_lines", __doc__, run, 500))
