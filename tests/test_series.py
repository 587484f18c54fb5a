"""--seeds and --folds: each run is the one that it is alone, a stopped series is finished as a whole, and the summary
is honest about runs that diverged and about folds that chose their own epoch."""

import json
import os
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import exchange, tiny_sentences, write_split
from test_resume import lines, main, stop_at

import dataset
from commands import job as jobs
from commands import one_run, series
from tokenizer import Tokenizer
from training import metrics

posix = pytest.mark.skipif(os.name != "posix", reason="SIGTERM's handler is POSIX's")
SERIES = {"--seeds": ["seed-1337", "seed-1338"], "--folds": ["fold-0", "fold-1"]}


@pytest.fixture(scope="module")
def inputs(tiny_model, tmp_path_factory) -> list[str]:
    """The model's, the data's and the size's part of a command line: 40 of 96 sentences, in steps of 16."""
    folder = tmp_path_factory.mktemp("data")
    files = {name: write_split(folder / f"toy-{name}.txt", tiny_sentences(n, seed))
             for seed, (name, n) in enumerate({"train": 96, "dev": 30, "test": 33}.items())}
    return ["--option", "finetune", "--pretrained_model_path", str(tiny_model), "--train_limit", "40", "--epochs", "2",
            "--batch_size", "16", "--lr", "3e-3", *(w for n, f in files.items() for w in (f"--{n}", str(f)))]


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory):
    """The undisturbed series of two seeds, or of two folds."""
    done: dict[str, Path] = {}

    def get(option: str) -> Path:
        if option not in done:
            done[option] = tmp_path_factory.mktemp("straight") / "all"
            assert main(*inputs, option, "2", "--output_dir", done[option]) == 0
        return done[option]
    return get


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def result_of(folder) -> dict:
    return json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))


def assert_same_series(folder: Path, expected: Path) -> None:
    assert (folder / "result.json").read_bytes() == (expected / "result.json").read_bytes()
    for name in result_of(expected)["runs"]:
        for log in ("steps.jsonl", "epochs.jsonl"):
            assert lines(folder / name / log) == lines(expected / name / log), (name, log)


# --------------------------------------------------------------------------- each run is the one alone


@posix
@pytest.mark.parametrize("option, alone", [("--seeds", ["--seed", "1338"]),
                                           ("--folds", ["--folds", "2", "--fold", "1"])])
def test_with_a_train_limit_a_run_of_a_series_is_the_one_by_hand_resumed_or_not(inputs, straight, option, alone,
                                                                                monkeypatch):
    """The sentences are drawn by the run's own seed: the numbers of tokens in each step show which ones they are."""
    first, second = (lines(straight(option) / name / "steps.jsonl") for name in SERIES[option])
    if option == "--seeds":
        tokenizer = Tokenizer(tokenizer_model=inputs[inputs.index("--pretrained_model_path") + 1])
        train = dataset.load_split(Path(inputs[inputs.index("--train") + 1]), tokenizer, 128)
        for seed, steps in ((1337, first), (1338, second)):
            drawn = np.random.default_rng(seed).permutation(96)[:40]
            assert sum(step["tokens"] for step in steps) == 2 * train.lengths[drawn].sum()
    assert main(*inputs, *alone, "--output_dir", "alone") == 0
    assert lines(Path("alone/steps.jsonl")) == second != first
    stop_at(monkeypatch, [2])
    assert main(*inputs, *alone, "--output_dir", "stopped") == 143 and main("--resume", "stopped") == 0
    assert lines(Path("stopped/steps.jsonl")) == second


