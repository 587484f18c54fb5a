"""The part of --option inspect that looks at a finished run: where it is wrong, how sure it is, which words tip it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from commands import ensemble, inputs
from commands import splits as run_splits
from commands.evaluate import own_files
from commands.finished import columns_of, load_run
from commands.inspect_pages import Section, percent, quoted, table
from commands.scores import NAME_WIDTH, fitted, width
from config import InputError, RunConfig, counted, only_run
from dataset import Split
from formats import files, tables
from formats import labels as class_labels
from formats.columns import Usual
from training import calibration, logs, metrics, mistakes, saliency
from training import device as devices
from training.device import Device
from training.run_folder import options_in
from training.saliency import Decision
from training.saved import SavedRun, home_of

KEPT = 50  # examples of a kind in the files
SURE, EXAMPLES, CLASSES = 5, 3, 12  # on the terminal
TIPPED, MOST_INPUT = 5, 10  # sentences whose words are looked at: the surest mistakes, or of --input
WORDS = 4  # of each such sentence on its line
FEWEST_TO_CALIBRATE = 20  # sentences, of which each half gets a temperature


@dataclass(frozen=True)
class Looked:
    """One split and what the run says of it: log-probabilities (N, C)."""

    name: str
    split: Split
    log_probs: np.ndarray
    probabilities: np.ndarray
    predicted: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.split.labels

    def place(self, row: int) -> str:
        return f"{self.split.path.name}:{self.split.lines[row]}" if self.split.lines else self.split.path.name


@dataclass(frozen=True)
class Inspected:
    """What is said of a run; `card`: of that, what the report shows, as (what, text); `best`: the checksum of the
    weights that it is about."""

    home: Path
    sections: list[Section]
    card: list[tuple[str, str]]
    best: str


def inspected(config: RunConfig) -> Inspected:
    """Everything that is said of --run."""
    typed = read_input(config, columns_of(home_of(Path(only_run(config))))) if config.input else []
    saved = load_run(config)
    device = devices.choose_device(replace(config, dtype="float32") if config.dtype == "auto" else config)
    splits = read_splits(config, saved)
    devices.accelerate(config, saved.model.to(device.where), device)
    looked = [look(saved, name, split, device) for name, split in splits.items()]
    names, main = saved.settings.label_names, looked[0]
    learned = ensemble.learned_from(saved.home)
    sections = [on_accuracy(looked, saved, config), on_classes(main, names), on_length(looked),
                on_calibration(looked, files.sha256(main.split.path) in learned),
                on_confusion(main, names), on_mistakes(main, names)]
    texts = typed or [main.split.sentences[row] for row in mistakes.surest_mistakes(
        main.probabilities, main.labels, TIPPED)]
    found = saliency.decisions(saved.model, saved.tokenizer, texts, device, saved.model.llama.config.max_seq_len,
                               saved.settings.max_sentence_len)
    sections.append(on_words(found, names, bool(typed)))
    card = [(section.title, f"{main.name}: {section.brief}") for section in sections if section.brief]
    card = card if is_own(config) else []  # the report's card is about the run's own sentences
    return Inspected(saved.home.path, sections, card, files.manifest_digest(saved.best) or "")


def read_input(config: RunConfig, usual: Usual) -> list[str]:
    """The sentences of --input, the first MOST_INPUT of them. `usual`: the run's own columns. Raises InputError for
    none, and for an empty one."""
    path = Path(config.input or "")
    if config.input == "-":
        raise InputError("--input -: inspect reads a file; write the sentences into one")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; check --input")
    table_read = tables.read_table(path, config.text_column, config.label_column, labelled=False,
                                   usual=usual)
    texts = [text.strip() for text in table_read.texts]
    empty = [line for line, text in zip(table_read.lines, texts, strict=True) if not text]
    if empty:
        raise InputError(f"{path}:{empty[0]}: the sentence is empty; write one, or take the line out")
    if len(texts) > MOST_INPUT:
        logs.warn(f"{path}: it has {counted(len(texts), 'sentence')}; the first {MOST_INPUT} are looked at")
    return texts[:MOST_INPUT]


def is_own(config: RunConfig) -> bool:
    """Are the sentences those that the run itself was scored on?"""
    return not config.given & {"dataset", "dev", "test"}


def read_splits(config: RunConfig, saved: SavedRun) -> dict[str, Split]:
    """Dev and test, those that there are: the run's own files, or those that were typed. Of one of several --folds test
    alone is its own: it was trained on a part of its dev file."""
    columns = columns_of(saved.home)
    reading = replace(config, max_sentence_len=saved.settings.max_sentence_len, loss=saved.settings.loss)
    if config.train:
        logs.warn("--train: no effect, of a --run its dev and test sentences are looked at")
    if not is_own(config):
        used = inputs.find_files(replace(config, train=None))
    elif not saved.home.has_run():
        raise InputError(f"{saved.typed}: which dev file the run used is not known (no args.json); name one with --dev "
                         "FILE")
    else:
        used, _ = own_files(saved)
        if options_in(saved.home).get("folds"):
            if used.test is None:
                raise InputError(f"{saved.typed}: it is one of several --folds, which was trained on a part of its dev "
                                 "file, and it has no test file; name sentences that it has not seen with --dev FILE")
            logs.notice("dev is not looked at: the run was trained on a part of it")
            used = replace(used, dev=None)
        reading = replace(reading, text_column=columns[0], label_column=columns[1])
    read = run_splits.read_tables(reading, {"dev": used.dev, "test": used.test}, columns)
    if not read:
        raise InputError(f"{saved.typed}: there is neither a dev nor a test file to look at; name one with --dev FILE")
    classes = {name: class_labels.named(saved.settings.label_names, table_read, saved.best / "config.json")
               for name, table_read in read.items()}
    return run_splits.tokenise(reading, read, classes, saved.tokenizer, saved.model.llama.config.max_seq_len)


def look(saved: SavedRun, name: str, split: Split, device: Device) -> Looked:
    """What the run says of a split."""
    outputs = metrics.predict(saved.model, split, saved.tokenizer.pad_id, device, name)
    metrics.check_finite(outputs, f"{saved.typed}: {name}")
    log_probs = outputs.numpy().astype(np.float64)
    return Looked(name, split, log_probs, calibration.scaled(log_probs, 1.0), log_probs.argmax(1))


# --------------------------------------------------------------------------- right and wrong


def on_accuracy(looked: list[Looked], saved: SavedRun, config: RunConfig) -> Section:
    values = {one.name: {"n": len(one.split), "accuracy": float((one.predicted == one.labels).mean())}
              for one in looked}
    said = ", ".join(f"{name} {found['accuracy']:.3f} of {found['n']:,} sentences" for name, found in values.items())
    has_result = is_own(config) and saved.home.has_run() and saved.home.is_finished()
    before = saved.home.read_result().get(looked[0].name, {}).get("acc") if has_result else None
    lines = [f"the run itself found {before:.3f}, in another precision"] if before is not None and (
        abs(before - values[looked[0].name]["accuracy"]) > 1e-9) else []
    return Section("accuracy", said, lines, values)


def on_classes(main: Looked, names: list[str]) -> Section:
    """Of each class how many of its sentences are right, and what the others are taken for."""
    found = metrics.per_class(main.labels, main.predicted, len(names))
    there = [label for label in range(len(names)) if found.n[label]]
    if len(there) > CLASSES:
        there.sort(key=lambda label: found.recall[label])
    usual = {a: (b, n) for a, b, n in reversed(metrics.most_confused(main.labels, main.predicted, len(main.labels)))}
    columns = min(NAME_WIDTH, max(map(width, names)))
    rows = []
    for label in there:
        guess, n = usual.get(label, (label, 0))
        rows.append([fitted(names[label], columns), f"{found.n[label]:,}", f"{found.recall[label]:.3f}",
                     f"{names[guess]} ({percent(n, int(found.n[label]))})" if n else "-"])
    order = "the worst first" if len(there) > CLASSES else "of its own sentences, the share that is right"
    return Section("by class", f"{main.name}; {order}", table(["", "n", "accuracy", "else mostly"], rows),
                   {names[label]: {"n": int(found.n[label]), "accuracy": float(found.recall[label])}
                    for label in there}, CLASSES + 1)


def on_length(looked: list[Looked]) -> Section:
    lines, values = [], {}
    for one in looked:
        groups = mistakes.by_length(one.split.lengths, one.predicted == one.labels)
        values[one.name] = [{"tokens": [g.shortest, g.longest], "n": g.n, "accuracy": g.accuracy} for g in groups]
        lines.append(f"{one.name}: " + ", ".join(f"{g.shortest}-{g.longest} {g.accuracy:.3f}" for g in groups))
    n = min(len(one.split) for one in looked) / 4
    return Section("by length", f"accuracy of sentences of so many tokens; chance moves each by {1 / n ** 0.5:.2f}",
                   lines, values)


def on_calibration(looked: list[Looked], is_learned: bool = False) -> Section:
    """ECE, and what a temperature that is fitted on dev (where there is none, test) does for it. `is_learned`: the run
    was trained on these sentences, of which it is surer than of others."""
    main = looked[0]
    bins = calibration.reliability(main.probabilities, main.labels)
    values: dict[str, Any] = {"bins": [vars(one) for one in bins if one.n]}
    if is_learned or len(main.labels) < FEWEST_TO_CALIBRATE:
        now = calibration.ece(main.probabilities, main.labels)
        why = "the run was trained on these sentences, or on a part of them: no temperature is fitted on them" if (
            is_learned) else f"{counted(len(main.labels), 'sentence')} are too few for a temperature"
        return Section("calibration", f"ECE {now:.3f}; {why}", (), {**values, "ece": now})
    found = calibration.mended(main.log_probs, main.labels)
    confidence, accuracy = main.probabilities.max(1).mean(), (main.predicted == main.labels).mean()
    is_sound = found.before <= 2 * found.by_chance
    tendency = "too sure" if confidence > accuracy else "not sure enough"
    summary = (f"ECE {found.before:.3f} (about {found.by_chance:.3f} would be chance"
               + (")" if is_sound else f"; {tendency}: confidence {confidence:.3f}, accuracy {accuracy:.3f})"))
    values |= {"ece": found.before, "ece_by_chance": found.by_chance, "temperature": found.t, "ece_after": found.after,
               "temperature_helps": found.helps()}
    if not found.helps():
        summary += "; no temperature is needed" + ("" if found.before <= found.by_chance else
                                                   f": with {found.t:.2f} it is {found.after:.3f}")
        lines = [f"{one.name}: ECE {calibration.ece(one.probabilities, one.labels):.3f}" for one in looked[1:]]
        values |= {one.name: {"ece": calibration.ece(one.probabilities, one.labels)} for one in looked[1:]}
        return Section("calibration", summary, lines, values, brief=summary)
    summary += f"; with temperature {found.t:.2f} {found.after:.3f}"
    lines = [f"measured on halves of {main.name}, each with the temperature fitted on the other half "
             f"({found.halves[0]:.2f}, {found.halves[1]:.2f}); {found.t:.2f} is fitted on all of it: divide the logits "
             "(or log p) by it"]
    for one in looked[1:]:
        before = calibration.ece(one.probabilities, one.labels)
        after = calibration.ece(calibration.scaled(one.log_probs, found.t), one.labels)
        lines.append(f"{one.name}: ECE {before:.3f}, with the temperature of {main.name} {after:.3f}")
        values[one.name] = {"ece": before, "ece_after": after}
    return Section("calibration", summary, lines, values, brief=summary)


def on_confusion(main: Looked, names: list[str]) -> Section:
    pair = mistakes.most_confused_pair(main.labels, main.predicted)
    if pair is None:
        return Section("confused most", f"nothing: every {main.name} sentence is right")
    ways = ((pair.first, pair.second, pair.as_second), (pair.second, pair.first, pair.as_first))
    n = pair.as_first + pair.as_second
    n_wrong = int((main.labels != main.predicted).sum())
    summary = (f"{names[pair.first]} and {names[pair.second]}: {n:,} of {n_wrong:,} mistakes ("
               + ", ".join(f"{names[a]} taken for {names[b]} {k:,}" for a, b, k in ways) + ")")
    lines = []
    for label, guess, _ in ways:
        rows = np.flatnonzero((main.labels == label) & (main.predicted == guess))
        rows = rows[np.argsort(-main.probabilities[rows, guess], kind="stable")]
        lines += [f"{names[label]}, says {names[guess]} {main.probabilities[row, guess]:.2f}: "
                  f"{quoted(main.split.sentences[row], 70)} ({main.place(int(row))})" for row in rows[:2]]
    return Section("confused most", summary, lines, {"classes": [names[pair.first], names[pair.second]],
                                                     "mistakes": n, "of": n_wrong}, brief=summary)


def on_mistakes(main: Looked, names: list[str]) -> Section:
    rows = mistakes.surest_mistakes(main.probabilities, main.labels, KEPT)
    lines, values = [], []
    for row in rows:
        guess, label = int(main.predicted[row]), int(main.labels[row])
        p = float(main.probabilities[row, guess])
        lines.append(f"{names[label]}, says {names[guess]} {p:.2f}: {quoted(main.split.sentences[row], 70)} "
                     f"({main.place(row)})")
        values.append({"place": main.place(row), "label": names[label], "predicted": names[guess], "probability": p,
                       "text": main.split.sentences[row]})
    return Section("surest mistakes", f"of {main.name}; is the label right?" if rows else "none", lines,
                   {"examples": values}, SURE, lines[0] if lines else "")


# --------------------------------------------------------------------------- words


def on_words(found: list[Decision], names: list[str], is_typed: bool) -> Section:
    """The words that tip each decision, by gradient times input and by deleting them."""
    if not found:
        return Section("words", "no mistake to look at; --input FILE names sentences")
    lines, values = [], []
    for one in found:
        p, q = np.exp(one.log_probs[[one.first, one.second]])
        agreement = one.agreement
        lines.append(f"{quoted(one.text)}{' (cut)' if one.is_cut else ''}")
        lines.append(f"  {names[one.first]} {p:.2f}, {names[one.second]} {q:.2f}, margin {one.margin:+.2f}: "
                     + ", ".join(f"{quoted(one.units[i], 20)} {one.gradient[i]:+.2f} / {one.deletion[i]:+.2f}"
                                 for i in np.argsort(-np.abs(one.deletion), kind="stable")[:WORDS])
                     + (f"; r {agreement:+.2f}" if agreement is not None else ""))
        values.append({"text": one.text, "first": names[one.first], "second": names[one.second],
                       "margin": one.margin, "rank_correlation": agreement,
                       "words": [{"word": word, "gradient_times_input": float(g), "deletion": float(d)}
                                 for word, g, d in zip(one.units, one.gradient, one.deletion, strict=True)]})
    known = [one.agreement for one in found if one.agreement is not None]
    n_same = sum(one.is_same_word for one in found)
    summary = (f"of {'--input' if is_typed else 'the surest mistakes'}, what each adds to the margin between the two "
               "likeliest classes: gradient x input / what deleting the word loses")
    verdict = f"the two name the same word first in {n_same} of {len(found)} sentences"
    values_all: dict[str, Any] = {"examples": values, "same_word_first": n_same, "sentences": len(found)}
    if known:
        mean = float(np.mean(known))
        trust = "they agree" if mean >= 0.6 else "they agree loosely" if mean >= 0.3 else "they do not agree"
        advice = "" if mean >= 0.6 else "; believe the deletion, which is what the model does"
        verdict += f"; over all words the mean rank correlation r is {mean:+.2f}: {trust}{advice}"
        values_all["rank_correlation"] = mean
    brief = "; ".join(f"{quoted(one.text, 60)}: " + ", ".join(
        f"{quoted(one.units[i], 20)} {one.deletion[i]:+.2f}" for i in np.argsort(-np.abs(one.deletion))[:2])
        for one in found[:EXAMPLES])
    return Section("words", summary, [*lines, verdict], values_all, 2 * MOST_INPUT + 1,
                   f"the margin that is lost without a word: {brief}")
