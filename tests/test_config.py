"""The command line: spellings, defaults, and messages."""

import ast
import dataclasses
import functools
import importlib
import io
import json
import re
import subprocess
import sys
import types
from contextlib import redirect_stdout

import pytest
from conftest import ROOT

import config
import schedule
from training import run_folder


def test_every_option_of_the_teaching_scripts_is_understood():
    line = ("--train t --dev d --test e --label-names l --pretrained-model-path m --max_sentence_len 9 --seed 3 "
            "--epochs 4 --option prompt --use_gpu --generated_sentence_low_temp_out a "
            "--generated_sentence_high_temp_out b --dev_out c --test_out f --batch_size 80 --hidden_dropout_prob 0.8 "
            "--lr 1e-5")
    c = config.parse_args(line.split())
    assert (c.label_names, c.pretrained_model_path, c.batch_size, c.lr, c.use_gpu) == ("l", "m", 80, 1e-5, True)
    assert len(c.given) == 17


def test_the_defaults_are_the_teaching_scripts():
    c = config.parse_args([])
    assert (c.option, c.seed, c.epochs, c.batch_size, c.hidden_dropout_prob, c.lr, c.max_sentence_len) == (
        "generate", 1337, 10, 8, 0.3, 1e-5, None)
    assert not c.use_gpu and c.given == frozenset()


@pytest.mark.parametrize("f", config.options(), ids=lambda f: f.name)
def test_minus_and_underscore_are_interchangeable(f):
    check = f.metadata.get("check")
    read = config.value_type(f)
    fitting = next((v for v in ("0.5", "1", "2", "10", "csv", "all", "none") if "float" in str(f.type) or "." not in v
                    if not check or check.holds(read(v))), "1")
    value = [] if f.type is bool else [str((f.metadata.get("choices") or [fitting])[0])]
    finetune = ["--option", "finetune"]
    partners = {"plan": finetune, "seeds": finetune, "folds": finetune, "fold": [*finetune, "--folds", "2"],
                "lr_min": ["--lr_max", "1"]}.get(f.name, [])  # what some options are refused without
    spellings = {f"--{f.name}", "--" + f.name.replace("_", "-")}
    assert len({config.parse_args([s, *value, *partners]) for s in spellings}) == 1
    if value:
        given = config.parse_args([f"--{f.name.replace('_', '-')}={value[0]}", *partners]).given
        assert given == {f.name, *(word[2:] for word in partners if word.startswith("--"))}


def test_values_keep_their_underscores_and_minuses():
    assert config.parse_args(["--dev_out=a-b_c", "--test-out", "d-e_f"]).dev_out == "a-b_c"


