"""--option report from end to end: what it writes and says, of folders, logs and tables; bad input; hostile text."""

import csv
import html.parser
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import run_llama
from commands import report, report_pages, report_pictures
from config import parse_args
from formats import run_logs

LOG = Path(__file__).parent / "logs" / "twelve_runs.md"
LINE = "epoch {}: train loss :: {}, train acc :: {}, dev acc :: {}\n"


def reported(folder: Path, *words: str) -> dict[str, dict[str, str]]:
    """The rows of report.csv, by the run's name."""
    assert run_llama.main(["--option", "report", "--output_dir", str(folder), *words]) == 0
    return {row["run"]: row for row in csv.DictReader(io.StringIO((folder / "report.csv").read_text("utf-8")))}


def rising(n: int) -> str:
    return "".join(LINE.format(i, 1.6 - .02 * i, .30 + .01 * i, .30 + .01 * i) for i in range(n))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a small run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = subprocess.run([sys.executable, str(ROOT / "run_llama.py"), "--option", "finetune", *inputs, "--lr", "3e-3",
                           "--epochs", "4", "--batch_size", "16", "--device", "cpu", "--output_dir", str(folder)],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, encoding="utf-8")
    return folder, done.stdout


@pytest.mark.parametrize("has_dev", [True, False])
def test_a_run_has_the_same_row_from_its_folder_and_from_what_it_printed(finished, inputs, tmp_path, has_dev):
    """Both streams in one file, as `> log 2>&1` has them; the number of dev sentences too is read from it."""
    folder, printed = finished
    if not has_dev:  # a tenth of train is held out
        folder = tmp_path / "small"
        done = subprocess.run([sys.executable, str(ROOT / "run_llama.py"), "--option", "finetune", *inputs[:4],
                               "--epochs", "3", "--lr", "3e-3", "--batch_size", "16", "--test", inputs[-1],
                               "--output_dir", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, check=True, encoding="utf-8")
        printed = done.stdout
        assert "held out" in printed and (folder / "dev-split.jsonl").is_file()
    assert "loading the program" in printed or "warning: " in printed
    (tmp_path / "printed.log").write_text(printed, encoding="utf-8")
    rows = reported(tmp_path / "report", "--run", str(folder), str(tmp_path / "printed.log"))
    one, other = rows["small"], rows["printed.log"]
    assert one["n dev"] == str(json.loads((folder / "result.json").read_text("utf-8"))["dev"]["n"])
    measured = [name for name in one if name not in ("rank", "run", "from") and not name.startswith("--")]
    assert len(measured) > 12 and one["peak dev"] and one["test"] and one["verdict"]
    assert {name: one[name] for name in measured} == {name: other[name] for name in measured}
    result = json.loads((folder / "result.json").read_text("utf-8"))
    assert one["test"] == f"{result['test']['acc']:.3f}" and float(one["best epoch"]) == result["best_epoch"]


def test_a_tie_and_a_stop_by_patience_are_read_from_the_log(inputs, tmp_path):
    """Such small steps change no prediction: all epochs have the same dev accuracy, and the lowest loss, a later
    epoch's, decides which one is kept."""
    folder = tmp_path / "small"
    done = subprocess.run([sys.executable, str(ROOT / "run_llama.py"), "--option", "finetune", *inputs, "--lr", "1e-6",
                           "--epochs", "9", "--patience", "2", "--device", "cpu", "--output_dir", str(folder)],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, encoding="utf-8")
    result = json.loads((folder / "result.json").read_text("utf-8"))
    assert result["stopped"] == "patience" and result["best_epoch"] > 0
    (run,) = run_logs.read_runs(done.stdout, "log")
    assert len({epoch.dev_acc for epoch in run.epochs}) == 1
    assert (run.said_best, run.stopped, run.planned) == (result["best_epoch"], "patience", 9)
    (tmp_path / "printed.log").write_text(done.stdout, encoding="utf-8")
    rows = reported(tmp_path / "report", "--run", str(folder), str(tmp_path / "printed.log"))
    assert float(rows["small"]["best epoch"]) == result["best_epoch"]
    own = ("rank", "run", "from")
    one, other = ({k: v for k, v in rows[name].items() if k not in own and not k.startswith("--")}
                  for name in ("small", "printed.log"))
    assert one == other


def test_two_runs_with_held_out_dev_are_compared_sentence_by_sentence(inputs, tmp_path, capsys):
    for dropout in ("0.1", "0.6"):
        assert run_llama.main(["--option", "finetune", *inputs[:4], "--epochs", "1", "--lr", "3e-3", "--output_dir",
                               str(tmp_path / "runs" / dropout), "--hidden_dropout_prob", dropout]) == 0
    capsys.readouterr()
    reported(tmp_path / "report", "--run", str(tmp_path / "runs"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("option :: "))
    assert line.startswith("option :: hidden_dropout_prob 0.1 -> 0.6: dev ") and "McNemar, " in line
    for name in ("result.json", "dev-predictions.txt"):  # a run that was stopped: its dev is still in its folder
        (tmp_path / "runs" / "0.6" / name).unlink()
    rows = reported(tmp_path / "report", "--run", str(tmp_path / "runs"))
    assert rows["0.6"]["n dev"] == rows["0.1"]["n dev"] != "1101"


def test_the_folds_of_a_cross_validation_are_one_setting(inputs, tmp_path, capsys):
    for lr in ("3e-3", "1e-3"):
        assert run_llama.main(["--option", "finetune", *inputs, "--epochs", "1", "--lr", lr, "--folds", "3",
                               "--output_dir", str(tmp_path / "runs" / lr)]) == 0
    capsys.readouterr()
    rows = reported(tmp_path / "report", "--run", str(tmp_path / "runs"))
    said = capsys.readouterr().out
    assert len(rows) == 6 and {row["n dev"] for row in rows.values()} == {"42"}  # (96 + 30) / 3
    lines = [line for line in said.splitlines() if line.startswith("option :: ")]
    assert len(lines) == 1 and lines[0].startswith("option :: lr 0.001 -> 0.003: ")
    assert "paired over 3 folds" in lines[0]
    assert said.count(" over 3 folds; so many can show") == 2


def test_no_torch_is_imported(tmp_path):
    words = ["--option", "report", "--run", str(LOG), "--output_dir", str(tmp_path)]
    code = f"import sys, run_llama\nassert run_llama.main({words}) == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_n_dev_says_how_much_is_chance(tmp_path, capsys):
    """A difference of 0.08 is none on 100 sentences, and is one on 1,101."""
    text = "".join(f"python run_llama.py --lr {lr}\n" + LINE.format(0, 1.5, acc, acc) for lr, acc in (
        ("1e-5", .36), ("3e-5", .44)))
    (tmp_path / "two.log").write_text(text, encoding="utf-8")
    reported(tmp_path / "a", "--run", str(tmp_path / "two.log"))
    said = capsys.readouterr().out
    assert "more than chance (p" in said and "1,101 are assumed" in said
    rows = reported(tmp_path / "b", "--run", str(tmp_path / "two.log"), "--n_dev", "100")
    said = capsys.readouterr().out
    assert "not to be told from chance" in said and "assumed" not in said
    assert {row["n dev"] for row in rows.values()} == {"100"}


def test_score_names_the_column_of_a_table(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("name,lr,dev acc,test acc\na,1e-5,0.41,0.43\nb,3e-5,0.42,0.40\n", encoding="utf-8")
    last = reported(tmp_path / "a", "--run", str(tmp_path / "t.csv"))
    assert last["a"]["rank"] == "1" and last["a"]["peak dev"] == "0.430"
    named = reported(tmp_path / "b", "--run", str(tmp_path / "t.csv"), "--score", "dev acc")
    assert named["b"]["rank"] == "1" and named["b"]["peak dev"] == "0.420"
    said = capsys.readouterr().out
    assert f"score :: {tmp_path / 't.csv'}: the column 'test acc' (--score)\n" in said
    assert f"score :: {tmp_path / 't.csv'}: the column 'dev acc' (--score)\n" in said


def test_a_table_of_lr_dev_and_test_has_a_pair(tmp_path, capsys):
    (tmp_path / "t.md").write_text("| lr | dev | test |\n|--|--|--|\n| 1e-5 | 0.41 | 0.40 |\n| 3e-5 | 0.42 | 0.43 |\n",
                                   encoding="utf-8")
    reported(tmp_path / "a", "--run", str(tmp_path / "t.md"))
    assert "option :: lr 1e-05 -> 3e-05: " in capsys.readouterr().out


def test_several_runs_are_read_and_the_best_comes_first(tmp_path, finished):
    (tmp_path / "a.log").write_text(rising(12), encoding="utf-8")
    rows = reported(tmp_path / "report", "--run", str(finished[0].parent), str(tmp_path / "a.log"), str(LOG))
    assert len(rows) == 14 and {"small", "a.log", "Try8"} <= rows.keys()
    peaks = [float(row["peak dev"]) for row in rows.values()]
    assert peaks == sorted(peaks, reverse=True)


def test_the_default_folder_is_replaced_by_the_next_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_llama.main(["--option", "report", "--run", str(LOG)]) == 0
    assert sorted(path.name for path in (tmp_path / "runs" / "report").iterdir()) == [
        "report.csv", "report.html", "report.md"]


def test_advice_has_its_reason_and_its_command(tmp_path, capsys):
    (tmp_path / "a.log").write_text("python run_llama.py --lr 1e-5 --epochs 20\n" + rising(20), encoding="utf-8")
    reported(tmp_path / "report", "--run", str(tmp_path / "a.log"))
    advice = [line for line in capsys.readouterr().out.splitlines() if line.startswith("try :: ")]
    assert len(advice) == 1
    assert "train longer: python run_llama.py --option finetune --epochs 30 --lr 1e-05" in advice[0]


def test_no_advice_against_the_evidence(tmp_path, capsys):
    """More dropout was worse by far more than chance: it is not advised, though the best run overfits."""
    over = "".join(LINE.format(i, 1.5 - .15 * i, .40 + .06 * i, .45 - .01 * abs(i - 2)) for i in range(10))
    under = "".join(LINE.format(i, 1.5, .30, .30) for i in range(3))
    (tmp_path / "a.log").write_text(f"python run_llama.py --hidden_dropout_prob 0.3\n{over}"
                                    f"python run_llama.py --hidden_dropout_prob 0.8\n{under}", encoding="utf-8")
    reported(tmp_path / "report", "--run", str(tmp_path / "a.log"))
    said = capsys.readouterr().out
    assert "overfitting" in said and "try :: " in said and "raise --hidden_dropout_prob" not in said


@pytest.mark.parametrize("options, more", [
    ("--guards off --kernels off --plots on --use_gpu --lr 1e-5 --epochs 10", ""),
    ("--folds 3 --lr 1e-5 --seed 3 --epochs 10", "--folds 10"), ("--seed 3 --lr 1e-5 --epochs 10", "--seeds 5")])
def test_the_advised_commands_are_accepted(tmp_path, capsys, options, more):
    """Each of them by the parser itself, with the options that the run had."""
    run = "".join(f"fold-{i}:\n{rising(10)}" for i in range(3)) if "folds" in options else rising(10)
    (tmp_path / "a.log").write_text("".join(f"### {rate}\npython run_llama.py {options} --hidden_dropout_prob {rate}\n"
                                            f"{run}" for rate in (.1, .2)), encoding="utf-8")
    reported(tmp_path / "report", "--run", str(tmp_path / "a.log"))
    advice = [line for line in capsys.readouterr().out.splitlines() if line.startswith("try :: ")]
    commands = [shlex.split(line.rpartition("python run_llama.py ")[2]) for line in advice]
    assert len(commands) >= 2 and (not more or any(more in line for line in advice))
    for words in commands:
        config = parse_args(words)
        assert {"lr", "hidden_dropout_prob", "epochs"} <= config.given
        if "guards" in options:
            assert config.guards == config.kernels == "off" and config.plots == "on" and config.use_gpu


# --------------------------------------------------------------------------- bad input


def test_what_cannot_be_read_is_named_and_the_rest_is_reported(tmp_path, capsys):
    (tmp_path / "empty.log").write_text("nothing here\n", encoding="utf-8")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 30)
    (tmp_path / "folder").mkdir()
    (tmp_path / "words.csv").write_text("name,note\na,b\n", encoding="utf-8")
    old = tmp_path / "old"
    old.mkdir()
    (old / "args.json").write_text('{"options": {"lr": 1e-5, "gone": 3}}', encoding="utf-8")
    (old / "epochs.jsonl").write_text('{"epoch": 0, "train_loss": 1.5, "train_acc": 0.3, "dev_acc": 0.3}\n{"ep\n',
                                      encoding="utf-8")
    bad = [str(tmp_path / name) for name in ("empty.log", "binary", "folder", "words.csv", "missing")]
    rows = reported(tmp_path / "report", "--run", *bad, str(LOG), str(LOG), str(old))
    said = capsys.readouterr().err
    assert len(rows) == 13 and all(path in said for path in bad) and "named twice" in said and "Traceback" not in said
    assert rows["old"]["peak dev"] == "0.300"
    assert "not finished" in (tmp_path / "report" / "report.md").read_text("utf-8")
    assert run_llama.main(["--option", "report", "--run", *bad]) == 2
    said = capsys.readouterr().err
    assert all(path in said for path in bad) and "no run could be read" in said


def small_folder(folder: Path, n: object = 30, lr: object = 1e-5) -> None:
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"options": {"lr": lr, "epochs": n}, "given": ["lr"]}),
                                      encoding="utf-8")
    (folder / "result.json").write_text(json.dumps({"dev": {"acc": .4, "n": n}}), encoding="utf-8")
    (folder / "epochs.jsonl").write_text('{"epoch": 0, "train_loss": 1.5, "train_acc": 0.3, "dev_acc": 0.4}\n',
                                         encoding="utf-8")


