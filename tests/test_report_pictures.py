"""The pictures of the report: what they show, that they are the same each time, and how the page looks in a browser."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import chromium
import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

import run_llama
from commands import past_runs, plot, report_pictures
from formats.past_run import Epoch, PastRun
from training import calibration

LOG = Path(__file__).parent / "logs" / "twelve_runs.md"


def past_run(i: int, n_epochs: int = 6, **more) -> PastRun:
    epochs = tuple(Epoch(e, 1.6 - .1 * e - .001 * i, .3 + .1 * e, .4 + .01 * e - .001 * i, 1e-5) for e in range(
        n_epochs))
    return PastRun(name=f"run <{i}>", source="log", epochs=epochs, **more)


def write_runs(folder: Path, n: int) -> None:
    """Run folders of n runs on a dev file of 400 sentences, with predictions and a calibration."""
    random = np.random.default_rng(0)
    folder.mkdir()
    labels, lengths = random.integers(0, 3, 400).tolist(), random.integers(2, 30, 400).tolist()
    dev = folder / "dev.txt"
    dev.write_text("".join(f"{a} ||| {'word ' * b}\n" for a, b in zip(labels, lengths, strict=True)), encoding="utf-8")
    for i in range(n):
        run = folder / f"a-run-with-a-name-that-is-long-{i}"
        run.mkdir()
        guesses = [a if random.random() < .5 else (a + 1) % 3 for a in labels]
        (run / "dev-predictions.txt").write_text("".join(
            f"{a} ||| {'word ' * b}\n" for a, b in zip(guesses, lengths, strict=True)), encoding="utf-8")
        acc = float(np.mean(np.equal(guesses, labels)))
        lines = [{"epoch": e, "step": e, "train_loss": 1.1 - .1 * e, "train_acc": .4 + .1 * e, "dev_loss": 1.0,
                  "dev_acc": acc - .01 * (5 - e), "lr": 1e-5 * (1 - e / 6), "seconds": e} for e in range(6)]
        (run / "epochs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        (run / "args.json").write_text(json.dumps({"options": {"option": "finetune", "lr": 1e-5 * (i + 1)},
                                                   "given": ["lr"], "files": {"dev": {"path": str(dev)}}}), "utf-8")
        (run / "result.json").write_text(json.dumps({
            "best_epoch": 5, "dev": {"acc": acc, "n": 400}, "label_names": ["a", "b", "c"], "stopped": "finished",
            "calibration": {"dev": [[.5, .6, 300, .55, .5], [.6, .7, 100, .65, .7]]}}), encoding="utf-8")


# --------------------------------------------------------------------------- what they show


def test_all_runs_are_drawn_together_with_the_numbers_of_their_logs():
    runs = [past_run(i) for i in range(3)]
    axes = report_pictures.together_of([*enumerate(runs, 1)], "dev_acc").axes[0]
    drawn = {tuple(line.get_ydata()) for line in axes.get_lines() if line.get_transform() is not axes.transAxes}
    assert {tuple(e.dev_acc for e in run.epochs) for run in runs} <= drawn
    assert sorted(text.get_text() for text in axes.texts) == ["1", "2", "3"]


@pytest.mark.parametrize("n", [1, 3, 20, 200])
def test_however_many_runs_there_are(n):
    found = report_pictures.draw([past_run(i) for i in range(n)])
    assert len(found.together) == 2 and len(found.legend) == min(n, 8) and len(found.cards) == min(n, 30)
    assert ("The best 30 of 200 runs" in found.note) == (n == 200) and ("grey" in found.note) == (n > 8)


def test_the_ranks_at_the_ends_of_the_lines_do_not_overlap():
    axes = report_pictures.together_of([(i, past_run(0)) for i in range(1, 9)], "train_loss").axes[0]
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert len(heights) == 8 and min(np.diff(heights)) > 0.06 and heights[-1] <= 1.001


def test_runs_without_curves_have_no_pictures_and_odd_ones_do():
    assert report_pictures.draw([PastRun("table", "t.csv", score=.4)]) == report_pictures.Pictures()
    odd = [PastRun("odd", "log", epochs=tuple(Epoch(e, *values) for e in (0, 1e12))) for values in (
        (float("nan"),) * 3, (1e308, 0.0, 1.0), (-1e300, -5.0, 1e9), (float("inf"), 0.2, float("nan")))]
    assert len(report_pictures.draw(odd).cards) == 4


def test_accuracy_by_length_counts_the_words(tmp_path):
    sentences = ["one"] * 10 + ["one two three"] * 10 + ["one two three four five six"] * 10
    labels = ["0"] * 30
    guesses = ["0"] * 10 + ["0"] * 5 + ["1"] * 5 + ["1"] * 10
    for name, column in (("dev", labels), ("predicted", guesses)):
        (tmp_path / name).write_text("".join(f"{a} ||| {b}\n" for a, b in zip(column, sentences, strict=True)), "utf-8")
    run = past_run(0, dev=.5, predictions=tmp_path / "predicted", dev_file=tmp_path / "dev")
    bins = report_pictures.length_bins(run)
    assert [(one.low, one.high, one.n, one.accuracy) for one in bins] == [
        (1, 1, 10, 1.0), (3, 3, 10, .5), (6, 6, 10, 0)]
    scipy_stats = pytest.importorskip("scipy.stats")
    for one in bins:
        wilson = scipy_stats.binomtest(round(one.n * one.accuracy), one.n).proportion_ci(method="wilson")
        assert one.interval() == pytest.approx((wilson.low, wilson.high), abs=1e-4)
    assert report_pictures.length_bins(past_run(0)) == []
    (tmp_path / "chinese").write_text("0 ||| 这部电影非常好看我很喜欢它的故事\n1 ||| 不好\n", encoding="utf-8")
    assert report_pictures.sentence_lengths(tmp_path / "chinese") == ("characters", [16, 2])


def test_the_calibration_of_a_run_reaches_its_card(tiny_arguments):
    """From the run's own probabilities: ECE by hand, and the diagram of the report."""
    assert run_llama.main(["--option", "finetune", *tiny_arguments, "--output_dir", "run"]) == 0
    (run,) = past_runs.read(("run",), None).runs
    assert sum(one[2] for one in run.reliability) == 30 and run.n_classes == 3
    right = sum(one[2] * one[4] for one in run.reliability) / 30
    assert right == pytest.approx(json.loads(Path("run/result.json").read_text(encoding="utf-8"))["dev"]["acc"])
    axes = report_pictures.quality_of(run, report_pictures.length_bins(run)).axes
    ece = sum(one[2] / 30 * abs(one[3] - one[4]) for one in run.reliability)
    assert axes[-1].get_title() == f"share right, ECE {ece:.3f}"


