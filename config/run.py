"""The run's options: one field of `RunConfig` each, with its default, its help, the values that it accepts, the
commands that use it and the options that it needs."""

import re
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any

import schedule
from config.model import LORA_TARGETS, LoraConfig
from config.words import InputError
from schedule import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, SCHEDULERS, Check, Need

COMMANDS = ("generate", "prompt", "finetune", "evaluate", "predict", "serve", "lr_find", "verify_resume",
            "search", "inspect", "report", "export")
COMPUTING = COMMANDS[:-2]  # those that run a model
FINETUNE = ("finetune",)
TRIALS = ("finetune", "search")  # the trials of a search are such runs
WHOLE_RUN = (*TRIALS, "verify_resume")  # the commands that train to the end
TRAINING = (*WHOLE_RUN, "lr_find")
PRETRAINED = ("generate", "prompt", *TRAINING)  # those that read pretrained weights
MODEL_FILES = (*PRETRAINED, "inspect")  # those that read its tokenizer at least
SAVED = ("evaluate", "predict", "serve")  # those that use a finished run
LABELLED = ("prompt", "evaluate", "inspect", *TRAINING)  # those that read labelled sentences
TABLES = (*LABELLED, "predict")  # those that read files of sentences
SCORING = ("prompt", "evaluate", *WHOLE_RUN)  # those that report accuracies
WRITING = ("prompt", "evaluate", "finetune")  # those that write predictions where they are asked to

POOLINGS = ("last", "mean", "max", "first")
OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor")
LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")
MONITORS = ("dev_acc", "dev_f1", "dev_loss", "dev_mae", "dev_qwk")
METHODS = ("grid", "random", "tpe", "gp", "hyperband", "bohb")
PRUNERS = ("median", "halving", "hyperband", "none")
GENERATE_PREFIX = ("I have wanted to see this thriller for a while, and it didn't disappoint. Keanu Reeves, "
                   "playing the hero John Wick, is")
QUESTION = "Is this movie {labels}? This movie is"

RATE = Check(lambda x: 0 < x <= 1e6, "above 0 and at most 1e6")
AT_LEAST_TWO = Check(lambda x: x >= 2, "2 or more")
PROBABILITY = Check(lambda x: 0 <= x < 1, "at least 0 and below 1")
FREEZE = Check(lambda x: x in ("none", "embeddings", "backbone") or frozen_layers(x) is not None,
               "none, embeddings, backbone, or first:K with K from 1 on, such as first:4")
TRAINS_LAYERS = Need(lambda c: c.freeze != "backbone", "--freeze backbone trains the head alone")

SGD = Need(lambda c: c.optimizer == "sgd", "--optimizer {optimizer} does not use it")
LORA = Need(lambda c: c.lora_r or c.adapter, "it needs --lora_r")
ONE_RUN = Need(lambda c: not c.seeds and (not c.folds or c.fold is not None),
               "each run has its predictions in its own folder")
SERIES = Need(lambda c: c.option in TRIALS or c.resume,
              "--{name} repeats --option finetune, and --option is {option}")


