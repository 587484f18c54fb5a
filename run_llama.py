"""The entry point: read the command line, choose the option, wire the rooms, print.

    python run_llama.py --option finetune --lr 1e-5 --hidden_dropout_prob 0.8 --use_gpu
    python run_llama.py --help
"""

import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

from config import RunConfig, counted, is_out_of_memory, parse_args, shown

# The other rooms are imported by the options that need them: torch alone takes two seconds.


def notice(text: str) -> None:
    """A line for a person, on stderr; stdout is for results."""
    if text:
        print(shown(text), file=sys.stderr, flush=True)


def open_streams() -> bool:
    """Give the standard streams that the caller closed (`>&-`) an empty end, or the next file that is opened would get
    their number and the messages. Returns whether stdout was open."""
    was_open = sys.stdout is not None
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    return was_open


def to_nowhere(stream) -> None:
    """Whatever is still written to this stream is dropped: nobody can read it."""
    handle = os.open(os.devnull, os.O_WRONLY)
    os.dup2(handle, stream.fileno())
    os.close(handle)


class _Checked:
    """stdout or stderr. An error of stdout that is not a broken pipe is named; messages that stderr does not take are
    dropped: they end nothing."""

    def __init__(self, stream, is_stderr: bool):
        self.stream, self.is_stderr, self.fault = stream, is_stderr, None

    def __getattr__(self, attribute: str):
        return getattr(self.stream, attribute)

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, do, *arguments):
        try:
            return do(*arguments)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and not self.is_stderr:
                raise
            to_nowhere(self.stream)  # else Python tries what is left once more at its end
            if not self.is_stderr:
                self.fault = OSError(f"standard output could not be written ({error.strerror}); send it to where there "
                                     "is room, and run this again")
                raise self.fault from None


class _GoOn:
    """A stream that its reader may leave."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, do, *arguments) -> None:
        try:
            do(*arguments)
        except BrokenPipeError:
            to_nowhere(self.stream)
            notice("the reader of the output has left; the run goes on, its folder has everything")


@contextmanager
def without_readers() -> Iterator[None]:
    """Inside, a closed stdout or stderr (`| head -1`) ends nothing: a training run's results are in its folder."""
    with redirect_stdout(_GoOn(sys.stdout)), redirect_stderr(_GoOn(sys.stderr)):
        yield
        sys.stdout.flush()


# --------------------------------------------------------------------------- what the options share


def load_inputs(config: RunConfig, need: tuple[str, ...]):
    """What a run reads, all checked: .files, .splits by name, .names of the labels, .tokenizer, .weights.

    `need`: the splits that the option cannot do without.
    """
    import checkpoint
    import dataset
    import kernels
    from tokenizer import Tokenizer
    from trainer import warn

    files = dataset.find_files(config)
    for split in need:
        if getattr(files, split) is None:
            raise ValueError(f"--{split} is missing: {config.option} needs it beside the files that were given")
    model = checkpoint.find_model(config)
    notice(files.notice)
    notice(model.notice)
    names = dataset.read_label_names(files.label_names)
    tokenizer = Tokenizer(tokenizer_model=model.tokenizer)
    weights = checkpoint.read_weights(model.weights)
    checkpoint.check_vocabulary(tokenizer, weights.config)
    checkpoint.check_n_layers(weights, config.n_layers)
    on_cpu = (config.device or ("cuda" if config.use_gpu else "cpu")) == "cpu"
    if config.kernels == "auto" and on_cpu and is_large(sum(math.prod(shape) for shape in weights.shapes.values())):
        threading.Thread(target=kernels.library, daemon=True).start()  # compiled while the rest is read
    splits = load_splits(config, files, names and len(names), files.label_names, tokenizer, weights.config.max_seq_len)
    first = splits["train"] if "train" in splits else splits["dev"]
    held_out = [split for split in splits.values() if split is not first]
    if "train" in splits:
        for split in held_out:
            dataset.check_labels(split, first)
    classes = len(set(first.labels.tolist()))
    if names and len(names) >= 10 * classes:
        warn(f"{files.label_names} has {len(names)} names, of which {first.path} has only {classes}; is it the right "
             "file?")
    names = names or dataset.number_names(first)
    for split in held_out:
        dataset.check_names(split, len(names), first)
    return SimpleNamespace(files=files, splits=splits, names=names, tokenizer=tokenizer, weights=weights)


def load_splits(config: RunConfig, files, n_labels: int | None, labels_file, tokenizer, context: int) -> dict:
    """The splits that there are, by name; train only where something is trained."""
    import dataset
    from trainer import warn

    splits = {}
    for name in ("train", "dev", "test"):
        path = getattr(files, name)
        if path is None or (name == "train" and config.option in ("prompt", "evaluate")):
            continue
        splits[name] = split = dataset.load_split(path, tokenizer, context, config.max_sentence_len, n_labels,
                                                  labels_file)
        if split.n_cut:
            warn(f"{path}: {split.n_cut} of {counted(len(split), 'sentence')} cut to "
                 f"{counted(config.max_sentence_len or context, 'token')}")
        print(shown(f"load {len(split)} data from {path}"), flush=True)
    if "test" not in splits:
        notice("there is no test file: only dev is evaluated")
    return splits


def use_kernels(config: RunConfig, model, device) -> bool:
    """C on a CPU, for models that are worth the second of compiling; the same choice in every option. Returns whether
    it is as wanted: without a compiler it is not."""
    import kernels

    wanted = config.kernels == "auto" and device.where.type == "cpu" and is_large(
        sum(p.numel() for p in model.parameters()))
    kernels.switch(wanted)
    return kernels.is_on() == wanted


def is_large(n_parameters: int) -> bool:
    """Is a model of that size worth the second that compiling kernels.c takes?"""
    return n_parameters >= 1_000_000