@posix
def test_one_run_of_a_stopped_series_can_be_resumed_alone_on_its_own_sentences(inputs, straight, monkeypatch, capfd):
    seen, real = [], one_run.train

    def train_one(*arguments, **more):
        seen.append(arguments)
        if len(seen) == 2:
            stop_at(monkeypatch, [2])
        return real(*arguments, **more)

    monkeypatch.setattr(one_run, "train", train_one)
    assert main(*inputs, "--seeds", "2", "--output_dir", "all") == 143
    assert capfd.readouterr().err.splitlines()[-1] == "stopped; go on with: python run_llama.py --resume all"
    expected = straight("--seeds")
    assert main("--resume", "all/seed-1338") == 0
    assert lines(Path("all/seed-1338/steps.jsonl")) == lines(expected / "seed-1338/steps.jsonl")
    assert len(seen) == 3 and main("--resume", "all") == 0 and len(seen) == 3, "all that is left is the summary"
    assert_same_series(Path("all"), expected)


# --------------------------------------------------------------------------- a stopped series


class Kill(BaseException):
    """Ends the program at once, as SIGKILL does."""


def kill_at(monkeypatch, moment: str) -> None:
    """`moment`: before the N-th run, in its training, in its last evaluation, or before the summary."""
    runs, real, summarise, evaluate = [], one_run.train, series.summarise, metrics.predict
    before, _, number = moment.partition(" ")

    def train_one(*arguments):
        runs.append(arguments)
        if str(len(runs)) == number:
            if before == "before":
                raise Kill
            if before == "in":
                stop_at(monkeypatch, [4])  # of 6, or of 10 of a fold
            monkeypatch.setattr(metrics, "predict", predict)
        return real(*arguments)

    def killed(*arguments):
        if number == "summary" and len(runs) == 2:
            raise Kill
        return summarise(*arguments)

    def predict(*arguments, **named):
        if before == "evaluating" and arguments[-1] == "test":
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **named)

    monkeypatch.setattr(one_run, "train", train_one)
    monkeypatch.setattr(series, "summarise", killed)


@posix
@pytest.mark.parametrize("option", SERIES)
@pytest.mark.parametrize("moment", ["before 1", "in 1", "before 2", "in 2", "evaluating 2",
                                    "before summary"])
def test_a_stopped_series_is_finished_as_a_whole(inputs, straight, option, moment, monkeypatch, tmp_path, capfd):
    expected, run = straight(option), Path("a series")
    kill_at(monkeypatch, moment)
    if not moment.startswith("before"):
        assert main(*inputs, option, "2", "--output_dir", run) == 143
        assert capfd.readouterr().err.splitlines()[-1] == f"stopped; go on with: python run_llama.py --resume '{run}'"
    else:
        with pytest.raises(Kill):
            main(*inputs, option, "2", "--output_dir", run)
    assert not (run / "result.json").exists()
    finished = [name for name in SERIES[option] if (run / name / "result.json").exists()]
    assert len(finished) == {"1": 0, "2": 1, "summary": 2}[moment.split()[1]]
    untouched = {name: (run / name / "result.json").stat().st_mtime_ns for name in finished}
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert main("--resume", run) == 0
    out = capfd.readouterr().out.splitlines()
    assert [line for line in out if " over 2 " in line][-2:] == out[-2:]
    assert all((run / name / "result.json").stat().st_mtime_ns == when for name, when in untouched.items())
    assert_same_series(run, expected)


def test_what_is_no_unfinished_series_is_refused(inputs, straight, capsys, tmp_path):
    def refused(*argv) -> str:
        capsys.readouterr()
        assert main(*argv) == 2
        return capsys.readouterr().err.splitlines()[-1]

    expected = straight("--seeds")
    err = refused("--resume", expected)
    assert "all its runs are finished" in err and f"--run {expected / 'seed-1337'}" in err
    for option in ("serve", "inspect"):  # evaluate and predict average the runs
        err = refused("--option", option, "--run", expected)
        assert f"name one of them: --run {expected / 'seed-1337'}, {expected / 'seed-1338'}" in err
    err = refused("--resume", expected / "seed-1338", "--seeds", "2")
    assert "the run is finished" in err
    assert "there is a run in this folder already" in refused(*inputs, "--seeds", "2", "--output_dir", expected)
    assert "there is a run in this folder already" in refused(*inputs, "--output_dir", expected)
    assert_same_series(expected, straight("--seeds"))