def test_text_that_is_no_text_and_numbers_without_end(tmp_path, capsys):
    small_folder(tmp_path / "runs" / "a", lr="\ud800")
    small_folder(tmp_path / "runs" / "b", n=10**400)
    (tmp_path / "empty.csv").write_text(";\n", encoding="utf-8")
    if sys.platform == "linux":  # other systems refuse such a name
        small_folder(tmp_path / "runs" / "caf\udce9")
    rows = reported(tmp_path / "report", "--run", str(tmp_path / "runs"), str(tmp_path / "empty.csv"))
    assert {name: row["n dev"] for name, row in rows.items() if name in "ab"} == {"a": "30", "b": "1101"}
    assert rows["a"]["--lr"] == "?" and (sys.platform != "linux" or "caf?" in rows)
    assert f"{tmp_path / 'empty.csv'}: there is no line" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_llama.main(["--option", "report", "--run", str(LOG), "--n_dev", "1" + "0" * 400])
    assert "at most a billion" in capsys.readouterr().err


def test_without_jinja2_the_other_pages_are_written(tmp_path, capsys, monkeypatch):
    reported(tmp_path, "--run", str(LOG))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    capsys.readouterr()
    assert len(reported(tmp_path, "--run", str(LOG))) == 12
    said = capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.csv", "report.md"]
    assert said.err.count("report.html is not written") == 1 and "report.html" not in said.out


