"""The part of --option inspect that looks at data, before anything is trained on them."""

import numpy as np

from commands import inputs
from commands import splits as run_splits
from commands.inspect_pages import Section, percent, quoted, table
from commands.scores import NAME_WIDTH, fitted, width
from config import InputError, RunConfig, counted
from formats import tables, weights, words
from tokenizer import Tokenizer
from training import data_checks, logs
from training.data_checks import Part
from training.metrics import WordClassifier

CLASSES = 12  # of more, the terminal has the first ones of the table, which are the largest
EXAMPLES = 3
HARDEST = 5
MOST_TO_LEARN = 20_000  # sentences for TF-IDF: more take minutes, and the hardest ones stay much the same
KEPT = 50  # examples of a kind in the files


def sections_of(config: RunConfig) -> list[Section]:
    """Everything that is said of --train, --dev and --test (or --dataset)."""
    if not (config.train or config.dataset):
        raise InputError("--option inspect needs data to look at (--train FILE [--dev FILE] [--test FILE], or "
                         "--dataset NAME), or --run RUN, a finished run")
    parts, names = read_parts(config)
    leaks = {name: data_checks.leak(parts["train"], part) for name, part in parts.items() if name != "train"}
    return [on_classes(parts, names), on_copies(parts), on_leaks(parts, leaks), on_contradictions(parts, names),
            on_short_ones(parts), on_lengths(config, parts), on_hardest(parts, names, leaks)]


def read_parts(config: RunConfig) -> tuple[dict[str, Part], list[str]]:
    """The splits, as finetune reads them, and the classes' names. Without a dev file, the same tenth of train is held
    out that finetune would hold out."""
    found = inputs.find_files(config)
    logs.notice(found.notice)
    names = tables.read_label_names(found.label_names)
    read = run_splits.read_tables(config, {name: getattr(found, name) for name in ("train", "dev", "test")})
    classes = run_splits.classes_of(config, read, names, found.label_names)
    parts = {name: Part(name, table.path, table.texts, classes.numbers(table), table.lines)
             for name, table in read.items()}
    if "dev" not in parts:
        train = parts["train"]
        is_out = run_splits.held_out_rows(train.path, train.texts, train.labels)
        sides = {"train": np.flatnonzero(~is_out), "dev": np.flatnonzero(is_out)}
        parts = {**{name: train.take(name, rows.tolist()) for name, rows in sides.items()},
                 **{name: part for name, part in parts.items() if name != "train"}}
    return parts, classes.names


# --------------------------------------------------------------------------- classes, copies


def on_classes(parts: dict[str, Part], names: list[str]) -> Section:
    counts = {name: data_checks.balance(part, len(names)) for name, part in parts.items()}
    train = counts["train"]
    rows = sorted(range(len(names)), key=lambda label: -train[label]) if len(names) > CLASSES else range(len(names))
    columns = min(NAME_WIDTH, max(map(width, names)))
    lines = table(["", *(f"{name}      " for name in parts)], [
        [fitted(names[label], columns), *(f"{counts[name][label]:,} {percent(counts[name][label], len(part)):>6}"
                                          for name, part in parts.items())] for label in rows])
    summary = f"{len(names)}, of {', '.join(f'{len(part):,} {name}' for name, part in parts.items())} sentences"
    if not min(train):
        summary += f"; train has none of: {', '.join(n for n, count in zip(names, train, strict=True) if not count)}"
    elif max(train) > 3 * min(train):
        summary += (f"; the largest is {max(train) / min(train):.0f} times the rarest (--class_weights balanced and "
                    "--sampler balanced are for that)")
    return Section("classes", summary, lines, {"names": names, **counts}, CLASSES + 1)


def on_copies(parts: dict[str, Part]) -> Section:
    lines, values = [], {}
    for name, part in parts.items():
        found = data_checks.copies_inside(part)
        values[name] = {"exact": found.exact, "near": found.near}
        if found.near:
            lines.append(f"{name}: {found.near:,} ({percent(found.near, len(part))}), {found.exact:,} of them to the "
                         f"letter; {found.n_most} times {quoted(found.most, 60)}")
    summary = "sentences that stand in the same split before, but for case, spaces and punctuation"
    return Section("copies", summary if lines else "none inside a split", lines, values)