def stop_before(monkeypatch, number: int) -> None:
    kill_at(monkeypatch, f"before {number}")


def test_a_series_takes_only_its_own_runs_and_options(inputs, monkeypatch, tmp_path, capsys):
    """A stranger's result would be a lie in the mean, whether it is older than the series or newer."""
    assert main(*inputs, "--seeds", "2", "--output_dir", "all", "--lr", "1e-3") == 0
    with monkeypatch.context() as patch:
        stop_before(patch, 2)
        with pytest.raises(Kill):
            main(*inputs, "--seeds", "2", "--output_dir", "all", "--overwrite")
    assert not Path("all/seed-1338/result.json").exists(), "the older series' result is gone at once"
    assert main("--resume", "all", "--seeds", "3") == 2
    assert "--seeds is 2 in the run, 3 now" in capsys.readouterr().err
    assert main(*inputs, "--seed", "1338", "--lr", "1e-3", "--output_dir", "all/seed-1338") == 0
    capsys.readouterr()
    assert main("--resume", "all", "--seeds", "2") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "this run is not one of all: --lr is 0.001 there, 0.003 in all; move the folder away" in err
    Path("all/seed-1338").rename("moved")
    assert main("--resume", "all") == 0
    assert all(line["lr"] > 1e-3 for line in lines(Path("all/seed-1338/steps.jsonl"))[:1])


def test_a_run_that_is_in_the_way_is_refused_before_the_first_one_begins(inputs, capsys):
    assert main(*inputs, "--epochs", "1", "--seed", "1338", "--output_dir", "all/seed-1338") == 0
    capsys.readouterr()
    assert main(*inputs, "--seeds", "2", "--output_dir", "all") == 2
    err = capsys.readouterr().err
    assert f"{Path('all/seed-1338')}: there is a run in this folder already; --overwrite replaces it" in err
    assert not Path("all/args.json").exists() and not Path("all/seed-1337/args.json").exists()


# --------------------------------------------------------------------------- the cut into folds


def test_a_seed_of_any_size_cuts_folds(inputs):
    """scikit-learn's own seeds end at 2^32; below, its cut is what it was."""
    from sklearn.model_selection import StratifiedKFold

    labels = np.arange(60) % 3
    for seed in (0, 1337, 2**32 - 1):
        cut = StratifiedKFold(3, shuffle=True, random_state=seed).split(np.zeros(60), labels)
        for mine, (_, theirs) in zip(dataset.folds(labels, 3, seed), cut, strict=True):
            assert mine.tolist() == theirs.tolist()
    large = [[part.tolist() for part in dataset.folds(labels, 3, seed)] for seed in (2**32, 2**40, 2**40, 2**63 - 1)]
    assert large[1] == large[2] and large[0] != large[1] != large[3] != large[0]
    for parts in large:
        assert sorted(sum(parts, [])) == list(range(60))
        assert all(np.bincount(labels[part]).tolist() == [6, 7, 7] or len(part) == 20 for part in parts)
    assert main(*inputs, "--epochs", "1", "--folds", "2", "--seed", 2**32, "--output_dir", "all") == 0


# --------------------------------------------------------------------------- an honest summary


def diverge(monkeypatch, *seeds: int) -> None:
    """No loss of these seeds' runs is a number."""
    real = jobs.build_job

    def start(config, *arguments):
        run = real(config, *arguments)
        if config.seed in seeds:
            losses = run.task.losses
            exchange(run.task, losses=lambda batch: losses(batch) * float("nan"))
        return run

    monkeypatch.setattr(jobs, "build_job", start)