@pytest.mark.parametrize("argv, words", [
    (["--lr", "-1"], "--lr -1.0: it must be above 0"),
    (["--lr", "nan"], "--lr nan: it must be above 0"),
    (["--lr", "fast"], "invalid float value"),
    (["--epochs", "0"], "--epochs 0: it must be 1 or more"),
    (["--n_layers", "0"], "--n_layers 0"),
    (["--hidden_dropout_prob", "1"], "at least 0 and below 1"),
    (["--option", "train"], "invalid choice"),
    (["--epoch", "3"], "did you mean --epochs?"),
    (["--milestones", "30,10"], "--milestones 30,10: it must be whole numbers from 1, each larger than the one before"),
    (["--milestones", "0,10"], "--milestones 0,10: it must be whole numbers from 1"),
    (["--milestones", "3,x"], "invalid list of whole numbers"),
    (["--lr_steps", "9"], "--lr_steps 9: it must be 10 or more"),
    (["--cycle_mult", "0.5"], "--cycle_mult 0.5: it must be 1 or more"),
    (["--pct_start", "1"], "--pct_start 1.0: it must be above 0 and below 1"),
    (["finetune"], "unknown option finetune"),
    (["--space", "lr=1e-4|1e-3", "batch_size=16|32"], "put the whole space in quotes"),
    (["--space", "--lr=1e-4|1e-3"], "its parts have no dashes"),
])
def test_a_bad_value_is_one_line_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse_args(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize("line, words", [
    ("--option finetune --seeds 2 --folds 3", "--seeds and --folds contradict each other; give one"),
    ("--resume x --option lr_find", "--resume goes on with a fine-tuning run, and --option is lr_find"),
    ("--plan", "--plan is about --option finetune, and --option is generate"),
    ("--option lr_find --seeds 2", "--seeds repeats --option finetune, and --option is lr_find"),
    ("--option finetune --fold 1", "--fold 1 needs --folds above it, which is not given"),
    ("--option finetune --folds 3 --fold 3", "--fold 3 needs --folds above it, which is 3"),
    ("--warmup_steps 3 --warmup_ratio 0.1", "--warmup_steps and --warmup_ratio contradict each other; give one"),
    ("--warmup_epochs 0 --warmup_ratio 0", "--warmup_epochs and --warmup_ratio contradict each other; give one"),
    ("--nesterov --momentum 0 --optimizer sgd", "--nesterov needs a --momentum above 0"),
    ("--lr_min 0.1 --option lr_find", "--lr_min 0.1 must be below --lr_max 0.01"),
    ("--lr_min 1e-3 --lr_max 1e-3", "--lr_min 0.001 must be below --lr_max 0.001"),
])
def test_options_that_contradict_each_other_are_both_named(line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse_args(line.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


def test_what_fits_together_is_accepted():
    for line in ("--resume x", "--resume x --seeds 2", "--resume x --option finetune", "--option finetune --folds 2",
                 "--option finetune --plan --seeds 2",
                 "--option finetune --folds 3 --fold 2", "--warmup_steps 0", "--nesterov --optimizer sgd",
                 "--monitor dev_loss", "--option lr_find --confirm --lr_min 1e-5 --lr_max 1e-4"):
        config.parse_args(line.split())


def test_the_schedulers_are_those_that_there_are():
    (scheduler,) = (f for f in config.options() if f.name == "scheduler")
    assert scheduler.metadata["choices"] == tuple(schedule.SCHEDULES) == schedule.SCHEDULERS


# What other programs call these options.
OTHER_NAMES = {
    "option": "mode task action command",
    "dataset": "data dataset_name",
    "train": "train_file train_data",
    "dev": "dev_file valid validation validation_file eval_file",
    "test": "test_file predict_file",
    "label_names": "labels label_file",
    "max_sentence_len": "max_len max_seq_len max_seq_length max_sentence_length",
    "train_limit": "max_train_samples",
    "pretrained_model_path": "model model_name model_path model_name_or_path pretrained_model checkpoint",
    "tokenizer": "tokenizer_name tokenizer_path",
    "n_layers": "layers num_layers num_hidden_layers",
    "hidden_dropout_prob": "hidden_dropout classifier_dropout",
    "dropout": "dropout_prob attention_dropout",
    "epochs": "num_epochs n_epochs num_train_epochs max_epochs",
    "batch_size": "bs train_batch_size per_device_train_batch_size",
    "grad_accum": "gradient_accumulation gradient_accumulation_steps accumulation_steps accumulate_grad_batches",
    "grad_checkpoint": "gradient_checkpointing",
    "seed": "random_seed random_state",
    "seeds": "n_seeds num_seeds",
    "folds": "cv kfold k_folds n_folds num_folds",
    "optimizer": "optim",
    "lr": "learning_rate",
    "layerwise_lr_decay": "llrd layer_decay",
    "weight_decay": "wd",
    "max_grad_norm": "grad_clip clip_grad_norm gradient_clip_val",
    "scheduler": "schedule lr_scheduler lr_scheduler_type",
    "warmup_ratio": "warmup warmup_proportion",
    "label_smoothing": "label_smoothing_factor",
    "ema": "ema_decay",
    "monitor": "metric metric_for_best_model",
    "patience": "early_stop early_stopping early_stopping_patience",
    "eval_every": "eval_steps eval_interval",
    "save_every": "save_steps save_interval",
    "resume": "resume_from resume_from_checkpoint",
    "use_gpu": "gpu cuda use_cuda",
    "device": "cpu no_cuda use_cpu",
    "dtype": "bf16 fp16 amp precision",
    "output_dir": "output out_dir save_dir",
    "overwrite": "overwrite_output_dir force",
    "prefix": "prompt_text text",
    "max_new_tokens": "max_tokens",
}


@pytest.mark.parametrize("argv, name", [
    ("--early_stopping", "patience"), ("--early-stopping-patience=3", "patience"), ("--num_epochs 3", "epochs"),
    ("--model_name_or_path x", "pretrained_model_path"), ("--gpu", "use_gpu"), ("--cuda", "use_gpu"),
    ("--learning-rate 1", "lr"), ("--per_device_train_batch_size 8", "batch_size"), ("--no_cuda", "device"),
])
def test_what_other_programs_call_an_option_is_understood(argv, name, capsys):
    with pytest.raises(SystemExit):
        config.parse_args(argv.split())
    assert f"did you mean --{name}?" in capsys.readouterr().err


def test_other_names_lead_to_options_and_hide_none(capsys):
    known = {f.name for f in config.options()}
    meant, aliases = config.parser.MEANT, config.parser.ALIASES.keys()
    assert set(meant.values()) <= known and not meant.keys() & (known | aliases)
    assert len(config.parser.MEANT) == sum(len(f.metadata["also"].split()) for f in config.options()), "a name twice"
    for name, others in OTHER_NAMES.items():
        for other in others.split():
            with pytest.raises(SystemExit):
                config.parse_args([f"--{other}"])
            assert f"did you mean --{name}?" in capsys.readouterr().err


def test_one_is_no_plural():
    assert [config.counted(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]


def test_messages_say_is_not_where_a_translation_would_say_is_no():
    """`is no integer`, `are no UTF-8`: found by what they look like in the source. `there is no file` is English."""
    wrong = re.compile(r"(?<!there )\b(is|are) no \w+|: no (JSON|llama2|Llama|plain|saved|SentencePiece|tokenizer)")
    said = {}
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                if found := wrong.search(node.value):
                    said[f"{path.name}:{node.lineno}"] = found[0]
    assert not said


def schedules_and_options():
    return [(name, option) for name, one in schedule.SCHEDULES.items() for option in one.options]


def test_the_docs_have_every_option_of_the_schedules():
    """A schedule's signature is where its options are; the command line is made from them, and the table in
    docs/schedules.md must know them."""
    own = {option for _, option in schedules_and_options()}
    of_schedules = {f.name for f in config.options() if f.metadata["group"] == "Schedule"}
    general = {"scheduler", "schedule_every"} | {n for n in of_schedules if n.startswith("warmup_")}
    assert of_schedules - general == own
    table = (ROOT / "docs/schedules.md").read_text(encoding="utf-8")
    for name, one in schedule.SCHEDULES.items():
        row = re.search(rf"^\| `{name}`.*\|(.*)\|$", table, re.MULTILINE)[1]
        assert set(re.findall(r"--(\w+)", row)) == one.options.keys(), name


def rooms_with(monkeypatch, addition):
    """schedule.py with an addition at the end of its schedules, and a config/ that reads it."""
    new = types.ModuleType("schedule")
    source = (ROOT / "schedule.py").read_text(encoding="utf-8")
    source = source.replace("\n\ndef between(", addition + "\n\ndef between(")
    monkeypatch.setitem(sys.modules, "schedule", new)
    exec(compile(source, "schedule.py", "exec"), new.__dict__)
    for name in [name for name in sys.modules if name.partition(".")[0] == "config"]:
        monkeypatch.delitem(sys.modules, name)
    return new, importlib.import_module("config")


NEW_SCHEDULE = '''
@register(default_warmup=0.0)
def square_root(t: int, n: int, *,
                steepness: Annotated[float, Option("how far the rate falls", FRACTION)] = 0.5) -> float:
    """1 - s sqrt(t/n)"""
    return 1.0 - steepness * math.sqrt(t / n)

'''


def test_a_new_schedule_with_its_own_option_is_one_function(monkeypatch, capsys):
    new, new_config = rooms_with(monkeypatch, NEW_SCHEDULE)
    f = {f.name: f for f in new_config.options()}["steepness"]
    assert f.metadata["group"] == "Schedule" and "square_root: 0.5" in f.metadata["help"]
    config = new_config.parse_args(["--option", "finetune", "--scheduler", "square_root", "--steepness", "0.2"])
    made = new.from_options(config, 4, True)
    assert [made(i) for i in (0, 10, 40)] == [1.0, 1.0 - 0.2 * 0.5, 0.8] and not new_config.no_effect(config)
    assert new.make_schedule("square_root", total_steps=40)(40) == 0.5
    idle = new_config.parse_args(["--option", "finetune", "--scheduler", "cosine", "--steepness", "0.2"])
    assert new_config.no_effect(idle) == ["--steepness: --scheduler cosine does not use it"]
    fault = run_folder.fault_of({"steepness": 2.0}, new_config.options())
    assert fault == "--steepness is 2.0; it must be above 0 and at most 1"
    for words, said in ((["--steepness", "0"], "--steepness 0.0: it must be above 0 and at most 1"),
                        (["--scheduler", "x"], "square_root")):
        with pytest.raises(SystemExit):
            new_config.parse_args(words)
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="--steepness 2 must be above 0 and at most 1"):
        new.make_schedule("linear", total_steps=40, steepness=2)


def typed(option):
    """Words of a command line that give an option a value which is not its default, and the value."""
    values = next(f.metadata.get("choices") for f in config.options() if f.name == option) or ("0.5", "3", "2,3")
    for value in values:
        try:
            parsed = getattr(config.parse_args([f"--{option}", value]), option)
        except SystemExit:
            continue
        if parsed != getattr(config.RunConfig(), option):
            return [f"--{option}", value], parsed


def made_and_reached(monkeypatch, name, words, monitor_rises=True):
    """The keywords that a schedule gets when a run with these words asks for its rate."""
    reached, one = {}, schedule.SCHEDULES[name]

    @functools.wraps(one.factor)  # its signature too
    def factor(*arguments, **keywords):
        reached.update(keywords)
        return one.factor(*arguments, **keywords)

    monkeypatch.setitem(schedule.SCHEDULES, name, one._replace(factor=factor))
    schedule.from_options(config.parse_args(["--scheduler", name, *words]), 10, monitor_rises)(20, [0.5])
    return reached


@pytest.mark.parametrize("name, option", schedules_and_options())
def test_every_option_of_a_schedule_reaches_it_from_the_command_line(name, option, monkeypatch):
    words, value = typed(option)
    needed = [word for other, record in schedule.SCHEDULES[name].options.items()
              if other != option and record.default is schedule.REQUIRED for word in typed(other)[0]]
    assert made_and_reached(monkeypatch, name, [*words, *needed])[option] == value


@pytest.mark.parametrize("monitor", ["dev_acc", "dev_f1", "dev_qwk", "dev_loss", "dev_mae"])
def test_plateau_knows_which_way_the_monitor_gets_better(monitor, monkeypatch):
    from commands import job

    seen, real = [], schedule.from_options
    monkeypatch.setattr(schedule, "from_options", lambda *arguments: seen.append(arguments[2]) or real(*arguments))
    job.schedule_of(config.parse_args(["--scheduler", "plateau", "--monitor", monitor]), 10)
    mode = made_and_reached(monkeypatch, "plateau", [], seen[0])["plateau_mode"]
    assert mode == ("min" if monitor in ("dev_loss", "dev_mae") else "max")


# --------------------------------------------------------------------------- which command uses what


def help_of(*words):
    out = io.StringIO()
    with pytest.raises(SystemExit) as stop, redirect_stdout(out):
        config.parse_args([*words, "--help"])
    assert stop.value.code == 0
    return out.getvalue()


def shown_in(text):
    return set(re.findall(r"^  --(\w+)", text, re.MULTILINE))


def test_help_has_its_groups_and_does_not_import_torch():
    code = "import sys, run_llama\ntry: run_llama.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip().endswith("False")
    for group in ("Data:", "Model:", "Training:", "Device:", "Output:"):
        assert group in done.stdout


def test_every_option_belongs_to_commands_and_is_in_their_help():
    for f in config.options():
        assert f.metadata["only"] and {*f.metadata["only"]} <= {*config.COMMANDS}, f.name
    for command in config.COMMANDS:
        used = {f.name for f in config.options() if command in f.metadata["only"]}
        for words in (["--option", command], [f"--option={command}"]):
            assert shown_in(help_of(*words)) == used, command


def test_the_option_may_stand_behind_help(capsys):
    with pytest.raises(SystemExit):
        config.parse_args(["-h", "--option", "predict"])
    assert shown_in(capsys.readouterr().out) == shown_in(help_of("--option", "predict")) > {"run", "input"}


def test_the_short_help_has_what_people_use_most_and_says_how_to_see_the_rest():
    text = help_of()
    assert shown_in(text) == {f.name for f in config.options() if f.metadata["common"]} > {"option", "lr", "epochs"}
    assert "--option COMMAND --help" in " ".join(text.split())
    assert "predict, inspect: the sentences to label" in text, "whose it is, where the help is nobody's own"
    assert len(shown_in(text)) < 40


@pytest.mark.parametrize("f", config.options(), ids=lambda f: f.name)
def test_a_help_text_says_more_than_a_word(f):
    words = f.metadata["help"].partition(" (")[0].split()
    assert len(words) >= 3


# An option -> words with which it does nothing, words with which it does, and the reason.
NEEDS = {
    "schedule_every": ("epoch --scheduler constant", "epoch --scheduler step", "--scheduler constant does not go by "
                                                                               "the step"),
    "warmup_kind": ("constant --warmup_steps 0", "constant --warmup_steps 2", "there is no warmup"),
    "warmup_start": ("0.5 --scheduler cyclic", "0.5", "there is no warmup"),
    "cycle_mult": ("2 --scheduler cosine_restarts", "2 --scheduler cosine_restarts --cycles 2",
                   "there is one cycle only; give --cycles"),
    "cycle_decay": ("0.5 --scheduler cosine_restarts --cycles 1", "0.5 --scheduler cosine_restarts --cycles 3",
                    "there is one cycle only; give --cycles"),
    "base_batch_size": ("9", "9 --lr_scaling sqrt", "it needs --lr_scaling"),
    "decay_all": ("", "--weight_decay 0.1", "it needs --weight_decay"),
    "momentum": ("0.5 --optimizer lion", "0.5 --optimizer sgd", "--optimizer lion does not use it"),
    "nesterov": ("", "--optimizer sgd", "--optimizer adamw does not use it"),
    "r_drop": ("1 --hidden_dropout_prob 0", "1 --hidden_dropout_prob 0 --dropout 0.1",
               "without --dropout and --hidden_dropout_prob the two passes are the same"),
    "overwrite": ("", "--output_dir x", "it needs --output_dir"),
    "lora_alpha": ("8", "8 --lora_r 4", "it needs --lora_r"), "lora_dropout": ("0.1", "0.1 --lora_r 4",
                                                                               "it needs --lora_r"),
    "lora_targets": ("q,v", "q,v --lora_r 4", "it needs --lora_r"), "lora_rs": ("", "--lora_r 4", "it needs --lora_r"),
    "lora_dora": ("", "--lora_r 4", "it needs --lora_r"),
    "head_bias": ("--loss ordinal", "", "the head of --loss ordinal has none"),
    "new_head": ("", "--pretrained_model_path runs/x", "it needs --pretrained_model_path RUN"),
    "n_layers": ("2 --option export --run y", "2 --option export", "the saved run has its own"),
    "tokenizer": ("x --option export --run y", "x --option export", "the saved run has its own"),
    "gguf_type": ("f32 --option export", "f32 --option export --format gguf", "--format hf does not use it"),
    "freeze": ("embeddings --lora_r 4", "embeddings", "beside adapters, nobody trains the embeddings"),
    "grad_checkpoint": ("--freeze backbone", "--freeze first:2", "--freeze backbone trains the head alone"),
    "lr": ("1 --freeze backbone --head_lr 1", "1 --freeze backbone",
           "--freeze backbone trains the head alone, and --head_lr is its rate"),
    "layerwise_lr_decay": ("0.5 --freeze backbone", "0.5 --freeze first:2", "--freeze backbone trains the head alone"),
    "use_gpu": ("--device cpu", "", "--device decides"),
    "dev_out": ("x --seeds 2", "x", "each run has its predictions in its own folder"),
    "final_seeds": ("2 --option search --finalists 0", "2 --option search", "there are no --finalists"),
    "test_out": ("x --folds 3", "x --folds 3 --fold 1", "each run has its predictions in its own folder"),
}


def no_effect(words):
    return config.no_effect(config.parse_args(["--option", "finetune", *words.split()]))


@pytest.mark.parametrize("f", [f for f in config.options() if f.metadata["needs"]], ids=lambda f: f.name)
def test_an_option_does_nothing_without_what_it_needs(f):
    if f.name in NEEDS:
        without, enough, reason = NEEDS[f.name]
        assert no_effect(f"--{f.name} {without}") == [f"--{f.name}: {reason}"]
        assert no_effect(f"--{f.name} {enough}") == []
    else:
        assert f.name in {option for _, option in schedules_and_options()}
    for name, one in schedule.SCHEDULES.items():
        if f.name in {option for _, option in schedules_and_options()}:
            words = f"{' '.join(typed(f.name)[0])} --scheduler {name}"
            is_idle = f"--{f.name}: --scheduler {name} does not use it" in no_effect(words)
            assert is_idle == (f.name not in one.options), name


@pytest.mark.parametrize("f", [f for f in config.options() if "finetune" not in f.metadata["only"]],
                         ids=lambda f: f.name)
def test_an_option_of_another_command_does_nothing(f):
    value = "" if f.type is bool else "1e-3" if "float" in str(f.type) else (f.metadata.get("choices") or ["20"])[0]
    assert no_effect(f"--{f.name} {value}") == [f"--{f.name}: it belongs to another --option"]
    (its, *_) = f.metadata["only"]
    value = NEEDS[f.name][1] if f.name in NEEDS else value
    assert config.no_effect(config.parse_args(["--option", its, *f"--{f.name} {value}".split()])) == []


LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}
ROPE_FAULTS = ["linear", [2.0], {}, {"kind": "yarn", "factor": 2.0}, {"kind": "linear"},
               {"kind": "linear", "factor": "2"},
               {"kind": "linear", "factor": 0}, {"kind": "linear", "factor": float("nan")}, {"kind": [], "factor": 2.0},
               {**LLAMA3, "kind": "linear"}, {"kind": "llama3", "factor": 8.0}, {**LLAMA3, "low_freq_factor": 4.0},
               {**LLAMA3, "original_max_seq_len": 32.5}, {**LLAMA3, "high_freq_factor": True}, {**LLAMA3, "more": 1}]


def test_a_models_shape_is_read_again_from_its_json():
    shape = config.LlamaConfig(dim=32, n_heads=4, head_dim=12, rope_scaling=config.RopeScaling(**LLAMA3))
    again = config.LlamaConfig(**json.loads(json.dumps(dataclasses.asdict(shape))))
    assert again == shape and again.rope_scaling.factor == 8.0
    assert config.LlamaConfig(dim=32, n_heads=4).head_dim == 8  # as in files of before it was a field


@pytest.mark.parametrize("bad", [{"dim": 0}, {"dim": 30, "n_heads": 4}, {"n_heads": 4, "n_kv_heads": 3},
                                 {"attention": "sideways"}, {"n_layers": "8"}, {"dim": 12, "n_heads": 4},
                                 {"head_dim": 7}, {"head_dim": 0}, {"head_dim": 8.0}, {"head_dim": True},
                                 *({"rope_scaling": scaling} for scaling in ROPE_FAULTS)], ids=str)
def test_a_model_that_cannot_be_is_refused(bad):
    with pytest.raises(ValueError):
        config.LlamaConfig(**bad)


def test_a_number_is_no_file_in_the_help():
    for f in config.options():
        if "int" in str(f.type) or "float" in str(f.type):
            assert f.metadata.get("metavar") != "FILE", f.name


def test_the_page_of_options_has_every_one():
    page = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    rows = "".join(line for line in page.splitlines(keepends=True) if line.startswith("|"))
    assert {f.name for f in config.options()} == set(re.findall(r"--(\w+)", rows))


def test_pefts_names_of_targets_are_understood():
    typed = config.parse_args(["--option", "finetune", "--lora_r", "2", "--lora_targets", "q_proj,down_proj,q"])
    assert config.lora_config(typed).targets == ("q", "down")
