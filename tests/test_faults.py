"""What a person, a file or the machine can do to the program: each is one message and an exit code, no traceback."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_split

import classifier
import config
import run_llama
from commands import generate, results
from formats import files, memory, tables
from training import metrics, trainer
from training.course import Course


@pytest.fixture
def arguments(tiny_model, tiny_data, tmp_path, monkeypatch):
    """The command line of a tiny run, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return ["--pretrained_model_path", str(tiny_model), "--epochs", "1", "--batch_size", "32", "--output_dir", "run",
            "--train", str(tiny_data["train"]), "--dev", str(tiny_data["dev"])]


@pytest.fixture
def run(arguments, capsys):
    """A finished run's folder."""
    assert run_llama.main(["--option", "finetune", *arguments]) == 0
    capsys.readouterr()
    return Path("run")


# --------------------------------------------------------------------------- out of memory


OUT_OF_MEMORY = [
    MemoryError(), np._core._exceptions._ArrayMemoryError((10**11,), np.dtype("float64")),
    torch.OutOfMemoryError("CUDA out of memory."), OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 80000000000 bytes."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("can't start new thread"), RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: f"{type(e).__name__} {e}"[:40])
def test_every_way_to_say_out_of_memory_is_one_message(arguments, monkeypatch, capsys, error):
    def no_room(*_):
        raise error

    monkeypatch.setattr(torch.nn.Embedding, "forward", no_room)
    assert run_llama.main(["--option", "generate", *arguments]) == 2
    err = capsys.readouterr().err
    assert "error: out of memory" in err and "--batch_size" in err and err.count("\n") == 1


def test_other_errors_are_not_taken_for_it():
    assert not any(map(memory.is_out_of_memory, (RuntimeError("size mismatch"), ValueError("not enough memory"),
                                                 OSError(errno.ENOENT, "no such file"), KeyboardInterrupt())))
    assert trainer.is_out_of_memory is memory.is_out_of_memory, "one definition"


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import run_llama, commands.generate, tokenizers, torch
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26,) * 2)
sys.exit(run_llama.main(["--option", "generate", "--pretrained_model_path", "big.pt", "--tokenizer", "any.json"]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limits")
def test_a_pt_that_cannot_be_mapped_is_not_called_damaged(arguments, tiny_model, tmp_path):
    (tmp_path / "any.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    torch.save({"a": torch.zeros(2**25)}, "big.pt")  # 128 MiB; half of it may be mapped
    done = subprocess.run([sys.executable, "-c", LIMITED, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 2 and "out of memory" in done.stderr and "damaged" not in done.stderr
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------- streams


class Full(io.StringIO):
    """A stream on a full disk."""

    def flush(self):
        if self.getvalue():
            raise OSError(errno.ENOSPC, "No space left on device")

    def fileno(self):
        return self.number


@pytest.fixture
def full():
    stream = Full()
    stream.number = os.open(os.devnull, os.O_WRONLY)
    yield stream
    os.close(stream.number)


@pytest.mark.parametrize("option", ["evaluate", "predict"])
def test_a_full_stdout_is_named(run, tiny_data, monkeypatch, capsys, full, option):
    monkeypatch.setattr(sys, "stdout", full)
    assert run_llama.main(["--option", option, "--run", "run", "--input", str(tiny_data["dev"])]) == 2
    assert "error: standard output could not be written (No space left on device)" in capsys.readouterr().err


def test_a_full_stderr_ends_nothing(run, monkeypatch, capsys, full):
    monkeypatch.setattr(sys, "stderr", full)
    assert run_llama.main(["--option", "evaluate", "--run", "run"]) == 0
    assert "dev acc ::" in capsys.readouterr().out
    assert run_llama.main(["--option", "evaluate", "--run", "none"]) == 2


def test_a_reader_that_leaves_before_the_work_is_done_is_no_success(run, tiny_data, monkeypatch, full):
    has_left = []

    def flush():
        if not has_left:
            has_left.append(True)
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    full.flush = flush
    monkeypatch.setattr(sys, "stdout", full)
    assert run_llama.main(["--option", "predict", "--run", "run", "--input", str(tiny_data["dev"])]) == 141
    has_left.clear()
    assert run_llama.main(["--option", "evaluate", "--run", "run"]) == 0, "its predictions are in the folder"
    assert (run / "dev-predictions.txt").is_file()


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell closes streams")
@pytest.mark.parametrize("closed, words", [
    ("--option generate >&-", ""), ("--option generate 2>&-", ""),
    ("--option predict --run run --input in.txt >&-", "standard output is closed"),
    ("--option predict --run run --input - <&-", "stdin: there is no sentence"),
])
def test_closed_streams(run, tiny_model, closed, words):
    """In a child, some of them without torch's seconds: the streams are opened before any command is imported."""
    code = ("import sys, types; sys.path.insert(0, sys.argv.pop(1)); import run_llama\n"
            "from training import logs\n"
            "sys.modules['commands.generate'] = generate = types.ModuleType('commands.generate')\n"
            "generate.run = lambda config: open('kept', 'w').close() or print('x') or logs.notice('y') or 0\n"
            "if 'predict' in sys.argv:\n"
            "    from commands import predict\n"
            "    bag = types.SimpleNamespace\n"
            "    predict.load_model = lambda config: bag(saved=bag(settings=bag(label_names=['a', 'b'])))\n"
            "sys.exit(run_llama.main())")
    Path("in.txt").write_text("good\n", encoding="utf-8")
    done = subprocess.run(["sh", "-c", f'"$0" -c "$1" "$2" {closed}', sys.executable, code, str(ROOT)], text=True,
                          capture_output=True)
    assert done.returncode == (2 if words else 0) and words in done.stderr and "Traceback" not in done.stderr
    if not words:
        assert Path("kept").read_text(encoding="utf-8") == "", "no message went into a file"
        assert (done.stdout, done.stderr) == (("", "y\n") if ">&-" in closed and "2" not in closed else ("x\n", ""))


# --------------------------------------------------------------------------- ^C


@pytest.mark.skipif(os.name != "posix", reason="os.kill would end this process")
def test_a_second_interrupt_adds_no_traceback(arguments, monkeypatch):
    def twice(stopped):
        print("stopped here", file=sys.stderr)
        raise KeyboardInterrupt

    class Slow(io.StringIO):
        def write(self, text):
            if "interrupted" in text:  # the second ^C comes while the first is being answered
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    err = Slow()
    monkeypatch.setattr(generate, "run", twice)
    monkeypatch.setattr(sys, "stderr", err)
    assert run_llama.main(["--option", "generate"]) == 130
    assert err.getvalue() == "stopped here\ninterrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "and the caller's handler is back"


# --------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("every, marks", [(1e-9, 7), (1e-310, 7), (5e-324, 7), (0.5, 2), (0.3, 3), (1.0, 1)])
def test_there_is_at_most_one_evaluation_a_step(every, marks):
    assert len(Course(7, 7, every).marks()) == marks


@pytest.mark.parametrize("option", ["--lr", "--head_lr", "--max_grad_value", "--weight_decay", "--r_drop", "--lr_max"])
@pytest.mark.parametrize("value", ["1e300", "inf", "nan"])
def test_numbers_that_no_tensor_holds_are_refused(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse_args([option, value])
    assert stop.value.code == 2 and f"{option} " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dev_out", "test_out"])
def test_no_file_of_mine_is_touched_by_the_check_of_an_output(tmp_path, name):
    mine = tmp_path / "o.txt.probe"
    mine.write_text("mine", encoding="utf-8")
    results.check_outputs(config.RunConfig(option="finetune", **{name: str(tmp_path / "o.txt")}))
    assert mine.read_text(encoding="utf-8") == "mine" and list(tmp_path.iterdir()) == [mine]


@pytest.mark.parametrize("settings", [{"layer_norm_eps": 2**64}, {"layer_norm_eps": True}, {"rope_theta": 10**400},
                                      {"rope_theta": "1"}, {"layer_norm_eps": float("nan")}, {"dropout": 9}], ids=str)
def test_a_model_with_numbers_that_cannot_be_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        config.LlamaConfig(**settings)


def test_weights_that_are_no_numbers_are_named(arguments, tiny_model, tiny_data, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_model / "model.safetensors")
    state["model.norm.weight"][0] = torch.nan
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in tiny_model.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    save_file(state, bad / "model.safetensors", metadata={"format": "pt"})
    for option in ("generate", "prompt"):
        assert run_llama.main(["--option", option, *arguments, "--pretrained_model_path", str(bad)]) == 2
        err = capsys.readouterr().err
        assert "the weights hold numbers that are not" in err and "Traceback" not in err


def test_far_more_names_than_labels_are_said_before_the_training(arguments, tmp_path, capsys):
    (tmp_path / "many.json").write_text(json.dumps([f"name {i}" for i in range(2000)]), encoding="utf-8")
    assert run_llama.main(["--option", "finetune", *arguments, "--label_names", "many.json"]) == 0
    assert "many.json has 2000 names, of which" in capsys.readouterr().err
    result = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert sum(count for *_, count in result["dev"]["confusion_pairs"]) == 30


def test_of_many_classes_the_pairs_that_occur_are_kept():
    assert metrics.confusion([0, 1, 1], [0, 0, 1], 2) == {"confusion_matrix": [[1, 0], [1, 1]]}
    many = metrics.confusion([0, 99_999, 0], [3, 0, 3], 100_000)
    assert many == {"confusion_pairs": [[0, 3, 2], [99_999, 0, 1]]}


def test_kappa_is_scikit_learns_without_its_matrix():
    from sklearn.metrics import cohen_kappa_score

    for seed in range(20):
        random = np.random.default_rng(seed)
        labels, scores = random.integers(0, 7, 40), torch.from_numpy(random.normal(size=(40, 7)))
        expected = cohen_kappa_score(labels, scores.argmax(1).numpy(), labels=range(7), weights="quadratic")
        assert metrics.score(scores, labels, ordinal=True)["qwk"] == pytest.approx(expected, abs=1e-12)
    many = torch.zeros((3, 200_000), dtype=torch.float64)  # a matrix of 200,000 by 200,000 takes 300 GiB
    assert metrics.score(many, np.array([0, 0, 199_999]), ordinal=True)["qwk"] == 0


# --------------------------------------------------------------------------- text for a terminal


@pytest.mark.parametrize("text, said", [
    ("plain, ü, 语, \t\n", "plain, ü, 语, \t\n"), ("a\x1b[31mb", "a\\x1b[31mb"), ("\x9b2J\r\x07", "\\x9b2J\\r\\x07"),
    ("exe.\u202etxt\u2066", "exe.\\u202etxt\\u2066"), ("a\u2028b", "a\\u2028b"),
])
def test_terminal_codes_are_written_out(text, said):
    assert config.shown(text) == said


def test_no_code_reaches_the_terminal(arguments, tiny_model, tmp_path, capsys):
    odd = "x\x1b[31m\u202ey"
    assert run_llama.main(["--option", "evaluate", "--run", odd]) == 2
    with pytest.raises(SystemExit):
        run_llama.main([f"--{odd}"])
    (tmp_path / f"{odd}.pt").write_bytes(b"nothing")
    assert run_llama.main(["--option", "generate", "--pretrained_model_path", f"{odd}.pt", "--tokenizer",
                           str(tiny_model / "tokenizer.json")]) == 2
    write_split(tmp_path / f"{odd}.txt", [(0, "a"), (1, "b")])
    assert run_llama.main(["--option", "finetune", *arguments, "--dev", f"{odd}.txt", "--output_dir", odd]) == 0
    streams = capsys.readouterr()
    for text in streams:
        assert "\x1b[31m" not in text and "\u202e" not in text
    assert "load 2 data from x\\x1b[31m\\u202ey.txt" in streams.out and "run :: x\\x1b" in streams.out


def test_a_saved_label_name_with_terminal_codes_is_refused(run):
    settings = files.read_json(run / "best" / "config.json")
    settings["label_names"][0] = "\x1b[31mbad"
    with pytest.raises(ValueError, match="label_names"):
        classifier.ClassifierConfig.read(settings, run / "best" / "config.json")


# --------------------------------------------------------------------------- line ends


@pytest.mark.parametrize("ends", [["\n"], ["\r\n"], ["\r"], ["\n", "\r\n", "\r"], ["\r", "\n"]], ids=repr)
def test_every_line_end_is_one(tmp_path, ends, run, capsys):
    rows = [(i % 3, f"sentence\u2028 {i}") for i in range(60)]
    text = "".join(f"{label} ||| {sentence}{ends[i % len(ends)]}" for i, (label, sentence) in enumerate(rows))
    path = tmp_path / "data.txt"
    path.write_bytes(text.encode())
    table = tables.read_table(path)
    assert list(zip(map(int, table.labels), table.texts, strict=True)) == rows and table.lines == list(range(1, 61))
    assert run_llama.main(["--option", "predict", "--run", "run", "--input", str(path)]) == 0
    assert capsys.readouterr().out.count("\n") == 60
    lines = [f"{label} ||| {sentence}" for label, sentence in rows]
    for number, fault in ((31, b"no separator"), (47, b"1 ||| caf\xe9")):
        raw = [line.encode() for line in lines]
        raw[number - 1] = fault
        path.write_bytes(b"".join(line + ends[i % len(ends)].encode() for i, line in enumerate(raw)))
        with pytest.raises(ValueError, match=f"data.txt:{number}: "):
            tables.read_table(path)


# --------------------------------------------------------------------------- a tokenizer beside a saved classifier


def make_older(run: Path) -> None:
    """As an older version left it: without checksums."""
    (run / "best" / "manifest.json").unlink()
    for name in ("args.json", "result.json"):
        values = json.loads((run / name).read_text(encoding="utf-8"))
        plain = {k: v for k, v in values.items() if k not in ("id", "sha256", "best_manifest")}
        (run / name).write_text(json.dumps(plain), encoding="utf-8")


@pytest.mark.parametrize("option", ["evaluate", "predict"])
def test_a_saved_tokenizer_with_words_beyond_the_embedding_is_refused(run, tiny_data, capsys, option):
    path = run / "best" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    n = max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"]))
    tokenizer["added_tokens"].append({"id": n + 1, "content": "film", "single_word": False, "lstrip": False,
                                      "rstrip": False, "normalized": False, "special": False})
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    make_older(run)
    assert run_llama.main(["--option", option, "--run", "run", "--input", str(tiny_data["dev"])]) == 2
    assert "the model's embedding has only" in capsys.readouterr().err
