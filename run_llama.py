"""The entry point: read the command line, choose the option, wire the rooms, print.

    python run_llama.py --option finetune --lr 1e-5 --hidden_dropout_prob 0.8 --use_gpu
    python run_llama.py --help
"""

import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

from config import RunConfig, parse_args

# The other rooms are imported by the options that need them: torch alone takes two seconds.


def notice(text: str) -> None:
    """A line for a person, on stderr; stdout is for results."""
    if text:
        print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------- what the options share


def load_inputs(config: RunConfig, need: tuple[str, ...]):
    """Data files, their splits, the label names, the tokenizer and the path of the weights, all checked.

    `need`: the splits that the option cannot do without. Returns (files, splits by name, label names, tokenizer,
    weights' path).
    """
    import checkpoint
    import dataset
    from tokenizer import Tokenizer

    files = dataset.find_files(config)
    for split in need:
        if getattr(files, split) is None:
            raise ValueError(f"--{split} is missing: {config.option} needs it beside the files that were given")
    model = checkpoint.find_model(config)
    notice(files.notice)
    notice(model.notice)
    names = dataset.read_label_names(files.label_names)
    tokenizer = Tokenizer(tokenizer_model=model.tokenizer)
    shape = checkpoint.read_weights(model.weights).config
    checkpoint.check_vocabulary(tokenizer, shape)
    if config.n_layers and config.n_layers > shape.n_layers:
        raise ValueError(f"--n_layers {config.n_layers}: {model.weights} has {shape.n_layers} layers")
    splits = load_splits(config, files, names, tokenizer, shape.max_seq_len)
    if names is None:
        names = [str(i) for i in range(int(max(split.labels.max() for split in splits.values())) + 1)]
        if len(names) < 2:
            raise ValueError(f"{files.train or files.dev}: all labels are 0; a classifier needs two classes or more")
    return files, splits, names, tokenizer, model.weights


def load_splits(config: RunConfig, files, names: list[str] | None, tokenizer, context: int) -> dict:
    """The splits that there are, by name."""
    import dataset
    from trainer import warn

    splits = {}
    for name in ("train", "dev", "test"):
        path = getattr(files, name)
        if path is None or (name == "train" and config.option != "finetune"):
            continue
        splits[name] = split = dataset.load_split(path, tokenizer, context, config.max_sentence_len,
                                                  len(names) if names else None, files.label_names)
        if split.n_cut:
            warn(f"{path}: {split.n_cut} of {len(split)} sentences are longer than "
                 f"{config.max_sentence_len or context} tokens and were cut")
        print(f"load {len(split)} data from {path}", flush=True)
    if "test" not in splits:
        notice("there is no test file: only dev is evaluated")
    return splits


