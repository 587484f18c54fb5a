"""The pictures: what is drawn is what the logs say; --plots off; a failure is a warning; nothing is overwritten."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import run_llama
from commands import plot, rate_pictures, run_pictures
from training import logs
from training.run_folder import PICTURES, RunFolder

FINETUNE = ("--option", "finetune", "--output_dir", "run")


def main(*argv: str) -> int:
    return run_llama.main(list(argv))


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def line_of(axes, label: str):
    """The drawn line with this label in the legend."""
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return found


def drawn(lines: list[dict], best: float | None = None, n_classes: int | None = 3):
    """The three axes of curves.png for these lines of epochs.jsonl."""
    with plot.drawing():
        figure = plot.figure(7, 6)
        axes = run_pictures.draw_curves(figure, run_pictures.read_curves(lines, best), n_classes)
        figure.draw_without_rendering()
    return axes


def evaluations(n: int) -> list[dict]:
    return [logs.columns(logs.EpochRecord(epoch=i, step=6 * i + 6, train_loss=1.6 - .05 * i, train_acc=.3 + .03 * i,
                                          dev_loss=1.5 + .01 * i, dev_acc=.3 + .001 * i, lr=1e-5 / (1 + i), seconds=i))
            for i in range(n)]


# --------------------------------------------------------------------------- a run's pictures


def test_a_run_draws_its_curves_and_its_confusion(tiny_arguments, monkeypatch):
    """The lines of the picture that the run itself draws have the numbers of its epochs.jsonl, and the matrix those of
    its result.json."""
    figures = []
    save = plot.save
    monkeypatch.setattr(plot, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    assert main(*FINETUNE, *tiny_arguments, "--epochs", "3") == 0
    for name in PICTURES:
        with Image.open(f"run/{name}") as image:
            assert image.format == "PNG" and image.width > 400
    lines, result = jsonl(Path("run/epochs.jsonl")), json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    loss, accuracy, rate = figures[0].axes
    for axes, label, column in ((loss, "training", "train_loss"), (loss, "dev", "dev_loss"),
                                (accuracy, "training", "train_acc"), (accuracy, "dev", "dev_acc")):
        points = line_of(axes, label)
        assert [*points.get_xdata()] == [line["epoch"] for line in lines] and len(lines) == 3
        assert [*points.get_ydata()] == [line[column] for line in lines], column
    assert [*rate.get_lines()[0].get_ydata()] == [line["lr"] for line in lines]
    (star,) = [line for line in accuracy.get_lines() if line.get_label().startswith("best")]
    best = next(line for line in lines if line["epoch"] == result["best_epoch"])
    assert ([*star.get_xdata()], [*star.get_ydata()]) == ([best["epoch"]], [best["dev_acc"]])
    cells = [int(text.get_text()) for text in figures[1].axes[0].texts]
    assert cells == [n for row in result["dev"]["confusion_matrix"] for n in row]
    assert "2 layers" in figures[0].get_suptitle() and "toy-train.txt" in figures[0].get_suptitle()


def test_plots_off_draws_none(tiny_arguments):
    assert main(*FINETUNE, *tiny_arguments, "--epochs", "1", "--plots", "off") == 0
    assert not [name for name in PICTURES if Path("run", name).exists()]
    assert main(*FINETUNE, *tiny_arguments, "--epochs", "1", "--overwrite") == 0
    assert all(Path("run", name).exists() for name in PICTURES)
    assert main(*FINETUNE, *tiny_arguments, "--epochs", "1", "--overwrite", "--plots", "off") == 0
    assert not [name for name in PICTURES if Path("run", name).exists()], "those of the run that was replaced are gone"


def test_each_run_of_a_series_has_its_pictures(tiny_arguments):
    assert main(*FINETUNE, *tiny_arguments, "--epochs", "1", "--seeds", "2") == 0
    assert all(Path("run", seed, name).exists() for seed in ("seed-1337", "seed-1338") for name in PICTURES)


@pytest.mark.parametrize("fault", ["no matplotlib", "cannot draw", "full disk"])
def test_a_failure_in_drawing_is_one_warning(tiny_arguments, capsys, monkeypatch, fault):
    if fault == "no matplotlib":
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        plot.cjk_fonts.cache_clear()
    elif fault == "cannot draw":
        monkeypatch.setattr(run_pictures, "draw_curves", lambda *_: 1 / 0)
    else:
        monkeypatch.setattr(plot, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    assert main(*FINETUNE, *tiny_arguments, "--epochs", "1") == 0
    said = capsys.readouterr()
    assert said.err.count("warning: the pictures could not be drawn") == 1 and "Traceback" not in said.err
    assert RunFolder("run").is_finished() and "test acc ::" in said.out


def test_after_a_resume_the_pictures_show_the_whole_run(tiny_arguments, monkeypatch):
    assert main(*FINETUNE, *tiny_arguments, "--epochs", "2", "--keep_state", "--patience", "0") == 0
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    assert main("--resume", "run", "--epochs", "4", "--patience", "0") == 0
    assert [*line_of(figures[0].axes[1], "dev").get_xdata()] == [0, 1, 2, 3]
    assert not Path("run/curves.png").exists(), "that of the shorter run is gone"


def test_somebody_elses_picture_is_replaced_only_when_asked(tiny_arguments, capsys):
    Path("run").mkdir()
    Path("run/curves.png").write_bytes(b"mine")
    assert main(*FINETUNE, *tiny_arguments) != 0
    assert "--overwrite allows that" in capsys.readouterr().err and Path("run/curves.png").read_bytes() == b"mine"


# --------------------------------------------------------------------------- what the axes show


def test_the_loss_axis_fits_the_loss_and_the_chance_line_does_not_stretch_it():
    loss, *_ = drawn([{**line, "train_loss": .02 - .0005 * i, "dev_loss": .021} for i, line in
                      enumerate(evaluations(10))], n_classes=5)
    low, high = loss.get_ylim()
    assert 0.01 < low < 0.0155 and 0.021 < high < 0.03
    assert any(text.get_text() == f"chance, ln 5 = {math.log(5):.2f} (above)" for text in loss.get_legend().get_texts())
    loss, *_ = drawn([{**line, "train_loss": 1.7 - .1 * i} for i, line in enumerate(evaluations(10))], n_classes=5)
    (chance,) = [line for line in loss.get_lines() if str(line.get_label()).startswith("chance")]
    assert [*chance.get_ydata()] == [math.log(5)] * 2


@pytest.mark.parametrize("lines", [
    evaluations(1), evaluations(200), [], [{"epoch": 0}],
    [{**line, "train_loss": None, "dev_loss": math.nan} for line in evaluations(3)],
    [{**line, "train_loss": math.inf if i else 1e308, "dev_loss": 1e-300} for i, line in enumerate(evaluations(3))],
    [{**line, "train_acc": 0.2, "dev_acc": 0.2, "lr": 0.0} for line in evaluations(3)]])
def test_any_curves_can_be_drawn(lines):
    drawn(lines, 0)


def overlapping(texts, renderer) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text().strip()]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[i + 1:]
            if one.x0 < other.x1 - 1 and other.x0 < one.x1 - 1 and one.y0 < other.y1 - 1 and other.y0 < one.y1 - 1]


@pytest.mark.parametrize("n, name", [(2, "good"), (5, "quite a long name of a class"), (12, "name"),
                                     (60, "类别名称很长很长"), (200, "intent")])
def test_no_labels_of_the_confusion_matrix_overlap(n, name):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    counts = np.random.default_rng(0).integers(0, 900, (n, n))
    with plot.drawing():
        figure = run_pictures.draw_confusion(counts, [f"{name} {i}" for i in range(n)], "title")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        axes = figure.axes[0]
        texts = [t for t in [*axes.get_xticklabels(), *axes.get_yticklabels(), *axes.findobj(Text)] if t.get_visible()]
        assert not overlapping({id(t): t for t in texts}.values(), canvas.get_renderer())
        assert len(axes.get_yticklabels()) == min(n, run_pictures.MOST_CLASSES)


def test_names_that_no_font_has_become_numbers_without_a_flood_of_warnings(monkeypatch):
    monkeypatch.setattr(plot, "cjk_fonts", lambda: ())
    code = ("import numpy as np\nfrom commands import plot, run_pictures\nplot.cjk_fonts = lambda: ()\n"
            "with plot.drawing():\n"
            "    made = run_pictures.draw_confusion(np.eye(3), ['差评', '中评', '好评'], '中文标题')\n"
            "    made.savefig('/dev/null' if __import__('os').name != 'nt' else 'nul', format='png')\n"
            "print([t.get_text() for t in made.axes[0].get_yticklabels()])\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['0', '1', '2']" and "lyph" not in done.stderr


def test_the_classes_with_the_most_mistakes_are_shown():
    counts = np.eye(100) * 5
    counts[7, 90] = 3
    figure = run_pictures.draw_confusion(counts, [f"c{i}" for i in range(100)], "title")
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(rows) == 60 and {"7 c7", "90 c90"} <= set(rows) and "60 with the most mistakes" in figure.get_suptitle()


# --------------------------------------------------------------------------- lr_find and --plan


def test_the_fall_of_the_range_test_fills_the_picture():
    """Also where the loss explodes at its end and single steps are noisy."""
    rates = np.geomspace(1e-7, 1e-1, 200)
    means = np.where(rates < 1e-5, 1.6, np.where(rates < 1e-3, 1.6 - .04 * np.log(rates / 1e-5), 1.42))
    means = np.where(rates > 1e-2, 1.4 + 1e3 * rates, means)
    points = [*zip(rates.tolist(), (means + np.random.default_rng(0).normal(0, .3, 200)).tolist(), strict=True)]
    axes = rate_pictures.range_test([points], [means.tolist()], 1e-6, 1e-3, 1e-4, 5, "toy.txt, 2 layers").axes[0]
    low, high = axes.get_ylim()
    assert (means[0] - means.min()) / (high - low) > 0.5 and low < means.min() and high > means[0]
    (mark,) = [line for line in axes.get_lines() if line.get_marker() == "*"]
    assert [*mark.get_xdata()] == [1e-4] and low < mark.get_ydata()[0] < high


def test_lr_find_draws_the_rate_that_it_prints(tiny_arguments, capsys, monkeypatch):
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    assert main("--option", "lr_find", "--lr_steps", "30", "--lr_min", "1e-4", "--lr_max", "1", "--output_dir", "find",
                *tiny_arguments) == 0
    (mark,) = [line for line in figures[0].axes[0].get_lines() if line.get_marker() == "*"]
    printed = capsys.readouterr().out.splitlines()[-1].split()
    assert f"{mark.get_xdata()[0]:.1e}" == printed[printed.index("--lr") + 1]
    assert "toy-train.txt, 2 layers" in figures[0].get_suptitle()


def test_a_plan_marks_the_epochs_and_replaces_no_plan(tiny_arguments, capsys, monkeypatch):
    figures = []
    save = plot.save
    monkeypatch.setattr(plot, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    for _ in range(3):
        assert main(*FINETUNE, "--plan", *tiny_arguments, "--epochs", "4") == 0
    assert sorted(path.name for path in Path("run").iterdir()) == ["plan-2.png", "plan-3.png", "plan.png"]
    assert [line.rpartition(" ")[2] for line in capsys.readouterr().out.splitlines() if line.endswith(".png")] == [
        str(Path("run", name)) for name in ("plan.png", "plan-2.png", "plan-3.png")]
    axes = figures[0].axes[0]
    marks = [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert marks == [6, 12, 18, 24] and len(axes.get_lines()[0].get_ydata()) == 24  # 96 sentences, 16 a step
    assert "toy-train.txt, 2 layers" in figures[0].get_suptitle()


@pytest.mark.parametrize("n_epochs", [0, 1, 15, 16, 200, 5000])
def test_the_marks_of_a_plan_are_never_too_many(n_epochs):
    axes = rate_pictures.schedule([1e-5] * (2 * n_epochs + 1), 2, "title").axes[0]
    marks = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert len(marks) <= 15 and (len(marks) >= 5 or len(marks) == n_epochs)