def test_runs_that_diverged_are_named_and_the_mean_is_given_without_them_too(inputs, monkeypatch, capsys):
    diverge(monkeypatch, 1338)
    assert main(*inputs, "--epochs", "4", "--lr", "1e-2", "--seeds", "3", "--output_dir", "all") == 3
    out, summary = capsys.readouterr().out.splitlines(), result_of("all")
    acc = {split: [result_of(f"all/seed-{seed}")[split]["acc"] for seed in (1337, 1338, 1339)]
           for split in ("dev", "test")}
    assert [line for line in out if line.startswith("seed-1338 diverged: ")]
    assert not [line for line in out if line.startswith(("seed-1337 diverged", "seed-1339 diverged"))]
    assert summary["diverged"] == ["seed-1338"]
    text = []
    for split, values in acc.items():
        healthy = [values[0], values[2]]
        assert summary[split] == {"acc": values, "mean": statistics.mean(values), "std": statistics.stdev(values)}
        assert summary["without_diverged"][split] == {"acc": healthy, "mean": statistics.mean(healthy),
                                                      "std": statistics.stdev(healthy)}
        assert f"{split} acc :: {statistics.mean(values):.3f} +- {statistics.stdev(values):.3f} over 3 seeds" in out
        text.append(f"{split} acc {statistics.mean(healthy):.3f} +- {statistics.stdev(healthy):.3f}")
    assert f"diverged :: seed-1338, 1 of 3 seeds; without it: {', '.join(text)}" in out
    assert summary["without_diverged"]["dev"]["mean"] > summary["dev"]["mean"], "it did make a difference"


def test_a_summary_of_one_healthy_run_or_of_none_has_no_deviation(inputs, monkeypatch, capsys):
    diverge(monkeypatch, 1337)
    assert main(*inputs, "--epochs", "4", "--seeds", "2", "--output_dir", "one") == 3
    acc = {split: result_of("one/seed-1338")[split]["acc"] for split in ("dev", "test")}
    assert (f"diverged :: seed-1337, 1 of 2 seeds; without it: dev acc {acc['dev']:.3f}, test acc {acc['test']:.3f}"
            in capsys.readouterr().out.splitlines())
    diverge(monkeypatch, 1338)
    assert main(*inputs, "--epochs", "4", "--seeds", "2", "--output_dir", "none") == 3
    assert "diverged :: seed-1337, seed-1338, 2 of 2 seeds" in capsys.readouterr().out.splitlines()
    assert result_of("none")["without_diverged"] == {}


def test_folds_say_that_they_chose_their_own_epoch_and_give_the_last_one_too(inputs, capsys):
    options = [*inputs, "--folds", "2", "--lr", "1e-2", "--scheduler", "constant"]
    assert main(*options, "--epochs", "2", "--patience", "0", "--output_dir", "all") == 0
    streams, summary = capsys.readouterr(), result_of("all")
    each = [[line["dev_acc"] for line in lines(Path(f"all/fold-{i}/epochs.jsonl"))] for i in range(2)]
    last, best = [values[-1] for values in each], [max(values) for values in each]
    assert last != best, "else this would show nothing"
    assert summary["dev"]["acc"] == pytest.approx(best)
    assert summary["dev_last_epoch"] == {"acc": last, "mean": statistics.mean(last), "std": statistics.stdev(last)}
    assert summary["dev_epoch"] == "the best of each fold, chosen on that same fold"
    assert (f"last epoch :: dev acc {statistics.mean(last):.3f} +- {statistics.stdev(last):.3f} over 2 folds"
            in streams.out.splitlines())
    assert "best epoch, chosen on that same fold" in streams.err and "--patience" not in streams.err
    assert main(*options, "--epochs", "3", "--patience", "1", "--output_dir", "stopped") == 0
    assert "--patience stopped on the fold too" in capsys.readouterr().err
    assert main(*inputs, "--epochs", "1", "--seeds", "2", "--output_dir", "seeds") == 0
    streams = capsys.readouterr()
    assert "last epoch ::" not in streams.out and "fold" not in streams.err


@posix
def test_no_link_in_a_run_of_a_series_is_followed(inputs, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, [2])
        assert main(*inputs, "--seeds", "2", "--output_dir", "all") == 143
    described = Path("all/seed-1337/args.json")
    described.rename(tmp_path / "elsewhere.json")
    described.symlink_to(tmp_path / "elsewhere.json")
    assert main("--resume", "all") == 2
    assert f"{described}: this is a symbolic link" in capsys.readouterr().err
