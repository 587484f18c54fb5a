"""The command line: spellings, defaults, and messages."""

import ast
import functools
import inspect
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import config


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
    read = f.metadata.get("parse", float)
    fitting = next((v for v in ("0.5", "1", "2", "10") if "float" in str(f.type) or "." not in v
                    if not check or check.holds(read(v))), "1")
    value = [] if f.type is bool else [str(f.metadata.get("choices", [fitting])[0])]
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
    from optimizer import SCHEDULES

    assert config.SCHEDULERS == tuple(SCHEDULES)


@pytest.mark.parametrize("argv, name", [
    ("--early_stopping", "patience"), ("--early-stopping-patience=3", "patience"), ("--num_epochs 3", "epochs"),
    ("--model_name_or_path x", "pretrained_model_path"), ("--gpu", "use_gpu"), ("--cuda", "use_gpu"),
    ("--learning-rate 1", "lr"), ("--per_device_train_batch_size 8", "batch_size"), ("--no_cuda", "device"),
])
def test_what_other_programs_call_an_option_is_understood(argv, name, capsys):
    with pytest.raises(SystemExit):
        config.parse_args(argv.split())
    assert f"did you mean --{name}?" in capsys.readouterr().err


def test_other_names_lead_to_options_and_hide_none():
    known = {f.name for f in config.options()}
    assert set(config.MEANT.values()) <= known and not config.MEANT.keys() & (known | config.ALIASES.keys())
    assert len(config.MEANT) == sum(len(names.split()) for names in config.OTHER_NAMES.values()), "a name twice"


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


def option_of(keyword):
    """The option of the command line that gives a schedule its keyword."""
    return {"patience": "plateau_patience", "plateau_mode": "monitor"}.get(keyword, keyword)


def schedule_keywords():
    from optimizer import SCHEDULE_OPTIONS

    return [(name, keyword) for name, keywords in SCHEDULE_OPTIONS.items() for keyword in keywords]


def test_every_list_has_every_option_of_the_schedules():
    """A schedule's signature is where its options are; what else must know them: the options of the command line, the
    checks, what run_llama passes on (and names when it has no effect), and the table in README.md."""
    import optimizer
    import run_llama

    keywords = {keyword for _, keyword in schedule_keywords()}
    assert set(run_llama.schedule_options(config.RunConfig())) == keywords
    assert set(optimizer._CHECKS) == keywords
    assert {option_of(keyword) for keyword in keywords} <= {f.name for f in config.options()}
    of_schedules = {f.name for f in config.options() if f.metadata["group"] == "Schedule"}
    general = {"scheduler", "schedule_every"} | {n for n in of_schedules if n.startswith("warmup_")}
    assert of_schedules - general == {option_of(keyword) for keyword in keywords} - {"monitor"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, taken in optimizer.SCHEDULE_OPTIONS.items():
        row = re.search(rf"^\| `{name}`.*\|(.*)\|$", readme, re.MULTILINE)[1]
        assert set(re.findall(r"--(\w+)", row)) == {option_of(k) for k in taken} - {"monitor"}, name


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


@pytest.mark.parametrize("name, keyword", schedule_keywords())
def test_every_option_of_a_schedule_reaches_it_from_the_command_line(name, keyword, monkeypatch):
    import optimizer
    import run_llama

    reached, real = {}, optimizer.SCHEDULES[name]

    @functools.wraps(real)  # its signature too
    def schedule(*arguments, **keywords):
        reached.update(keywords)
        return real(*arguments, **keywords)

    words, value = typed(option_of(keyword))
    needed = [word for other in optimizer.SCHEDULE_OPTIONS[name] if other != keyword and
              inspect.signature(real).parameters[other].default is inspect.Parameter.empty
              for word in typed(option_of(other))[0]]
    monkeypatch.setitem(optimizer.SCHEDULES, name, schedule)
    monkeypatch.setattr(optimizer, name, schedule)
    made = run_llama.schedule_of(config.parse_args(["--scheduler", name, *words, *needed]), 10)
    made(20, [0.5])
    assert reached[keyword] == ({"dev_loss": "min", "dev_mae": "min"}.get(value, "max") if keyword == "plateau_mode"
                                else value)


def test_help_has_every_option_in_groups_and_does_not_import_torch():
    code = "import sys, run_llama\ntry: run_llama.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("False")
    for f in config.options():
        assert re.search(rf"--{f.name}\b", done.stdout)
    for group in ("Data:", "Model:", "Training:", "Device:", "Output:"):
        assert group in done.stdout


@pytest.mark.parametrize("bad", [{"dim": 0}, {"dim": 30, "n_heads": 4}, {"n_heads": 4, "n_kv_heads": 3},
                                 {"attention": "sideways"}, {"n_layers": "8"}, {"dim": 12, "n_heads": 4}])
def test_a_model_that_cannot_be_is_refused(bad):
    with pytest.raises(ValueError):
        config.LlamaConfig(**bad)
