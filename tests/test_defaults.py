"""The settings of a run for which none was typed."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

import run_llama
from commands import defaults
from config import RunConfig, parse_args

CLASSIC = RunConfig()
CHOSEN = {"attention": "bidirectional", "pooling": "mean", "batch_size": 32, "hidden_dropout_prob": 0.1}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_of(argv: list[str]) -> dict:
    """The options of a run, as its args.json has them."""
    assert run_llama.main(["--option", "finetune", "--epochs", "1", "--output_dir", "run", "--overwrite", *argv]) == 0
    return json.loads(Path("run/args.json").read_text(encoding="utf-8"))["options"]


def test_without_settings_they_are_those_of_the_readmes_first_command(inputs, folder, capsys):
    options = settings_of(inputs)
    assert {name: options[name] for name in CHOSEN} == CHOSEN and options["lr"] == defaults.rate_for(2)
    said = re.search("^settings :: (.*?) [(]", capsys.readouterr().err, re.MULTILINE)[1]
    assert settings_of([*inputs, *said.split()]) == options, "typed, what was said is the same run"


def test_the_readmes_first_command_has_them():
    command = re.search("run_llama.py (--option finetune .*)", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    assert not parse_args(command.split()).given & {*defaults.SETTINGS}


@pytest.mark.parametrize("typed", [["--lr", "1e-3"], ["--pooling", "last"], ["--hidden_dropout_prob", "0.8"],
                                   ["--optimizer", "sgd"], ["--grad_accum", "2"]])
def test_one_setting_that_is_typed_leaves_the_classic_defaults(typed, inputs, folder, capsys):
    options, config = settings_of([*inputs, *typed]), parse_args(typed)
    for name in defaults.SETTINGS:
        assert options[name] == getattr(config, name), name
    said = re.search("^settings :: (.*?) [(](.*)", capsys.readouterr().err, re.MULTILINE)
    assert settings_of([*inputs, *typed, *said[1].split()]) == options, "typed, what was said is the same run"
    assert typed[0] not in said[1] and f"since {typed[0]} was typed; without: --attention bidirectional" in said[2]


def test_other_options_do_not_count_as_settings(inputs, folder):
    options = settings_of([*inputs, "--seed", "3", "--n_layers", "1", "--scheduler", "cosine"])
    assert options["pooling"] == "mean" and options["lr"] == defaults.rate_for(1)


def test_sst_with_stories42m_keeps_the_classic_defaults(inputs, folder):
    """Told by the names of its files, wherever they lie."""
    renamed = {}
    for word in inputs:
        if word.endswith(".txt"):
            renamed[word] = Path(word).with_name(Path(word).name.replace("toy", "sst"))
            renamed[word].write_bytes(Path(word).read_bytes())
    model = Path(inputs[1]).parent / "stories42M"
    model.exists() or model.symlink_to(inputs[1], target_is_directory=True)
    options = settings_of([str(renamed.get(word, model if word == inputs[1] else word)) for word in inputs])
    assert {name: options[name] for name in CHOSEN} == {name: getattr(CLASSIC, name) for name in CHOSEN}
    assert options["lr"] == 1e-5


def test_a_resumed_run_keeps_its_settings(inputs, folder, capsys):
    """The second of two seeds is stopped before it begins; the series goes on with the settings that it chose."""
    settings_of([*inputs, "--seeds", "2"])
    before = Path("run/seed-1338/steps.jsonl").read_text(encoding="utf-8")
    for path in (Path("run/result.json"), Path("run/seed-1338/result.json")):
        path.unlink()
    for path in sorted(Path("run/seed-1338").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert run_llama.main(["--resume", "run"]) == 0

    def losses(text: str) -> list[float]:
        return [json.loads(line)["loss"] for line in text.splitlines()]

    assert losses(Path("run/seed-1338/steps.jsonl").read_text(encoding="utf-8")) == losses(before)


def test_lr_find_looks_and_answers_with_the_same_settings(inputs, folder, capsys):
    assert run_llama.main(["--option", "lr_find", "--lr_steps", "12", "--output_dir", "find", *inputs]) == 0
    command = re.search("^use it :: python run_llama.py (.*)$", capsys.readouterr().out, re.MULTILINE)[1]
    config = parse_args(command.split())
    assert {name: getattr(config, name) for name in CHOSEN} == CHOSEN


def test_a_deeper_stack_has_a_lower_rate():
    rates = [defaults.rate_for(n) for n in range(1, 81)]
    assert rates == sorted(rates, reverse=True) and 1e-5 <= rates[-1] < rates[0] <= 1e-3


@pytest.mark.parametrize("typed, rate, said", [
    ([], 7.9e-4, "that for 2 layers."), (["--lora_r", "4"], 4e-3, "that for 2 layers with adapters."),
    (["--freeze", "backbone"], 1e-2, "that for a head alone."),
    (["--freeze", "first:1"], 7.9e-4, "that for 2 layers.")])
def test_the_rate_is_that_of_what_is_trained(typed, rate, said, inputs, folder, capsys):
    assert settings_of([*inputs, *typed])["lr"] == rate
    assert f"the rate is {said}" in capsys.readouterr().err