def on_leaks(parts: dict[str, Part], leaks: dict[str, data_checks.Leak]) -> Section:
    lines, values = [], {}
    for name, found in leaks.items():
        part = parts[name]
        values[name] = {"exact": found.exact, "near": found.near, "same_label": found.same_label,
                        "lines": [part.lines[row] for row in found.rows[:KEPT]]}
        if found.near:
            lines.append(f"{name}: {found.near:,} of {len(part):,} ({percent(found.near, len(part))}), {found.exact:,} "
                         f"of them to the letter, {found.same_label:,} with the label that train has for it; "
                         f"{part.place(found.rows[0])} {quoted(part.texts[found.rows[0]], 50)}")
    summary = "sentences that are in train too: what a model is right about there, it may have memorised"
    return Section("leak", summary if lines else "no sentence of train is in another split", lines, values)


def on_contradictions(parts: dict[str, Part], names: list[str]) -> Section:
    found = data_checks.contradictions(parts)
    lines, values = [], []
    for one in found[:KEPT]:
        seen: dict[int, str] = {}
        for name, row in one.places:
            seen.setdefault(parts[name].labels[row], parts[name].place(row))
        name, row = one.places[0]
        text = parts[name].texts[row]
        lines.append(f"{' / '.join(f'{names[label]} ({place})' for label, place in list(seen.items())[:4])} "
                     f"{quoted(text, 60)}")
        values.append({"text": text, "places": [
            {"split": split, "line": parts[split].lines[i], "label": names[parts[split].labels[i]]}
            for split, i in one.places[:10]]})
    n = sum(len(one.places) for one in found)
    summary = (f"{counted(len(found), 'sentence')} with more than one label, {n:,} lines: at most one of them is right"
               if found else "none: no sentence has two labels")
    return Section("contradictions", summary, lines, {"sentences": len(found), "lines": n, "examples": values},
                   EXAMPLES)


# --------------------------------------------------------------------------- lengths


def on_short_ones(parts: dict[str, Part]) -> Section:
    lines, values = [], {}
    for name, part in parts.items():
        empty, single = data_checks.short_ones(part)
        values[name] = {"no_word": len(empty), "one_word": len(single),
                        "lines": [part.lines[row] for row in (empty + single)[:KEPT]]}
        if empty or single:
            shown = [f"{quoted(part.texts[row], 20)} ({part.place(row)})" for row in (empty + single)[:EXAMPLES]]
            lines.append(f"{name}: {len(empty):,} without a word, {len(single):,} of one word: {', '.join(shown)}")
    return Section("short", "sentences that say next to nothing" if lines else "every sentence has two words or more",
                   lines, values)


def on_lengths(config: RunConfig, parts: dict[str, Part]) -> Section:
    """Lengths in tokens, and what --max_sentence_len cuts; in words where there is no tokenizer."""
    tokenizer, context, why = find_tokenizer(config)
    unit = "token" if tokenizer else "word"
    lengths = {}
    for name, part in parts.items():
        with logs.doing(f"tokenizing {part.path}"):
            counts = map(len, tokenizer.encode_batch(list(part.texts), bos=False, eos=False)) if tokenizer else (
                words.count(text) for text in part.texts)
            lengths[name] = np.fromiter(counts, dtype=np.int64, count=len(part))
    lines = table(["", "shortest", "median", "95%", "99%", "longest"], [
        [name, *(f"{x:,.0f}" for x in (found.min(), *np.quantile(found, (0.5, 0.95, 0.99)), found.max()))]
        for name, found in lengths.items()])
    limit = config.max_sentence_len
    limits = [limit] if limit else data_checks.limits_worth_a_look(np.concatenate(list(lengths.values())))
    cuts = {one: {name: data_checks.n_cut(found, one) for name, found in lengths.items()} for one in limits}
    for one, by_split in cuts.items():
        lines.append(f"--max_sentence_len {one} cuts " + ", ".join(
            f"{n:,} of {len(parts[name]):,} {name} ({percent(n, len(parts[name]))})" for name, n in by_split.items()))
    if context:
        n = sum(data_checks.n_cut(found, context) for found in lengths.values())
        lines.append(f"the model's context of {context:,} tokens cuts {n:,}" if n else
                     f"all fit into the model's context of {context:,} tokens")
    summary = f"in {unit}s" + (f" of {tokenizer.path}" if tokenizer else f": {why}")
    return Section("lengths", summary, lines, {
        "unit": unit, **{name: {"shortest": int(found.min()), "median": float(np.median(found)),
                                "longest": int(found.max())} for name, found in lengths.items()},
        "cut": {str(one): by_split for one, by_split in cuts.items()}})