def test_reliability_and_ece_are_their_definition():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet([1, 1, 1], 500)
    labels = random.integers(0, 3, 500)
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = sum(abs(sure[at].mean() - right[at].mean()) * at.sum() / 500 for low in np.arange(10) / 10
                   if (at := (sure > low) & (sure <= low + .1)).any())
    assert calibration.ece(probabilities, labels) == pytest.approx(expected)
    assert sum(one.n for one in calibration.reliability(probabilities, labels)) == 500


# --------------------------------------------------------------------------- the SVGs in their page


def test_the_page_is_the_same_each_time_and_its_ids_are_each_others(tmp_path):
    write_runs(tmp_path / "runs", 3)
    pages = []
    for name in ("a", "b"):
        words = ["--option", "report", "--run", str(tmp_path / "runs"), "--output_dir", str(tmp_path / name)]
        subprocess.run([sys.executable, "run_llama.py", *words], cwd=ROOT, check=True, capture_output=True)
        pages.append((tmp_path / name / "report.html").read_text("utf-8"))
    assert pages[0] == pages[1]
    ids = re.findall(r' id="([^"]+)"', pages[0])
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', pages[0]))
    assert len(ids) == len(set(ids)) and used <= set(ids) and len(used) > 10
    pictures = re.findall(r"<svg role.*?</svg>", pages[0], re.DOTALL)
    assert len(pictures) == 2 + 2 * 3
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "currentColor" in picture and "1a1c1e" not in picture


def test_no_name_of_a_run_is_in_a_picture():
    """They stand in the page's legend, where they are escaped."""
    found = report_pictures.draw([past_run(i) for i in range(3)])
    assert "run <" not in str(found) and "run &lt;" not in str(found)


def test_a_report_without_matplotlib_has_no_pictures_and_says_so(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_llama.main(["--option", "report", "--run", str(LOG), "--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("warning: the report has no pictures") == 1
    assert "<svg" not in (tmp_path / "report.html").read_text("utf-8")


def test_a_picture_that_fails_is_left_out(capsys, monkeypatch):
    monkeypatch.setattr(plot, "fit", lambda *_, **__: 1 / 0)
    found = report_pictures.draw([past_run(i) for i in range(3)])
    assert not found.together and "5 pictures of the report could not be drawn" in capsys.readouterr().err


@pytest.mark.skipif(bool(chromium.MISSING), reason=chromium.MISSING or "it is here")
def test_the_page_in_a_browser(tmp_path):
    """Opened from disk, in light and dark: nothing scrolls sideways, no text lies over another one or leaves its
    picture, and the console is silent."""
    write_runs(tmp_path / "runs", 12)
    assert run_llama.main(["--option", "report", "--run", str(tmp_path / "runs"), str(LOG), "--output_dir",
                           str(tmp_path / "report")]) == 0
    with chromium.tab(tmp_path) as page:
        page.open(tmp_path / "report" / "report.html")
        for width in (400, 1280, 2000):
            for dark in (False, True):
                found = page.layout(width, dark)
                assert (found["width"], found["scroll"]) == (width, width)
                assert found["texts"] > 500 and not found["overlaps"] and not found["outside"]
        assert not page.errors
        page.send("Runtime.evaluate", expression="document.querySelector('h1').insertAdjacentHTML('beforeend', '<p "
                  "style=\"margin-top:-1.2em;width:3000px\">over the title, and too wide</p>'); console.error('seen')")
        found = page.layout(1280)
        assert found["overlaps"] and found["scroll"] > 1280 and page.errors, "this test can fail"


@pytest.mark.parametrize("accuracy", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("n", [1, 3, 7, 30, 222, 1101])
def test_the_interval_of_a_length_is_wilsons_and_holds_the_accuracy(accuracy, n):
    k = round(accuracy * n)
    low, high = report_pictures.LengthBin(1, 2, n, k / n, "words").interval()
    wilson = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((wilson.low, wilson.high), abs=2e-5) and low <= k / n <= high