def write_predictions(path: Path, predicted, split) -> None:
    """`label ||| sentence` a line, in the file's order."""
    from checkpoint import write_atomically

    lines = "".join(f"{label} ||| {sentence}\n" for label, sentence in zip(predicted, split.sentences, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(lines, encoding="utf-8", newline="\n"))


def report_splits(
    config: RunConfig, splits: dict, outputs: dict, default_out: dict[str, Path], names: list[str]
) -> dict:
    """Print dev and test accuracy, write the predictions, and return the scores with their confusion matrices."""
    from sklearn.metrics import confusion_matrix

    from trainer import score

    result = {}
    for name, log_probs in outputs.items():
        split, predicted = splits[name], log_probs.argmax(1).tolist()
        path = Path(getattr(config, f"{name}_out") or default_out[name])
        write_predictions(path, predicted, split)
        matrix = confusion_matrix(split.labels, predicted, labels=range(len(names))).tolist()
        result[name] = {**score(log_probs, split.labels), "n": len(split), "confusion_matrix": matrix}
        print(f"{name} acc :: {result[name]['acc']:.3f}", flush=True)
    return result


def check_outputs(config: RunConfig) -> None:
    """Raises OSError for an output file that cannot be written: before the work, not after it."""
    for name in ("dev_out", "test_out", "generated_sentence_low_temp_out", "generated_sentence_high_temp_out"):
        path = Path(getattr(config, name) or ".")
        folder = path if path.is_dir() else path.parent
        if getattr(config, name) and path.is_dir():
            raise OSError(f"--{name} {path}: it is a folder; name a file")
        if folder.exists() and not os.access(folder, os.W_OK):
            raise OSError(f"--{name} {path}: the folder {folder} cannot be written")


# --------------------------------------------------------------------------- the options


def generate(config: RunConfig) -> None:
    """Continue the prefix, greedily and at temperature 1.0, to stdout and the two files."""
    import torch

    import checkpoint
    from tokenizer import Tokenizer
    from trainer import choose_device

    files = checkpoint.find_model(config)
    notice(files.notice)
    device = choose_device(config)
    tokenizer = Tokenizer(max_len=config.max_sentence_len, tokenizer_model=files.tokenizer)
    llama = checkpoint.load_pretrained(files.weights, config.n_layers).to(device.where)
    checkpoint.check_vocabulary(tokenizer, llama.config)
    print(f"load model from {files.weights}")
    start = tokenizer.encode(config.prefix, bos=tokenizer.add_bos, eos=False)
    if not start:
        raise ValueError("--prefix is empty, and this model has no begin token to start from; give it some words")
    torch.manual_seed(config.seed)
    for temperature, path in ((0.0, config.generated_sentence_low_temp_out),
                              (1.0, config.generated_sentence_high_temp_out)):
        with device.autocast():
            tokens = llama.generate(torch.tensor([start], device=device.where), config.max_new_tokens, temperature)
        sentence = tokenizer.decode(tokens[0].tolist())
        print(f"Temperature is {temperature}\n{sentence}\n---------------")
        Path(path).write_text(sentence, encoding="utf-8", newline="\n")
        print(f"Wrote generated sentence to {path}.", flush=True)


def prompt(config: RunConfig) -> None:
    """Ask the pretrained model, without training, which label's name it would go on with."""
    from dataclasses import replace

    import checkpoint
    import dataset
    from classifier import LlamaZeroShotClassifier
    from trainer import choose_device, predict

    files, splits, names, tokenizer, weights = load_inputs(config, need=("dev",))
    device = choose_device(config)
    llama = checkpoint.load_pretrained(weights, config.n_layers)
    model = LlamaZeroShotClassifier(config, tokenizer, names, llama).to(device.where)
    labels = " or ".join(names) if len(names) == 2 else ", ".join(names[:-1]) + ", or " + names[-1]
    question = config.question.replace("{labels}", labels).strip()
    room = llama.config.max_seq_len - max(len(ids) for ids in model.label_name_ids)
    outputs = {}
    for name, split in splits.items():
        asked, n_cut = dataset.tokenize([f"{s} {question}" for s in split.sentences], tokenizer, room)
        if n_cut:
            raise ValueError(f"{split.path}: {n_cut} sentences with the question are longer than the model's context "
                             f"of {llama.config.max_seq_len} tokens; shorten the sentences or --question")
        outputs[name] = predict(model, replace(split, tokens=asked), tokenizer.pad_id, device, name)
    default_out = {name: Path(f"{files.name}-{name}-prompting-output.txt") for name in outputs}
    print_baselines(files.train, splits)
    report_splits(config, splits, outputs, default_out, names)


def print_baselines(train, splits: dict) -> dict:
    """The baselines on the test split (on dev where there is no test), as one line; all of them returned.

    `train`: the training split, or the path of its file, or None where the run has none.
    """
    import dataset

    if train is None:
        return {}
    labels, sentences = dataset.read_examples(train, None) if isinstance(train, Path) else (
        train.labels, train.sentences)
    held_out = {name: split for name, split in splits.items() if name != "train"}
    found = dataset.baselines(labels, sentences, held_out)
    name = "test" if "test" in found else "dev"
    print(f"baseline :: majority {found[name]['majority']:.3f}, "
          f"tf-idf + logistic regression {found[name]['tfidf']:.3f}", flush=True)
    return found


def finetune(config: RunConfig) -> None:
    """Train on train, choose the best epoch on dev, evaluate that one on dev and test."""
    import time

    import numpy as np
    import torch
    from torch.nn.functional import nll_loss

    import checkpoint
    import dataset
    import trainer
    from classifier import LlamaEmbeddingClassifier
    from optimizer import AdamW

    start = time.perf_counter()
    files, splits, names, tokenizer, weights = load_inputs(config, need=("train", "dev"))
    full_train = splits["train"]
    dataset.check_labels(splits["dev"], full_train)
    if config.pooling == "first" and config.attention == "causal":
        trainer.warn("--pooling first with causal attention: the first token sees no other; add --attention "
                     "bidirectional, or pool the last")
    device = trainer.choose_device(config)
    random = np.random.default_rng(config.seed)
    if config.train_limit and config.train_limit < len(full_train):
        splits["train"] = full_train.take(np.sort(random.permutation(len(full_train))[: config.train_limit]))
    train, dev = splits["train"], splits["dev"]
    torch.manual_seed(config.seed)
    llama = checkpoint.load_pretrained(weights, config.n_layers, config.dropout, config.attention)
    settings = {"num_labels": len(names), "label_names": names, "pooling": config.pooling,
                "hidden_dropout_prob": config.hidden_dropout_prob, "max_sentence_len": config.max_sentence_len}
    model = LlamaEmbeddingClassifier(SimpleNamespace(**settings), llama).to(device.where)
    folder = trainer.open_run(config)
    used = {n: getattr(files, n) for n in ("train", "dev", "test", "label_names")}
    described = {n: {"path": str(p), "sha256": dataset.sha256(p)} for n, p in used.items() if p}
    checkpoint.write_json(folder / trainer.RUN_FILE, trainer.describe(
        config, device, {**described, "weights": {"path": str(weights)}}))
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"model :: {weights}, {llama.config.n_layers} layers, {n_parameters / 1e6:.1f}M trainable parameters")
    print(f"run :: {folder}, on {device}", flush=True)

    sample = train
    if config.train_eval == "sample" and len(dev) < len(train):
        sample = train.take(np.sort(random.permutation(len(train))[: len(dev)]))

    def evaluate() -> dict[str, float]:
        on_train = trainer.score(trainer.predict(model, sample, tokenizer.pad_id, device, "train acc"), sample.labels)
        on_dev = trainer.score(trainer.predict(model, dev, tokenizer.pad_id, device, "dev"), dev.labels)
        return {"train_acc": on_train["acc"], **{f"dev_{k}": v for k, v in on_dev.items()}}

    task = trainer.Task(
        model, train, tokenizer.pad_id, evaluate=evaluate,
        losses=lambda batch: nll_loss(model(batch["tokens"], batch["lengths"]), batch["labels"], reduction="none"),
        save_best=lambda: checkpoint.save_classifier(folder / "best", model, tokenizer, settings),
    )
    optimizer = AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    best = trainer.fit(task, optimizer, config, device, folder)
    train_seconds = time.perf_counter() - start

    checkpoint.load_state(folder / "best", model)  # the best epoch's weights are the ones that are evaluated
    held_out = {name: split for name, split in splits.items() if name != "train"}
    outputs = {n: trainer.predict(model, s, tokenizer.pad_id, device, n) for n, s in held_out.items()}
    found = print_baselines(train, splits)
    default_out = {name: folder / f"{name}-predictions.txt" for name in outputs}
    scores = report_splits(config, splits, outputs, default_out, names)
    trainer.save_result(folder, {
        "best_epoch": best["epoch"], **scores, "baselines": found, "label_names": names,
        "train_seconds": round(train_seconds, 2), "seconds": round(time.perf_counter() - start, 2),
    })