def names_in(text: str | None) -> tuple[str, ...]:
    """`a,b` as ("a", "b"), each name once; () for None."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(","))) if text else ()


def targets_in(text: str) -> tuple[str, ...]:
    """The names in --lora_targets; `q_proj`, as PEFT says it, is q."""
    return tuple(dict.fromkeys(name.removesuffix("_proj") for name in names_in(text)))


def frozen_layers(freeze: str) -> int | None:
    """K of --freeze first:K; None for everything else."""
    word, _, number = freeze.partition(":")
    return int(number) if word == "first" and re.fullmatch("[1-9][0-9]{0,5}", number) else None


def _option(group: str, default: Any, help: str, *, only: tuple[str, ...] = TRAINING, common: bool = False,
            needs: Sequence[Need] = (), requires: Need | None = None, one_of: tuple[str, ...] = (), also: str = "",
            **more: Any) -> Any:
    """A field of `RunConfig`. `only`: the commands that use the option; `common`: is it in the short help? Without what
    it `needs` it has no effect; without what it `requires`, or beside another of `one_of`, it is refused. `also`: what
    other programs call it; `earlier`: what runs did that are older than the option, where that is not its default."""
    return field(default=default, metadata={"group": group, "help": help, "only": only, "common": common,
                 "needs": needs, "requires": requires, "one_of": one_of, "also": also, **more})


# A group of the help each, with the commands of those of its options that name none.
_what = partial(_option, "What to do", common=True)
_data = partial(_option, "Data", only=LABELLED, metavar="FILE")
_model, _lora, _train, _optimizer, _schedule, _regular, _output = (partial(_option, group) for group in (
    "Model", "Adapters", "Training", "Optimizer", "Schedule", "Regularisation", "Output"))
_stop = partial(_option, "Stopping and guards", only=WHOLE_RUN)
_search = partial(_option, "Search", only=("search",))
_range = partial(_option, "Range test", only=("lr_find",))
_device = partial(_option, "Device", only=COMPUTING)
_report = partial(_option, "Report", only=("report",))
_text = partial(_option, "Generation and prompting", only=("generate",), metavar="FILE")


def _with_schedule_options(cls: Any) -> Any:
    """Add a field for each option that schedule.py has, behind --scheduler."""
    types, own = list(cls.__annotations__.items()), schedule.command_line_options()
    at = list(cls.__annotations__).index("scheduler") + 1
    cls.__annotations__ = dict([*types[:at], *((name, o.type) for name, o in own.items()), *types[at:]])
    for name, option in own.items():
        setattr(cls, name, _schedule(**vars(option)))
    return cls


@dataclass(frozen=True)
@_with_schedule_options
class RunConfig:
    """Every option of `run_llama.py`, typed, with its default. None: decided at run time, as the help says."""

    option: str = _what("generate", "generate continues --prefix; prompt asks the pretrained model without training; "
        "finetune trains, then evaluates the best epoch; evaluate, predict and serve use a saved --run; lr_find looks "
        "for the learning rate; verify_resume kills a run and compares; search looks for the best options; inspect "
        "says what is wrong with data or with a --run; report compares runs and says what is chance; export writes a "
        "--run, or pretrained weights, for other programs",
        choices=COMMANDS, only=COMMANDS,
        show_default=False, also="mode task command")
    run: tuple[str, ...] | None = _what(None, "the folder of a finished run; evaluate and predict average several, "
        "or those of --seeds and --folds; report takes folders of runs, logs and tables too", metavar="RUN",
        only=(*SAVED, "inspect", "report", "export"), also="runs")
    input: str | None = _what(None, "the sentences to label: one a line, or a table as --train takes; - is stdin, "
        "which is answered line by line; inspect says of each which words tip the decision", metavar="FILE",
        only=("predict", "inspect"))

    dataset: str | None = _data(None, "short for the four paths data/NAME-{train,dev,test}.txt and "
        "data/NAME-label-mapping.json; movies is fetched when it is not there", metavar="NAME", common=True,
        one_of=("dataset", "train"))
    train: str | None = _data(None, "training sentences: `label ||| sentence` a line, CSV, TSV, JSONL or Parquet, also "
        "with .gz (default: data/sst-train.txt where it is, else the data set movies)", common=True,
        one_of=("dataset", "train"), also="train_file train_data")
    dev: str | None = _data(None, "development sentences: the best epoch is chosen on them (default with --train: a "
        "tenth of it, held out)", common=True,
        also="dev_file valid validation validation_file eval_file")
    test: str | None = _data(None, "test sentences: looked at once, at the end", common=True, also="predict_file")
    label_names: str | None = _data(None, "JSON list of the labels' names (default: beside --train, else as the "
        "file has them)")
    text_column: str | None = _data(None, "the column of a table that has the sentences; a,b joins two (default: found "
        "by its name or its contents)", metavar="NAME", only=TABLES, also="text_col sentence_column")
    label_column: str | None = _data(None, "the column of a table that has the labels (default: found by its name or "
        "its contents)", metavar="NAME", only=TABLES, also="label_col target_column")
    max_sentence_len: int | None = _data(None, "cut sentences after this many tokens; also --max_length (default: "
        "the model's context)", metavar="N", check=AT_LEAST_ONE, only=MODEL_FILES, also="max_len max_seq_length")
    train_limit: int | None = _data(None, "train on a random N of the training sentences", metavar="N", only=TRAINING,
        check=AT_LEAST_ONE, also="max_train_samples")

    pretrained_model_path: str | None = _model(None, "a llama2.c .pt or .bin, a .gguf, a Hugging Face folder, "
        "hf:OWNER/NAME[@REVISION] from its hub, the folder of a finished run, or a name that data/prepare.py knows "
        "(default: stories42M.pt where it is, else smollm2-135m)", metavar="PATH", common=True,
        only=(*MODEL_FILES, *SAVED, "export"),
        also="model model_name model_name_or_path checkpoint")
    tokenizer: str | None = _model(None, "SentencePiece .model, tokenizer.json or .gguf (default: the one that comes "
        "with the weights)", metavar="FILE", only=(*MODEL_FILES, "export"),
        needs=[Need(lambda c: c.option != "export" or not c.run, "the saved run has its own")])
    n_layers: int | None = _model(None, "use the first K layers of the pretrained stack", metavar="K",
        only=(*PRETRAINED, "export"), check=AT_LEAST_ONE, common=True,
        needs=[Need(lambda c: c.option != "export" or not c.run, "the saved run has its own")])
    attention: str = _model("causal", "what a token sees: the ones before it, or all",
        choices=("causal", "bidirectional"))
    pooling: str = _model("last", "how a sentence's hidden states become one vector", choices=POOLINGS)
    head_bias: bool = _model(False, "the linear head has a bias; without one, `transformers` and `peft` can load the "
        "classifier (--option export)", earlier=True,
        needs=[Need(lambda c: c.loss == "ce", "the head of --loss {loss} has none")])
    hidden_dropout_prob: float = _model(0.3, "dropout in front of the classification head", check=PROBABILITY,
        common=True, also="classifier_dropout")
    dropout: float = _model(0.0, "embedding, attention and residual dropout inside the stack", check=PROBABILITY,
        also="dropout_prob attention_dropout")

    freeze: str = _model("none", "what is not trained: the embeddings; the backbone, which is all but the head; or "
        "first:K, the embeddings and the first K layers. What a frozen first part computes is kept for the next epoch",
        metavar="PART", check=FREEZE, needs=[Need(lambda c: c.freeze != "embeddings" or not (c.lora_r or c.adapter),
            "beside adapters, nobody trains the embeddings")], also="freeze_layers freeze_backbone num_frozen_layers")
    new_head: bool = _model(False, "where --pretrained_model_path is a finished run: take its Llama alone, and train a "
        "new head",
        needs=[Need(lambda c: c.pretrained_model_path or c.adapter, "it needs --pretrained_model_path RUN")])

    lora_r: int | None = _lora(None, "train adapters of this rank beside the matrices of the stack, and the head; the "
        "rest stays as it is", metavar="R", check=AT_LEAST_ONE,
        requires=Need(lambda c: c.freeze != "backbone" or c.adapter, "--freeze backbone trains the head alone, and "
            "--lora_r asks for adapters; leave one of them out"), also="lora_rank lora_dim rank")
    lora_alpha: float | None = _lora(None, "what an adapter adds is multiplied with alpha / R (default: 2 R)",
        metavar="ALPHA", check=RATE, needs=[LORA])
    lora_dropout: float = _lora(0.0, "dropout in front of the adapters", check=PROBABILITY, needs=[LORA])
    lora_targets: str = _lora("all", "which matrices of each layer get an adapter: q, k, v, o, gate, up, down, with "
        "commas between, or all", metavar="NAME[,NAME]", needs=[LORA], also="lora_target_modules target_modules",
        check=Check(lambda x: x == "all" or bool(targets_in(x)) and {*targets_in(x)} <= {*LORA_TARGETS},
                    f"all, or some of {', '.join(LORA_TARGETS)} with commas and no spaces, such as q,v"))
    lora_rs: bool = _lora(False, "multiply with alpha / sqrt(R) instead (rsLoRA), for large ranks", needs=[LORA],
        also="use_rslora")
    lora_dora: bool = _lora(False, "learn the length of each row apart from its direction (DoRA); slower",
        needs=[LORA], also="use_dora")
    adapter: str | None = _lora(None, "begin with this adapter: the folder of a run with --lora_r, or one of PEFT's; "
        "predict uses one of PEFT's that has a head", metavar="DIR", only=(*TRAINING, "predict"))

    epochs: int = _train(10, "passes over the training set", check=AT_LEAST_ONE, common=True, also="num_train_epochs")
    max_steps: int | None = _train(None, "end after N optimizer steps, where --epochs would have more; the schedule is "
        "laid over them", metavar="N", check=AT_LEAST_ONE)
    max_minutes: float | None = _train(None, "end after so many minutes at most, everything counted: as many steps as "
        "fit, and the schedule laid over them", metavar="MINUTES", only=FINETUNE, also="max_time time_limit",
        check=Check(lambda x: x > 0, "above 0"))
    batch_size: int = _train(8, "sentences a forward pass; times --grad_accum an optimizer step", check=AT_LEAST_ONE,
        common=True, also="bs train_batch_size per_device_train_batch_size")
    grad_accum: int = _train(1, "forward passes an optimizer step; the loss is their mean", check=AT_LEAST_ONE,
        also="gradient_accumulation_steps accumulation_steps accumulate_grad_batches")
    auto_batch: bool = _train(False, "find the largest forward pass that fits into memory on the longest sentences; "
        "the effective batch stays", only=WHOLE_RUN)
    grad_checkpoint: bool = _train(False, "compute activations twice instead of keeping them: less memory, about a "
        "third more time", needs=[TRAINS_LAYERS])
    train_eval: str = _train("sample", "train acc is measured on a fixed random sample as large as dev, or on the "
        "full training set", choices=("sample", "full"), only=WHOLE_RUN)
    seed: int = _train(1337, "the seed of everything random", only=("generate", *TRAINING), common=True,
        check=Check(lambda x: 0 <= x < 2**63, "0 or more, and below 2^63"), also="random_seed random_state")
    seeds: int | None = _train(None, "run with N seeds, one after another; mean and standard deviation", metavar="N",
        check=AT_LEAST_TWO, only=TRIALS, one_of=("seeds", "folds"), requires=SERIES)
    folds: int | None = _train(None, "cross-validate: train and dev together, cut into N", metavar="N", requires=SERIES,
        check=AT_LEAST_TWO, only=FINETUNE, one_of=("seeds", "folds"), also="cv kfold")
    fold: int | None = _train(None, "of the --folds N, run this one alone: 0 to N-1", metavar="I", check=NOT_NEGATIVE,
        only=FINETUNE,
        requires=Need(lambda c: c.fold < (c.folds or 0), "--fold {fold} needs --folds above it, which is {folds}"))

    optimizer: str = _optimizer("adamw", "how gradients become steps; sgd has --momentum", also="optim",
        choices=OPTIMIZERS)
    lr: float = _optimizer(1e-5, "learning rate at its peak", check=RATE, common=True, also="learning_rate",
        needs=[Need(lambda c: TRAINS_LAYERS.holds(c) or not c.head_lr, "--freeze backbone trains the head alone, and "
            "--head_lr is its rate")])
    head_lr: float | None = _optimizer(None, "the classification head's own rate", check=RATE)
    layerwise_lr_decay: float = _optimizer(1.0, "each layer's rate is this times that of the layer above", also="llrd",
        check=FRACTION, needs=[TRAINS_LAYERS])
    lr_scaling: str | None = _optimizer(None, "scale the rates with effective batch / --base_batch_size",
        choices=("linear", "sqrt"))
    base_batch_size: int = _optimizer(80, "the batch that the rate was tuned at", check=AT_LEAST_ONE,
        needs=[Need(lambda c: c.lr_scaling, "it needs --lr_scaling")])
    weight_decay: float = _optimizer(0.0, "decoupled weight decay, not on norms and biases", check=NOT_NEGATIVE,
        also="wd")
    decay_all: bool = _optimizer(False, "decay norms and biases too",
        needs=[Need(lambda c: c.weight_decay, "it needs --weight_decay")])
    momentum: float = _optimizer(0.9, "sgd: the part of a step that goes into the next", check=PROBABILITY, needs=[SGD])
    nesterov: bool = _optimizer(False, "sgd: take the gradient's step after that of the momentum (Nesterov)",
        needs=[SGD], requires=Need(lambda c: c.momentum, "--nesterov needs a --momentum above 0"))
    max_grad_norm: float = _optimizer(1.0, "clip the gradient's norm; 0: off", check=NOT_NEGATIVE,
        also="grad_clip gradient_clip_val")
    max_grad_value: float = _optimizer(0.0, "clip each number of the gradient; 0: off", check=NOT_NEGATIVE)

    # The other options of this group are made from schedule.py.
    scheduler: str = _schedule("linear", "the rate's way from its peak to the end of the run", choices=SCHEDULERS,
        common=True)

    loss: str = _regular("ce", "cross-entropy, or a cumulative link for ordered labels", choices=("ce", "ordinal"))
    ordinal: bool = _regular(False, "the labels are ordered: report mean absolute error, quadratic weighted kappa "
        "and off-by-one accuracy too", only=SCORING)
    label_smoothing: float = _regular(0.0, "this much of each label goes to all classes", check=PROBABILITY)
    r_drop: float = _regular(0.0, "weight of the divergence between two passes with different dropout", metavar="ALPHA",
        check=NOT_NEGATIVE,
        needs=[Need(lambda c: c.dropout or c.hidden_dropout_prob,
            "without --dropout and --hidden_dropout_prob the two passes are the same")])
    ema: float = _regular(0.0, "evaluate and keep a moving average of the weights with this decay", metavar="DECAY",
        check=PROBABILITY, also="ema_decay")
    class_weights: str | None = _regular(None, "weigh each class's loss by its rarity", choices=("balanced",))
    sampler: str | None = _regular(None, "draw each class as often as the others", choices=("balanced",))
    aug_delete: float = _regular(0.0, "delete each word of a sentence with this probability", check=PROBABILITY)
    aug_swap: float = _regular(0.0, "swap this part of the words with a neighbour", check=PROBABILITY)
    aug_replace: float = _regular(0.0, "replace each token with this probability by a near neighbour in the model's "
        "own embedding", check=PROBABILITY)

    monitor: str = _stop("dev_acc", "what chooses the best evaluation", also="metric metric_for_best_model",
        choices=MONITORS)
    patience: int = _stop(5, "stop after N evaluations without a new best; 0: never", metavar="N", check=NOT_NEGATIVE,
        common=True, also="early_stop early_stopping early_stopping_patience")
    min_delta: float = _stop(0.0, "what a new best must gain", check=NOT_NEGATIVE)
    eval_every: float = _stop(1.0, "evaluate every such part of an epoch", check=FRACTION, also="eval_steps")
    guards: str = _stop("on", "skip steps that are not finite, roll back when the loss diverges", choices=("on", "off"),
        only=TRAINING)
    detect_anomaly: bool = _stop(False, "name the operation whose gradient is not a number (slow)", only=TRAINING)
    overfit_batch: bool = _stop(False, "check first that the model can memorise one batch")
    check_gradients: bool = _stop(False, "check first that one big batch, micro-batches and a short last one give "
        "the same gradient")
    save_every: int | None = _stop(None, "save the state for a resume every N steps too (each epoch it is saved "
        "anyway)", metavar="N", check=AT_LEAST_ONE, also="save_steps save_interval")
    keep_state: bool = _stop(False, "keep last/ when the run ends, so that it can be gone on with: --resume RUN "
        "--epochs 20", only=FINETUNE)
    resume: str | None = _stop(None, "go on with a run that was stopped, or with all the runs of --seeds or --folds; "
        "the options come from its folder", metavar="RUN", only=FINETUNE, common=True, also="resume_from_checkpoint",
        requires=Need(lambda c: c.option == "finetune" or "option" not in c.given,
            "--resume goes on with a fine-tuning run, and --option is {option}; leave --option out"))
    deterministic: bool = _stop(False, "bit-identical runs on a GPU too, a little slower", only=TRAINING)
    plan: bool = _stop(False, "train nothing: print what the run would do, draw its schedule", only=FINETUNE,
        common=True,
        requires=Need(lambda c: c.option == "finetune", "--plan is about --option finetune, and --option is {option}"))

    method: str = _search("tpe", "how the next trial is chosen: every point of a grid, by chance, by TPE, by a "
        "Gaussian process (gp); hyperband is chance with the pruner of that name, bohb TPE with it", choices=METHODS)
    space: str | None = _search(None, "what is searched, as text or a file: `lr=log:1e-6..1e-3 batch_size=16|32 "
        "warmup_ratio=0..0.2 n_layers=int:4..12 step_size[scheduler=step]=int:20..200`; a range may have a step behind "
        "a colon (default: one for the data's size, which is printed)", metavar="SPACE", also="search_space hp_space")
    trials: int | None = _search(None, "how many trials the search has in all, those of every start and process "
        "counted (default: 20; of a grid, every point)", metavar="N", check=AT_LEAST_ONE, also="n_trials num_trials")
    timeout: float | None = _search(None, "begin no trial after so many seconds; the one that runs ends at its next "
        "evaluation", metavar="SECONDS", check=Check(lambda x: x > 0, "above 0"))
    prune: str | None = _search(None, "end a trial that is behind the others, at an evaluation (default: hyperband for "
        "the methods hyperband and bohb, none for grid, else median)", choices=PRUNERS, also="pruner",
        requires=Need(lambda c: c.prune == "hyperband" or c.method not in ("hyperband", "bohb"),
            "--method {method} prunes by hyperband, and --prune is {prune}; leave it out, or take --method random"))
    objective: str | None = _search(None, "the number that decides, its best over a trial (default: that of --monitor; "
        "typed alone, it is that of --monitor too)", choices=MONITORS)
    storage: str | None = _search(None, "where the trials are kept: sqlite:///FILE, postgresql://..., mysql://..., or "
        "the name of a journal file, for folders on NFS; processes that name the same one work on one search "
        "(default: search.db in the search's folder)", metavar="STORAGE")
    finalists: int = _search(3, "run the best N trials again at the end, with new seeds; 0: none", metavar="N",
        check=NOT_NEGATIVE)
    final_seeds: int = _search(3, "with how many new seeds", metavar="N", check=AT_LEAST_ONE,
        needs=[Need(lambda c: c.finalists, "there are no --finalists")])

    lr_min: float = _range(1e-7, "the first rate", check=RATE,
        requires=Need(lambda c: c.lr_min < c.lr_max, "--lr_min {lr_min:g} must be below --lr_max {lr_max:g}"))
    lr_max: float = _range(1e-2, "the last rate", check=RATE)
    lr_steps: int = _range(100, "how many steps it takes", check=Check(lambda x: x >= 10, "10 or more"))
    lr_repeats: int = _range(1, "repeat over N seeds, for an interval", metavar="N", check=AT_LEAST_ONE)
    confirm: bool = _range(False, "train briefly at five rates across the interval, with up to three seeds, and "
        "recommend the best where it can be told from chance")

    use_gpu: bool = _device(False, "short for --device cuda; without a GPU it warns and uses the CPU", common=True,
        needs=[Need(lambda c: not c.device, "--device decides")], also="cuda")
    device: str | None = _device(None, "cpu, cuda, cuda:1, mps (default: cpu)", common=True, also="cpu no_cuda use_cpu")
    dtype: str = _device("auto", "precision of the matrix products; auto is bfloat16 where the device is fast at it, "
        "and float32 for predict and serve",
        choices=("auto", "float32", "bfloat16"), also="bf16 fp16 amp precision")
    kernels: str = _device("auto", "auto: on a CPU the norms, positions, SwiGLU and AdamW of a large model run in C "
        "(fused.c), compiled at the first start; off: all in PyTorch", choices=("auto", "off"))

    output_dir: str | None = _output(None, "the run folder (default: runs/<option>-<epochs>-<lr>, with -2, -3 behind "
        "it when it exists; of search runs/search, where the same search goes on; of report runs/report, which the "
        "next report replaces, and of inspect the --run, or runs/inspect; export needs a new one)", metavar="DIR",
        common=True, also="save_dir", only=(*TRAINING, "inspect", "report", "export"))
    overwrite: bool = _output(False, "replace the run that is in --output_dir", also="overwrite_output_dir force",
        only=("finetune", "verify_resume", "lr_find"),
        needs=[Need(lambda c: c.output_dir, "it needs --output_dir")])
    plots: str = _output("on", "draw curves.png and confusion.png into the run folder when the run has ended (search: "
        "of no trial, where it is not typed)", choices=("on", "off"), only=TRIALS, also="plot")
    save_dtype: str = _output("float32", "how best/ stores the weights; bfloat16 takes half the room, and is what is "
        "evaluated", choices=("float32", "bfloat16"), only=TRIALS)
    logger: str | None = _output(None, "keep the numbers of each step and each evaluation for other programs too: "
        "csv, tensorboard, wandb, mlflow; several with commas between", metavar="NAME[,NAME]", only=TRIALS,
        check=Check(lambda x: {*names_in(x)} <= {*LOGGERS}, f"one of {', '.join(LOGGERS)}, or several with commas"),
        also="report_to log_with loggers")
    dev_out: str | None = _output(None, "predictions for dev, `label ||| sentence` a line, in the file's order "
        "(default: in the run folder; for prompt, here)", metavar="FILE", only=WRITING, needs=[ONE_RUN])
    test_out: str | None = _output(None, "the same for test", metavar="FILE", only=WRITING, needs=[ONE_RUN])

    output_format: str = _output("tsv", "how the answers are written", choices=("tsv", "jsonl", "csv"),
        only=("predict",))
    top_k: int | None = _output(None, "write the K likeliest classes instead of every probability", metavar="K",
        check=AT_LEAST_ONE, only=("predict",))
    threshold: float | None = _output(None, "say `unsure` where the likeliest class has a lower probability",
        metavar="P", check=Check(lambda x: 0 < x <= 1, "above 0 and at most 1"), only=("predict",))
    host: str = _output("127.0.0.1", "the address that serve listens at; 0.0.0.0: every one, so others can reach it",
        metavar="ADDRESS", only=("serve",))
    port: int = _output(8000, "the port that serve listens at; 0: any that is free", only=("serve",),
        check=Check(lambda x: 0 <= x < 65536, "0 to 65535"))

    score: str | None = _report(None, "the column of a table of experiments that has the score (default: the last one "
        "with numbers)", metavar="NAME")
    n_dev: int | None = _report(None, "how many dev sentences an accuracy was measured on, where a log does not say it "
        "(default: 1101, those of SST-5, and the report says that it assumed so)", metavar="N",
        check=Check(lambda x: 2 <= x <= 10**9, "2 or more, and at most a billion"))

    format: str = _output("hf", "what the files are for: transformers, PEFT (the adapters of a run with --lora_r), "
        "llama.cpp, llama2.c", choices=("hf", "peft", "gguf", "llama2c"), only=("export",))
    gguf_type: str = _output("f16", "how a GGUF stores the matrices; q8_0 takes about half of f16",
        choices=("f32", "f16", "bf16", "q8_0"), only=("export",), also="quantization quant outtype",
        needs=[Need(lambda c: c.format == "gguf", "--format {format} does not use it")])

    prefix: str = _text(GENERATE_PREFIX, "the text to continue", metavar="TEXT", show_default=False, common=True,
        also="prompt_text text")
    max_new_tokens: int = _text(75, "how many tokens to generate", metavar="N", check=AT_LEAST_ONE)
    generated_sentence_low_temp_out: str = _text("generated-sentence-temp-0.txt", "the file for the greedy text")
    generated_sentence_high_temp_out: str = _text("generated-sentence-temp-1.txt", "the file for the text drawn at "
        "temperature 1.0")
    question: str = _text(QUESTION, "what follows the sentence; {labels} stands for the labels' names", metavar="TEXT",
        show_default=False, only=("prompt",))

    given: frozenset[str] = field(default=frozenset(), metadata={})  # the options that were typed


def only_run(c: RunConfig) -> str:
    """The one --run of a command that uses one. Raises InputError for none, and for several."""
    if not c.run:
        raise InputError(f"--option {c.option} needs --run RUN, the folder of a finished fine-tuning run")
    if len(c.run) > 1:
        raise InputError(f"--option {c.option} uses one --run, and {len(c.run)} are given: {', '.join(c.run[:5])}")
    return c.run[0]


def lora_config(c: RunConfig) -> LoraConfig | None:
    """The adapters that are to be trained; None: none."""
    if not c.lora_r:
        return None
    targets = tuple(LORA_TARGETS) if c.lora_targets == "all" else targets_in(c.lora_targets)
    return LoraConfig(c.lora_r, c.lora_alpha or 2 * c.lora_r, c.lora_dropout, targets, c.lora_rs, c.lora_dora)


def options() -> list[Field[Any]]:
    """The fields of `RunConfig` that are options of the command line."""
    return [f for f in fields(RunConfig) if f.metadata]


def contradiction(c: RunConfig) -> str:
    """What the options have against each other, seen from the options alone; "" when it is nothing."""
    for f in options():
        rivals = [name for name in f.metadata["one_of"] if getattr(c, name) is not None]
        if len(rivals) > 1:
            return f"--{' and --'.join(rivals)} contradict each other; give one"
        need, value = f.metadata["requires"], getattr(c, f.name)
        if need and value is not None and value is not False and not need.holds(c):  # --fold 0 equals False
            return need.said(f.name, c)
    return ""


def no_effect(c: RunConfig) -> list[str]:
    """A line for each option that was given but does nothing in this run, and why."""
    lines = []
    for f in sorted((f for f in options() if f.name in c.given), key=lambda f: f.name):
        if c.option not in f.metadata["only"]:
            lines.append(f"--{f.name}: it belongs to another --option")
        elif missing := [need for need in f.metadata["needs"] if not need.holds(c)]:
            lines.append(f"--{f.name}: {missing[0].said(f.name, c)}")
    return lines
