"""--plan: what a run would do. It leaves everything as it was."""

import json
import re
from pathlib import Path

import pytest
import torch
from loops import CPU, assert_same, made, state_of
from tokenizers import Tokenizer

import run_llama
from commands import estimate, plan
from config import no_effect, parse_args
from training.task import Job


def main(*argv):
    return run_llama.main(list(argv))


PLAN = ("--option", "finetune", "--plan")


def plan_of(capsys, *argv):
    assert main(*PLAN, *argv) == 0
    return [line.removeprefix("plan :: ") for line in capsys.readouterr().out.splitlines() if line.startswith("plan")]


def test_a_plan_says_what_a_run_does(tiny_arguments, capsys):
    """Every number of it is compared with the run itself."""
    options = [*tiny_arguments, "--grad_accum", "2", "--batch_size", "8", "--scheduler", "cosine", "--warmup_steps",
               "3", "--epochs", "3", "--output_dir", "out"]
    lines = plan_of(capsys, *options)
    assert [p.name for p in Path("out").iterdir()] == ["plan.png"]
    assert Path("out/plan.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert main("--option", "finetune", *options) == 0
    rates = [json.loads(x)["lr"] for x in Path("out/steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0] == f"96 sentences, 16 a step (8 x 2), 6 steps an epoch, {len(rates)} in all"
    assert lines[1] == (f"cosine, warmup 3 steps, lr {rates[0]:.2e} at the start, {max(rates):.2e} at the peak, "
                        f"{rates[-1]:.2e} at the end")
    assert max(rates) == 3e-3
    run = capsys.readouterr().out
    number = re.search(r"(\S+) trainable parameters", run)[1]
    assert lines[2].startswith(f"{number} trainable parameters; ") and "MiB" in lines[2] and "GiB" in lines[2]
    assert " s a step on cpu" in lines[3] and "min an epoch" in lines[3]
    assert "min in all, evaluation counted (3 of " in lines[3]
    train = Path(tiny_arguments[tiny_arguments.index("--train") + 1]).read_text(encoding="utf-8").splitlines()
    backend = Tokenizer.from_file(f"{tiny_arguments[1]}/tokenizer.json")
    lengths = sorted(len(backend.encode(line.partition(" ||| ")[2], add_special_tokens=False)) for line in train)
    assert lines[4] == f"sentences have {lengths[48]} tokens (median), {lengths[91]} (95%), {lengths[95]} at most"
    assert not [line for line in lines if line.startswith("no effect")]


def test_a_plan_touches_neither_weights_nor_a_run_that_is_there(tiny_arguments, capsys, tmp_path):
    run, config = made(tiny_arguments)
    run.optimizer.zero_grad(set_to_none=True)
    before = state_of(run)
    estimate.measure(run, config, CPU, {"dev": run.task.dev}, tmp_path, with_longest=True)
    assert_same(state_of(run), before)

    assert main("--option", "finetune", *tiny_arguments, "--output_dir", "run", "--epochs", "1") == 0

    def contents():
        return {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file() and p.name != "plan.png"}

    there = contents()
    plan_of(capsys, *tiny_arguments, "--output_dir", "run", "--overwrite")
    assert contents() == there
    plan_of(capsys, *tiny_arguments)
    assert [p.name for p in Path("runs").iterdir()] == ["plan.png"], "the run that follows has the plain name"


@pytest.mark.parametrize("options, name", [
    ("--min_lr_ratio 0.1 --scheduler constant", "min_lr_ratio"),
    ("--milestones 2,3 --scheduler cosine", "milestones"),
    ("--plateau_patience 2 --scheduler cosine", "plateau_patience"),
    ("--cycle_mult 2 --scheduler cosine_restarts", "cycle_mult"),
    ("--schedule_every epoch --scheduler constant", "schedule_every"),
    ("--momentum 0.8", "momentum"),
    ("--nesterov", "nesterov"),
    ("--base_batch_size 9", "base_batch_size"),
    ("--warmup_start 0.1 --warmup_steps 0", "warmup_start"),
    ("--decay_all", "decay_all"),
    ("--r_drop 1 --hidden_dropout_prob 0", "r_drop"),
    ("--overwrite", "overwrite"),
    ("--use_gpu", "use_gpu"),  # beside --device cpu
    ("--test_out x.txt --seeds 2", "test_out"),
    ("--confirm", "confirm"),
    ("--lr_steps 50", "lr_steps"),
    ("--input x", "input"),
])
def test_an_option_without_effect_is_named(options, name):
    config = parse_args(["--option", "finetune", "--device", "cpu", *options.split()])
    lines = no_effect(config)
    assert [line.partition(":")[0] for line in lines] == [f"--{name}"]


@pytest.mark.parametrize("options", [
    "--patience 5 --min_delta 0.1 --scheduler cosine --min_lr_ratio 0.1", "--optimizer sgd --momentum 0.8 --nesterov",
    "--lr_scaling sqrt --base_batch_size 9", "--warmup_start 0.1", "--weight_decay 0.1 --decay_all", "--r_drop 1",
    "--scheduler plateau --plateau_patience 2 --gamma 0.3 --patience 0", "--scheduler step --step_size 3 --gamma 0.5",
    "--scheduler cosine_restarts --cycles 2 --cycle_mult 2 --cycle_decay 0.5 --schedule_every epoch",
    "--save_every 3 --eval_every 0.5 --ema 0.9 --overwrite --output_dir x", "--folds 3 --fold 1 --dev_out x.txt"])
def test_an_option_with_an_effect_is_not(options):
    assert no_effect(parse_args(["--option", "finetune", *options.split()])) == []


def test_a_plan_names_idle_options_says_how_many_runs_and_what_plateau_depends_on(tiny_arguments, capsys):
    lines = plan_of(capsys, *tiny_arguments, "--scheduler", "plateau", "--monitor", "dev_f1", "--seeds", "3",
                    "--milestones", "3,5")
    assert any(line.startswith("3 such runs, one after another: ") for line in lines)
    assert any(line.startswith("plateau: the rate falls when dev_f1 gets no better") for line in lines)
    assert "no effect: --milestones: --scheduler plateau does not use it" in lines
    # Two of three parts of 96 + 30 sentences.
    assert plan_of(capsys, *tiny_arguments, "--folds", "3")[0].startswith("84 sentences, ")


def test_the_rates_of_a_plan_are_those_of_its_largest_group():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 1.0}, {"params": [torch.zeros(1)], "lr": 3.0}])
    run = Job(torch.nn.Identity(), None, optimizer, lambda step, history: 1 / (1 + step), 1)
    assert plan.rates(run, 3) == [3.0, 1.5, 1.0]