def load_run(config: RunConfig):
    """The classifier, the tokenizer and the settings of a saved run: (folder, model, tokenizer, settings)."""
    import checkpoint
    from classifier import empty_classifier
    from tokenizer import Tokenizer

    if not config.run:
        raise ValueError(f"--option {config.option} needs --run RUN, the folder of a finished fine-tuning run")
    folder = Path(config.run)
    best = folder / "best" if (folder / "best").is_dir() else folder
    if not (best / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: there is no saved classifier here (no best/config.json); name the folder "
                                "of a run that has finished an epoch")
    settings = checkpoint.read_json(best / "config.json")
    model = empty_classifier(settings, best / "config.json")
    checkpoint.load_state(best, model)
    return folder, model.eval(), Tokenizer(tokenizer_model=best), settings


def evaluate(config: RunConfig) -> None:
    """A saved run on its own dev and test files, or on those that are given."""
    from dataclasses import replace

    import checkpoint
    import dataset
    from trainer import RUN_FILE, choose_device, predict, warn

    folder, model, tokenizer, settings = load_run(config)
    used = {} if config.given & {"dataset", "dev", "test"} else checkpoint.read_json(folder / RUN_FILE)["files"]
    paths = {n: used[n]["path"] for n in ("train", "dev", "test") if n in used}
    config = replace(config, **paths, max_sentence_len=settings["max_sentence_len"])
    files = dataset.find_files(config)
    for name in paths:
        if dataset.sha256(getattr(files, name)) != used[name]["sha256"]:
            warn(f"{paths[name]}: the file has changed since the run")
    names = settings["label_names"]
    splits = load_splits(config, files, names, tokenizer, model.llama.config.max_seq_len)
    device = choose_device(config)
    model.to(device.where)
    outputs = {n: predict(model, s, tokenizer.pad_id, device, n) for n, s in splits.items()}
    default_out = {name: folder / f"{name}-predictions.txt" for name in outputs}
    print_baselines(files.train, splits)
    report_splits(config, splits, outputs, default_out, names)


