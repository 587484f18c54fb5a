"""--freeze: what is frozen stays as it is, and what its part computes is kept. The judge is plain PyTorch with
requires_grad switched off by hand, and the same run without the keeping."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import CPU, made
from safetensors.torch import load_file
from torch.nn import functional as F

import run_llama
from classifier import LlamaEmbeddingClassifier
from commands import estimate
from commands.classification import ClassificationTask
from config import no_effect, parse_args
from training import device as devices
from training import kept, trainer
from training.kept import Activations

SETTINGS = ("--batch_size 16 --lr 0.05 --epochs 3 --device cpu --dtype float32 --scheduler constant --patience 0 "
            "--optimizer sgd --momentum 0 --hidden_dropout_prob 0 --max_grad_norm 0 --plots off").split()
# --freeze, and the names of what it leaves as it is: in a model of two layers.
PARTS = {"embeddings": ["llama.tok_embeddings."], "first:1": ["llama.tok_embeddings.", "llama.layers.0."],
         "first:2": ["llama.tok_embeddings.", "llama.layers."], "backbone": ["llama."]}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finetune(inputs, folder, *options, code=0):
    assert run_llama.main(["--option", "finetune", *inputs, *SETTINGS, "--output_dir", str(folder), *options]) == code
    return Path(folder)


def lines(folder, log):
    found = [json.loads(line) for line in (Path(folder) / log).read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "update_ratio")} for line in found]


def best(folder):
    return load_file(folder / "best/model.safetensors")


def train_with_pytorch(job, parameters):
    """Three epochs on the program's model and batches, with PyTorch's SGD."""
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for epoch in range(3):
        for rows in job.task.order(epoch):
            batch = job.task.make_batch(rows, epoch)
            optimizer.zero_grad()
            F.nll_loss(job.model(batch["tokens"], batch["lengths"]), batch["labels"]).backward()
            optimizer.step()


@pytest.mark.parametrize("part", PARTS)
def test_what_is_frozen_stays_and_the_rest_is_trained_as_pytorch_does(inputs, part):
    job, config = made(inputs, *SETTINGS)
    model, frozen = job.model, PARTS[part]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(tuple(frozen)))
    train_with_pytorch(job, [p for p in model.parameters() if p.requires_grad])
    folder = finetune(inputs, "run", "--freeze", part, "--patience", "0", "--monitor", "dev_loss", "--keep_state")
    (state,) = [load_file(path) for path in [max(folder.glob("last/step-*/tensors.safetensors"))]]
    for name, p in model.named_parameters():
        is_frozen = name.startswith(tuple(frozen))
        assert is_frozen == torch.equal(p, before[name])
        assert is_frozen == (f"model.{name}" not in state)
        if not is_frozen:
            torch.testing.assert_close(state[f"model.{name}"], p.detach(), rtol=1e-4, atol=1e-6)
    saved = best(folder)
    assert saved.keys() == model.state_dict().keys(), "a whole model"
    for name in saved:
        if name.startswith(tuple(frozen)):
            assert torch.equal(saved[name], before[name])


def test_adapters_below_the_frozen_layers_add_nothing(inputs, monkeypatch, without_keeping):
    """By hand as above, with the adapters of the first layer left out of the training; their dropout is off."""
    options = ["--lora_r", "4", "--lora_dropout", "0"]
    job, _ = made(inputs, *SETTINGS, *options)
    model, frozen = job.model, tuple(PARTS["first:1"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(frozen)}
    train_with_pytorch(job, trained.values())
    calls = Calls(monkeypatch)
    folder = finetune(inputs, "run", "--freeze", "first:1", *options, "--keep_state")
    state = load_file(max(folder.glob("last/step-*/tensors.safetensors")))
    assert calls.n == 96 + 30
    assert {name for name in state if name.startswith("model.")} == {f"model.{name}" for name in trained}
    for name, p in trained.items():
        torch.testing.assert_close(state[f"model.{name}"], p.detach(), rtol=1e-4, atol=1e-6)
    below = [tensor for name, tensor in best(folder).items() if ".layers.0." in name and name.endswith("lora_b")]
    assert len(below) == 7 and not any(tensor.any() for tensor in below)
    started = ["--adapter", "run", "--freeze", "first:2", "--lora_dropout", "0.5"]  # what is learned stays, undisturbed
    one = finetune(inputs, "again", *started)
    without_keeping()
    assert_equal_runs(one, finetune(inputs, "computed", *started))
    assert all(torch.equal(tensor, best(one)[name]) for name, tensor in best(folder).items() if "llama" in name)


# --------------------------------------------------------------------------- what is kept


class Calls:
    """Of each sentence, how often the frozen first part was computed."""

    def __init__(self, monkeypatch):
        self.n, real = 0, LlamaEmbeddingClassifier.first_part

        def first_part(model, tokens, lengths):
            self.n += len(tokens)
            return real(model, tokens, lengths)

        monkeypatch.setattr(LlamaEmbeddingClassifier, "first_part", first_part)


@pytest.fixture
def without_keeping(monkeypatch):
    """without_keeping(): what is frozen is computed at each pass from here on."""
    return lambda: monkeypatch.setattr(ClassificationTask, "activations", lambda task, name: None)


def assert_equal_runs(one, other, atol=1e-6):
    """The losses, the scores, the predictions and the best weights."""
    for log in ("steps.jsonl", "epochs.jsonl"):
        for a, b in zip(lines(one, log), lines(other, log), strict=True):
            assert a == pytest.approx(b, rel=1e-6, abs=atol), log
    for name in ("dev", "test"):
        assert (one / f"{name}-predictions.txt").read_text() == (other / f"{name}-predictions.txt").read_text()
    a, b = best(one), best(other)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("options", [
    "--freeze first:1", "--freeze first:1 --pooling mean --attention bidirectional --grad_checkpoint",
    "--freeze first:1 --pooling max", "--freeze first:1 --pooling first --attention bidirectional --grad_accum 2",
    "--freeze first:2", "--freeze first:2 --pooling mean", "--freeze first:2 --pooling first --attention bidirectional",
    "--freeze backbone", "--freeze backbone --pooling mean --attention bidirectional --ema 0.9",
    "--freeze backbone --pooling max --loss ordinal", "--freeze backbone --pooling first --attention bidirectional",
    "--freeze first:1 --hidden_dropout_prob 0.3 --r_drop 1 --layerwise_lr_decay 0.5 --sampler balanced",
])
def test_what_is_kept_gives_what_is_computed(inputs, monkeypatch, without_keeping, options):
    """Train and dev pass through the frozen part once, test at its end; the numbers are those of a run that keeps
    nothing."""
    calls = Calls(monkeypatch)
    one = finetune(inputs, "kept", *options.split())
    once = 96 + 30 + 33
    assert calls.n == (once if "backbone" in options else 96 + 30)
    without_keeping()
    assert_equal_runs(one, finetune(inputs, "computed", *options.split()))


@pytest.mark.parametrize("options", ["--freeze first:1 --pooling mean --attention bidirectional", "--freeze backbone"])
def test_what_is_kept_gives_what_is_computed_in_c(inputs, monkeypatch, without_keeping, options):
    monkeypatch.setattr(devices, "LARGE", 0)
    one = finetune(inputs, "kept", *options.split())
    assert json.loads((one / "args.json").read_text())["versions"]["c_compiler"] != "not used"
    without_keeping()
    assert_equal_runs(one, finetune(inputs, "computed", *options.split()))


def test_what_is_kept_gives_what_is_computed_in_bfloat16(inputs, without_keeping):
    """To the precision that bfloat16 has: its products round otherwise in a batch of another size."""
    options = ["--freeze", "first:1", "--pooling", "mean", "--dtype", "bfloat16", "--epochs", "1"]
    one = finetune(inputs, "kept", *options)
    without_keeping()
    other = finetune(inputs, "computed", *options)
    for a, b in zip(lines(one, "steps.jsonl"), lines(other, "steps.jsonl"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=5e-3)


@settings(deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=9), st.data())
def test_a_batch_has_the_vectors_of_its_rows_and_zeros(counts, data):
    """Any rows in any order, some twice; through a view of some of the sentences too."""
    starts, n = np.cumsum([0, *counts[:-1]]), sum(counts)
    numbers = torch.arange(1.0, 2 * n + 1).view(n, 2)
    chosen = np.array(data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1)))
    rows = np.array(data.draw(st.lists(st.integers(0, len(chosen) - 1), min_size=1)))
    wanted = [numbers[starts[i] : starts[i] + counts[i]] for i in chosen[rows]]
    found = Activations(numbers, starts, np.array(counts)).take(chosen).batch(rows)
    assert torch.equal(found, torch.nn.utils.rnn.pad_sequence(wanted, batch_first=True))


def test_a_file_holds_the_same_bits_as_memory_and_is_gone_afterwards(inputs, monkeypatch, capfd):
    job, _ = made(inputs, *SETTINGS, "--freeze", "first:1", "--lr_steps", "99")
    one = job.task.first_part("train")
    other = job.task.first_part("train", Path())
    assert torch.equal(one.numbers, other.numbers) and len(one.numbers) == job.task.lengths.sum()
    assert not [*Path().iterdir()]
    memory = finetune(inputs, "memory", "--freeze", "first:1")
    monkeypatch.setattr(kept, "BUDGET", 1000)
    capfd.readouterr()
    assert_equal_runs(memory, finetune(inputs, "file", "--freeze", "first:1"), atol=0)
    assert "it is kept in a file in file, and mapped into memory" in capfd.readouterr().err
    assert {p.name for p in Path("file").iterdir()} == {p.name for p in Path("memory").iterdir()}


def test_a_full_disk_keeps_nothing_and_the_run_goes_on(inputs, monkeypatch, capfd, without_keeping):
    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "BUDGET", 1000)
    monkeypatch.setattr(kept.tempfile, "TemporaryFile", lambda dir: Full())
    one = finetune(inputs, "full", "--freeze", "first:1")
    said = capfd.readouterr().err
    assert said.count("cannot be kept ([Errno 28] No space left on device); each epoch computes it again") == 1
    without_keeping()
    assert_equal_runs(one, finetune(inputs, "computed", "--freeze", "first:1"), atol=0)


@pytest.mark.parametrize("options, why", [
    ("--dropout 0.1", "--dropout is at work inside it"), ("--aug_delete 0.2", "--aug_delete changes the sentences"),
    ("--aug_swap 0.2 --aug_replace 0.2", "--aug_swap and --aug_replace change the sentences")])
def test_what_changes_from_epoch_to_epoch_is_not_kept(inputs, capfd, without_keeping, options, why):
    one = finetune(inputs, "run", "--freeze", "first:1", *options.split())
    assert capfd.readouterr().err.count(f"is not kept from epoch to epoch, since {why}") == 1
    without_keeping()
    assert_equal_runs(one, finetune(inputs, "computed", "--freeze", "first:1", *options.split()), atol=0)


def test_weights_that_are_rounded_when_they_are_saved_are_what_is_evaluated(inputs, without_keeping):
    """In bfloat16 the frozen part is another one in best/ than in training."""
    options = ["--freeze", "backbone", "--save_dtype", "bfloat16", "--dev_out", "dev.txt"]
    one = finetune(inputs, "run", *options)
    loss = json.loads((one / "result.json").read_text())["calibration"]
    without_keeping()
    other = finetune(inputs, "computed", *options)
    assert json.loads((other / "result.json").read_text())["calibration"] == loss


# --------------------------------------------------------------------------- with the rest of the program


def test_a_run_that_goes_on_has_the_same_bits(inputs):
    """What was kept is computed anew."""
    options = ["--freeze", "first:1", "--optimizer", "adamw", "--lr", "1e-3", "--hidden_dropout_prob", "0.2"]
    straight = finetune(inputs, "straight", *options)
    stopped = finetune(inputs, "stopped", *options, "--max_steps", "8", "--keep_state")
    assert run_llama.main(["--resume", "stopped", "--max_steps", "18"]) == 0
    assert lines(stopped, "steps.jsonl") == lines(straight, "steps.jsonl")
    a, b = best(straight), best(stopped)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_optimizer_has_no_state_of_what_is_frozen(inputs):
    job, _ = made(inputs, "--freeze", "first:1")
    held = [p for group in job.optimizer.param_groups for p in group["params"]]
    names = {name for name, p in job.model.named_parameters() if any(p is q for q in held)}
    assert names == {name for name, _ in job.model.named_parameters()
                     if name.startswith(("llama.layers.1.", "llama.norm", "classifier_head"))}
    trainer.fit(job, parse_args([]), CPU, max_steps=2, evaluate=False)
    assert len(job.optimizer.state) == len(names)


def test_autograd_keeps_nothing_of_the_frozen_part(inputs):
    """Neither its weights nor its activations are in the graph, and it runs without."""
    job, _ = made(inputs, "--freeze", "first:1", "--lr_steps", "10", "--batch_size", "8")
    layers = job.model.llama.layers
    graph = {}
    for i, layer in enumerate(layers):
        layer.register_forward_hook(
            lambda layer, x, y, i=i: graph.update({i: (torch.is_grad_enabled(), y.requires_grad)}))
    batch = job.task.make_batch(np.arange(4), 0)
    assert "below" not in batch, "a range test of a few steps does not compute all of train before"
    job.task.losses(batch)
    assert graph == {0: (False, False), 1: (True, True)}


def test_after_a_rollback_what_is_kept_still_holds(inputs, capfd, without_keeping):
    words = ["--option", "finetune", *inputs, *SETTINGS, "--freeze", "first:1", "--lr", "50", "--epochs", "6"]
    code = run_llama.main([*words, "--output_dir", "a"])
    assert code in (0, 3) and "Back to step" in capfd.readouterr().err
    without_keeping()
    assert run_llama.main([*words, "--output_dir", "b"]) == code
    assert len(lines("a", "events.jsonl")) == len(lines("b", "events.jsonl")) > 0
    assert all(torch.isfinite(value).all() for value in best(Path("a")).values())


def test_a_range_test_a_search_and_seeds_run_with_it(inputs, capfd, monkeypatch):
    assert run_llama.main(["--option", "lr_find", *inputs, *SETTINGS[:2], "--freeze", "backbone", "--lr_steps", "20",
                           "--device", "cpu", "--output_dir", "range"]) == 0
    assert "--freeze backbone" in capfd.readouterr().out.splitlines()[-1]
    finetune(inputs, "seeds", "--freeze", "first:1", "--seeds", "2", "--epochs", "1")
    assert run_llama.main(["--option", "search", *inputs, "--epochs", "1", "--space",
                           "freeze=none|embeddings|backbone|first:1 lr=1e-3", "--method", "grid", "--finalists", "0",
                           "--device", "cpu", "--output_dir", "search"]) == 0
    assert "freeze first:1" in capfd.readouterr().out
    assert run_llama.main(["--option", "search", *inputs, "--space", "freeze=none|first:3", "--device", "cpu"]) == 2
    assert "no run at freeze first:3: --freeze first:3: the model has 2 layers" in capfd.readouterr().err


def test_each_fold_has_the_activations_of_its_own_sentences(inputs, without_keeping):
    options = ["--freeze", "first:1", "--folds", "2", "--epochs", "1"]
    folds = finetune(inputs, "folds", *options)
    without_keeping()
    again = finetune(inputs, "again", *options)
    for name in ("fold-0", "fold-1"):
        assert_equal_runs(folds / name, again / name)


# --------------------------------------------------------------------------- what is said


@pytest.mark.parametrize("part, message", [
    ("first:3", "--freeze first:3: the model has 2 layers; freeze so many at most"), ("first:0", None),
    ("first:", None), ("first", None), ("first:-1", None), ("first:1.5", None), ("layers", None), ("all", None)])
def test_parts_that_there_are_not_are_refused(inputs, capfd, part, message):
    message = message or f"--freeze {part}: it must be none, embeddings, backbone, or first:K"
    try:
        code = run_llama.main(["--option", "finetune", *inputs, "--freeze", part, "--output_dir", "run"])
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capfd.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize("options, idle", [
    ("--layerwise_lr_decay 0.9 --grad_checkpoint", ["grad_checkpoint", "layerwise_lr_decay"]),
    ("--lr 1e-3 --head_lr 1e-2", ["lr"]), ("--lr 1e-3", []), ("--ema 0.9 --weight_decay 0.1", [])])
def test_options_about_layers_have_no_effect_where_none_is_trained(options, idle):
    words = ["--option", "finetune", *options.split()]
    assert [line.partition(":")[0] for line in no_effect(parse_args([*words, "--freeze", "backbone"]))] == [
        f"--{name}" for name in idle]
    assert not no_effect(parse_args([*words, "--freeze", "first:1"]))


def test_options_of_adapters_and_what_is_frozen(capfd):
    with pytest.raises(SystemExit):
        parse_args(["--option", "finetune", "--freeze", "backbone", "--lora_r", "4"])
    assert "--freeze backbone trains the head alone, and --lora_r asks for adapters" in capfd.readouterr().err
    for part, idle in (("embeddings", ["--freeze: beside adapters, nobody trains the embeddings"]), ("first:1", [])):
        assert no_effect(parse_args(["--option", "finetune", "--freeze", part, "--lora_r", "4"])) == idle


def test_the_disk_is_measured_with_a_file_as_large_as_the_model(inputs, monkeypatch, tmp_path):
    """A state of the head alone is so small that what a file costs at all would be taken for the price of its bytes."""
    sizes = []
    monkeypatch.setattr(estimate, "_seconds_per_byte", lambda place, n: sizes.append(n) or 0.0)
    job, config = made(inputs, "--freeze", "backbone")
    estimate.measure(job, config, CPU, {"dev": job.task.dev}, tmp_path)
    assert sizes[0] > 4 * sum(p.numel() for p in job.model.parameters())


def test_a_plan_says_what_is_frozen_and_where_it_is_kept(inputs, capfd, monkeypatch):
    def plan(*options):
        finetune(inputs, "out", "--plan", *options)
        return [line for line in capfd.readouterr().out.splitlines() if "frozen:" in line]

    assert plan() == []
    job, _ = made(inputs)
    numbers = {name: p.numel() for name, p in job.model.named_parameters()}
    first = sum(n for name, n in numbers.items() if name.startswith(tuple(PARTS["first:1"])))
    tokens = job.task.lengths.sum() + job.task.dev.lengths.sum()
    monkeypatch.setattr(kept, "BUDGET", 1 << 29)
    assert plan("--freeze", "first:1") == [
        f"plan :: frozen: the embeddings and the first layer, {first:,} parameters; what they give for train and "
        f"dev is computed once and takes {tokens * 32 * 4 / 2**20:.1f} MiB, kept in memory (up to 0.50 GiB)"]
    monkeypatch.setattr(kept, "BUDGET", tokens * 32 * 4 - 1)
    assert "kept in a file in out, mapped into memory, since it is more than 0.2 MiB" in plan("--freeze", "first:1")[0]
    assert "kept in memory" in plan("--freeze", "backbone")[0], "one vector of each sentence"
    assert plan("--freeze", "first:1", "--dropout", "0.1")[0].endswith("since --dropout is at work inside it")
    words = numbers["llama.tok_embeddings.weight"]
    assert plan("--freeze", "embeddings")[0].startswith(f"plan :: frozen: the embeddings, {words:,} parameters")
