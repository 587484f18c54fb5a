"""Do the tests notice? Each option and guard is broken on purpose, one at a time, and the tests must fail.

    python tests/breaks.py                  all of them, and docs/breaks.md anew
    python tests/breaks.py --only dropout   one, or those whose names begin like that
    python tests/breaks.py --list

A break is a text in a file and what stands there instead. It is made in a copy of the tracked files in a temporary
folder; the working tree stays as it is. A break whose text does not occur exactly once is an error: the code has
changed, and the break must follow. Before anything is broken, the whole copy must pass the tests that are to notice.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG, PARSER, SCHEDULE, DATASET = "config/run.py", "config/parser.py", "schedule.py", "dataset.py"
COURSE, AVERAGE, CLOCK = "training/course.py", "training/average.py", "training/clock.py"
ESTIMATE = "commands/estimate.py"
TRAINER, DEVICE, RUN_FOLDER = "training/trainer.py", "training/device.py", "training/run_folder.py"
JOB, TASK, FINETUNE, SERIES = ("commands/job.py", "commands/classification.py", "commands/finetune.py",
                               "commands/series.py")
INPUTS, RESULTS, LR_FIND, GENERATE = ("commands/inputs.py", "commands/results.py", "commands/lr_find.py",
                                      "commands/generate.py")
PREDICT, SERVE, HTTP = "commands/predict.py", "commands/serve.py", "commands/http_service.py"
STATE, ONE_RUN = "training/state.py", "commands/one_run.py"
METRICS, SCORES, START = "training/metrics.py", "commands/scores.py", "commands/start.py"
SPLITS, ENSEMBLE = "commands/splits.py", "commands/ensemble.py"
WEIGHTS = "test_weights"
SEARCH = "test_search"
FROZEN = "training/frozen.py"
LOGGERS, GRADIENTS = "training/loggers.py", "training/gradients.py"


@dataclass(frozen=True)
class Break:
    name: str
    file: str
    old: str
    new: str
    pick: str = ""  # pytest's -k: which tests of the file
    test: str = "test_options"


BREAKS = [
    # The loss
    Break("label smoothing never reaches the loss", TASK, "self.config.label_smoothing, self.config.r_drop",
          "0.0, self.config.r_drop", "smoothing"),
    Break("r_drop never reaches the loss", TASK, "self.config.label_smoothing, self.config.r_drop",
          "self.config.label_smoothing, 0.0", "r_drop"),
    Break("class weights never reach the loss", TASK, "        if config.class_weights:", "        if False:",
          "class_weights"),
    Break("loss ordinal is cross-entropy", JOB, "config.pooling, config.loss,", 'config.pooling, "ce",', "ordinal"),
    Break("ordinal reports nothing more", TASK, "return config.ordinal or", "return", "ordinal"),
    Break("hidden dropout is 0", JOB, "config.hidden_dropout_prob, config.max_sentence_len",
          "0.0, config.max_sentence_len", "dropout"),
    Break("dropout never reaches the stack", JOB, "config.n_layers, config.dropout, config.attention,",
          "config.n_layers, 0.0, config.attention,", "dropout"),
    Break("dropout misses the attention", "llama.py", "self.config.dropout if self.training else 0.0)",
          "0.0)", "dropout"),

    # The model
    Break("n_layers is ignored", JOB, "inputs.weights, config.n_layers, config.dropout",
          "inputs.weights, None, config.dropout", "first_loss"),
    Break("attention is always causal", JOB, "config.dropout, config.attention,", 'config.dropout, "causal",',
          "first_loss"),
    Break("pooling is always last", JOB, "inputs.names, config.pooling,", 'inputs.names, "last",', "first_loss"),
    Break("new_head is ignored", START, "return not config.new_head and learned(inputs) is not None",
          "return learned(inputs) is not None", "new_head", "test_start"),
    Break("the head of a run is not taken", JOB, "        start.load_head(model, inputs)", "        pass",
          "begins", "test_start"),
    Break("a run's pooling and attention are forgotten", START, "return replace(config, **kept,",
          "return replace(config,", "begins", "test_start"),
    Break("a head of other labels is taken", START, "if run.label_names != inputs.names:", "if False:", "cannot",
          "test_start"),
    Break("a damaged run is a start", INPUTS, 'saved.checked_best(found, "--pretrained_model_path")',
          "saved.best_of(found)", "damaged", "test_start"),
    Break("a trained head is called untrained", TRAINER, "and not self.job.is_trained and", "and", "begins",
          "test_start"),
    Break("grad_checkpoint is ignored", JOB, "llama.grad_checkpoint = config.grad_checkpoint",
          "llama.grad_checkpoint = False", "checkpointed"),
    Break("tokenizer is ignored", INPUTS, "    if config.tokenizer:", "    if False:", "tokenizer"),

    # The data
    Break("max_sentence_len is ignored", SPLITS, "tokenizer, context, config.max_sentence_len)",
          "tokenizer, context, None)", "first_loss"),
    Break("text_column is ignored", SPLITS, "else (config.text_column, config.label_column)",
          "else (None, config.label_column)", "columns_that_were_typed", "test_own_data"),
    Break("label_column is ignored", SPLITS, "else (config.text_column, config.label_column)",
          "else (config.text_column, None)", "columns_that_were_typed", "test_own_data"),
    Break("what is held out is drawn anew each time", "formats/holdout.py", "hashlib.sha256(folded(text).encode",
          "hashlib.sha256(repr(id(text)).encode", "held_out", "test_own_data"),
    Break("test is read from dev", INPUTS, 'given["train"], given["dev"], given["test"]',
          'given["train"], given["dev"], given["dev"]', "each_split"),
    Break("label_names is ignored", INPUTS, 'labels = given["label_names"]', "labels = None", "each_split"),
    Break("dev_out and test_out are ignored", RESULTS, 'typed = getattr(config, f"{name}_out")',
          "typed = None", "each_split"),
    Break("train_eval is always sample", TASK, 'config.train_eval == "sample" and ', "", "train_acc"),
    Break("train_eval is always full", TASK, 'config.train_eval == "sample" and ', "False and ", "train_acc"),
    Break("the sampler is off", TASK, "balance = self.train.labels if self.config.sampler else None", "balance = None",
          "sampler"),
    Break("aug_delete is ignored", TASK, "Augmentation(config.aug_delete, ", "Augmentation(0.0, ", "aug"),
    Break("aug_swap is ignored", TASK, "config.aug_delete, config.aug_swap, config.aug_replace, near",
          "config.aug_delete, 0.0, config.aug_replace, near", "aug"),
    Break("aug_replace is ignored", TASK, "config.aug_swap, config.aug_replace, near",
          "config.aug_swap, 0.0, near", "aug"),
    Break("augmentation is the same each epoch", TASK, "self.augment, (self.config.seed, epoch))",
          "self.augment, (self.config.seed, 0))", "aug"),
    Break("the order is the same each epoch", TASK, "self.config.seed, epoch, balance)",
          "self.config.seed, 0, balance)", "batch_size"),
    Break("the seed draws no head", JOB, "torch.manual_seed(config.seed)", "torch.manual_seed(0)", "seed"),
    Break("the seed draws no order", TASK, "effective_batch, self.config.seed, epoch", "effective_batch, 0, epoch",
          "seed"),

    # What a result says
    Break("McNemar counts every sentence", METRICS, "(first & ~second).sum()), int(", "first.sum()), int(", "mcnemar",
          "test_metrics"),
    Break("McNemar is one-sided", "training/comparisons.py", "min(1.0, 2 * float(bdtr(", "min(1.0, float(bdtr(",
          "mcnemar", "test_metrics"),
    Break("precision and recall are exchanged", METRICS, "ClassScores(right / guessed, right / n,",
          "ClassScores(right / n, right / guessed,", "each_class", "test_metrics"),
    Break("every character is one column wide", SCORES, '(unicodedata.east_asian_width(c) in "WF")', "False", "width",
          "test_scores"),
    Break("a changed training file gives the baseline", "commands/evaluate.py",
          'if files.sha256(path) != train.get("sha256"):', "if False:", "training_sentences", "test_scores"),
    Break("a command is guessed", "run_llama.py", "needs_command=True", "needs_command=False", "guessed",
          "test_run_llama"),

    # The batch
    Break("grad_accum is ignored", TASK, "effective_batch = self.config.batch_size * self.config.grad_accum",
          "effective_batch = self.config.batch_size", "batch_size"),
    Break("a forward pass has all the sentences", TRAINER, "Progress(micro_batch=config.batch_size)",
          "Progress(micro_batch=10**6)", "batch_size"),
    Break("a micro-batch weighs as much as any other", TRAINER, "(losses.sum() / len(rows)).backward()",
          "losses.mean().backward()", "micro_batches", "test_trainer"),
    Break("auto_batch finds a size and drops it", ONE_RUN,
          "loop.progress.micro_batch = checks.find_micro_batch(loop)", "checks.find_micro_batch(loop)", "auto_batch"),
    Break("epochs is always 1", COURSE, "run_length(config.epochs, steps", "run_length(1, steps", "batch_size"),

    # The optimizer
    Break("weight_decay is ignored", JOB, "config.lr * scale, config.weight_decay, config.layerwise",
          "config.lr * scale, 0.0, config.layerwise", "decay"),
    Break("decay_all is ignored", JOB, "config.head_lr * scale, config.decay_all)", "config.head_lr * scale, False)",
          "decay"),
    Break("weight decay is not decoupled", JOB, '"decoupled": True', '"decoupled": False', "decay"),
    Break("head_lr is ignored", JOB, "config.head_lr and config.head_lr * scale", "None", "head or rates"),
    Break("head_lr is not scaled", JOB, "config.head_lr and config.head_lr * scale", "config.head_lr", "rates"),
    Break("layerwise_lr_decay is ignored", JOB, "config.weight_decay, config.layerwise_lr_decay,",
          "config.weight_decay, 1.0,", "head"),
    Break("lr_scaling is ignored", JOB, "        if config.lr_scaling:", "        if False:", "rates"),
    Break("base_batch_size is ignored", JOB, "effective_batch, config.base_batch_size)", "effective_batch, 80)",
          "rates"),
    Break("momentum is ignored", JOB, '"momentum": config.momentum', '"momentum": 0.9', "sgd"),
    Break("nesterov is ignored", JOB, '"nesterov": config.nesterov', '"nesterov": False', "sgd"),
    Break("lion is adamw", "optimizer.py", '"lion": Lion', '"lion": AdamW', "lion"),
    Break("adafactor is adamw", "optimizer.py", '"adafactor": Adafactor}', '"adafactor": AdamW}', "adafactor"),
    Break("max_grad_norm is ignored", TRAINER, "clip_(self.parameters, config.max_grad_norm, config",
          "clip_(self.parameters, 0.0, config", "clipped"),
    Break("max_grad_value is ignored", TRAINER, "config.max_grad_norm, config.max_grad_value)",
          "config.max_grad_norm, 0.0)", "clipped"),

    # The schedule
    Break("the schedule changes no rate", TRAINER, 'group["lr"] = base * factor', 'group["lr"] = base', "formula"),
    Break("gamma is dropped on its way", SCHEDULE, "if name not in WARMUPS}",
          'if name not in (*WARMUPS, "gamma")}', "formula"),
    Break("cycle_mult is dropped on its way", SCHEDULE, "if name not in WARMUPS}",
          'if name not in (*WARMUPS, "cycle_mult")}', "formula"),
    Break("cycle_decay is dropped on its way", SCHEDULE, "if name not in WARMUPS}",
          'if name not in (*WARMUPS, "cycle_decay")}', "formula"),
    Break("cyclic_mode is dropped on its way", SCHEDULE, "if name not in WARMUPS}",
          'if name not in (*WARMUPS, "cyclic_mode")}', "formula"),
    Break("pct_start is dropped on its way", SCHEDULE, "if name not in WARMUPS}",
          'if name not in (*WARMUPS, "pct_start")}', "formula"),
    Break("decay_fraction is dropped on its way", SCHEDULE, "if name not in WARMUPS}",
          'if name not in (*WARMUPS, "decay_fraction")}', "formula"),
    Break("min_lr_ratio is dropped on its way", SCHEDULE, "if name not in WARMUPS}",
          'if name not in (*WARMUPS, "min_lr_ratio")}', "formula"),
    Break("warmup_epochs counts steps", SCHEDULE, "round(warmup_epochs * steps_per_epoch)", "round(warmup_epochs)",
          "formula"),
    Break("warmup_ratio is ignored", SCHEDULE, "if warmup_ratio is None else warmup_ratio", "if True else warmup_ratio",
          "formula"),
    Break("warmup_kind is ignored", SCHEDULE, 'if warmup_kind == "constant":', "if False:", "formula"),
    Break("warmup_start is ignored", SCHEDULE, "return warmup_start + (top - warmup_start) * ", "return top * ",
          "formula"),
    Break("schedule_every is ignored", SCHEDULE, 'by_epoch = schedule_every == "epoch"', "by_epoch = False", "formula"),
    Break("plateau_patience is ignored", SCHEDULE, "if name not in WARMUPS}",
          'if name not in (*WARMUPS, "plateau_patience")}', "plateau"),
    Break("plateau does not know which way is better", SCHEDULE, '"max" if monitor_rises else "min"', '"max"',
          "plateau"),
    Break("a schedule by name is always linear", SCHEDULE, "f, own = SCHEDULES[name].factor, SCHEDULES[name].options",
          'f, own = SCHEDULES["linear"].factor, SCHEDULES[name].options', "formula"),

    # Which command uses what
    Break("an option of another command is said to have an effect", CONFIG, 'if c.option not in f.metadata["only"]:',
          "if False:", "another_command", "test_config"),
    Break("what an option needs is not looked at", CONFIG, 'for need in f.metadata["needs"] if not need.holds(c)',
          "for need in ()", "needs", "test_config"),
    Break("help shows every option", PARSER, "help=text if is_shown else argparse.SUPPRESS", "help=text", "help",
          "test_config"),
    Break("a schedule's option never reaches the command line", CONFIG,
          "        setattr(cls, name, _schedule(**vars(option)))",
          "        setattr(cls, name, None)", "reaches", "test_config"),

    # The pictures
    Break("plots off draws", ONE_RUN, 'if config.plots == "on":', "if True:", "off", "test_pictures"),
    Break("a picture that fails ends the run", "commands/run_pictures.py", "except Exception as error:",
          "except ValueError as error:", "failure", "test_pictures"),
    Break("dev's curve is that of training", "commands/run_pictures.py", '("train_acc", "dev_acc")',
          '("train_acc", "train_acc")', "draws_its_curves", "test_pictures"),
    Break("a plan replaces the one before", "commands/plan.py", 'rate_pictures.free_path(folder / "plan.png")',
          'folder / "plan.png"', "plan", "test_pictures"),
    Break("the chance line stretches the axis", "commands/plot.py", "if low <= loss <= high:", "if True:", "chance",
          "test_pictures"),
    Break("overwrite leaves the pictures", RUN_FOLDER, "*SPLITS, *PICTURES, *INSPECTED, RUN_FILE):",
          "*SPLITS, *INSPECTED, RUN_FILE):", "off", "test_pictures"),
    Break("two pictures of a page have the same ids", "commands/plot.py", """f' id="{name}-{m[1]}"'""",
          """f' id="{m[1]}"'""", "same_each_time", "test_report_pictures"),
    Break("a label leaves its picture", "commands/plot.py", '"left": 0.17,', '"left": 0.05,', "browser",
          "test_report_pictures"),
    Break("a run keeps no calibration", ONE_RUN, '"calibration": {"dev": reliability_of',
          '"kalibration": {"dev": reliability_of', "calibration_of_a_run", "test_report_pictures"),

    # The report
    Break("a log's own number of dev sentences is not read", "formats/run_logs.py",
          'None if is_fold else _n_dev(draft.loaded, options.get("dev", ""))', "None", "how_many", "test_run_logs"),
    Break("what a sentence says of other runs is a claim", "formats/log_lines.py",
          "at = _behind(BEFORE_CLAIM, line, 0)",
          "at = min([m.start() for m in CLAIM.finditer(line)], default=0)", "begins_with_it", "test_run_logs"),
    Break("the line with the best epoch is not read", "formats/log_lines.py", "(?:, counted from 0,)?", "",
          "keep_their", "test_run_logs"),
    Break("a heading overrides the command line", "formats/run_logs.py", "if is_of_series else {**named, **typed}",
          "if True else {}", "command_line_is_right", "test_run_logs"),
    Break("what a shell puts in is kept as a value", "formats/command_lines.py", "if PUT_IN.search(value) or",
          "if False or", "shell", "test_run_logs"),
    Break("a row with too many cells is read", "formats/run_tables.py",
          "if any(cell.strip() for cell in cells[len(header):]):", "if False:", "too_many", "test_run_logs"),
    Break("a rollback begins a new run", "formats/run_logs.py", "if self.folder and not started and not",
          "if False and not", "rolled", "test_run_logs"),
    Break("n_dev is ignored", "training/pairs.py", "return run.n_dev or n_dev or ASSUMED_N",
          "return run.n_dev or ASSUMED_N", "n_dev", "test_report"),
    Break("score is ignored", "formats/run_tables.py", "    if score is not None:", "    if False:", "score",
          "test_report"),
    Break("of several runs one is read", "commands/past_runs.py", "for typed in paths:", "for typed in paths[:1]:",
          "several", "test_report"),
    Break("a drop within chance is overfitting", "training/verdicts.py",
          "if top - end > ERRORS * error * math.sqrt(2 / k) and", "if top - end > 0 and", "flat", "test_verdicts"),
    Break("a run and its log are compared", "training/copies.py", "if len(run.epochs) > 1:", "if False:", "folder",
          "test_copies"),
    Break("what guessing reaches is good", "training/verdicts.py",
          "if run.majority is not None and best <", "if False and best <", "guessing", "test_verdicts"),
    Break("pairs are not corrected", "training/pairs.py", "corrected = iter(comparisons.holm([",
          "corrected = iter(list([", "seldom", "test_comparisons"),
    Break("the leader is judged as if it were one of two", "training/pairs.py",
          "limit = comparisons.critical_p(len(found))", "limit = ALPHA", "seldom", "test_comparisons"),
    Break("a long flat curve is unstable", "training/verdicts.py", "jump = max(JUMP, NormalDist()",
          "jump = min(JUMP, NormalDist()", "unstable", "test_verdicts"),
    Break("patience forgets min_delta", "training/verdicts.py", "value > values[kept] + delta", "value > values[kept]",
          "min_delta", "test_verdicts"),
    Break("logged runs on other dev files are compared", "training/pairs.py",
          "return len(names) > 1 or len(sizes) > 1 or", "return len(sizes) > 1 or", "typed or dev_files",
          "test_comparisons"),
    Break("a lone fold is a setting", "training/pairs.py", "len(self.runs) == 1 and is_fold", "False and is_fold",
          "lone", "test_comparisons"),
    Break("who is ahead is behind", "training/pairs.py", "difference.p <= limit and difference.value > 0",
          "difference.p <= limit", "ahead", "test_comparisons"),
    Break("advice drops the value of an option that is off", "training/advice.py",
          'is_flag = name in FLAGS or name not in NAMES.values() and value == "on"',
          'is_flag = value in ("on", "off")', "advised", "test_report"),
    Break("a wrongly copied number is not named", "training/contradictions.py",
          "if run.test is None or _agree(claim, run.test):", "if True:", "copied", "test_run_logs"),
    Break("advice against the evidence", "training/advice.py",
          "        if pair.option == option and pair.is_told_apart()", "        if False and pair.is_told_apart()",
          "evidence", "test_report"),
    Break("inspect ignores dtype", "commands/inspect_run.py",
          'if config.dtype == "auto" else config)', "if True else config)", "dtype", "test_inspect"),
    Break("inspect ignores the columns of its input", "commands/inspect_run.py",
          "config.text_column, config.label_column, labelled=False,", "None, None, labelled=False,", "columns",
          "test_inspect"),
    Break("inspect forgets the run's own columns", "commands/inspect_run.py", "usual=usual)", "usual=(None, None))",
          "columns", "test_inspect"),
    Break("the page does not escape", "commands/report_pages.py", "Environment(autoescape=True,",
          "Environment(autoescape=False,", "hostile", "test_report"),

    # Stopping and checks
    Break("the monitor is always dev_acc", TRAINER, "value = scores[monitor] if monitor in MORE_IS_BETTER else "
          "-scores[monitor]", 'value = scores["dev_acc"]', "monitor"),
    Break("a larger error is better", TRAINER, 'MORE_IS_BETTER = ("dev_acc", "dev_f1", "dev_qwk")',
          'MORE_IS_BETTER = ("dev_acc", "dev_f1", "dev_qwk", "dev_mae")', "monitor"),
    Break("patience is ignored", TRAINER, "if config.patience and progress", "if False and progress", "patience"),
    Break("eval_every is ignored", COURSE, "n = max(1, round(min(self.steps_per_epoch, 1 / self.eval_every)))", "n = 1",
          "eval_every"),
    Break("max_steps is ignored", COURSE, "config.epochs, steps_per_epoch, config.max_steps)",
          "config.epochs, steps_per_epoch)", "max_steps"),
    Break("the schedule knows nothing of max_steps", SCHEDULE,
          "total_steps=run_length(options.epochs, steps_per_epoch, options.max_steps)",
          "total_steps=run_length(options.epochs, steps_per_epoch)", "max_steps"),
    Break("max_steps ends without an evaluation", TRAINER,
          "if is_late or progress.window in (marks[progress.evaluated], end):",
          "if progress.window == end != marks[-1]:\n                progress.evaluated_at = progress.step\n"
          "                return\n            if is_late or progress.window == marks[progress.evaluated]:",
          "max_steps"),
    Break("a small part of a pass stands for it", ESTIMATE, "        run(rows)\n", "        run(rows[:1])\n",
          "as_large", "test_clock"),
    Break("a run's own columns are forgotten", "commands/finished.py", 'options = options_in(home)', "options = {}",
          "columns", "test_own_data"),
    Break("save_every is ignored", TRAINER, "if self.config.save_every and", "if False and", "save_every"),
    Break("detect_anomaly is ignored", DEVICE, "set_detect_anomaly(config.detect_anomaly)",
          "set_detect_anomaly(False)", "anomaly"),
    Break("deterministic is ignored", DEVICE, "torch.use_deterministic_algorithms(config.deterministic)", "pass",
          "switches", "test_run_llama"),
    Break("overfit_batch is always content", ONE_RUN, 'if last < 0.5 * first else (', "if True else (", "overfit"),
    Break("check_gradients accepts everything", "training/checks.py", "if difference > 1e-4:", "if False:",
          "check_gradients"),

    # How long a run takes
    Break("max_minutes is ignored", ESTIMATE, "    if n == course.steps:", "    if True:", "max_minutes", "test_clock"),
    Break("max_minutes has no clock", CLOCK, "if self.deadline is None or not self.estimated:", "if True:",
          "slower_machine", "test_clock"),
    Break("max_minutes forgets the time before a resume", ONE_RUN, "clock.deadline -= before_resume", "pass",
          "time_before", "test_clock"),
    Break("each run of a series has all of max_minutes", SERIES, "(deadline - began) / max(1, n_left)",
          "(deadline - began)", "minutes_of_a_series", "test_clock"),
    Break("the estimate leaves a trace", ESTIMATE, "    with untouched(job.model, job.optimizer), task",
          "    with task", "measuring_leaves", "test_clock"),
    Break("evaluation is not counted", CLOCK, "course.n_evaluations(done) * self.evaluation", "0",
          "before_a_long_run", "test_clock"),
    Break("a long run is not announced", ONE_RUN, "if clock.estimated and n_runs:", "if False:",
          "before_a_long_run", "test_clock"),
    Break("no line shows life", "training/bar.py", "if self.bar.disable and", "if False and", "long_run_says",
          "test_clock"),
    Break("what takes long is not said", "training/logs.py", "    timer.start()\n", "", "takes_long", "test_clock"),

    # What a finished run keeps, and how it goes on
    Break("keep_state is ignored", ONE_RUN, "if not config.keep_state:", "if True:", "keeps_its_state", "test_longer"),
    Break("the state always stays", ONE_RUN, "if not config.keep_state:", "if False:", "keeps_its_state",
          "test_longer"),
    Break("save_dtype is ignored", TASK, "getattr(torch, self.config.save_dtype)", "torch.float32", "bfloat16",
          "test_longer"),
    Break("logger is ignored", ONE_RUN, 'Loggers(folder, names_in(config.logger)', "Loggers(folder, ()",
          "numbers_of_the_jsonl", "test_loggers"),
    Break("a resume repeats steps in TensorBoard", LOGGERS, 'self.event(last["step"] + is_evaluated, session_log',
          "self.event(10**6, session_log", "twice or mid_epoch", "test_loggers"),
    Break("a resume repeats steps in the CSV", LOGGERS, "files.write_text(self.paths[kind], text, follow=False)",
          'self.paths[kind].open("a").close()', "twice or mid_epoch", "test_loggers"),
    Break("loggers do not see a rollback", "training/logs.py", "if self.mirror and self.open:", "if False:",
          "rollback", "test_loggers"),
    Break("a logger that fails ends the run", LOGGERS, "except Exception as error:", "except ImportError as error:",
          "fails", "test_loggers"),
    Break("the histograms change the gradients", GRADIENTS, "some.float().cpu().numpy().copy())",
          "some.float().mul_(2).cpu().numpy().copy())", "same or own", "test_loggers"),
    Break("a longer run is not written down", "commands/resume.py",
          "loop.described = folder.extend(described, changes, loop.progress.step)", "pass", "more_epochs",
          "test_longer"),
    Break("other rates are not said", "commands/resume.py", "if any(then(step, []) != now(step, [])",
          "if False and any(0", "other_rates", "test_longer"),
    Break("more patience does not go on", TRAINER, '            progress.stopped = ""\n', "            pass\n",
          "more_patience", "test_longer"),

    # Several runs, resume
    Break("seeds repeats one seed", SERIES, "replace(config, seed=seed, seeds=None)", "replace(config, seeds=None)",
          "several_runs", "test_run_llama"),
    Break("every fold is the first", DATASET, '"dev": both.take(parts[i])', '"dev": both.take(parts[0])',
          "fold", "test_dataset"),
    Break("fold is ignored", SERIES, "config, part(config.fold, ", "config, part(0, ", "fold_alone", "test_run_llama"),
    Break("a resume forgets the optimizer", STATE, 'optimizer.load_state_dict(saved["optimizer"])', "pass",
          "early_stopping", "test_resume"),
    Break("a resume forgets the random state", STATE, 'devices.set_random_state(device, saved["random"])',
          "pass", "signal_saves", "test_resume"),
    Break("plan trains", FINETUNE, "    if config.plan:", "    if False:", "plan_says", "test_plan"),

    # The range test
    Break("lr_min is ignored", LR_FIND, "return config.lr_min * (", "return 1e-7 * (", "lr_find"),
    Break("lr_repeats is ignored", LR_FIND, "for i in range(config.lr_repeats):", "for i in range(1):", "lr_find"),
    Break("each repeat has the first seed", LR_FIND, "replace(config, seed=config.seed + i)", "config",
          "repeats", "test_lr_find"),
    Break("confirm is ignored", LR_FIND, "    if config.confirm:", "    if False:", "confirm", "test_lr_find"),

    # Device, output, generation and prompting
    Break("device is ignored", DEVICE, "name = config.device or (", "name = (", "device"),
    Break("use_gpu without a GPU fails", DEVICE, "if config.use_gpu and not config.device and not torch",
          "if False and not torch", "device"),
    Break("dtype is always float32", DEVICE, "getattr(torch, config.dtype))", "torch.float32)", "dtype"),
    Break("kernels off is ignored", DEVICE, 'return config.kernels == "auto" and where', "return where",
          "run_with_c", "test_run_llama"),
    Break("output_dir is ignored", RUN_FOLDER, "if config.output_dir is None:", "if True:", "clipped"),
    Break("a run is replaced without overwrite", RUN_FOLDER,
          'if not config.overwrite:\n            raise FileExistsError(f"{path}: there is a run',
          'if False:\n            raise FileExistsError(f"{path}: there is a run', "holds_a_run", "test_run_llama"),
    Break("prefix is ignored", GENERATE, "encode(config.prefix,", 'encode("the",', "generate"),
    Break("max_new_tokens is ignored", GENERATE, "config.max_new_tokens, temperature)", "75, temperature)",
          "generate"),
    Break("the greedy file is elsewhere", GENERATE, "(0.0, config.generated_sentence_low_temp_out)",
          '(0.0, "generated-sentence-temp-0.txt")', "generate"),
    Break("question is ignored", "commands/prompt.py", "config.question, inputs.names)", '"Is it", inputs.names)',
          "question"),

    # The answers
    Break("all runs but the first are dropped", ENSEMBLE, "replace(config, run=runs)", "replace(config, run=runs[:1])",
          "evaluate or mean", "test_ensemble"),
    Break("predict leaves the first run out of the mean", ENSEMBLE, "enumerate(self.runs, 1)",
          "enumerate(self.runs[1:], 1)", "mean", "test_ensemble"),
    Break("runs with the labels in another order are not mapped", ENSEMBLE, "output[:, member.order] for", "output for",
          "order or evaluate", "test_ensemble"),
    Break("answers with the labels in another order are not mapped", ENSEMBLE, "probabilities[:, member.order]",
          "probabilities", "mean", "test_ensemble"),
    Break("output_format is ignored", PREDICT, "answers.LINES[config.output_format](", 'answers.LINES["tsv"](',
          "output_format", "test_predict"),
    Break("top_k is ignored", PREDICT, "names, config.top_k, config.threshold)", "names, None, config.threshold)",
          "top_k", "test_predict"),
    Break("threshold is ignored", PREDICT, "names, config.top_k, config.threshold)", "names, config.top_k)",
          "threshold", "test_predict"),
    Break("a label is a part of the sentence", PREDICT, "return sentence if self.add(", "return line if self.add(",
          "labels", "test_predict"),
    Break("the host is ignored", SERVE, r'''re.sub(r"^\[(.*)\]$", r"\1", config.host)''', '"127.0.0.1"',
          "host", "test_serve"),
    Break("the port is ignored", SERVE, "config.port, batcher", "0, batcher", "signal",
          "test_serve"),
    Break("a trickle moves the deadline", HTTP, "self.connection.settimeout(left)",
          "self.deadline += 1", "trickle", "test_serve"),
    Break("another site's Host is answered", HTTP, "if self.server.is_local and host", "if False and host",
          "status", "test_serve"),
    Break("the queue has no end", "commands/batcher.py", "return not self._n_waiting or", "return True or", "queue",
          "test_serve"),
    Break("the answers of a batch are mixed up", "commands/batcher.py", "            start += len(texts)\n", "",
          "together", "test_serve"),
    Break("auto is bfloat16 in the door", "minllama.py", 'dtype="float32") if config.dtype == "auto"',
          'dtype="bfloat16") if config.dtype == "auto"', "output_format", "test_predict"),

    # The moving average
    Break("best holds the raw weights", TRAINER,
          "                    digest = self.task.save_best(self.folder.best)\n",
          "                    with self.average.in_place():\n"
          "                        digest = self.task.save_best(self.folder.best)\n",
          "moving_average"),
    Break("the raw weights are evaluated", TRAINER, "with self.average.in_place():\n            found = ",
          "with ExitStack():\n            found = ", "moving_average"),
    Break("the moving average never moves", AVERAGE, "        if self.values:\n            decay",
          "        if False:\n            decay", "moving_average"),
    Break("ema's decay is always a half", AVERAGE, "min(self.decay, (1 + t) / (10 + t))", "0.5", "moving_average"),
    Break("the moving average does not warm up", AVERAGE, "min(self.decay, (1 + t) / (10 + t))", "self.decay",
          "moving_average"),

    # The guards
    Break("a step that is not finite is taken", TRAINER, 'if finite or config.guards == "off":', "if True:", "guards"),
    Break("guards off is ignored", TRAINER, 'if finite or config.guards == "off":', "if finite:", "guards"),
    Break("nothing is rolled back", TRAINER, 'if config.guards == "on" and (why := guards.divergence(',
          "if False and (why := guards.divergence(", "rollback"),
    Break("a rollback keeps the rate", TRAINER, "self.progress.history) * self.progress.lr_factor",
          "self.progress.history)", "rollback"),
    Break("the collapse guard is off", TRAINER, 'bool(why) and config.guards == "on" and not progress.stopped', "False",
          "collapse"),
    Break("min_delta is ignored", TRAINER, "value > before + self.config.min_delta", "value > before", "min_delta"),
    Break("train_limit is ignored", INPUTS, "if not config.train_limit:", "if True:", "train_limit"),
    # What inspect says
    Break("inspect takes a copy in another case for another sentence", "training/data_checks.py",
          "[holdout.without_marks(text) for text in self.texts]", "list(self.texts)", test="test_data_checks"),
    Break("inspect takes 4.5 for 45", "formats/holdout.py", r"(?<!\d)[^\w\s]|[^\w\s](?!\d)|_", r"[^\w\s]|_",
          "near_copies", "test_data_checks"),
    Break("inspect counts a leak with another label as one with the same", "training/data_checks.py",
          "sum(part.labels[row] in known[part.keys[row]] for row in rows)", "len(rows)", test="test_data_checks"),
    Break("inspect's dev is what finetune trains on", "commands/inspect_data.py",
          '{"train": np.flatnonzero(~is_out), "dev"',
          '{"dev": np.flatnonzero(~is_out), "train"', "held_out", "test_inspect"),
    Break("inspect's limit is one token off", "training/data_checks.py", "(lengths > limit)", "(lengths >= limit)",
          test="test_data_checks"),
    Break("the hardest sentences are the easiest", "training/data_checks.py", "np.argsort(of_label,",
          "np.argsort(-of_label,", "hardest", "test_inspect"),
    Break("ECE forgets how many are in a bin", "training/calibration.py", "one.n * abs(one.accuracy",
          "abs(one.accuracy", test="test_calibration"),
    Break("the temperature is its inverse", "training/calibration.py", "return 1 / float(np.sqrt(low * high))",
          "return float(np.sqrt(low * high))", test="test_calibration"),
    Break("a half is mended with its own temperature", "training/calibration.py",
          "t[halves[0]], t[halves[1]] = fitted[1], fitted[0]", "t[halves[0]], t[halves[1]] = fitted[0], fitted[1]",
          test="test_calibration"),
    Break("gradient times input is the gradient alone", "training/saliency.py",
          "(gradient.float() * kept[0].detach().float())", "gradient.float()", test="test_saliency"),
    Break("deletion deletes nothing", "training/saliency.py", "before, after = text[:begin], text[end:]",
          "before, after = text[:end], text[end:]", test="test_saliency"),
    Break("the words of what is cut away are looked at", "training/saliency.py", "is_cut = len(seen) > limit",
          "is_cut = False", "sees", "test_saliency"),
    Break("inspect forgets --input", "commands/inspect_run.py", "texts = typed or [", "texts = [",
          "typed", "test_inspect"),
    Break("the surest mistakes are right", "training/mistakes.py", "np.flatnonzero(predicted != labels)",
          "np.flatnonzero(predicted == labels)", "surest", "test_data_checks"),
    Break("the card is about sentences that were typed", "commands/inspect_run.py", "card if is_own(config) else []",
          "card", "own_sentences", "test_inspect"),
    Break("a fold is inspected on what it learned", "commands/inspect_run.py", "used = replace(used, dev=None)",
          "pass", "fold", "test_inspect"),
    Break("a temperature that helps nothing is recommended", "training/calibration.py",
          "return self.before > self.by_chance and", "return self.before > 0 or", "helps", "test_inspect"),
    Break("the report shows an inspection of other weights", "commands/past_runs.py",
          'if values.get("best") != (files.manifest_digest(folder.best) or ""):', "if False:", "card", "test_inspect"),

    # The search
    Break("method is always tpe", "commands/study.py", 'if plan.method == "grid"', "if False", "grid", SEARCH),
    Break("gp is chance", "commands/study.py", 'if plan.method == "gp"', "if False", "gp_finds", SEARCH),
    Break("the space is the default one", "commands/search.py", "spaces.read(config.space) if config.space",
          '"" if True', "space_is", SEARCH),
    Break("trials are counted anew at each start", "commands/study.py", "if len(trials) >= self.n_wanted:",
          "if len(trials) >= 2 * self.n_wanted:", "total", SEARCH),
    Break("timeout is ignored", "commands/search.py", "None if config.timeout is None else", "None if True else",
          "timeout", SEARCH),
    Break("no trial is pruned", "commands/study.py", "return bool(trial.should_prune())", "return False",
          "prune", SEARCH),
    Break("a pruned run goes on", TRAINER, "            progress.stopped = why", "            pass", "prune", SEARCH),
    Break("the objective is always dev_acc", "commands/search.py", "config.objective or config.monitor", '"dev_acc"',
          "objective", SEARCH),
    Break("the storage is always in the folder", "commands/search.py", "config.storage or f", "f",
          "storage_is", SEARCH),
    Break("finalists are always three", "commands/finalists.py", "leaders[: config.finalists]", "leaders[:3]",
          "finalists_and", SEARCH),
    Break("there are always three final seeds", "commands/finalists.py", "first_new + config.final_seeds",
          "first_new + 3", "scores_are or seeds_give", SEARCH),
    Break("the new seeds are the old ones", "commands/finalists.py", "config.seed + (config.seeds or 1)", "config.seed",
          "finalists_and or seeds_give", SEARCH),
    Break("a trial has one seed", "commands/search.py", "for i in range(config.seeds or 1)", "for i in range(1)",
          "seeds_give", SEARCH),
    Break("weights are not restored between trials", JOB, "    llama.grad_checkpoint = config.grad_checkpoint",
          "    llama = globals().setdefault('_kept', llama)", "types_by_hand", SEARCH),
    Break("trials see the test split", "commands/trial.py", 'if name != "test"}', "}", "looks_at", SEARCH),
    Break("the test split is looked at with each start", "commands/finalists.py", "before or look_at_test(",
          "look_at_test(", "looked_at_once", SEARCH),
    Break("points depend on the process", "commands/study.py", "sampler=make_sampler(plan, (plan.seed",
          "sampler=make_sampler(plan, (time.time_ns()", "depend", SEARCH),
    Break("a trial that was left behind stays running", "commands/study.py", "self._left_behind(stack) or", "",
          "killed or gone", SEARCH),
    Break("a lock on a trial is not looked at", "commands/study.py", "if is_free and",
          "if", "exactly", SEARCH),
    Break("a torn journal is left as it is", "commands/storage.py", "        if end < size:", "        if False:",
          "torn", SEARCH),
    Break("another search is joined", "commands/study.py", "elif known != own:", "elif False:", "by_name", SEARCH),
    Break("a trial that fails ends the search", "commands/trial.py", "            failure = error\n",
          "            raise\n", "recorded_and", SEARCH),
    Break("three failures end nothing", "commands/search.py", "            check_first(found, outcome)",
          "            pass", "three_failures", SEARCH),
    Break("a full disk is a failed trial", "commands/trial.py", "isinstance(error, OSError) and", "False and",
          "full_disk", SEARCH),
    # Adapters
    Break("lora_r does nothing", CONFIG, "    if not c.lora_r:\n", "    if True:\n", "only_the_adapters",
          "test_adapters"),
    Break("lora_alpha is 2 R", CONFIG, "c.lora_alpha or 2 * c.lora_r", "2 * c.lora_r", "options_are", "test_adapters"),
    Break("lora_dropout is 0", CONFIG, "c.lora_dropout, targets,", "0.0, targets,", "lora_dropout", "test_adapters"),
    Break("lora_targets is all", CONFIG, 'if c.lora_targets == "all" else', "if True else", "options_are",
          "test_adapters"),
    Break("lora_rs is off", CONFIG, "targets, c.lora_rs,", "targets, False,", "options_are", "test_adapters"),
    Break("lora_dora is off", CONFIG, "c.lora_rs, c.lora_dora)", "c.lora_rs, False)", "options_are", "test_adapters"),
    Break("the adapter of --adapter is not read", JOB, "    if inputs.adapter:\n", "    if False:\n",
          "goes_on or pefts", "test_adapters"),
    Break("a run with adapters keeps its base too", "training/saved.py",
          "for k, v in lora.without_base(model.state_dict()).items()", "for k, v in model.state_dict().items()",
          "only_the_adapters", "test_adapters"),
    Break("a state holds the frozen weights", STATE, "if name not in frozen}", "if True}", "only_the_adapters",
          "test_adapters"),
    Break("the sha256 of a base is not compared", "formats/adapters.py", "if files.sha256(path) != base.sha256:",
          "if False:", "base", "test_adapters"),
    Break("what is not finite is merged", "formats/adapters.py", "if not torch.isfinite(both).all():", "if False:",
          "not_finite", "test_lora"),
    Break("a query's rows stay in halves", "formats/peft.py", 'if target in ("q", "k") and', 'if target in ("k",) and',
          "pefts_adapter", "test_adapters"),
    Break("unknown settings of PEFT's are passed over", "formats/peft.py", "if value and name not in _HARMLESS:",
          "if False:", "otherwise", "test_adapters"),
    Break("the base of adapters stays in float32", "lora.py",
          "    if has_adapters(model):\n        for name, parameter",
          "    if False:\n        for name, parameter", "precision", "test_adapters"),
    Break("the gradient goes through the norm of DoRA", "lora.py", "with torch.no_grad(), torch.autocast(",
          "with torch.enable_grad(), torch.autocast(", "gradients_are", "test_lora"),

    # Weights in
    Break("rotary positions are never scaled", "llama.py", "    if scaling is None:", "    if True:", "every_shape",
          WEIGHTS),
    Break("llama3 is linear", "llama.py", 'if scaling.kind == "linear":', "if True:", "every_shape", WEIGHTS),
    Break("a head is always width / heads", "formats/huggingface.py", 'head_dim=settings.get("head_dim")',
          "head_dim=None", "every_shape", WEIGHTS),
    Break("pairs are reordered as halves are", "formats/huggingface.py", 'settings["model_type"] not in _IN_PAIRS',
          "True", "every_shape", WEIGHTS),
    Break("a sliding window is not looked at", "formats/huggingface.py", "if window is not None and", "if False and",
          "has_not", WEIGHTS),
    Break("biases are passed over", "formats/huggingface.py", "if name is None and _is_beyond(key):", "if False:",
          "tensor_that", WEIGHTS),
    Break("a shard may be anywhere", "formats/huggingface.py", "if Path(name).name != name or", "if False and", "shard",
          WEIGHTS),
    Break("rope_freqs are passed over", "formats/gguf_weights.py", "    if divisors is None:", "    if True:",
          "gguf_of_every", WEIGHTS),
    Break("the size of a .bin is not checked", "formats/llama2c.py", "    if want != size:", "    if False:", "bin",
          WEIGHTS),
    Break("a negative number of words says nothing", "formats/llama2c.py", "vocab_size > 0 if version == 0", "True if "
          "version == 0", "bin", WEIGHTS),
    Break("weights are always read in float32", "llama.py", "weights.readers[name](dtypes[name])",
          "weights.readers[name]()", "precision", WEIGHTS),
    Break("a file may change while it is read", "formats/tensors.py", "    if stamp_of(status) != stamp:",
          "    if False:", "anew", WEIGHTS),
    Break("generate reads in float32", "commands/generate.py", ", dtype=device.dtype", "", "nothing_is_trained",
          "test_run_llama"),
    Break("prompt reads in float32", "commands/prompt.py", ", dtype=device.dtype", "", "nothing_is_trained",
          "test_run_llama"),
    Break("sums are in bfloat16", "llama.py", "            x = x.float()", "            pass", "bfloat16_give",
          "test_llama"),
    Break("all of a model is fetched", "data/hub.py", "allow_patterns=FILES", "allow_patterns=None", "fetched_once",
          "test_hub"),
    Break("the commit is not kept", "commands/inputs.py", "if fetched := hub.origin(self.weights.path):", "if False:",
          "names_its", "test_hub"),
    Break("the hub's password is said", "data/hub.py", 'return re.sub(r"//[^/@]*@", "//", address)', "return address",
          "password", "test_hub"),
    # Freezing
    Break("freeze freezes nothing", JOB, "frozen.freeze(model, config.freeze)", 'frozen.freeze(model, "none")',
          "pytorch_does", "test_freeze"),
    Break("freeze forgets the embeddings", FROZEN, "[model.llama.tok_embeddings, *model", "[*model", "pytorch_does",
          "test_freeze"),
    Break("one layer more is frozen", FROZEN, "layers[: frozen_layers(what) or 0]",
          "layers[: (frozen_layers(what) or 0) + 1]", "pytorch_does", "test_freeze"),
    Break("adapters below are trained", FROZEN, "        module.requires_grad_(False)",
          "        module.requires_grad_(lora.has_adapters(model))", "adapters_below", "test_freeze"),
    Break("dropout of frozen adapters", FROZEN, "adapter.dropout = 0.0", "pass", "adapters_below", "test_freeze"),
    Break("frozen layers are in the graph", "llama.py", "torch.is_grad_enabled() and not self.n_frozen",
          "torch.is_grad_enabled()", "autograd", "test_freeze"),
    Break("nothing is kept", TASK, "self.keeps = model.llama.n_frozen > 0 and", "self.keeps = False and",
          "what_is_kept_gives", "test_freeze"),
    Break("what is kept is of other rows", TASK, 'batch["below"] = activations.batch(rows)',
          'batch["below"] = activations.batch(rows[::-1])', "what_is_kept_gives", "test_freeze"),
    Break("the sample has the first rows' activations", TASK, "activations and activations.take(rows)",
          "activations and activations", "what_is_kept_gives", "test_freeze"),
    Break("dropout inside the frozen part is kept", FROZEN, "    if config.dropout:", "    if False:",
          "changes_from_epoch", "test_freeze"),
    Break("augmented sentences are kept", FROZEN, "if getattr(config, name)]", "if False]", "changes_from_epoch",
          "test_freeze"),
    Break("rounded weights meet what was kept before", ONE_RUN, "            job.task.forget()", "            pass",
          "rounded", "test_freeze"),
    Break("a file is never taken", TASK, "if self.bytes_kept() <= kept.BUDGET:", "if True:", "file", "test_freeze"),
    Break("a full disk ends the run", TASK, "except OSError as error:", "except KeyError as error:", "full_disk",
          "test_freeze"),
    Break("more layers are frozen than there are", FROZEN, "k is not None and k > n_layers", "False", "refused",
          "test_freeze"),
    # Export
    Break("the head never has a bias", JOB, "llama.config, config.head_bias", "llama.config, False", "has_a_bias"),
    Break("an old run's head has no bias", "classifier.py", 'values.get("head_bias", True),  #',
          'values.get("head_bias", False),  #', "older", "test_start"),
    Break("every export is for transformers", "commands/export.py", "WRITERS[config.format](", 'WRITERS["hf"](',
          "llama_cpp_goes", "test_export"),
    Break("every GGUF is float16", "commands/export.py", "config.gguf_type, model.path.name)",
          '"f16", model.path.name)', "llama_cpp_goes", "test_export"),
    Break("rows stay in pairs for transformers", "formats/export_hf.py",
          "    return heads.transpose(1, 2).reshape(tensor.shape)", "    return tensor", "transformers_classifies",
          "test_export"),
    Break("bidirectional attention is not said", "formats/export_hf.py", 'values["is_causal"] = False', "pass",
          "transformers_classifies", "test_export"),
    Break("mean pooling passes for a sequence classifier", "commands/model_card.py",
          'settings.pooling == "last" and', "", "no_word", "test_export"),
    Break("a bias is dropped in silence", "commands/model_card.py", " and not settings.head_bias", "", "model_card",
          "test_export"),
    Break("sentences are padded with a word", "commands/export_tokenizer.py", "    return min(names, key",
          '    return tokenizer.encode("film", False, False)[-1] or min(names, key', "transformers_classifies",
          "test_export"),
    Break("a control token in a text is one for SentencePiece too", "commands/export_tokenizer.py",
          '"split_special_tokens": is_spm,', '"split_special_tokens": False,', "control_tokens", "test_export"),
    Break("no begin token in transformers", "commands/export_tokenizer.py",
          'single=f"{bos} $A" if tokenizer.add_bos else "$A"', 'single="$A"', "same_tokens", "test_export"),
    Break("PEFT's B keeps its pairs", "formats/export_peft.py", 'if part == "lora_a" else', "if True else",
          "peft_classifies or comes_back", "test_export"),
    Break("rsLoRA is not said", "formats/export_peft.py", '"use_rslora": config.rs', '"use_rslora": False',
          "peft_classifies", "test_export"),
    Break("llama3's rope scaling is left out", "formats/export_gguf.py", "    elif config.rope_scaling:",
          "    elif False:", "other_shapes", "test_export"),
    Break("an export replaces what is in the folder", "formats/new_folder.py", "    if held:", "    if False:",
          "holds_something", "test_export"),
    Break("a half-written export has the name", "formats/new_folder.py",
          'temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))',
          "temporary = folder; folder.mkdir()", "in_the_middle", "test_export"),
    Break("two exports write into one folder", "formats/new_folder.py",
          'temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))',
          'temporary = folder.with_name(".tmp"); temporary.mkdir(exist_ok=True)', "two_exports", "test_export"),
    Break("theta is lost in llama2.c", "formats/export_llama2c.py", "if config.rope_theta != 10000.0:", "if False:",
          "no_word_for", "test_export"),
    Break("a folder's attention is not read", "formats/huggingface.py",
          '"bidirectional" if settings.get("is_causal") is False', '"causal" if settings.get("is_causal") is False',
          "attention_that_is_said", "test_export"),
    Break("a GGUF's attention is not read", "formats/gguf_weights.py", 'attention="bidirectional" if metadata',
          'attention="causal" if metadata', "attention_that_is_said", "test_export"),
    Break("a head that is left behind is not said", START,
          "    logs.notice(inputs.weights.said_of_left())", "    pass",
          "attention_that_is_said", "test_export"),
    Break("an adapter's layers have to be typed", START, ', "n_layers": adapter.n_layers}', "}", "goes_on_with",
          "test_adapters"),
    Break("weights lose their attention", "commands/exported.py", "attention=read.config.attention",
          'attention="causal"', "keep_their_attention", "test_export"),
    Break("a base that has moved is not used", "training/saved.py", "        settings = replace(settings, base=Base(",
          "        replace(settings, base=Base(", "has_moved", "test_export"),
    Break("PEFT is told of a base with other layers", "commands/export_hf.py",
          "(own.n_layers, own.attention) != (trained.n_layers, trained.attention)", "False",
          "something_else", "test_export"),
    Break("PEFT is told a path for a name of the hub", "commands/export_hf.py", "if fetched := hub.origin(base):",
          "if fetched := None:", "from_the_hub", "test_export"),
    Break("an adapter's own base is not compared", "commands/inputs.py",
          "if found.base and files.sha256(base.path) != found.base.sha256:", "if False:", "on_another_file",
          "test_export"),
    Break("PEFT's names of targets are unknown", CONFIG, 'name.removesuffix("_proj") for name', "name for name",
          "names_of_targets", "test_config"),
    Break("a full disk has no place", "formats/new_folder.py", "isinstance(error, OSError) and error.errno is None",
          "False", "cannot_be_written", "test_export"),
    Break("the working folder is replaced", "formats/new_folder.py", "if folder.resolve() == Path.cwd():", "if False:",
          "holds_something", "test_export"),
    Break("a head may be anything", "formats/peft.py", "    _check_head(head, llama, file)", "    pass",
          "another_model", "test_adapters"),
    Break("an adapter is looked at late", INPUTS, "    lora.check(adapter, base.config)", "    pass",
          "before_anything", "test_adapters"),
    Break("adapters that nobody trains", FROZEN, "if config.lora_r and not config.adapter and", "if False and",
          "before_anything", "test_adapters"),
    Break("a series forgets where its adapter lies", SERIES, '"pretrained_model_path", "adapter"}',
          '"pretrained_model_path"}', "series_that_began", "test_adapters"),
    Break("an option of adapters has no effect in a search", "commands/search.py",
          "in spaces.no_effect_anywhere(space, typed):", "in no_effect(typed):", "has_an_effect", "test_adapters"),
    Break("two shards hold one tensor", "formats/huggingface.py", "            if name in shapes:",
          "            if False:", "two_shards", WEIGHTS),
    Break("adapters have the rate of the whole model", "commands/defaults.py", "    if config.lora_r:", "    if False:",
          "what_is_trained", "test_defaults"),
    Break("a head alone has the rate of the whole model", "commands/defaults.py", 'if config.freeze == "backbone":',
          "if False:", "what_is_trained", "test_defaults"),
    Break("rope_scaling is not looked at beside rope_parameters", "formats/huggingface.py",
          "if scalings[1:] not in ([], scalings[:1]):", "if False:", "rope_scaling_that_disagree", WEIGHTS),
    Break("an export has all layers", "commands/exported.py", "load_pretrained(read, config.n_layers, attention",
          "load_pretrained(read, None, attention", "first_layers", "test_export"),
    Break("a step's share of adapters is told", "training/gradients.py", "if lora.is_adapter(name):", "if False:",
          "share_of_adapters", "test_adapters"),
    Break("a quantised file may change", "formats/gguf_weights.py", "    check_unchanged(path, path.stat(), stamp)",
          "    pass", "anew", WEIGHTS),
    Break("short sentences attend in bfloat16", "llama.py", "key.shape[2] <= SHORT", "False", "short_sentences",
          "test_llama"),
    Break("the output layer of another base is taken", "commands/exported.py",
          'files.sha256(base) == used.get("sha256")', "True", "has_lost", "test_export"),
    Break("passwords are said", "commands/storage.py", 'f"{match[1] or match[3]}***"', "match[0]", "hidden", SEARCH),
    Break("a file that is no journal is written into", "commands/storage.py",
          "            check_journal(Path(storage))\n", "", "no_storage", SEARCH),
    Break("a storage in memory is taken", "commands/storage.py", 'name in ("", ":memory:")', "False",
          "cannot_be_reached", SEARCH),
    Break("two processes draw one point", "commands/study.py",
          "                point = spaces.walk(self.plan.space, partial(suggest, found[0])) if found else {}\n"
          "            if found:\n",
          "            if found:\n                point = spaces.walk(self.plan.space, partial(suggest, found[0]))\n",
          "one_point", SEARCH),
    Break("a trial that was drawn and not taken is somebody's", "commands/study.py", "if file_of(self.storage):",
          "if False:", "taking_it", SEARCH),
    Break("a dead trial is another process's", "commands/study.py", "n += not is_free", "n += 1", "dead_trial", SEARCH),
    Break("models pile up from trial to trial", "commands/trial.py", "    gc.collect()", "    pass", "gone_before",
          SEARCH),
    Break("the error of a trial keeps its model", "commands/search.py", "            del outcome", "            pass",
          "gone_before", SEARCH),
    Break("the trials of another storage are taken over", "commands/search.py",
          'if before.get("storage", kept) != kept:', "if False:", "another_storage", SEARCH),
    Break("finalists with failed seeds are ranked by the others", "commands/finalists.py",
          "key=lambda one: (one.n_failed, ", "key=lambda one: (", "have_failed", SEARCH),
    Break("every trial has as many evaluations", "commands/search.py", "planned = len(seeds) * n_evaluations_of(",
          "planned = trials.plan.n_evaluations + 0 * n_evaluations_of(", "pruning_saved", SEARCH),
]


def copy_of_the_code(folder: Path) -> Path:
    """The tracked files as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def failing_tests(folder: Path, *words: str) -> list[str]:
    """pytest in that folder: the tests that failed. Raises SystemExit when it could not run any."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider",
                           "-W", "ignore", *words], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""})
    failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+::\w+)", done.stdout, re.M)
    if done.returncode not in (0, 1) or bool(failed) != bool(done.returncode):
        sys.exit(f"pytest {' '.join(words)}: it did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed


def tried(one: Break, ignored: list[str]) -> str:
    """The name of the test that noticed the break, or ""."""
    with tempfile.TemporaryDirectory() as temporary:
        path = copy_of_the_code(Path(temporary)) / one.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(one.old, one.new), encoding="utf-8", newline="\n")
        compile(path.read_text(encoding="utf-8"), one.file, "exec")  # a file that cannot be read proves nothing
        words = ["-x", f"tests/{one.test}.py", "-k", one.pick or "test", *(f"--deselect={test}" for test in ignored)]
        return "".join(failing_tests(Path(temporary), *words)[:1])


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the code on purpose and see the tests fail.")
    parser.add_argument("--only", metavar="NAME", help="the breaks whose names begin like that")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at once (default: 1)")
    parser.add_argument("--list", action="store_true", help="their names, and nothing else")
    arguments = parser.parse_args()
    chosen = [one for one in BREAKS if one.name.startswith(arguments.only or "")]
    if arguments.list or not chosen:
        print("\n".join(one.name for one in chosen) or f"no break begins with {arguments.only}")
        return 0 if chosen else 2
    for one in chosen:
        n = (ROOT / one.file).read_text(encoding="utf-8").count(one.old)
        if n != 1:
            sys.exit(f"{one.name}: this is {n} times in {one.file}, and should be there once: {one.old}")

    with tempfile.TemporaryDirectory() as temporary:
        copy = copy_of_the_code(Path(temporary))
        unfit = failing_tests(copy, *sorted({f"tests/{one.test}.py" for one in chosen}))
    for test in unfit:
        print(f"FAILS ON THE UNBROKEN CODE, so it is left out: {test}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        caught = []
        for one, by in zip(chosen, pool.map(lambda one: tried(one, unfit), chosen), strict=True):
            caught.append(by)
            print(f"{'caught' if by else 'SURVIVED':8}  {one.name:45}  {by.partition('/')[2]}", flush=True)
    summary = f"{len(chosen)} breaks, {sum(map(bool, caught))} caught, {caught.count('')} survived"
    print(summary)
    if len(chosen) == len(BREAKS):
        rows = "".join(f"| {one.name} | `{one.file}` | {f'`{by[6:]}`' if by else '**nothing**'} |\n"
                       for one, by in zip(chosen, caught, strict=True))
        (ROOT / "docs/breaks.md").write_text(
            f"# Do the tests notice?\n\n{summary}. Made by `python tests/breaks.py`, which has the texts.\n\n"
            + "".join(f"Left out, since it fails on the unbroken code: `{test[6:]}`.\n\n" for test in unfit) +
            f"| What was broken | where | the first test that failed |\n|---|---|---|\n{rows}",
            encoding="utf-8", newline="\n")
    return 1 if unfit or not all(caught) else 0


if __name__ == "__main__":
    sys.exit(main())