def predict(config: RunConfig) -> None:
    """The class of each line of a file or of stdin: `label<TAB>name<TAB>p0 p1 ...`, and only that on stdout."""
    import numpy as np

    import dataset
    import trainer

    if not config.input:
        raise ValueError("--option predict needs --input FILE, with a sentence a line; - is stdin")
    _, model, tokenizer, settings = load_run(config)
    text = dataset.decode(sys.stdin.buffer.read(), "stdin") if config.input == "-" else dataset.read_text(config.input)
    sentences = text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
    if not sentences:
        raise ValueError(f"{config.input}: there is no sentence in it; write one a line")
    context = model.llama.config.max_seq_len
    tokens, n_cut = dataset.tokenize([s.strip() for s in sentences], tokenizer, context, settings["max_sentence_len"])
    if n_cut:
        trainer.warn(f"{config.input}: {n_cut} sentences were cut to {settings['max_sentence_len'] or context} tokens")
    split = dataset.Split(Path(config.input), sentences, tokens, np.zeros(len(tokens), dtype=np.int64), n_cut)
    device = trainer.choose_device(config)
    for row in trainer.predict(model.to(device.where), split, tokenizer.pad_id, device).exp().tolist():
        label = row.index(max(row))
        print(f"{label}\t{settings['label_names'][label]}\t{' '.join(f'{p:.6f}' for p in row)}")


# --------------------------------------------------------------------------- main

OPTIONS = {"generate": generate, "prompt": prompt, "finetune": finetune, "evaluate": evaluate, "predict": predict}


def is_about_the_input(error: BaseException) -> bool:
    """Was the error raised by one of our own rooms? Those say what is wrong with the input; an error from inside a
    library is a fault of ours, and keeps its traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    here = Path(__file__).resolve().parent
    return Path(last.filename).resolve().parent in (here, here / "data")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 2 for bad input, 130 after ^C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # a console may speak another encoding
    config = parse_args(argv)
    try:
        check_outputs(config)
        OPTIONS[config.option](config)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of our stdout has left (`| head`): not our fault, and nothing to add
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if not is_about_the_input(error):
            raise
        print(f"run_llama.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