def find_tokenizer(config: RunConfig) -> tuple[Tokenizer | None, int | None, str]:
    """The tokenizer that a run with these options has, how many tokens its model sees, and where there is none, why.
    Nothing is fetched unless it was typed."""
    if config.tokenizer and not config.pretrained_model_path:
        return Tokenizer(tokenizer_model=config.tokenizer), None, ""
    try:
        found = inputs.find_model(config, may_fetch=bool(config.pretrained_model_path))
    except FileNotFoundError as error:
        if config.pretrained_model_path:
            raise
        return None, None, f"there is no tokenizer ({error})"
    tokenizer = Tokenizer(tokenizer_model=found.tokenizer)
    context = weights.read_weights(found.weights).config.max_seq_len
    return tokenizer, context - int(tokenizer.add_bos), ""


# --------------------------------------------------------------------------- the hardest


def on_hardest(parts: dict[str, Part], names: list[str], leaks: dict[str, data_checks.Leak]) -> Section:
    """The dev sentences whose label is the least likely by TF-IDF and logistic regression, learned from train."""
    train, dev = parts["train"], parts["dev"]
    learned = ""
    if len(train) > MOST_TO_LEARN:
        learned = f" learned from {MOST_TO_LEARN:,} sentences"
        rows = np.random.default_rng(0).permutation(len(train))[:MOST_TO_LEARN]
        train = train.take("train", np.sort(rows).tolist())
    with logs.doing("learning the tf-idf baseline"):
        baseline = WordClassifier(train.labels, list(train.texts))
        if not baseline.has_learned:
            return Section("hardest", "there is nothing that tf-idf can learn from train", (), {})
        probabilities = baseline.probabilities(dev.texts, len(names))
    labels = np.asarray(dev.labels)
    is_right = probabilities.argmax(1) == labels
    lines, values = [], []
    for row in data_checks.hardest(probabilities, dev.labels, KEPT):
        label, guess = dev.labels[row], int(probabilities[row].argmax())
        if label == guess:
            break
        p = float(probabilities[row, label])
        lines.append(f"{names[label]} {p:.2f}, tf-idf says {names[guess]} {probabilities[row, guess]:.2f}: "
                     f"{quoted(dev.texts[row], 60)} ({dev.place(row)})")
        values.append({"line": dev.lines[row], "label": names[label], "probability": p, "tfidf": names[guess],
                       "text": dev.texts[row]})
    majority = np.bincount(parts["train"].labels).argmax()
    accuracies = {"majority": float((labels == majority).mean()), "tfidf": float(is_right.mean())}
    summary = f"dev by tf-idf + logistic regression{learned}: accuracy {accuracies['tfidf']:.3f}"
    is_known = np.zeros(len(dev), dtype=bool)
    is_known[list(leaks["dev"].rows)] = True
    if is_known.any() and not is_known.all():
        accuracies["tfidf_without_leak"] = float(is_right[~is_known].mean())
        summary += f" ({accuracies['tfidf_without_leak']:.3f} without those that are in train)"
    summary += f", majority {accuracies['majority']:.3f}; a wrong label, or hard to say from words"
    summary += "" if lines else "; none of dev is wrong"
    return Section("hardest", summary, lines, {**accuracies, "examples": values}, HARDEST)