def write_predictions(path: Path, predicted, split, is_typed: bool) -> None:
    """`label ||| sentence` a line, in the file's order. Only where the path was typed a link is followed."""
    from checkpoint import write_atomically

    lines = "".join(f"{label} ||| {sentence}\n" for label, sentence in zip(predicted, split.sentences, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(lines, encoding="utf-8", newline="\n"), is_typed)


def report_splits(
    config: RunConfig, splits: dict, outputs: dict, default_out: dict[str, Path], names: list[str], baselines: dict
) -> dict:
    """Print dev and test accuracy, each beside its own baselines, write the predictions, and return the scores with
    their confusion matrices."""
    from trainer import score

    result = {}
    for name, log_probs in outputs.items():
        split, predicted = splits[name], log_probs.argmax(1).tolist()
        typed = getattr(config, f"{name}_out")
        write_predictions(Path(typed or default_out[name]), predicted, split, bool(typed))
        result[name] = {**score(log_probs, split.labels, is_ordinal(config)), "n": len(split),
                        **confusion(split.labels.tolist(), predicted, len(names))}
        print(f"{name} acc :: {result[name]['acc']:.3f}", flush=True)
        if name in baselines:
            print(f"{name} baselines :: {baselines_text(baselines[name])}", flush=True)
        if is_ordinal(config):
            print("{} mae :: {mae:.3f}, qwk :: {qwk:.3f}, off by one :: {off_by_one:.3f}".format(name, **result[name]),
                  flush=True)
    return result


MATRIX_CLASSES = 1000  # the matrix of 100,000 classes would take 75 GiB


def confusion(labels: list[int], predicted: list[int], n: int) -> dict[str, list]:
    """The confusion matrix of n classes as result.json has it: a row for each true label, a column for each prediction.
    Of more than MATRIX_CLASSES, only the pairs that occur: [label, prediction, how often]."""
    from collections import Counter

    counts = Counter(zip(labels, predicted, strict=True))
    if n > MATRIX_CLASSES:
        return {"confusion_pairs": [[*pair, count] for pair, count in sorted(counts.items())]}
    return {"confusion_matrix": [[counts[label, guess] for guess in range(n)] for label in range(n)]}


def baselines_text(found: dict[str, float]) -> str:
    """The baselines of one split, as they are printed."""
    return f"majority {found['majority']:.3f}, tf-idf + logistic regression {found['tfidf']:.3f}"


def check_finite(outputs, what: str) -> None:
    """Raises ValueError for log-probabilities (N, C) that a sound model cannot give: a NaN, or a row without a class
    that is possible."""
    import torch

    bad = outputs.isnan().any(1) | ~torch.isfinite(outputs.max(1).values)
    if bad.any():
        raise ValueError(f"{what}: the output for {int(bad.sum())} of {counted(len(outputs), 'sentence')} is not "
                         "finite (NaN or infinity): the weights are damaged, or the training has diverged; nothing is "
                         "written")


def is_ordinal(config: RunConfig) -> bool:
    """Have the labels an order that the scores are to know of?"""
    return config.ordinal or config.loss == "ordinal" or config.monitor in ("dev_mae", "dev_qwk")


def check_outputs(config: RunConfig) -> None:
    """Raises an error for an output file that cannot be written, is named twice, or is one of a run's own files: before
    the work, not after it."""
    from checkpoint import check_writable

    names = ["dev_out", "test_out"]
    if config.option == "generate" and not config.resume:  # a resumed run is checked with its own options
        names = ["generated_sentence_low_temp_out", "generated_sentence_high_temp_out"]
    taken = {Path(getattr(config, n)).resolve(): n for n in ("train", "dev", "test", "label_names", "input")
             if getattr(config, n) and getattr(config, n) != "-"}
    for name in names:
        if not getattr(config, name):
            continue
        path = Path(getattr(config, name)).resolve()
        if path in taken:
            raise ValueError(f"--{name} {path}: that is --{taken[path]} too; name another file")
        if own := own_file(path, [Path(folder) for folder in (config.output_dir, config.run, config.resume) if folder]):
            raise ValueError(f"--{name} {path}: {own}; name another file")
        taken[path] = name
        check_writable(path, f"--{name}")


def own_file(path: Path, folders: list[Path]) -> str:
    """What a run has under this resolved path, which predictions must not replace; "" where it is nothing. `folders`:
    of runs, there already or about to be made; every other folder above the path that holds a run counts too."""
    from trainer import FOLDERS, LOGS, RUN_FILE

    above = [folder for folder in path.parents if (folder / RUN_FILE).is_file()]
    for folder in {*(folder.resolve() for folder in folders), *above}:
        if path == folder or path in folder.parents:
            return "that is a folder, which the run is in"
        if folder in path.parents:
            first = path.relative_to(folder).parts[0]
            if first in (RUN_FILE, *LOGS, "result.json", ".lock", *FOLDERS):
                return f"{folder / first} belongs to the run itself"
    return ""


# --------------------------------------------------------------------------- the options


@without_readers()
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
    weights = checkpoint.read_weights(files.weights)
    checkpoint.check_vocabulary(tokenizer, weights.config)
    # In the device's precision once, and not by autocast at each token: reading the weights is what takes the time.
    llama = checkpoint.load_pretrained(weights, config.n_layers).to(device.where, device.dtype)
    use_kernels(config, llama, device)
    print(shown(f"load model from {files.weights}"))
    start = tokenizer.encode(config.prefix, bos=tokenizer.add_bos, eos=False)
    if not start:
        raise ValueError("--prefix is empty, and this model has no begin token to start from; give it some words")
    torch.manual_seed(config.seed)
    for temperature, path in ((0.0, config.generated_sentence_low_temp_out),
                              (1.0, config.generated_sentence_high_temp_out)):
        tokens = llama.generate(torch.tensor([start], device=device.where), config.max_new_tokens, temperature)
        sentence = tokenizer.decode(tokens[0].tolist())
        print(f"Temperature is {temperature}\n{shown(sentence)}\n---------------")
        checkpoint.write_atomically(Path(path), lambda temporary, text=sentence: temporary.write_text(
            text, encoding="utf-8", newline="\n"))
        print(shown(f"Wrote generated sentence to {path}."), flush=True)


@without_readers()
def prompt(config: RunConfig) -> None:
    """Ask the pretrained model, without training, which label's name it would go on with."""
    from dataclasses import replace

    import checkpoint
    from classifier import LlamaZeroShotClassifier, ask
    from trainer import choose_device, predict

    inputs = load_inputs(config, need=("dev",))
    baselines = print_baselines(inputs.files.train, inputs.splits)
    device = choose_device(config)
    llama = checkpoint.load_pretrained(inputs.weights, config.n_layers)
    model = LlamaZeroShotClassifier(config, inputs.tokenizer, inputs.names, llama).to(device.where)
    use_kernels(config, model, device)
    outputs = {}
    for name, split in inputs.splits.items():
        asked = ask(model, split.tokens, inputs.tokenizer, config.question, inputs.names)
        outputs[name] = predict(model, replace(split, tokens=asked), inputs.tokenizer.pad_id, device, name)
        if outputs[name].isnan().any():
            raise ValueError(f"{inputs.weights.path}: the model's output is not a number: the weights hold numbers "
                             "that are not, or that are far too large; fetch or copy the file again")
    default_out = {name: Path(f"{inputs.files.name}-{name}-prompting-output.txt") for name in outputs}
    report_splits(config, inputs.splits, outputs, default_out, inputs.names, baselines)


def print_baselines(train, splits: dict, known: dict | None = None) -> dict:
    """The baselines on the test split (on dev where there is no test), as one line; all of them returned.

    `train`: the training split, or the path of its file, or None where the run has none. `known`: those that the run
    itself found; they are not computed again.
    """
    import dataset

    found = {name: known[name] for name in splits if known and name in known}
    missing = {name: split for name, split in splits.items() if name != "train" and name not in found}
    if missing and train is not None:
        labels, sentences = dataset.read_examples(train, None) if isinstance(train, Path) else (
            train.labels, train.sentences)
        found |= dataset.baselines(labels, sentences, missing)
    if not found:
        return {}
    name = "test" if "test" in found else "dev"
    print(f"baseline :: {baselines_text(found[name])}", flush=True)
    return found


def start(config: RunConfig, inputs, folder: Path | None, device):
    """The model, its task, optimizer and schedule, wired: what a training loop needs. Without a folder nothing is
    saved."""
    import numpy as np
    import torch

    import checkpoint
    import dataset
    import kernels
    import trainer
    from classifier import LlamaEmbeddingClassifier, classification_loss
    from optimizer import OPTIMIZERS, lr_scale, parameter_groups

    set_switches(config)
    splits, names, tokenizer = inputs.splits, inputs.names, inputs.tokenizer
    train, dev = splits["train"], splits["dev"]
    random = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    llama = checkpoint.load_pretrained(inputs.weights, config.n_layers, config.dropout, config.attention)
    llama.grad_checkpoint = config.grad_checkpoint
    settings = {"num_labels": len(names), "label_names": names, "pooling": config.pooling, "loss": config.loss,
                "hidden_dropout_prob": config.hidden_dropout_prob, "max_sentence_len": config.max_sentence_len}
    model = LlamaEmbeddingClassifier(SimpleNamespace(**settings), llama).to(device.where)
    if not use_kernels(config, model, device):
        trainer.warn(f"{kernels.fault()}: norms, positions, SwiGLU and AdamW run in PyTorch, which is slower "
                     "(--kernels off stops this warning)")
    # AdamW without decay is the same for a gradient that has only the batch's words in it, and has far less to read.
    llama.tok_embeddings.sparse = (kernels.suits(llama.tok_embeddings.weight) and config.optimizer == "adamw"
                                   and not config.weight_decay)

    sample = train
    if config.train_eval == "sample" and len(dev) < len(train):
        sample = train.take(np.sort(random.permutation(len(train))[: len(dev)]))
    augment = None
    if config.aug_delete or config.aug_swap or config.aug_replace:
        near = None
        if config.aug_replace:
            words = np.concatenate([tokens[int(tokenizer.add_bos):] for tokens in train.tokens])
            near = dataset.near_neighbours(llama.tok_embeddings.weight, words)
        augment = dataset.Augmentation(config.aug_delete, config.aug_swap, config.aug_replace, near,
                                       int(tokenizer.add_bos))
    weights = None
    if config.class_weights:
        weights = torch.tensor(dataset.class_weights(train.labels), dtype=torch.float32)
    balance = train.labels if config.sampler else None
    lengths, effective = train.lengths, config.batch_size * config.grad_accum

    def evaluate() -> dict[str, float]:
        on_train = trainer.score(trainer.predict(model, sample, tokenizer.pad_id, device, "train acc"), sample.labels)
        outputs = trainer.predict(model, dev, tokenizer.pad_id, device, "dev")
        scores = {"train_acc": on_train["acc"],
                  **{f"dev_{k}": v for k, v in trainer.score(outputs, dev.labels, is_ordinal(config)).items()}}
        predicted = outputs.argmax(1)
        if len(dev) > 1 and bool((predicted == predicted[0]).all()):
            scores["one_class"] = int(predicted[0])
        return scores

    def make_batch(rows: np.ndarray, epoch: int) -> dict[str, torch.Tensor]:
        batch = dataset.make_batch(train, rows, tokenizer.pad_id, augment, (config.seed, epoch))
        if weights is not None:
            batch["weights"] = weights[batch["labels"]]
        return batch

    task = trainer.Task(
        model, train, class_names=names, n_dev=len(dev), evaluate=evaluate, make_batch=make_batch,
        order=lru_cache(maxsize=2)(lambda epoch: dataset.epoch_order(lengths, effective, config.seed, epoch, balance)),
        losses=lambda batch: classification_loss(model, batch, config.label_smoothing, config.r_drop),
        save_best=lambda: checkpoint.save_classifier(folder / "best", model, tokenizer, settings) if folder else None,
    )
    scale = lr_scale(config.lr_scaling, effective, config.base_batch_size) if config.lr_scaling else 1.0
    groups = parameter_groups(model, config.lr * scale, config.weight_decay, config.layerwise_lr_decay,
                              config.head_lr and config.head_lr * scale, config.decay_all)
    more = {}
    if config.optimizer == "sgd":
        more = {"momentum": config.momentum, "nesterov": config.nesterov, "decoupled": True}
    optimizer = OPTIMIZERS[config.optimizer](groups, lr=config.lr * scale, **more)
    steps = len(task.order(0))
    return SimpleNamespace(model=model, task=task, optimizer=optimizer, schedule=schedule_of(config, steps),
                           settings=settings, steps_an_epoch=steps, dev=dev, pad_id=tokenizer.pad_id)


def set_switches(config: RunConfig) -> None:
    """--deterministic and --detect_anomaly, which PyTorch keeps for the whole process."""
    import torch

    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    if config.deterministic or torch.are_deterministic_algorithms_enabled():  # the call itself imports for two seconds
        torch.use_deterministic_algorithms(config.deterministic)
    torch.autograd.set_detect_anomaly(config.detect_anomaly)


@without_readers()
def finetune(config: RunConfig) -> int:
    """Train on train, choose the best evaluation on dev, evaluate that one on dev and test."""
    import trainer

    if config.resume:
        config = resumed(config)
        check_outputs(config)
    inputs = load_inputs(config, need=("train", "dev"))
    if config.pooling == "first" and config.attention == "causal":
        trainer.warn("--pooling first with causal attention: the first token sees no other; add --attention "
                     "bidirectional, or pool the last")
    runs = runs_of(config, inputs)
    for _, one, its in runs:
        schedule_of(one, steps_an_epoch(one, its))  # what cannot be is refused here, before anything is written
    device = trainer.choose_device(config)
    if config.plan:
        return show_plan(config, runs, device)
    if not config.resume:
        for line in idle_options(config):
            trainer.warn(f"no effect: {line}")
    if is_series(config):
        return repeat(config, inputs, runs, device)
    return exit_code(train_one(*runs[0][1:], device))


def runs_of(config: RunConfig, inputs) -> list[tuple[str, RunConfig, SimpleNamespace]]:
    """The runs that --seeds or --folds ask for, each with a name, its options and its inputs; without them, one.

    --train_limit draws each run's sentences with the run's own seed, so that it is the run that one gets alone.
    """
    from dataclasses import replace

    import dataset

    def part(i: int) -> SimpleNamespace:
        limited = limit_train(config, inputs)
        splits = dataset.fold(limited.splits, config.folds, i, config.seed)
        return SimpleNamespace(**{**vars(limited), "splits": splits})

    if config.folds and config.fold is None:
        return [(f"fold-{i}", replace(config, fold=i), part(i)) for i in range(config.folds)]
    if config.folds:
        return [(f"fold-{config.fold}", config, part(config.fold))]
    if config.seeds:
        each = [replace(config, seed=seed, seeds=None) for seed in range(config.seed, config.seed + config.seeds)]
        return [(f"seed-{one.seed}", one, limit_train(one, inputs)) for one in each]
    return [("", config, limit_train(config, inputs))]


def is_series(config: RunConfig) -> bool:
    """Do the options ask for several runs, one after another?"""
    from trainer import asks_for_series

    return asks_for_series(vars(config))


def limit_train(config: RunConfig, inputs) -> SimpleNamespace:
    """The inputs with the training sentences that --train_limit and --seed choose; all of them without a limit."""
    import dataset
    from trainer import warn

    if not config.train_limit:
        return inputs
    train = dataset.limit(inputs.splits["train"], config.train_limit, config.seed)
    missing = sorted(set(inputs.splits["train"].labels.tolist()) - set(train.labels.tolist()))
    if missing:
        named = ", ".join(inputs.names[label] for label in missing)
        warn(f"--train_limit {config.train_limit} with seed {config.seed} leaves no training sentence of: {named}")
    return SimpleNamespace(**{**vars(inputs), "splits": {**inputs.splits, "train": train}})


def steps_an_epoch(config: RunConfig, inputs) -> int:
    """Optimizer steps in one pass over the training sentences; a last, short one counts."""
    return -(-len(inputs.splits["train"]) // (config.batch_size * config.grad_accum))


def files_of(inputs) -> dict[str, dict[str, str]]:
    """The files that a run reads, for its args.json: each with its whole path and its sha256."""
    import dataset

    used = {n: getattr(inputs.files, n) for n in ("train", "dev", "test", "label_names")}
    used |= {"weights": inputs.weights.path, "tokenizer": inputs.tokenizer.path}
    found = {name: path.resolve() for name, path in used.items() if path}
    return {name: {"path": str(path), "sha256": dataset.sha256(path)} for name, path in found.items()}


def train_one(config: RunConfig, inputs, device, series: Path | None = None) -> dict:
    """One run from its folder to its result.json, which is returned. `series`: the folder of the --seeds or --folds
    that it belongs to, if there is one: what to resume when it is stopped."""
    import time

    import checkpoint
    import trainer

    begin, before_resume = time.perf_counter(), 0.0
    folder = Path(config.resume) if config.resume else trainer.open_run(config)
    with trainer.lock(folder):
        run = start(config, inputs, folder, device)
        if config.resume:
            before, now = trainer.read_description(folder), trainer.describe(config, device, {})
        else:
            before = trainer.save_description(folder, trainer.describe(config, device, files_of(inputs)))
        loop = trainer.Loop(run.task, run.optimizer, run.schedule, config, device, folder, resume_folder=series,
                            described=before)
        if config.resume:
            checkpoint.remove_litter(folder)
            loop.load()
            if (before["device"], before.get("versions")) != (now["device"], now["versions"]):
                trainer.warn("the device or the versions are others than when the run began (see its args.json); its "
                             "last bits may come out otherwise")
            before_resume = loop.progress.seconds
            notice(f"resuming {folder} at step {loop.progress.step}")
        n_parameters = sum(p.numel() for p in loop.parameters)
        print(shown(f"model :: {inputs.weights.path}, {counted(run.model.llama.config.n_layers, 'layer')}, "
                    f"{n_parameters / 1e6:.1f}M trainable parameters, {len(inputs.names)} classes"))
        print(shown(f"run :: {folder}, on {device}"), flush=True)
        if loop.saved is None:  # a resumed run has had them, and its micro-batch stays
            checks_before(config, loop)
        best = loop.run()

        checkpoint.check_best(folder / "best", best.get("manifest"))
        checkpoint.load_classifier_state(folder / "best", run.model)  # the best weights are what is evaluated
        held_out = {name: split for name, split in inputs.splits.items() if name != "train"}
        with trainer.stoppable(series or folder, config=config):
            outputs = {n: trainer.predict(run.model, s, inputs.tokenizer.pad_id, device, n)
                       for n, s in held_out.items()}
        for name in outputs:
            check_finite(outputs[name], f"{folder}: {name}")
        found = print_baselines(inputs.splits["train"], inputs.splits)
        diagnosis = diagnose_run(loop, folder, outputs["dev"], inputs, found["dev"]["majority"])
        for line in diagnosis:
            print(f"diagnosis :: {line}", flush=True)
        default_out = {name: folder / f"{name}-predictions.txt" for name in outputs}
        scores = report_splits(config, inputs.splits, outputs, default_out, inputs.names, found)
        progress = loop.progress
        result = {
            "best_epoch": best["epoch"], "best_manifest": best.get("manifest"), **scores, "baselines": found,
            "label_names": inputs.names,
            "stopped": progress.stopped or "finished", "steps": progress.step, "skipped_steps": progress.skipped,
            "last_dev_acc": last_dev_acc(folder), "loss_spikes": progress.spikes, "rollbacks": progress.rollbacks,
            "diagnosis": diagnosis, "train_seconds": round(loop.seconds(), 2),
            "seconds": round(before_resume + time.perf_counter() - begin, 2),
        }
        checkpoint.keep_newest_state(folder / "last")  # before the result: a finished run is never touched again
        trainer.save_result(folder, result)
    return result


def has_diverged(result: dict) -> bool:
    """Did the training of this result.json end because it diverged?"""
    return result["stopped"] == "diverged"


def exit_code(*results: dict) -> int:
    """3 where a run has diverged, else 0."""
    return 3 if any(map(has_diverged, results)) else 0


def diagnose_run(loop, folder: Path, log_probs, inputs, majority: float) -> list[str]:
    """What is wrong with the run that has just ended; see diagnosis.diagnose. `log_probs` (N, C): of dev; `majority`:
    the accuracy there of the most frequent class of training."""
    from diagnosis import diagnose
    from trainer import read_log, score

    progress, labels = loop.progress, inputs.splits["dev"].labels
    known = {"epoch", "train_loss", "train_acc", "dev_loss", "dev_acc"}
    epochs = [line for line in read_log(folder / "epochs.jsonl") if known <= line.keys()]  # others are damaged
    return diagnose(epochs, progress.best["epoch"], log_probs.argmax(1).numpy(), labels, inputs.names,
                    score(log_probs, labels)["f1"], majority, loop.guessing_loss(), progress.mean_loss,
                    loop.config.lr, progress.rollbacks, progress.stopped)


def show_plan(config: RunConfig, runs: list, device) -> int:
    """--plan: what the run would do, and which options would do nothing; see search.plan. With --seeds or --folds it
    is the first of the runs. No run's folder is opened: one that is there stays as it is."""
    import search

    _, one, inputs = runs[0]
    folder = Path(config.output_dir or "runs")
    folder.mkdir(parents=True, exist_ok=True)
    run = start(one, inputs, None, device)
    search.plan(run, one, device, folder, len(inputs.splits["train"]), idle_options(config),
                warmup_steps(one, run.steps_an_epoch), len(runs))
    return 0


def idle_options(config: RunConfig) -> list[str]:
    """A line for each option that is given but has no effect in this run."""
    from optimizer import SCHEDULE_OPTIONS

    used = SCHEDULE_OPTIONS[config.scheduler]
    option_of = {"patience": "plateau_patience"}  # --patience itself is early stopping's
    why = {option_of.get(name, name): f"--scheduler {config.scheduler} does not use it"
           for name in schedule_options(config) if name not in used}
    because = {
        "there is one cycle only; give --cycles": ("cycle_mult", "cycle_decay") if (config.cycles or 1) == 1 else (),
        f"--scheduler {config.scheduler} does not go by the step":
            ("schedule_every",) if config.scheduler in ("constant", "plateau") else (),
        f"--optimizer {config.optimizer} does not use it":
            () if config.optimizer == "sgd" else ("momentum", "nesterov"),
        "it needs --lr_scaling": () if config.lr_scaling else ("base_batch_size",),
        "there is no warmup": () if warmup_steps(config, 10**6) else ("warmup_kind", "warmup_start"),
        "it needs --weight_decay": () if config.weight_decay else ("decay_all",),
        "without --dropout and --hidden_dropout_prob the two passes are the same":
            () if config.dropout or config.hidden_dropout_prob else ("r_drop",),
        "it needs --output_dir": () if config.output_dir else ("overwrite",),
        "--device decides": ("use_gpu",) if config.device else (),
        "each run has its predictions in its own folder": ("dev_out", "test_out") if config.seeds or (
            config.folds and config.fold is None) else (),
        "it belongs to another --option": (
            "run", "input", "prefix", "max_new_tokens", "question", "lr_min", "lr_max", "lr_steps", "lr_repeats",
            "confirm", "generated_sentence_low_temp_out", "generated_sentence_high_temp_out"),
    }
    for reason, names in because.items():
        why |= {name: why.get(name, reason) for name in names}
    return [f"--{name}: {why[name]}" for name in sorted(config.given & why.keys())]


def checks_before(config: RunConfig, loop) -> None:
    """--check_gradients, --overfit_batch and --auto_batch: each says what it found, and leaves no trace."""
    import trainer

    if config.check_gradients:
        difference = trainer.check_gradients(loop)
        print(f"gradients :: one big batch, micro-batches and a short last one agree to {difference:.1e}", flush=True)
    if config.overfit_batch:
        first, last = trainer.overfit_batch(loop)
        verdict = "it can memorise it" if last < 0.5 * first else (
            "IT CANNOT MEMORISE IT: check the labels, the learning rate and the dropout")
        print(f"overfit :: one batch, loss {first:.3f} to {last:.3f}: {verdict}", flush=True)
    if config.auto_batch:
        loop.progress.micro_batch = trainer.find_micro_batch(loop)
        print(f"batch :: {counted(loop.progress.micro_batch, 'sentence')} a forward pass, "
              f"{config.batch_size * config.grad_accum} an optimizer step", flush=True)


def warmup_steps(config: RunConfig, steps_an_epoch: int) -> int:
    """The warmup in optimizer steps, from whichever of the three options was given.

    Raises ValueError when it is longer than the run."""
    total = config.epochs * steps_an_epoch
    for name, unit in (("warmup_steps", 1), ("warmup_epochs", steps_an_epoch)):
        if (getattr(config, name) or 0) * unit > total:
            raise ValueError(f"--{name} {getattr(config, name):g} is beyond the run's {counted(total, 'step')}, "
                             f"which come from --epochs {config.epochs}")
    if config.warmup_steps is not None:
        return config.warmup_steps
    if config.warmup_epochs is not None:
        return round(config.warmup_epochs * steps_an_epoch)
    ratio = config.warmup_ratio
    if ratio is None:
        ratio = 0.0 if config.scheduler in ("constant", "one_cycle", "cyclic") else DEFAULT_WARMUP
    return int(ratio * config.epochs * steps_an_epoch)


DEFAULT_WARMUP = 0.06  # of the run (Liu et al. 2019, RoBERTa, arXiv 1907.11692, table 10)


def schedule_of(config: RunConfig, steps_an_epoch: int):
    """The schedule of a run, see optimizer.make_schedule. Raises ValueError, naming the options, where none can be."""
    from optimizer import make_schedule

    return make_schedule(
        config.scheduler, total_steps=config.epochs * steps_an_epoch, steps_an_epoch=steps_an_epoch,
        warmup_steps=warmup_steps(config, steps_an_epoch), warmup_kind=config.warmup_kind,
        warmup_start=config.warmup_start, schedule_every=config.schedule_every, **schedule_options(config))


def schedule_options(config: RunConfig) -> dict:
    """The schedule's own options, under the names that optimizer.make_schedule has for them."""
    from trainer import RISING

    names = ("min_lr_ratio", "cycles", "cycle_mult", "cycle_decay", "cyclic_mode", "step_size", "milestones", "gamma",
             "decay_rate", "power", "pct_start", "decay_fraction")
    options = {name: getattr(config, name) for name in names}
    mode = "max" if config.monitor in RISING else "min"
    return {**options, "patience": config.plateau_patience, "plateau_mode": mode}


def resumed(config: RunConfig) -> RunConfig:
    """The options of the run, or of the series of --seeds or --folds, that is resumed. Refuses other options, and data
    that has changed, by name."""
    from dataclasses import replace

    import dataset
    from config import contradiction
    from trainer import (
        RUN_FILE,
        asks_for_series,
        check_run_folder,
        is_finished,
        lock,
        outside,
        read_description,
        read_result,
    )

    folder = Path(config.resume)
    if not (folder / RUN_FILE).is_file():
        raise FileNotFoundError(f"{folder}: there is no run here (no {RUN_FILE}){near_run(folder)}")
    check_run_folder(folder)
    if is_finished(folder):
        runs = read_result(folder).get("runs")
        raise ValueError(f"{folder}: all its runs are finished; evaluate one with --option evaluate --run "
                         f"{folder / runs[0]}" if runs else
                         f"{folder}: the run is finished; evaluate it with --option evaluate --run {folder}")
    with lock(folder):  # is it still going? said at once, before everything is read
        described = read_description(folder)
    files, saved = described["files"], options_of(described)
    if missing := {"train", "dev", "weights", "tokenizer"} - files.keys():
        raise ValueError(f"{folder / RUN_FILE}: no run is described here (its files lack {', '.join(sorted(missing))})")
    asked = {n: getattr(config, n) for n in sorted(config.given - {"resume", "option"})}
    option_of = {name: name for name in ("train", "dev", "test", "label_names", "tokenizer")}
    option_of |= {"weights": "pretrained_model_path"}
    paths, gone = {"dataset": None}, []
    for name, option in option_of.items():
        if name not in files:
            continue
        # One that has moved may be named anew: its checksum says that it is the same.
        path = Path(asked.pop(option, files[name]["path"]))
        digest = dataset.sha256(path) if path.is_file() or path.is_dir() else None
        if digest and digest == files[name].get("sha256", digest):
            paths[option] = str(path)
        else:
            gone.append(f"{path} has changed or is gone (where the same has moved to, say --{option} PATH)")
    if not asks_for_series(saved):  # a run's predictions may go elsewhere; those of a series' runs are in their folders
        paths |= {name: asked.pop(name) for name in ("dev_out", "test_out") if name in asked}
    differences = [f"--{n} is {saved[n]} in the run, {value} now" for n, value in asked.items() if value != saved[n]]
    if differences or gone:
        raise ValueError(f"--resume {folder}: what has changed since: {'; '.join([*differences, *gone])}")
    run = replace(RunConfig(**{**saved, **paths, "resume": str(folder)}), given=frozenset(described["given"]))
    if fault := contradiction(run):
        raise ValueError(f"{folder / RUN_FILE}: {fault}")
    for name in outside(folder, run):
        if name not in config.given and not is_series(run):
            path = getattr(run, name)
            raise ValueError(f"--resume {folder}: the run writes --{name} {path}, which is outside of its folder; type "
                             f"--{name} {path} again if that is what you want")
    return run


def options_of(described: dict) -> dict:
    """The options that an args.json holds; one that is newer than the file has its default."""
    from dataclasses import fields

    saved = {f.name: described["options"].get(f.name, f.default) for f in fields(RunConfig) if f.metadata}
    saved["milestones"] = tuple(saved["milestones"]) if saved["milestones"] else None
    return saved


def near_run(typed: Path) -> str:
    """The end of a message about a folder that is not there: the run whose name is nearest to the one that was typed,
    with numbers compared as numbers (1e-4 is 0.0001)."""
    import difflib
    import re

    from trainer import RUN_FILE

    def plain(name: str) -> str:
        return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", lambda number: str(float(number[0])), name.lower())

    if typed.exists():
        return ""
    places = [place for place in (typed.parent, Path("runs")) if place.is_dir()]
    runs = {plain(run.name): run for place in places for run in sorted(place.iterdir())
            if (run / RUN_FILE).is_file() or (run / "best").is_dir()}
    near = difflib.get_close_matches(plain(typed.name), runs, n=1, cutoff=0.8)
    return f"; did you mean {runs[near[0]]}?" if near else ""


def repeat(config: RunConfig, inputs, runs: list, device) -> int:
    """--seeds and --folds: the runs one after another, each in a folder inside the series' own, then the summary.

    The series' args.json is there before its first run, so that --resume can finish what was stopped: it reads the
    results of the runs that are finished, goes on with the one that is not, and starts the missing ones.
    """
    import shlex
    from dataclasses import replace

    import checkpoint
    import trainer

    folder = Path(config.resume) if config.resume else trainer.open_run(config)
    for name, *_ in runs:
        checkpoint.check_plain(folder / name, is_folder=True)
    members = {name: (replace(one, output_dir=str(folder / name), dev_out=None, test_out=None, resume=None), its)
               for name, one, its in runs}
    if not config.resume:
        for one, _ in members.values():
            trainer.open_run(one)  # a run that is in the way is refused (or replaced) before the first one begins
    with trainer.lock(folder):
        if not config.resume:
            trainer.save_description(folder, trainer.describe(config, device, files_of(inputs)))
        results = {}
        try:
            for name, (one, its) in members.items():
                print(f"{name}:", flush=True)
                results[name] = finish_member(one, its, device, folder)
                if has_diverged(results[name]):
                    print(f"{name} diverged: its accuracies are those of the weights from before that", flush=True)
        except KeyboardInterrupt:  # between two runs, or the second ^C in one
            notice(f"go on with: python run_llama.py --resume {shlex.quote(str(folder))}")
            raise
        summary = summarise(results, folder, "folds" if config.folds else "seeds")
        trainer.save_result(folder, summary)
    return exit_code(*results.values())


def finish_member(one: RunConfig, inputs, device, series: Path) -> dict:
    """The result of one run of a series: read where the run is finished, else it is gone on with, or started.

    Raises ValueError when the run in its folder is not the series' own.
    """
    from dataclasses import replace

    from trainer import RUN_FILE, is_finished, read_description, read_result

    folder = Path(one.output_dir)
    if not (folder / RUN_FILE).is_file():
        return train_one(one, inputs, device, series)
    described = read_description(folder)
    saved = options_of(described)
    places = {"output_dir", "overwrite", "resume", "dev_out", "test_out", "dataset", "train", "dev", "test",
              "label_names", "tokenizer", "pretrained_model_path"}
    other = [f"--{name} is {saved[name]} there, {getattr(one, name)} in {series}" for name in sorted(saved)
             if name not in places and saved[name] != getattr(one, name)]
    files, own = described["files"], read_description(series)["files"]
    other += [f"{files[name]['path'] if name in files else 'nothing'} is its {name} file" for name in own
              if name not in files or files[name].get("sha256") != own[name].get("sha256")]
    if other:
        raise ValueError(f"{folder}: this run is not one of {series}: {'; '.join(other)}; move the folder away, and "
                         "resume again")
    if is_finished(folder):
        notice(f"{folder} is finished: its result is taken as it is")
        return read_result(folder)
    return train_one(replace(one, resume=str(folder)), inputs, device, series)


def summarise(results: dict[str, dict], folder: Path, unit: str) -> dict:
    """Print mean and standard deviation of the accuracies of a series' runs, and return what its result.json holds.

    Of runs that diverged it says which they are, and what the others give alone. A fold's accuracy is flattered by the
    choice of the best epoch on that same fold: the last epoch's, which nobody chose, is printed too.
    """
    diverged = [name for name, result in results.items() if has_diverged(result)]
    summary = {"runs": list(results), "diverged": diverged}
    for split in ("dev", "test"):
        if all(split in result for result in results.values()):
            summary[split] = mean_and_deviation([result[split]["acc"] for result in results.values()])
    healthy = [result for name, result in results.items() if name not in diverged]
    if diverged:
        without = {split: mean_and_deviation([result[split]["acc"] for result in healthy])
                   for split in ("dev", "test") if split in summary and healthy}
        summary["without_diverged"] = without
        said = ", ".join(f"{split} acc {in_words(without[split])}" for split in without)
        print(f"diverged :: {', '.join(diverged)}, {len(diverged)} of {len(results)} {unit}"
              + (f"; without {'it' if len(diverged) == 1 else 'them'}: {said}" if said else ""), flush=True)
    if unit == "folds":
        summary["dev_epoch"] = "the best of each fold, chosen on that same fold"
        last = [result["last_dev_acc"] if "last_dev_acc" in result else last_dev_acc(folder / name)
                for name, result in results.items()]
        if None not in last:
            summary["dev_last_epoch"] = mean_and_deviation(last)
            print(f"last epoch :: dev acc {in_words(summary['dev_last_epoch'])} over {len(results)} folds", flush=True)
        stopped = any(result["stopped"] == "patience" for result in results.values())
        notice("dev acc is that of each fold's best epoch, chosen on that same fold, and so a little too high; the "
               "last epoch's is not chosen" + (", but --patience stopped on the fold too (--patience 0: all epochs)"
                                               if stopped else ""))
    for split in ("dev", "test"):
        if split in summary:
            print(f"{split} acc :: {in_words(summary[split])} over {len(results)} {unit}", flush=True)
    return summary


def mean_and_deviation(values: list[float]) -> dict:
    """The accuracies with their mean and their (sample) standard deviation, which one value alone does not have."""
    import statistics

    return {"acc": values, "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None}


def in_words(found: dict) -> str:
    """0.412 +- 0.030, of `mean_and_deviation`."""
    return f"{found['mean']:.3f}" + ("" if found["std"] is None else f" +- {found['std']:.3f}")


def last_dev_acc(folder: Path) -> float | None:
    """The dev accuracy in the last line of a run's epochs.jsonl; None where a divergence left no line."""
    from trainer import read_log

    lines = read_log(folder / "epochs.jsonl")
    return lines[-1].get("dev_acc") if lines else None


@without_readers()
def lr_find(config: RunConfig) -> int:
    """Look for the learning rate; see search.lr_find."""
    import search
    import trainer

    inputs = limit_train(config, load_inputs(config, need=("train", "dev")))
    schedule_of(config, steps_an_epoch(config, inputs))  # --confirm and the command that is printed use it
    device = trainer.choose_device(config)
    folder = trainer.open_run(config)
    with trainer.lock(folder):
        new = [name for name in ("lr_find.csv", "lr_find.png") if not (folder / name).exists()]
        try:
            search.lr_find(lambda changed: start(changed, inputs, None, device), config, device, folder)
        except BaseException:
            for name in new:
                (folder / name).unlink(missing_ok=True)
            if [path.name for path in folder.iterdir()] == [".lock"]:
                with suppress(OSError):  # Windows removes no file that is open
                    (folder / ".lock").unlink()
                    folder.rmdir()
            raise
    return 0


@without_readers()
def verify_resume(config: RunConfig) -> int:
    """Run, kill, resume, compare; see search.verify_resume."""
    import search
    import trainer

    return search.verify_resume(config, trainer.open_run(config), Path(__file__).resolve())


def load_run(config: RunConfig):
    """The classifier, the tokenizer and the settings of a saved run: (folder, model, tokenizer, settings)."""
    import checkpoint
    from classifier import empty_classifier
    from tokenizer import Tokenizer
    from trainer import check_run_folder, check_tree, known_manifest, warn

    if not config.run:
        raise ValueError(f"--option {config.option} needs --run RUN, the folder of a finished fine-tuning run")
    folder = Path(config.run)
    check_run_folder(folder)
    best = best_of(folder)
    if not (best / "config.json").is_file():
        inside = sorted(folder.glob("*/best/config.json"), key=lambda path: (len(path.parts[-3]), path))
        if inside:
            names = [str(path.parent.parent) for path in inside]
            more = f", ... ({len(names)} in all)" if len(names) > 5 else ""
            raise FileNotFoundError(f"{folder}: several runs are in this folder; name one of them: --run "
                                    f"{', '.join(names[:5])}{more}")
        raise FileNotFoundError(f"{folder}: there is no saved classifier here (no best/config.json)"
                                + (near_run(folder) or "; name the folder of a run that has finished an epoch"))
    fixed = config.given & {"pretrained_model_path", "tokenizer", "n_layers", "attention", "pooling",
                            "max_sentence_len", "hidden_dropout_prob", "dropout"}
    if fixed:
        warn(f"--{', --'.join(sorted(fixed))}: no effect, the saved run decides")
    check_tree(best)
    digest, has_manifest = known_manifest(home_of(folder))
    if not checkpoint.check_best(best, digest):
        if has_manifest:
            raise ValueError(f"{best}: manifest.json, with the checksums, is gone; copy the folder from where it is "
                             "whole, or train again")
        warn(f"{best}: an older version wrote it, without checksums: a damaged file would not be noticed")
    settings = checkpoint.read_json(best / "config.json")
    model = empty_classifier(settings, best / "config.json")
    checkpoint.load_classifier_state(best, model)
    tokenizer = Tokenizer(tokenizer_model=best)
    checkpoint.check_vocabulary(tokenizer, model.llama.config)
    return folder, model.eval(), tokenizer, settings


def home_of(folder: Path) -> Path:
    """The folder of the run; what was typed may be its best/."""
    from trainer import RUN_FILE

    return folder if (folder / RUN_FILE).is_file() or not (folder.parent / RUN_FILE).is_file() else folder.parent


def best_of(folder: Path) -> Path:
    """Where the classifier of a run is; the folder itself may be a run's best/."""
    places = (folder / "best", folder / ".best.old")  # the second one where a run was killed just as it changed them
    return next((place for place in places if place.is_dir()), folder)


@without_readers()
def evaluate(config: RunConfig) -> None:
    """A saved run on its own dev and test files, or on those that are given."""
    from dataclasses import replace

    import dataset
    from trainer import choose_device, is_finished, predict, read_description, read_result, warn

    folder, model, tokenizer, settings = load_run(config)
    names = settings["label_names"]
    config = replace(config, max_sentence_len=settings["max_sentence_len"], loss=settings.get("loss", "ce"))
    is_own = not config.given & {"dataset", "train", "dev", "test"}
    known = {}  # the baselines that the run itself found on the same sentences
    if is_own:
        home = home_of(folder)
        described = read_description(home)
        used = described["files"]
        files = dataset.DataFiles(home.name, *(Path(used[n]["path"]) if n in used else None for n in (
            "train", "dev", "test", "label_names")))
        if is_finished(home):
            known = dict(read_result(home).get("baselines", {}))
        if described["options"].get("folds"):
            known.pop("dev", None)  # that was the fold's
            warn(f"{folder}: the run is one of several --folds: it was trained on a part of the dev file")
        for name in ("dev", "test"):
            if name not in used:
                continue
            path = getattr(files, name)
            if not path.is_file():
                raise FileNotFoundError(f"{path}: the run's {name} file is not there any more; where it has moved to, "
                                        "say --dev FILE, or --test FILE")
            if dataset.sha256(path) != used[name].get("sha256"):
                known.pop(name, None)
                warn(f"{path}: the file has changed since the run" if "sha256" in used[name] else
                     f"{path}: the run has no checksum of it: it may have changed since")
    else:
        files = dataset.find_files(config)
        own_names = dataset.read_label_names(files.label_names)
        if own_names and own_names != names:
            warn(f"{files.label_names} names the labels {own_names}, the run {names}")
    splits = load_splits(config, files, len(names), best_of(folder) / "config.json", tokenizer,
                         model.llama.config.max_seq_len)
    if not splits:
        raise ValueError("there is neither a --dev nor a --test file to evaluate")
    baselines = print_baselines(files.train if files.train and files.train.is_file() else None, splits, known)
    device = choose_device(config)
    use_kernels(config, model.to(device.where), device)
    outputs = {n: predict(model, s, tokenizer.pad_id, device, n) for n, s in splits.items()}
    for name in outputs:
        check_finite(outputs[name], f"{folder}: {name}")
    default_out = {n: home_of(folder) / (f"{n}-predictions.txt" if is_own else f"{files.name}-{n}-predictions.txt")
                   for n in outputs}
    report_splits(config, splits, outputs, default_out, names, baselines)


def read_stdin() -> bytes:
    """All of stdin. Raises OSError where it cannot be read; a closed one is empty."""
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise OSError(f"stdin: it cannot be read ({error.strerror}); give --input a file, or pipe the sentences into "
                      "this") from None


def predict(config: RunConfig) -> None:
    """The class of each line of a file or of stdin: `label<TAB>name<TAB>p0 p1 ...`, and only that on stdout."""
    import numpy as np

    import dataset
    import trainer

    if not config.input:
        raise ValueError("--option predict needs --input FILE, with a sentence a line; - is stdin")
    folder, model, tokenizer, settings = load_run(config)
    source = "stdin" if config.input == "-" else config.input
    text = dataset.decode(read_stdin(), source) if config.input == "-" else dataset.read_text(source)
    sentences = dataset.split_lines(text)
    if not sentences[-1]:
        sentences.pop()  # behind the last line's end there is no line
    if not sentences:
        raise ValueError(f"{source}: there is no sentence in it; write one a line")
    context = model.llama.config.max_seq_len
    tokens, n_cut = dataset.tokenize([s.strip() for s in sentences], tokenizer, context, settings["max_sentence_len"])
    if n_cut:
        trainer.warn(f"{source}: {counted(n_cut, 'sentence')} cut to "
                     f"{counted(settings['max_sentence_len'] or context, 'token')}")
    split = dataset.Split(Path(source), sentences, tokens, np.zeros(len(tokens), dtype=np.int64), n_cut)
    device = trainer.choose_device(config)
    use_kernels(config, model.to(device.where), device)
    outputs = trainer.predict(model, split, tokenizer.pad_id, device)
    check_finite(outputs, str(folder))
    for row in outputs.exp().tolist():
        label = row.index(max(row))
        print(f"{label}\t{settings['label_names'][label]}\t{' '.join(f'{p:.6f}' for p in row)}")


# --------------------------------------------------------------------------- main

OPTIONS = {"generate": generate, "prompt": prompt, "finetune": finetune, "evaluate": evaluate, "predict": predict,
           "lr_find": lr_find, "verify_resume": verify_resume}


def is_about_the_input(error: BaseException) -> bool:
    """An error of the file system, or one that our own rooms raised: those say what is wrong with the input. An error
    from inside a library is a fault of ours, and keeps its traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    here = Path(__file__).resolve().parent
    return isinstance(error, OSError) or Path(last.filename).resolve().parent in (here, here / "data")


def message_of(error: BaseException) -> str:
    """What an error says; the operating system's own ones with the file in front."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}; check the path and its permissions"
    return str(error)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 when the work is done, 2 for bad input, 3 for a run that
    diverged, 130 after ^C, 141 when the reader of the results has left."""
    stdout_was_open = open_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # a console may speak another encoding
    with redirect_stdout(_Checked(sys.stdout, False)), redirect_stderr(_Checked(sys.stderr, True)):
        try:
            code = answer(argv, stdout_was_open)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader of our stdout has left (`| head`): what a shell says of such an end
            to_nowhere(sys.stdout)
            return 128 + 13  # SIGPIPE
        except OSError as error:  # of the last flush
            notice(f"run_llama.py: error: {message_of(error)}")
            return 2
        except KeyboardInterrupt:
            with undisturbed():
                notice("interrupted")
            return 130


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, ^C does nothing: the program is at its end, and one more would only add a traceback."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def answer(argv: list[str] | None, stdout_was_open: bool) -> int:
    """`main` without its streams: errors that a person can do something about are one message, and code 2."""
    try:
        config = parse_args(argv)
    except SystemExit:  # of --help, or of a bad option, which has been said
        sys.stdout.flush()
        if sys.stdout.fault:  # which argparse keeps to itself
            raise sys.stdout.fault from None
        raise
    try:
        if config.option == "predict" and not stdout_was_open:
            raise ValueError("standard output is closed, and it is where --option predict writes; send it to a file")
        check_outputs(config)
        return OPTIONS["finetune" if config.resume else config.option](config) or 0
    except BrokenPipeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            said = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            notice(f"run_llama.py: error: out of memory ({said}); close other programs, or try a smaller --batch_size "
                   "(with --grad_accum the effective batch stays), a smaller --max_sentence_len, or fewer --n_layers")
        elif isinstance(error, ValueError | OSError) and is_about_the_input(error):
            notice(f"run_llama.py: error: {message_of(error)}")
        else:
            raise
        return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # in front of main's first line, or behind its last
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # while the interpreter ends, ^C would only add a traceback