def test_a_command_that_uses_one_run_refuses_two(capsys):
    assert run_llama.main(["--option", "serve", "--run", "a", "b"]) == 2
    assert "uses one --run, and 2 are given: a, b" in capsys.readouterr().err
    assert run_llama.main(["--option", "report"]) == 2
    assert "--option report needs --run RUN" in capsys.readouterr().err


def test_two_runs_of_one_name_are_told_apart(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.log").write_text(rising(3), encoding="utf-8")
    rows = reported(tmp_path / "report", "--run", str(tmp_path / "a" / "x.log"), str(tmp_path / "b" / "x.log"))
    assert len(rows) == 2 and all(name.startswith("x.log (") for name in rows)
    assert "several runs are called x.log" in capsys.readouterr().err


def test_a_thousand_runs(tmp_path):
    text = "".join(f"### run {i}\n" + LINE.format(0, 1.5, .4, f"0.{300 + i % 100}") for i in range(1000))
    (tmp_path / "many.log").write_text(text, encoding="utf-8")
    rows = reported(tmp_path / "report", "--run", str(tmp_path / "many.log"))
    assert len(rows) == 1000
    assert "The other 800 runs are in report.csv" in (tmp_path / "report" / "report.md").read_text("utf-8")


# --------------------------------------------------------------------------- the pages

HOSTILE = "<script>alert(1)</script> | `x` **b** [a](javascript:b) =cmd|' /C calc'!A0 \x1b[2J \u202e"


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.links: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_advised_commands_are_code(tmp_path):
    text = "train longer: python run_llama.py --option finetune --lr 1e-5 --train 'a b<i>.txt'"
    found = report_pages.Report((), (), (), (), (text,), (), "")
    assert "- train longer: `python run_llama.py --option finetune --lr 1e-5 --train 'a b<i>.txt'`" in (
        report_pages.markdown(found))
    assert ("train longer: <code><span>python run_llama.py</span> <span>--option finetune</span> "
            "<span>--lr 1e-5</span> <span>--train &#39;a b&lt;i&gt;.txt&#39;</span></code>") in report_pages.html(found)


def test_hostile_text_stays_text(tmp_path):
    (tmp_path / "a.log").write_text(f"### {HOSTILE}\n{rising(4)}### =1+1\n{rising(3)}", encoding="utf-8")
    rows = reported(tmp_path / "report", "--run", str(tmp_path / "a.log"))
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    parsed = Tags()
    parsed.feed(page)
    assert "script" not in parsed.tags and "<script>alert(1)</script>" in parsed.text
    assert all(re.match("#(run|all)-", link) or link == "data:," for link in parsed.links)
    assert "\x1b" not in page and "\u202e" not in page and "'=1+1" in rows
    markdown = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "<script>" not in markdown and "\x1b" not in markdown


def test_the_page_needs_no_network_and_knows_light_and_dark():
    runs = run_logs.read_runs(LOG.read_text("utf-8"), "log")
    found = report.make_report(runs, (), None)
    page = report_pages.html(found, report_pictures.draw([card.run for card in found.cards]))
    assert not re.search(r"https?:|@import|url\((?!#)", page) and "prefers-color-scheme: dark" in page
    assert page.count('<svg role="img"') >= 14


@given(st.text(max_size=200), st.text(max_size=50))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_gives_pages(text, name):
    runs = run_logs.read_runs(f"### {name}\n{text}\n{LINE.format(0, 1.5, .3, .3)}", "log")
    found = report.make_report(runs, (text,), None)
    for page in (report_pages.markdown(found), report_pages.csv_text(found), report_pages.html(found)):
        page.encode("utf-8")
        assert "\x1b" not in page
