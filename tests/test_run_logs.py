"""formats/run_logs.py, run_tables.py, past_run.py: a person's own log, with everything that such logs have in them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import training.contradictions
from config import InputError
from formats import past_run, run_logs, run_tables
from training.contradictions import contradictions

FILE = Path(__file__).parent / "logs" / "twelve_runs.md"

# name, options, how many epochs, best epoch, its dev, dev and test at the end: read off the file by hand
TWELVE = [
    ("Try1", {"lr": "1e-05", "epochs": "3", "hidden_dropout_prob": "0.3", "use_gpu": "on"}, 3, 2, .408, .408, .415),
    ("Try1-2", {"lr": "3e-05", "epochs": "3", "hidden_dropout_prob": "0.3"}, 3, 1, .42301, .42301, .42999),
    ("Try1-3", {}, 2, 1, .38, None, None),
    ("1e-4", {}, 5, 1, .430, .430, None),
    ("lr=2e-5, hidden_dropout_prob = 0.5", {"lr": "2e-05", "hidden_dropout_prob": "0.5"}, 2, 1, .40, None, None),
    ("After", {"lr": "5e-06", "epochs": "2"}, 2, 1, .390, .390, .388),
    ("After-2", {"lr": "2e-06", "epochs": "2"}, 2, 1, .370, .370, .366),
    ("Try8", {"lr": "1e-05", "epochs": "3", "hidden_dropout_prob": "0.8"}, 3, 2, .424, .424, .408),
    ("Diverged", {"lr": "0.01", "epochs": "3"}, 3, 0, .260, .260, None),
    ("Seeds/seed-1337", {"lr": "1e-05", "epochs": "2", "seed": "1337"}, 2, 1, .381, .381, .377),
    ("Seeds/seed-1338", {"lr": "1e-05", "epochs": "2", "seed": "1338"}, 2, 1, .385, .385, .379),
    ("Last one", {}, 3, 1, .421, .421, None),
]


def encoded(how: str) -> bytes:
    text = FILE.read_bytes().decode("utf-8")
    if how == "crlf":
        return text.replace("\n", "\r\n").encode()
    return text.encode(how)


@pytest.mark.parametrize("how", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "crlf"])
def test_twelve_runs_are_found_with_all_their_numbers_and_nothing_else(how):
    runs = run_logs.read_runs(past_run.decode(encoded(how), FILE), str(FILE))
    found = [(run.name, {k: v for k, v in run.options.items() if k != "option"}, len(run.epochs), run.best().number,
              run.best().dev_acc, run.dev, run.test) for run in runs]
    assert found == TWELVE


def test_the_epochs_of_a_log_keep_their_numbers():
    runs = {run.name: run for run in run_logs.read_runs(FILE.read_text(encoding="utf-8"), "log")}
    first = runs["Try1"].epochs[0]
    assert (first.number, first.train_loss, first.train_acc, first.dev_acc, first.lr) == (0, 1.611, .36, .337, 9.05e-6)
    assert runs["Try1-2"].epochs[1].train_loss == 1.20345 and runs["Try1-2"].epochs[1].lr is None
    assert [e.number for e in runs["1e-4"].epochs] == [0, 1, 3, 4, 6]
    assert "2 of the epochs up to 6 are not in the log" in runs["1e-4"].notes
    assert runs["Seeds/seed-1337"].majority == .262 and runs["Seeds/seed-1337"].planned == 2
    for seed in (1337, 1338):  # the first has the line as it is printed now, the other as an older version did
        assert (runs[f"Seeds/seed-{seed}"].said_best, runs[f"Seeds/seed-{seed}"].stopped) == (1, "finished")


def test_a_number_that_was_copied_wrongly_is_named_with_both():
    found = {run.name: contradictions(run) for run in run_logs.read_runs(FILE.read_text(encoding="utf-8"), "log")}
    assert [name for name, lines in found.items() if lines] == ["Try8", "Last one"]
    assert "0.568" in found["Try8"][0] and "0.408" in found["Try8"][0]
    assert "epoch is 2" in found["Last one"][0] and "0.415" in found["Last one"][0] and "0.421" in found["Last one"][0]


@pytest.mark.parametrize("line, n_claims", [
    ("The paper reports test accuracy of 0.538. My goal: dev accuracy = 0.50.", 0), ("Try 1 had dev acc 0.372", 0),
    ("My goal: dev accuracy = 0.50", 0), ("test accuracy: 0.538", 1), ("- **Best dev accuracy**: 50.0%", 1),
    ("Final test acc = 0.538", 1),
    ("1. Result: best epoch: 1, dev accuracy 0.538 and test acc 0.55. Next: dev acc 0.6", 3)])
def test_only_a_line_that_begins_with_it_says_something_of_the_run_above(line, n_claims):
    text = LINE.format(0, "0.4") + LINE.format(1, "0.3") + "dev acc :: 0.400\ntest acc :: 0.410\n\n"
    run, = run_logs.read_runs(text + line, "log")
    assert len(run.claims) == n_claims == len(contradictions(run))


class Counted(tuple):
    """It counts how often it is gone through."""

    times = 0

    def __iter__(self):
        self.times += 1
        return super().__iter__()


def test_each_claim_is_looked_up_and_not_searched_for(monkeypatch):
    epochs = [past_run.Epoch(n, 1.5, .4, n / 1000) for n in range(900)]
    counts = []
    compared: list[float] = []
    agree = training.contradictions._agree
    monkeypatch.setattr(training.contradictions, "_agree", lambda *two: compared.append(two) or agree(*two))
    for n in (1, 100):
        run = past_run.PastRun("a", "a", epochs=Counted(epochs), test=.4, dev=.899, claims=tuple(
            past_run.Claim(line, what, value, 3) for line in range(n) for what, value in (
                ("best epoch", 3), ("dev", .9871), ("best dev", .4), ("test", .5))))
        compared.clear()
        assert len(contradictions(run)) == 4 * n
        assert len(compared) <= 4 * n
        counts.append(run.epochs.times)
    assert counts[0] == counts[1]


LINE = "epoch {}: train loss :: 1.0, train acc :: 0.4, dev acc :: {}\n"


@pytest.mark.parametrize("numbers, n_runs", [
    ([0, 1, 2, 0, 1], 2), ([0, 1, 1, 2], 1), ([0, 2, 1, 3], 1), ([2, 3, 4, 5, 0, 1], 2), ([0, 1, 10, 11, 2, 3], 1),
    ([0, 1, 2, 0, 1, 2], 2), ([1, 2, 3, 1, 2, 3], 2), ([0.5, 1, 1.5, 0.5], 2)])
def test_a_run_begins_where_the_count_starts_again(numbers, n_runs):
    text = "".join(LINE.format(n, f"0.{30 + int(10 * n)}") for n in numbers)
    assert len(run_logs.read_runs(text, "log")) == n_runs


LOADED = "load 8544 data from data/sst-train.txt\nload {} data from {}\nload 2210 data from data/sst-test.txt\n"


def test_how_many_dev_sentences_there_are_is_read_where_the_log_says_it():
    def sizes(*parts: str) -> list[int | None]:
        return [run.n_dev for run in run_logs.read_runs("".join(parts), "log")]

    epochs, other = LINE.format(0, .3) + LINE.format(1, .4), LINE.format(0, .2)
    assert sizes(LOADED.format(1101, "data/sst-dev.txt"), epochs) == [1101]
    assert sizes(LOADED.format(1101, "C:\\data\\sst_dev.txt"), epochs, "### next\n", epochs, other) == [
        1101, None, None]
    assert sizes(LOADED.format(90, "mine.csv"), epochs) == [None]
    for typed, printed in (("mine.csv", "mine.csv"), ("./mine.csv", "mine.csv"), ("data\\mine.csv", "data/mine.csv"),
                           ("data/mine.csv", "data\\mine.csv"), ("C:\\x\\..\\y.csv", "C:\\y.csv")):
        assert sizes(f"python run_llama.py --dev {typed}\n", LOADED.format(90, printed), epochs) == [90]
    assert sizes("dev :: 105 of 1061 sentences of mine.txt held out (the same ones)\n", epochs) == [105]
    series = "".join(f"seed-{seed}:\n{epochs}dev acc :: 0.4\n" for seed in (1, 2))
    assert sizes(LOADED.format(1101, "dev.txt"), series, LOADED.format(872, "dev.txt"), series) == [
        1101, 1101, 872, 872]
    assert sizes(LOADED.format(1101, "dev.txt"), f"fold-0:\n{epochs}") == [None], "a fold has another dev"


def test_a_run_that_was_rolled_back_or_gone_on_with_is_one_run():
    begun = "run :: runs/{}, on cpu (1 thread), bfloat16\n"
    again = LINE.format(0, .33) + LINE.format(0, .36) + LINE.format(0, .40) + LINE.format(1, .42)
    run, = run_logs.read_runs(begun.format("a") + again + "dev acc :: 0.420\n", "log")
    assert [e.dev_acc for e in run.epochs] == [.40, .42]
    assert len(run_logs.read_runs(again, "log")) == 3, "without that line the count starts again"
    parts = begun.format("a") + LINE.format(0, .3) + LINE.format(1, .4)
    assert len(run_logs.read_runs(parts + begun.format("a") + LINE.format(2, .5), "log")) == 1
    assert len(run_logs.read_runs(parts + begun.format("b") + LINE.format(2, .5), "log")) == 2
    assert len(run_logs.read_runs(parts + "dev acc :: 0.4\n" + LINE.format(0, .3), "log")) == 2


def test_prose_is_not_a_command_and_not_a_result():
    text = ("Use `python run_llama.py --lr 3` for that. The dev acc :: 0.9 that I dreamt of.\n" + LINE.format(0, "0.3")
            + "dev acc :: 0.412 +- 0.030 over 5 seeds\n")
    run, = run_logs.read_runs(text, "log")
    assert run.options == {} and run.known_by == "" and run.dev is None and run.claims == ()


def test_another_number_at_the_end_of_the_same_run_contradicts_the_first():
    epochs = "".join(f"epoch {i}: train loss :: 1.0, train acc :: 0.5, dev acc :: 0.4{i}\n" for i in range(3))
    (run,) = run_logs.read_runs(epochs + "test acc :: 0.420\ntest acc :: 0.420\ntest acc :: 0.240\n", "a.log")
    assert run.test == .24 and contradictions(run) == ["line 5 says test 0.420; the run itself printed 0.240"]


def test_a_row_is_about_the_run_in_its_first_cell_though_another_is_called_like_a_value():
    epochs = "".join(f"epoch {i}: train loss :: 1.0, train acc :: 0.5, dev acc :: 0.4{i}\n" for i in range(3))
    text = f"### Try1\n{epochs}test acc :: 0.411\n### 1e-5\n{epochs}test acc :: 0.4\n\n" \
           "| try | lr | test acc |\n|---|---|---|\n| Try1 | 1e-5 | **0.568** |\n"
    first, second = run_logs.read_runs(text, "a.log")
    assert contradictions(first) == ["line 14 says test 0.568; the run itself printed 0.411"]
    assert not contradictions(second)


def test_decimal_commas_and_percent_are_read():
    comma = "epoch 0: train loss :: 1,611, train acc :: 0,360, dev acc :: 0,337, lr :: 9,05e-06\ntest acc :: 0,41\n"
    run, = run_logs.read_runs(comma, "log")
    epoch = run.epochs[0]
    assert (epoch.train_loss, epoch.train_acc, epoch.dev_acc, epoch.lr) == (1.611, .36, .337, 9.05e-6)
    assert run.test == .41
    percent = "epoch 0: train loss :: 1.6, train acc :: 36.0%, dev acc :: 33.7 %\ndev acc :: 33.7%\ntest acc :: 41%\n"
    run, = run_logs.read_runs(percent + "test acc :: 40.1% +- 2.0% over 3 seeds\n", "log")
    assert (run.epochs[0].train_acc, run.epochs[0].dev_acc) == (.36, pytest.approx(.337))
    assert (run.dev, run.test) == (pytest.approx(.337), .41)
    assert run_logs.read_runs(LINE.format(0, "0.3") + "dev acc :: " + "1" * 100 + "\n", "log")[0].dev is None
    run, = run_logs.read_runs(LINE.format(0, "0.3") + "dev accuracy: 41,9%\n", "log")
    assert [claim.value for claim in run.claims] == [pytest.approx(.419)]
    run, = run_logs.read_runs(LINE.format(0, "0.3") + "dev acc :: 1,435\ndev accuracy: 41.9\n", "log")
    assert run.dev is None and [claim.value for claim in run.claims] == [pytest.approx(.419)]


def test_what_would_take_more_than_linear_time_is_bounded():
    """A number of a thousand digits is none; of the tables with ever other columns the first are looked up."""
    run, = run_logs.read_runs(LINE.format(0, "0.3") + f"dev acc :: 0.{'1' * 1000}\n", "log")
    assert run.dev is None
    n = run_logs.MOST_COLUMN_SETS + 1
    runs = "".join(f"### run {i}\npython run_llama.py --mine{i} 1\n{LINE.format(0, '0.3')}" for i in range(n))
    tables = "".join(f"\n| mine{i} | dev acc |\n|--|--|\n| 1 | 0.44 |\n" for i in range(n))
    has_claim = [bool(run.claims) for run in run_logs.read_runs(runs + tables, "log")]
    assert has_claim == [True] * (n - 1) + [False]


# --------------------------------------------------------------------------- where the options stand

EPOCHS = LINE.format(0, .3) + LINE.format(1, .35)


def options_of(*lines: str) -> list[dict[str, str]]:
    """The options of each run of a log with two epochs behind every line."""
    return [run.options for run in run_logs.read_runs("".join(f"{line}\n{EPOCHS}" for line in lines), "log")]


@pytest.mark.parametrize("front", [
    "", "$ ", "PS C:\\x> ", "PS C:\\my x> ", "C:\\x>", "(base) me@host:~/minllama$ ",
    "➜  minllama git:(main) ✗ ", "- `", "1. `",
    "CUDA_VISIBLE_DEVICES=0 nohup ", "uv run ", "poetry run ", "accelerate launch ", "conda run -n x ", "nice -n 10 ",
    "!",
    "cd minllama && ", "for seed in 1 2 3; do ", "$ for %s in (1 2 3) do "])
@pytest.mark.parametrize("python", ["python ", "python3 -u ", ""])
def test_a_command_line_has_many_things_in_front_of_it(front, python):
    assert options_of(f"{front}{python}run_llama.py --lr 1e-5 --epochs 2") == [{"lr": "1e-05", "epochs": "2"}]


@pytest.mark.parametrize("line", [
    "I then ran python run_llama.py --lr 3e-5 and got:", "See run_llama.py --lr 3e-5",
    "We run python run_llama.py --lr 3"])
def test_prose_about_a_command_gives_no_options(line):
    assert options_of(line) == [{}]


@pytest.mark.parametrize("typed, options", [
    ("--epochs 3;", {"epochs": "3"}), ("--epochs 3&", {"epochs": "3"}), ("--lr 1e-5|tee log", {"lr": "1e-05"}),
    ("--lr 1e-5>log", {"lr": "1e-05"}), ("--lr 1e-5 2>&1 | tee x", {"lr": "1e-05"}),
    ("--lr '1e-5'; ls", {"lr": "1e-05"}),
    ("--train C:\\data\\new\\t.txt", {"train": "C:\\data\\new\\t.txt"}),
    ("--train 'C:\\my data\\t.txt' --lr 1", {"train": "C:\\my data\\t.txt", "lr": "1"}),
    ("--label_names \"a; b\"", {"label_names": "a; b"}), ("--lr 1 # --epochs 3", {"lr": "1"}),
    *((f"--epochs 2 --lr {value}", {"epochs": "2"}) for value in ("$lr", "${lr}", "%LR%", "$(x)", "{lr}", '"$lr"'))])
def test_a_value_ends_where_the_shell_ends_it_and_what_the_shell_puts_in_is_unknown(typed, options):
    assert options_of(f"python run_llama.py {typed}") == [options]


@pytest.mark.parametrize("loop", [
    "for lr in 1e-5 2e-5; do\n  python run_llama.py --lr $lr --epochs 2\ndone\n",
    "for lr in 1e-5 2e-5; do python run_llama.py --lr $lr --epochs 2; done\n"])
def test_all_runs_of_a_loop_belong_to_its_command_line(loop):
    runs = run_logs.read_runs(loop + 2 * EPOCHS + "python run_llama.py --lr 3\n" + 2 * EPOCHS, "log")
    assert [run.options for run in runs] == [{"epochs": "2"}] * 2 + [{"lr": "3"}, {}]
    assert [run.known_by for run in runs] == ["partly"] * 2 + ["command", ""]
    assert runs[0].notes == ("--lr is not known: its command line says $lr",)


def test_the_command_line_is_right_and_a_heading_that_disagrees_is_named():
    text = f"### lr=2e-5, epochs=3\npython run_llama.py --lr 1e-5\n{EPOCHS}"
    run, = run_logs.read_runs(text, "log")
    assert run.options == {"lr": "1e-05", "epochs": "3"}
    assert contradictions(run) == ["its heading says lr 2e-05, its command line 1e-05"]
    run, = run_logs.read_runs(text.replace("2e-5", "0.00001"), "log")
    assert contradictions(run) == []


@pytest.mark.parametrize("heading, options", [
    ("lr=1e-5: dropout next", {"lr": "1e-05"}), ("lr=1e-5.", {"lr": "1e-05"}), ("lr=1e-5?", {"lr": "1e-05"}),
    ("lr=1e-5/epochs=3", {"lr": "1e-05", "epochs": "3"}), ('"lr=1e-5"', {"lr": "1e-05"}), ("lr=1e-5 vs lr=2e-5", {}),
    ("lr=1e-5→2e-5", {}), ("--use_gpu run", {"use_gpu": "on"}), ("why is epochs = better?", {}), ("optimizer=my", {}),
    ("train=data/x.txt", {"train": "data/x.txt"})])
def test_a_heading_gives_only_values_that_an_option_can_have(heading, options):
    assert options_of(f"### {heading}") == [options]


def test_a_command_that_does_not_train_is_no_run_s_own():
    for other in ("python run_llama.py --option evaluate --run runs/a", "python plot.py --lr 3 --log a.log"):
        assert options_of("### Try") == [{}]
        run, = run_logs.read_runs(f"### Try\n{EPOCHS}{other}\ndev acc :: 0.9\n", "log")
        assert run.options == {} and run.dev is None
    run, = run_logs.read_runs(f"### Try\n{EPOCHS}python run_llama.py --option finetune --lr 3\n", "log")
    assert run.options == {"option": "finetune", "lr": "3"}


# --------------------------------------------------------------------------- tables


def test_a_table_has_a_run_in_each_row():
    text = ("notes\n\n| Try | learning rate | hidden-dropout-prob | train acc | dev acc | comment |\n"
            "|---|:-:|--|--|--|--|\n| A | 1e-5 | 0.3 | 0.5 | **0.412** 🏆 | best |\n"
            "| B | 0.00003 | 0.3 | 0.5 | 40.1% | |\n| C | 1 | 1 | 1 | ? | |\n")
    runs, faults = run_tables.read_runs(text, "t.md", None)
    assert [(run.name, run.options, run.score) for run in runs] == [
        ("A", {"lr": "1e-05", "hidden_dropout_prob": "0.3"}, .412),
        ("B", {"lr": "3e-05", "hidden_dropout_prob": "0.3"}, .401)]
    assert faults == ["t.md:7: there is no number in the column 'dev acc'; the row is left out"]
    assert [run.score for run in run_tables.read_runs(text, "t.md", "Train acc")[0]] == [.5, .5, 1]


@pytest.mark.parametrize("text", ["lr,acc,note\n1e-5,0.41,x\n2e-5,0.42,\"y, z\"\n",
                                  "lr\tacc\r\n1e-5\t0.41\r\n2e-5\t0.42\r\n", "lr;acc\n1e-5;0,41\n2e-5;0,42\n"])
def test_csv_tsv_and_decimal_commas(text):
    runs, faults = run_tables.read_runs(text, "t.csv", None)
    assert [(run.options, run.score) for run in runs] == [({"lr": "1e-05"}, .41), ({"lr": "2e-05"}, .42)] and not faults


def test_a_struck_out_number_a_remark_and_an_emoji_leave_the_number():
    text = ("| run | dev acc |\n|---|---|\n| a | ~~0.3~~ **0.45**🔥 |\n| b | 0.447 (best) |\n| c | 40.1 % |\n")
    runs, faults = run_tables.read_runs(text, "a.md", None)
    assert [run.score for run in runs] == [.45, .447, .401] and not faults
    runs, faults = run_tables.read_runs('run,dev acc\na,"0,455"\nb,0.4\n', "a.csv", None)
    assert [run.score for run in runs] == [.455, .4] and not faults


def test_a_row_with_too_many_cells_is_a_fault():
    runs, faults = run_tables.read_runs("lr,acc\n1e-5,0,412\n2e-5,0.42,\n", "t.csv", None)
    assert [run.score for run in runs] == [.42]
    assert faults == ["t.csv:2: this row has 3 cells, and the table 2 columns; the row is left out"]


@pytest.mark.parametrize("title", ["dev", "test", "train", "loss"])
def test_a_column_of_numbers_that_is_called_like_an_option_is_a_result(title):
    text = f"| lr | {title} | train_limit | acc |\n|--|--|--|--|\n| 1 | 0.4 | 9 | 0,41 |\n| 2 | 0.5 | 9 | 0.42 |\n"
    runs, _ = run_tables.read_runs(text, "t.md", None)
    assert [(run.options, run.score) for run in runs] == [
        ({"lr": "1", "train_limit": "9"}, .41), ({"lr": "2", "train_limit": "9"}, .42)]
    assert {run.score_column for run in runs} == {"acc"}
    assert run_tables.read_runs(text.replace("0.4 ", "a.txt ").replace("0.5", "b"), "t.md", None)[0][0].options == {
        "lr": "1", title: "a.txt", "train_limit": "9"}


def test_words_behind_a_number_leave_it_a_number():
    cells = ("0.412 (best)", "**0.40** (epoch 3)", "41% (!)", "0.43±0.02", "(0.4)", "🔥0.44🔥")
    text = "lr,dev\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells))
    assert [run.score for run in run_tables.read_runs(text, "t.csv", None)[0]] == [.412, .40, .41, .43, .4, .44]


@pytest.mark.parametrize("text", [";\n", ";;\n;\n", ",\n", "\t\n"])
def test_a_table_of_empty_cells_is_none(text):
    assert run_tables.read_runs(text, "t.csv", None) == ([], [])


def test_a_table_without_a_number_and_an_unknown_column_are_refused():
    with pytest.raises(InputError, match="no column with numbers"):
        run_tables.read_runs("name,note\na,b\nc,d\n", "t.csv", None)
    with pytest.raises(InputError, match="no column 'f1'; there are lr, acc"):
        run_tables.read_runs("lr,acc\n1,0.4\n", "t.csv", "f1")


def test_a_binary_file_is_refused():
    for raw in (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 20, b"PK\3\4" + b"\1\2\3\xff\xfe" * 200):
        with pytest.raises(InputError, match="binary"):
            past_run.decode(raw, Path("x"))


# --------------------------------------------------------------------------- any text at all

PIECES = st.lists(st.one_of(st.text(max_size=30), st.sampled_from([
    "epoch 0: train loss :: 1.6, train acc :: 0.3, dev acc :: 0.31", "dev acc :: 0.4", "test acc :: 0.5", "\r", "\n",
    "epoch 3: train loss :: nan, train acc :: nan, dev acc :: nan", "### lr=1e-5", "#", "seed-1:",
    "epoch 999999999: train loss :: 1e999, train acc :: 7, dev acc :: -3", "python x.py --lr 'x \\", "|",
    "| a | b |", "|---|---|", "| 1e-5 | **0.4** |", "best epoch: 3", "a,b", "1,2", "\0", "\x1b[A", "\ufeff", "epoch 1",
    "best :: epoch . of 1 (chosen by x), stopped: y", "best dev acc = 99%"])), max_size=40)


@given(PIECES)
@settings(max_examples=200, deadline=None)
def test_any_text_gives_runs_or_one_clear_message(pieces):
    text = "\n".join(pieces)
    runs = run_logs.read_runs(text, "log")
    for run in runs:
        assert run.epochs and contradictions(run) is not None
    try:
        run_tables.read_runs(text, "table", None)
    except InputError as error:
        assert "table:" in str(error) or str(error).startswith("table")
