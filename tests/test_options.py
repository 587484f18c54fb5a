"""Every option does what it says: from the command line to the number that it changes.

Each test runs the whole program on a tiny model and fails when its option does nothing. The numbers are worked out
here: the model's forward pass by a plain loop over sentences, the losses and the steps by PyTorch or by hand, the
schedules by their formulas. `tests/breaks.py` breaks the options one by one and looks whether a test sees it.
"""

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import exchange, tiny_sentences, write_split
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional as F

import run_llama
from commands import job as jobs
from config import options
from data import prepare
from training import state as states
from training.task import Evaluation

# Plain SGD without clipping, dropout and schedule: the step that anyone can do by hand. An option that is given again
# behind these replaces them.
BASE = ("--batch_size 32 --epochs 1 --lr 0.1 --optimizer sgd --momentum 0 --scheduler constant --max_grad_norm 0 "
        "--hidden_dropout_prob 0 --patience 0 --device cpu --dtype float32").split()
LR = 0.1

# --------------------------------------------------------------------------- a run that is watched


class Watched:
    """What happens in one training: the weights before, and of every step the batches, the random state in front of
    them, the gradients that the optimizer got and the weights behind it; the weights that were evaluated."""

    def __init__(self, run):
        self.model, self.before = run.model, weights_of(run.model)
        self.windows, self.random, self.gradients, self.after, self.evaluated = [], [], [], [], []
        self.batches = []  # of the step that is going on
        losses, evaluate, step = run.task.losses, run.task.evaluate, run.optimizer.step

        def watched_losses(batch):
            self.batches.append(batch)
            self.random.append(torch.get_rng_state())
            return losses(batch)

        def watched_evaluate():
            self.evaluated.append(weights_of(run.model))
            return evaluate()

        def watched_step():
            self.gradients.append({n: p.grad.to_dense().clone() for n, p in run.model.named_parameters()
                                   if p.grad is not None})
            step()
            self.after.append(weights_of(run.model))
            self.windows.append(self.batches)
            self.batches = []

        exchange(run.task, losses=watched_losses, evaluate=watched_evaluate)
        run.optimizer.step = watched_step

    def rows(self, step: int = 0) -> list[int]:
        """The sentences of a step, numbered as in the training file."""
        return torch.cat([batch["index"] for batch in self.windows[step]]).tolist()


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@dataclass
class Run:
    folder: Path
    code: int
    out: str
    err: str
    starts: list[Watched]

    def __getattr__(self, name):
        """What the (first) training did: see Watched."""
        return getattr(self.starts[0], name)

    def lines(self, log: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / log).read_text(encoding="utf-8").splitlines()]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines("steps.jsonl")]

    @property
    def rates(self) -> list[float]:
        return [line["lr"] for line in self.lines("steps.jsonl")]

    @property
    def epochs(self) -> list[dict]:
        return self.lines("epochs.jsonl")

    @property
    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))

    @property
    def best(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "best/model.safetensors")


def main(folder: Path, argv: list, change: Callable = lambda run: None) -> Run:
    """The program in this process, its trainings watched. `change(run)` may replace parts of a training before that."""
    starts, real = [], jobs.build_job

    def start(*arguments):
        run = real(*arguments)
        change(run)
        starts.append(Watched(run))
        return run

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(jobs, "build_job", start)
        code = run_llama.main([str(word) for word in argv])
    return Run(folder, code, out.getvalue(), err.getvalue(), starts)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """96 sentences to train on; `few` are 24, `rare` 96 of which 64 are of class 0, 24 of 1 and 8 of 2."""
    folder = tmp_path_factory.mktemp("data")
    rows = {name: tiny_sentences(n, seed) for seed, (name, n) in enumerate(
        {"train": 96, "dev": 30, "test": 33, "few": 24}.items())}
    many, wanted = tiny_sentences(300, 9), {0: 64, 1: 24, 2: 8}
    rows["rare"] = [row for label, n in wanted.items() for row in [row for row in many if row[0] == label][:n]]
    paths = {name: write_split(folder / f"toy-{name}.txt", content) for name, content in rows.items()}
    paths["label_names"] = folder / "toy-label-mapping.json"
    paths["label_names"].write_text('["bad", "fine", "good"]', encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def inputs(tiny_model, files) -> list:
    return ["--pretrained_model_path", tiny_model, "--train", files["train"], "--dev", files["dev"], "--test",
            files["test"]]


@pytest.fixture(scope="module")
def finetune(inputs, tmp_path_factory):
    """finetune("--option value ...", change): a run with BASE and these options; the same ones are run once."""
    done: dict[str, Run] = {}

    def run(text: str = "", change: Callable | None = None, code: int = 0) -> Run:
        if text not in done or change:
            folder = tmp_path_factory.mktemp("run")
            argv = ["--option", "finetune", *inputs, *BASE, *text.split(), "--output_dir", folder]
            found = main(folder, argv, change or (lambda run: None))
            assert found.code == code, found.err
            if change:
                return found
            done[text] = found
        return done[text]
    return run


@pytest.fixture(scope="module")
def few(files) -> str:
    """Six steps an epoch of four sentences."""
    return f"--train {files['few']} --batch_size 4 --n_layers 1"


# --------------------------------------------------------------------------- the judge


def plain_llama(folder: Path, tokens: list[int], n_layers: int = 2, causal: bool = True) -> torch.Tensor:
    """The last hidden states (T, D) of one sentence, from the weights of a Hugging Face folder."""
    w, shape = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads, length = shape["num_attention_heads"], shape["num_key_value_heads"], len(tokens)
    size = shape["hidden_size"] // heads
    angles = torch.outer(torch.arange(length), 1e4 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + shape["rms_norm_eps"]).sqrt() * w[name]

    def turned(x):  # (heads, T, size), pairs (j, j + size / 2)
        return x * angles.cos() + torch.cat((-x[..., size // 2:], x[..., : size // 2]), -1) * angles.sin()

    x = w["model.embed_tokens.weight"][tokens]
    later = torch.ones(length, length).triu(1) > 0
    hidden = torch.zeros(length, length).masked_fill(later, -torch.inf if causal else 0.0)
    for i in range(n_layers):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = ((h @ w[f"{at}self_attn.{name}_proj.weight"].T).view(length, -1, size).transpose(0, 1)
                   for name in "qkv")
        k, v = (turned(k).repeat_interleave(heads // kv_heads, 0), v.repeat_interleave(heads // kv_heads, 0))
        seen = (turned(q) @ k.transpose(1, 2) / size**0.5 + hidden).softmax(-1) @ v
        x = x + seen.transpose(0, 1).reshape(length, -1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight")


def read(path: Path) -> tuple[list[int], list[str]]:
    """Labels and sentences."""
    rows = [line.split(" ||| ") for line in path.read_text(encoding="utf-8").splitlines()]
    return [int(label) for label, _ in rows], [sentence for _, sentence in rows]


def encoder(folder: Path) -> Callable[[str], list[int]]:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: backend.encode(text, add_special_tokens=False).ids


POOLED = {"last": lambda h: h[-1], "first": lambda h: h[0], "mean": lambda h: h.mean(0), "max": lambda h: h.max(0)[0]}


def judged(run: Run, model: Path, train: Path, pooling: str = "last", cut: int = 128, **more):
    """Of the sentences of the first step: pooled hidden states (B, D), logits (B, C) of the head as it began (for an
    ordinal one its score), and labels (B,)."""
    labels, sentences = read(train)
    tokens, rows = encoder(model), run.rows()
    pooled = torch.stack([POOLED[pooling](plain_llama(model, tokens(sentences[i])[:cut], **more)) for i in rows])
    logits = pooled @ run.before["classifier_head.weight"].T + run.before.get("classifier_head.bias", 0.0)
    return pooled, logits, torch.tensor(labels)[rows]


def same(a, b, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


HEAD, NORM, WQ = "classifier_head.weight", "llama.norm.weight", "llama.layers.1.attention.wq.weight"

# --------------------------------------------------------------------------- the model


@pytest.mark.parametrize("text, more", [
    ("", {}),
    ("--n_layers 1", {"n_layers": 1}),
    ("--attention bidirectional --pooling mean", {"causal": False, "pooling": "mean"}),
    ("--pooling mean", {"pooling": "mean"}),
    ("--pooling max", {"pooling": "max"}),
    ("--pooling first", {"pooling": "first"}),
    ("--max_sentence_len 5", {"cut": 5}),
])
def test_the_first_loss_is_that_of_the_model_that_was_asked_for(finetune, tiny_model, files, text, more):
    """... and the head's gradient, from the same pooled states by PyTorch."""
    run = finetune(text)
    pooled, logits, labels = judged(run, tiny_model, files["train"], **more)
    want = F.cross_entropy(logits, labels).item()
    assert run.losses[0] == pytest.approx(want, abs=2e-6)
    assert not text or abs(want - finetune().losses[0]) > 2e-5, "a model without the option would be told from it"
    head = run.before[HEAD].clone().requires_grad_()
    F.cross_entropy(pooled @ head.T, labels).backward()
    same(run.gradients[0][HEAD], head.grad)


def test_the_head_has_a_bias_where_one_is_asked_for(finetune, tiny_model, files):
    """It begins at 0, and its gradient is the mean error of each class."""
    bias = "classifier_head.bias"
    run = finetune("--head_bias")
    _, logits, labels = judged(run, tiny_model, files["train"])
    assert not run.before[bias].any() and bias not in finetune().before and bias not in finetune().best
    same(run.gradients[0][bias], (logits.softmax(1) - F.one_hot(labels, 3)).mean(0))
    same(moved(run, bias), -LR * run.gradients[0][bias])
    same(run.best[bias], run.after[-1][bias])


def test_the_weights_are_those_of_the_path(finetune, tiny_model, files, tmp_path):
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: w * 1.5 for name, w in weights.items()}, other / "model.safetensors")
    run = finetune(f"--pretrained_model_path {other}")
    _, logits, labels = judged(run, other, files["train"])
    assert run.losses[0] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=2e-6)
    same(run.before["llama.tok_embeddings.weight"], weights["model.embed_tokens.weight"] * 1.5)


def test_the_tokens_are_those_of_the_tokenizer(finetune, tiny_model, files, tmp_path):
    """One without merges: a token a byte."""
    content = json.loads((tiny_model / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    run = finetune(f"--tokenizer {tmp_path / 'tokenizer.json'}")
    assert sum(line["tokens"] for line in run.lines("steps.jsonl")) == sum(
        len(sentence.encode()) for sentence in read(files["train"])[1])


def test_dropout_in_front_of_the_head_is_pytorchs(finetune, tiny_model, files):
    run = finetune("--hidden_dropout_prob 0.5")
    pooled, _, labels = judged(run, tiny_model, files["train"])
    torch.set_rng_state(run.random[0])
    logits = F.dropout(pooled, 0.5) @ run.before[HEAD].T
    assert run.losses[0] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=2e-6)
    assert abs(run.losses[0] - finetune().losses[0]) > 1e-4


def test_dropout_in_the_stack_is_drawn_in_all_of_its_places(finetune, monkeypatch):
    """Behind the embedding and in each layer's two branches a quarter of the numbers is 0 and the others are 4/3 of
    what they were; the attention gets the same probability. In training alone."""
    seen, in_attention, attention = {}, set(), F.scaled_dot_product_attention

    def look(name):
        def hook(module, given, out):
            if module.training:
                zero = out == 0
                seen[name] = float(zero.float().mean())
                same(out[~zero], given[0][~zero] * 4 / 3)
            else:
                assert torch.equal(out, given[0])
        return hook

    def change(run):
        for name, module in run.model.llama.named_modules():
            if isinstance(module, torch.nn.Dropout):
                module.register_forward_hook(look(name))

    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, dropout_p, **more: in_attention.add(
        dropout_p) or attention(*a, dropout_p=dropout_p, **more))
    run = finetune("--dropout 0.25", change)
    assert set(seen) == {"dropout", *(f"layers.{i}.{place}" for i in (0, 1) for place in (
        "attention.resid_dropout", "feed_forward.dropout"))}
    assert all(0.2 < part < 0.3 for part in seen.values()) and in_attention == {0.25, 0.0}
    assert abs(run.losses[0] - finetune().losses[0]) > 1e-4


def test_a_checkpointed_layer_is_computed_twice(finetune):
    def calls(text):
        found = []

        def change(run):
            run.model.llama.layers[0].feed_forward.register_forward_pre_hook(
                lambda module, given: found.append(1) if module.training else None)
        finetune(text, change)
        return len(found)

    assert (calls(""), calls("--grad_checkpoint")) == (3, 6)


def test_dtype_is_the_precision_of_the_products(finetune):
    def products(text):
        found = set()

        def change(run):
            run.model.llama.layers[0].attention.wq.register_forward_hook(lambda m, given, out: found.add(out.dtype))
        return finetune(text, change), found

    (single, plain), (half, rounded) = products("--dtype float32"), products("--dtype bfloat16")
    assert (plain, rounded) == ({torch.float32}, {torch.bfloat16})
    assert single.losses[0] != half.losses[0] == pytest.approx(single.losses[0], abs=1e-2)


def test_device_and_use_gpu_are_asked_for(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = ["--option", "finetune", *inputs, *BASE[: BASE.index("--device")], "--output_dir", tmp_path / "run"]
    refused = main(tmp_path, [*argv, "--device", "cuda:77"])
    assert refused.code == 2 and "--device cuda:77: this torch has no such device" in refused.err
    warned = main(tmp_path / "run", [*argv, "--use_gpu"])
    assert warned.code == 0 and "--use_gpu: there is no GPU" in warned.err
    assert json.loads((tmp_path / "run/args.json").read_text(encoding="utf-8"))["device"].startswith("cpu")


# --------------------------------------------------------------------------- the data


def test_each_split_is_read_from_its_file(finetune, files, tmp_path):
    names = tmp_path / "names.json"
    names.write_text('["x", "y", "z"]', encoding="utf-8")
    run = finetune(f"--train {files['few']} --dev {files['test']} --test {files['dev']} --label_names {names} "
                   f"--dev_out {tmp_path / 'd.txt'} --test_out {tmp_path / 'below/t.txt'}")
    assert sorted(run.rows()) == list(range(24))
    for out, file in ((tmp_path / "d.txt", files["test"]), (tmp_path / "below/t.txt", files["dev"])):
        assert read(out)[1] == read(file)[1], "sentence by sentence in the file's order"
        labels, predicted = np.array(read(file)[0]), np.array(read(out)[0])
        split = "dev" if out.name == "d.txt" else "test"
        assert run.result[split]["acc"] == pytest.approx((labels == predicted).mean())
    assert run.result["label_names"] == ["x", "y", "z"]
    assert not list(run.folder.glob("*-predictions.txt"))


def test_a_dataset_is_short_for_its_four_files(finetune, inputs, files, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "DATA_DIR", files["train"].parent)
    run = main(tmp_path / "run", ["--option", "finetune", *inputs[:2], *BASE, "--dataset", "toy", "--output_dir",
                                  tmp_path / "run"])
    assert run.code == 0 and run.losses == finetune().losses
    assert run.result["label_names"] == ["bad", "fine", "good"]
    assert len((run.folder / "test-predictions.txt").read_text(encoding="utf-8").splitlines()) == 33


def test_train_limit_takes_so_many_sentences_at_random(finetune):
    rows = sorted(finetune("--train_limit 20").rows())
    assert len(set(rows)) == 20, "one step, each sentence once"
    labels = {int(label) for batch in finetune("--train_limit 20").windows[0] for label in batch["labels"]}
    assert labels == {0, 1, 2}
    tokens = [batch["tokens"] for run in (finetune("--train_limit 20"), finetune("--train_limit 20 --seed 3"))
              for batch in run.windows[0]]
    assert tokens[0].shape != tokens[1].shape or not torch.equal(*tokens), "another seed, other sentences"


def test_batch_size_accumulation_and_epochs_say_how_many_sentences_when(finetune):
    run = finetune("--batch_size 8 --grad_accum 3 --epochs 2")
    assert [[len(batch["labels"]) for batch in window] for window in run.windows] == [[8, 8, 8]] * 8
    assert [line["epoch"] for line in run.epochs] == [0, 1]
    for epoch in (0, 1):
        assert sorted(row for step in range(4) for row in run.rows(4 * epoch + step)) == list(range(96))
    assert run.rows(0) != run.rows(4), "each epoch in another order"


def test_the_seed_draws_the_head_and_the_order(finetune):
    plain, other = finetune(), finetune("--seed 3")
    assert not torch.equal(plain.before[HEAD], other.before[HEAD]) and plain.rows() != other.rows()
    assert torch.equal(plain.before[WQ], other.before[WQ])


def test_auto_batch_puts_more_sentences_into_a_pass(finetune):
    plain, auto = (finetune(f"--batch_size 2 --grad_accum 16{more}") for more in ("", " --auto_batch"))
    assert [len(run.windows[1]) for run in (plain, auto)] == [16, 1]
    assert plain.rows(1) == auto.rows(1) and plain.losses == pytest.approx(auto.losses, abs=1e-5)


def test_train_acc_is_that_of_a_sample_as_large_as_dev_or_of_all(finetune, files, tmp_path):
    sample, full = (finetune(f"--epochs 2 --train_eval {kind}") for kind in ("sample", "full"))
    for run in (sample, full):
        assert run.losses == sample.losses
    labels, sentences = read(files["train"])
    (tmp_path / "in.txt").write_text("\n".join(sentences), encoding="utf-8")
    rows = main(tmp_path, ["--option", "predict", "--run", full.folder, "--input", tmp_path / "in.txt"]).out
    hits = sum(int(row[0]) == label for row, label in zip(rows.splitlines(), labels, strict=True))
    best = {line["epoch"]: line for line in full.epochs}[full.result["best_epoch"]]
    assert best["train_acc"] == pytest.approx(hits / 96)
    of_sample = [30 * line["train_acc"] for line in sample.epochs]
    assert of_sample == pytest.approx([round(n) for n in of_sample]), "30 sentences"
    assert of_sample != pytest.approx([30 * line["train_acc"] for line in full.epochs])


def test_a_balanced_sampler_draws_the_rare_class_as_often(finetune, files):
    counts = {}
    for text in ("", " --sampler balanced"):
        run = finetune(f"--train {files['rare']}{text}")
        drawn = [label for window in run.windows for batch in window for label in batch["labels"].tolist()]
        counts[text] = np.bincount(drawn).tolist()
    assert counts[""] == [64, 24, 8] and all(20 <= n <= 44 for n in counts[" --sampler balanced"])


@pytest.fixture(scope="module")
def augmented(finetune, files, tiny_model):
    """Of every training sentence: the file's tokens and those that a run with these options saw."""
    def pairs(text: str) -> list[tuple[list[int], list[int]]]:
        tokens, sentences = encoder(tiny_model), read(files["train"])[1]
        run = finetune(text)
        return [(tokens(sentences[i]), row[:length].tolist()) for window in run.windows for batch in window
                for i, row, length in zip(batch["index"], batch["tokens"], batch["lengths"], strict=True)]
    return pairs


def test_aug_delete_deletes_its_part_of_the_words(augmented):
    pairs = augmented("--aug_delete 0.4 --epochs 2")
    for own, seen in pairs:
        left = iter(own)
        assert all(token in left for token in seen), "what is left is in its order"
    assert sum(len(s) for _, s in pairs) / sum(len(o) for o, _ in pairs) == pytest.approx(0.6, abs=0.06)
    first, second = sorted(map(repr, pairs[:96])), sorted(map(repr, pairs[96:]))
    assert first != second, "other words in the second epoch"


def test_aug_swap_moves_words_and_no_more(augmented):
    pairs = augmented("--aug_swap 0.4")
    assert all(sorted(own) == sorted(seen) for own, seen in pairs)
    assert sum(own != seen for own, seen in pairs) > 60


def test_aug_replace_replaces_its_part_by_near_neighbours(augmented, tiny_model):
    pairs = augmented("--aug_replace 0.4")
    words = sorted({token for own, _ in pairs for token in own})
    vectors = F.normalize(load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"][words], dim=1)
    near = (vectors @ vectors.T).fill_diagonal_(-1).argsort(dim=1, descending=True)[:, :5]
    near = {word: {words[i] for i in row} for word, row in zip(words, near.tolist(), strict=True)}
    both = [(a, b) for own, seen in pairs for a, b in zip(own, seen, strict=True)]
    assert all(a == b or b in near[a] for a, b in both)
    assert sum(a != b for a, b in both) / len(both) == pytest.approx(0.4, abs=0.06)


# --------------------------------------------------------------------------- the loss


def test_label_smoothing_is_pytorchs(finetune, tiny_model, files):
    run = finetune("--label_smoothing 0.6")
    _, logits, labels = judged(run, tiny_model, files["train"])
    want = F.cross_entropy(logits, labels, label_smoothing=0.6).item()
    assert run.losses[0] == pytest.approx(want, abs=2e-6) and abs(want - finetune().losses[0]) > 1e-4


def test_class_weights_are_scikit_learns(finetune, tiny_model, files):
    from sklearn.utils.class_weight import compute_class_weight

    run = finetune(f"--train {files['rare']} --class_weights balanced")
    _, logits, labels = judged(run, tiny_model, files["rare"])
    weights = compute_class_weight("balanced", classes=np.arange(3), y=read(files["rare"])[0])
    losses = F.cross_entropy(logits, labels, weight=torch.tensor(weights).float(), reduction="none")
    assert run.losses[0] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert abs(run.losses[0] - F.cross_entropy(logits, labels).item()) > 0.01


def test_r_drop_is_the_divergence_of_two_passes(finetune, tiny_model, files):
    """Two dropouts drawn by PyTorch from the random state that the step began with."""
    run = finetune("--hidden_dropout_prob 0.5 --r_drop 100")
    pooled, _, labels = judged(run, tiny_model, files["train"])
    torch.set_rng_state(run.random[0])
    p, q = (F.log_softmax(F.dropout(pooled, 0.5) @ run.before[HEAD].T, 1)
            for _ in range(2))
    divergence = sum(F.kl_div(a, b, log_target=True, reduction="batchmean") for a, b in ((p, q), (q, p)))
    want = (F.nll_loss(p, labels) + F.nll_loss(q, labels)) / 2 + 100 * divergence / 2
    assert run.losses[0] == pytest.approx(want.item(), abs=1e-5)
    assert 100 * divergence > 1e-3, "it would be missed"


def test_the_ordinal_loss_is_that_of_a_cumulative_link(finetune, tiny_model, files):
    """P(y <= k) = sigmoid(cut_k - score), with the cuts where the three classes are equally likely at score 0."""
    run = finetune("--loss ordinal")
    _, scores, labels = judged(run, tiny_model, files["train"])
    below = torch.sigmoid(torch.tensor([-math.log(2), math.log(2)]) - scores)
    below = torch.cat((torch.zeros(len(scores), 1), below, torch.ones(len(scores), 1)), 1)
    assert run.losses[0] == pytest.approx(F.nll_loss(below.diff(dim=1).log(), labels).item(), abs=2e-6)
    assert abs(run.losses[0] - finetune().losses[0]) > 1e-4


def test_ordinal_adds_the_scores_of_ordered_classes(finetune, files):
    from sklearn.metrics import cohen_kappa_score, mean_absolute_error

    run = finetune("--ordinal --lr 1")
    labels, predicted = read(files["dev"])[0], read(run.folder / "dev-predictions.txt")[0]
    mae, qwk = mean_absolute_error(labels, predicted), cohen_kappa_score(labels, predicted, weights="quadratic")
    assert (run.result["dev"]["mae"], run.result["dev"]["qwk"]) == pytest.approx((mae, qwk))
    off = np.mean(np.abs(np.subtract(labels, predicted)) <= 1)
    assert f"dev mae :: {mae:.3f}, qwk :: {qwk:.3f}, off by one :: {off:.3f}" in run.out
    assert "mae" not in finetune().result["dev"]


# --------------------------------------------------------------------------- the step


def moved(run: Run, name: str, step: int = 0) -> torch.Tensor:
    return run.after[step][name] - (run.after[step - 1] if step else run.before)[name]


def test_a_step_of_sgd_is_the_gradient_times_the_rate(finetune):
    for text, lr in (("", 0.1), ("--lr 0.02", 0.02)):
        run = finetune(text)
        assert run.rates == [lr] * 3
        for name, gradient in run.gradients[0].items():
            same(moved(run, name), -lr * gradient)


@pytest.mark.parametrize("text, more", [
    ("--momentum 0.8", {"momentum": 0.8}),
    ("--momentum 0.8 --nesterov", {"momentum": 0.8, "nesterov": True}),
])
def test_momentum_is_that_of_torchs_sgd(finetune, text, more):
    run = finetune(text)
    parameter = torch.nn.Parameter(run.before[WQ].clone())
    sgd = torch.optim.SGD([parameter], lr=LR, **more)
    for gradients in run.gradients:
        parameter.grad = gradients[WQ]
        sgd.step()
    same(run.after[-1][WQ], parameter.data)
    plain = run.before[WQ] - LR * sum(gradients[WQ] for gradients in run.gradients)
    assert (plain - parameter.data).abs().max() > 1e-5


def test_adamw_is_torchs_adam_with_the_decay_behind_it(finetune):
    """The paper's efficient form adds eps before the second moment's bias is taken away."""
    run = finetune("--optimizer adamw --lr 1e-2 --weight_decay 0.1")
    for name in (WQ, NORM):
        parameter = torch.nn.Parameter(run.before[name].clone())
        adam = torch.optim.Adam([parameter], lr=1e-2)
        for t, gradients in enumerate(run.gradients, 1):
            adam.param_groups[0]["eps"] = 1e-6 / math.sqrt(1 - 0.999**t)
            parameter.grad = gradients[name]
            adam.step()
            if name == WQ:
                parameter.data *= 1 - 1e-2 * 0.1
        same(run.after[-1][name], parameter.data)


def test_lion_goes_by_the_sign(finetune):
    run = finetune("--optimizer lion --lr 1e-3")
    same(moved(run, WQ), -1e-3 * run.gradients[0][WQ].sign())


def test_adafactor_divides_by_its_rows_and_columns(finetune):
    run = finetune("--optimizer adafactor --lr 1e-2")
    g = run.gradients[0][WQ]
    square = g.square() + 1e-30
    update = g / (square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()).sqrt()
    update /= max(1.0, update.square().mean().sqrt().item())
    same(moved(run, WQ), -1e-2 * update)


@pytest.mark.parametrize("text, of_norms", [("", 0.0), (" --decay_all", 0.5)])
def test_weight_decay_takes_its_part_of_the_weights(finetune, text, of_norms):
    """Not of norms and biases, unless all are to decay."""
    run = finetune(f"--weight_decay 0.5{text}")
    for name, decay in ((WQ, 0.5), (HEAD, 0.5), (NORM, of_norms)):
        same(run.after[0][name], (run.before[name] - LR * run.gradients[0][name]) * (1 - LR * decay))


def test_the_gradients_norm_is_clipped_as_pytorch_does(finetune):
    plain, clipped = finetune(), finetune("--max_grad_norm 0.05")
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in plain.gradients[0].values()]
    for p, gradient in zip(parameters, plain.gradients[0].values(), strict=True):
        p.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.05)
    assert norm > 0.1, "there is something to clip"
    for p, ours in zip(parameters, clipped.gradients[0].values(), strict=True):
        same(ours, p.grad)
    for run in (plain, clipped):
        assert run.lines("steps.jsonl")[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_the_gradients_numbers_are_clipped_as_pytorch_does(finetune):
    plain, clipped = finetune(), finetune("--max_grad_value 0.003")
    parameter = torch.nn.Parameter(plain.before[HEAD].clone())
    parameter.grad = plain.gradients[0][HEAD].clone()
    assert parameter.grad.abs().max() > 0.01
    torch.nn.utils.clip_grad_value_([parameter], 0.003)
    same(clipped.gradients[0][HEAD], parameter.grad)
    same(moved(clipped, HEAD), -LR * parameter.grad)


def test_the_head_has_its_own_rate_and_each_layer_less_than_the_one_above(finetune):
    run = finetune("--head_lr 0.5 --layerwise_lr_decay 0.5")
    rates = {HEAD: 0.5, NORM: LR, WQ: LR,
             "llama.layers.0.attention.wq.weight": LR / 2, "llama.tok_embeddings.weight": LR / 4}
    for name, lr in rates.items():
        same(moved(run, name), -lr * run.gradients[0][name])


@pytest.mark.parametrize("kind, factor", [("linear", 4.0), ("sqrt", 2.0)])
def test_the_rates_grow_with_the_batch(finetune, kind, factor):
    run = finetune(f"--lr_scaling {kind} --base_batch_size 8 --batch_size 16 --grad_accum 2 --lr 0.01 --head_lr 0.02")
    assert run.rates == pytest.approx([0.02 * factor] * 3)
    same(moved(run, WQ), -0.01 * factor * run.gradients[0][WQ])


def test_a_moving_average_is_what_is_evaluated_and_what_best_holds(finetune):
    run = finetune("--ema 0.5 --epochs 2")
    at = next(i for i, line in enumerate(run.epochs) if line["epoch"] == run.result["best_epoch"])
    raw = run.after[3 * at + 2]
    for name in (HEAD, WQ, NORM, "llama.tok_embeddings.weight"):
        same(run.best[name], run.evaluated[at][name], atol=0)
        assert (run.best[name] - raw[name]).abs().max() > 1e-6, "the raw weights go on, and are not kept"
        assert not torch.equal(run.best[name], run.before[name])


def test_the_moving_average_warms_up(finetune):
    """mean = d_t mean + (1 - d_t) weights behind update t = 0, 1, ..., with d_t = min(d, (1 + t) / (10 + t))."""
    run = finetune("--ema 0.3 --batch_size 16")
    for name in (HEAD, WQ):
        mean = run.before[name]
        for t, after in enumerate(run.after):
            d = min(0.3, (1 + t) / (10 + t))
            mean = d * mean + (1 - d) * after[name]
        assert len(run.after) == 6 and 4 / 13 > 0.3 > 3 / 12, "both sides of the minimum occur"
        same(run.best[name], mean)


# --------------------------------------------------------------------------- the schedule


def cos(x: float) -> float:
    """Half a cosine from 1 at 0 down to 0 at 1."""
    return (1 + math.cos(math.pi * x)) / 2


# Two epochs of six steps, i = 0 .. 11; the default warmup, 6% of 12 steps, is none.
SCHEDULES = {
    "--scheduler constant": lambda i: 1,
    "--scheduler linear": lambda i: 1 - i / 12,
    "--scheduler linear --min_lr_ratio 0.2": lambda i: 0.2 + 0.8 * (1 - i / 12),
    "--scheduler cosine": lambda i: 1e-3 + 0.999 * cos(i / 12),
    "--scheduler cosine --min_lr_ratio 0.1": lambda i: 0.1 + 0.9 * cos(i / 12),
    "--scheduler cosine_restarts --min_lr_ratio 0 --cycles 2": lambda i: cos(i % 6 / 6),
    "--scheduler cosine_restarts --min_lr_ratio 0 --cycles 2 --cycle_mult 2":
        lambda i: cos(i / 4) if i < 4 else cos((i - 4) / 8),
    "--scheduler cosine_restarts --min_lr_ratio 0 --cycles 2 --cycle_decay 0.25":
        lambda i: cos(i % 6 / 6) * (1 if i < 6 else 0.25),
    "--scheduler linear_cosine --min_lr_ratio 0.1": lambda i: (1 - i / 12) * cos(i / 12) + 0.1,
    "--scheduler step --step_size 5": lambda i: 0.1 ** (i // 5),
    "--scheduler step --step_size 3 --gamma 0.5": lambda i: 0.5 ** (i // 3),
    "--scheduler step --step_size 1 --gamma 0.5 --schedule_every epoch": lambda i: 0.5 ** (i // 6),
    "--scheduler multistep --milestones 2,7": lambda i: 0.1 ** ((i >= 2) + (i >= 7)),
    "--scheduler exponential --gamma 0.9": lambda i: 0.9**i,
    "--scheduler natural_exp --decay_rate 0.3": lambda i: math.exp(-0.3 * i),
    "--scheduler inverse_time --decay_rate 0.3": lambda i: 1 / (1 + 0.3 * i),
    "--scheduler polynomial --power 3": lambda i: (1 - i / 12) ** 3,
    "--scheduler inverse_sqrt --warmup_steps 4": lambda i: (i + 1) / 4 if i < 4 else math.sqrt(4 / i),
    "--scheduler cyclic --cycles 2": lambda i: 0.1 + 0.9 * (1 - abs(i % 6 - 3) / 3),
    "--scheduler cyclic --cycles 2 --cyclic_mode triangular2":
        lambda i: 0.1 + 0.9 * (1 - abs(i % 6 - 3) / 3) * (1 if i < 6 else 0.5),
    "--scheduler one_cycle --pct_start 0.5":
        lambda i: 1 - 0.96 * cos(i / 5) if i <= 5 else 4e-6 + (1 - 4e-6) * cos((i - 5) / 6),
    "--scheduler wsd --decay_fraction 0.5": lambda i: min(1, (12 - i) / 6),
    "--scheduler linear --schedule_every epoch": lambda i: 1 if i < 6 else 0.5,
    "--scheduler constant --warmup_steps 3": lambda i: min(1, (i + 1) / 3),
    "--scheduler constant --warmup_epochs 0.5": lambda i: min(1, (i + 1) / 3),
    "--scheduler constant --warmup_ratio 0.25": lambda i: min(1, (i + 1) / 3),
    "--scheduler constant --warmup_steps 3 --warmup_start 0.4": lambda i: min(1, 0.4 + 0.6 * (i + 1) / 3),
    "--scheduler constant --warmup_steps 3 --warmup_start 0.4 --warmup_kind constant": lambda i: 0.4 if i < 3 else 1,
}


@pytest.mark.parametrize("text", SCHEDULES)
def test_the_rate_of_each_step_is_the_schedules_formula(finetune, few, text):
    run = finetune(f"{few} --epochs 2 --guards off {text}")  # at this rate a rollback may come
    assert run.rates == pytest.approx([LR * SCHEDULES[text](i) for i in range(12)], rel=1e-9)
    assert "no effect" not in run.err
    same(moved(run, NORM, 7), -run.rates[7] * run.gradients[7][NORM])


def scores(**series):
    """A change that makes a run's evaluations give these values, one after another, the last one from then on."""
    def change(run):
        calls = []

        def evaluate():
            calls.append(1)
            found = {"train_acc": 0.5, "dev_loss": 1.0, "dev_acc": 0.5} | {
                name: values[min(len(calls), len(values)) - 1] for name, values in series.items()}
            return Evaluation(found, found.pop("collapsed", ""))
        exchange(run.task, evaluate=evaluate)
    return change


STEP_AN_EPOCH = "--batch_size 24 --epochs 6"


@pytest.mark.parametrize("text, want", [
    ("--plateau_patience 1 --gamma 0.2", [1, 1, 1, 0.2, 0.2, 0.04]),
    ("--plateau_patience 2 --gamma 0.2", [1, 1, 1, 1, 0.2, 0.2]),
    ("--plateau_patience 0 --gamma 0.2 --min_lr_ratio 0.1", [1, 1, 0.2, 0.1, 0.1, 0.1]),
])
def test_plateau_cuts_the_rate_when_the_monitor_stands_still(finetune, few, text, want):
    run = finetune(f"{few} {STEP_AN_EPOCH} --scheduler plateau {text}", scores(dev_acc=[0.5]))
    assert run.rates == pytest.approx([LR * factor for factor in want])


def test_plateau_goes_by_the_monitor(finetune, few):
    """The loss falls all the time and the accuracy with it."""
    fall = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    for monitor, want in (("dev_loss", [1] * 6), ("dev_acc", [1, 1, 0.5, 0.25, 0.125, 0.0625])):
        run = finetune(f"{few} {STEP_AN_EPOCH} --scheduler plateau --plateau_patience 0 --monitor {monitor}",
                       scores(dev_acc=fall, dev_loss=fall))
        assert run.rates == pytest.approx([LR * factor for factor in want])


# --------------------------------------------------------------------------- stopping and guards


SERIES = {"dev_acc": [0.1, 0.9, 0.5, 0.5, 0.5, 0.5], "dev_f1": [0.1, 0.1, 0.9, 0.5, 0.5, 0.5],
          "dev_loss": [0.9, 0.9, 0.9, 0.1, 0.5, 0.5], "dev_mae": [0.9, 0.9, 0.9, 0.9, 0.1, 0.5],
          "dev_qwk": [0.1, 0.1, 0.1, 0.1, 0.1, 0.9]}


@pytest.mark.parametrize("monitor, best", list(zip(SERIES, range(1, 6), strict=True)))
def test_the_monitor_chooses_the_best_evaluation(finetune, few, monitor, best):
    run = finetune(f"{few} {STEP_AN_EPOCH} --monitor {monitor}", scores(**SERIES))
    assert run.result["best_epoch"] == best and len(run.epochs) == 6
    same(run.best[HEAD], run.after[best][HEAD], atol=0)


@pytest.mark.parametrize("text, values, n, best", [
    ("--patience 2", [0.5, 0.6, 0.6, 0.5, 0.9], 4, 1),
    ("--patience 3", [0.5, 0.6, 0.6, 0.5, 0.9], 6, 4),
    ("--patience 0", [0.5, 0.4], 6, 0),
    ("--patience 2 --min_delta 0.15", [0.5, 0.55, 0.6, 0.9], 3, 0),
    ("--patience 2", [0.5, 0.55, 0.6, 0.9], 6, 3),
])
def test_patience_and_min_delta_say_when_to_stop(finetune, few, text, values, n, best):
    run = finetune(f"{few} {STEP_AN_EPOCH} {text}", scores(dev_acc=values))
    assert len(run.epochs) == n and run.result["best_epoch"] == best
    assert run.result["stopped"] == ("finished" if n == 6 else "patience")


def test_eval_every_is_a_part_of_an_epoch(finetune, few):
    run = finetune(f"{few} --eval_every 0.5 --epochs 2")
    assert [(line["epoch"], line["step"]) for line in run.epochs] == [(0.5, 3), (1.0, 6), (1.5, 9), (2.0, 12)]


@pytest.mark.parametrize("n, ends", [(8, [6, 8]), (6, [6]), (4, [4]), (99, [6, 12, 18])])
def test_max_steps_ends_the_run_there_evaluated_with_the_schedule_over_them(finetune, few, n, ends):
    run = finetune(f"{few} --epochs 3 --max_steps {n} --scheduler linear --warmup_ratio 0.5")
    total, warmup = ends[-1], ends[-1] // 2
    assert [line["step"] for line in run.epochs] == ends
    assert [line["epoch"] for line in run.epochs] == [i if end % 6 == 0 else round(end / 6, 3)
                                                      for i, end in enumerate(ends)]
    factors = [(i + 1) / warmup if i < warmup else 1 - (i - warmup) / (total - warmup) for i in range(total)]
    same(run.rates, [LR * factor for factor in factors])
    assert (run.result["steps"], run.result["stopped"]) == (total, "finished")
    assert (run.epochs[-1]["update_ratio"] is not None) and run.result["best_epoch"] in [e["epoch"] for e in run.epochs]


def test_save_every_keeps_a_state_of_these_steps(finetune, few, monkeypatch):
    saved, real = [], states.save_state
    monkeypatch.setattr(states, "save_state", lambda last, step, *more: saved.append(step) or real(last, step, *more))
    for text, want in (("", [0, 6]), (" --save_every 2", [0, 2, 4, 6])):
        saved.clear()
        finetune(f"{few}{text}", lambda run: None)
        assert sorted(set(saved)) == want


def poisoned(bad: set[int], make: Callable = lambda losses: losses * math.nan) -> Callable:
    """A change that spoils the losses of these passes, counted from 1 over the whole process of training."""
    def change(run):
        seen, real = [], run.task.losses

        def losses(batch):
            seen.append(1)
            return make(real(batch)) if len(seen) in bad else real(batch)
        exchange(run.task, losses=losses)
    return change


def test_the_guards_skip_a_step_that_is_not_finite(finetune):
    on = finetune("", poisoned({2}))
    assert on.result["skipped_steps"] == 1 and [e["event"] for e in on.lines("events.jsonl")] == ["skipped"]
    assert len(on.after) == 2 and all(torch.isfinite(w).all() for w in on.after[-1].values())
    off = finetune("--guards off", poisoned({2}), code=2)
    assert "is not finite" in off.err and not off.lines("events.jsonl")
    assert len(off.after) == 3 and not torch.isfinite(off.after[-1][HEAD]).any()


def test_a_rollback_goes_on_from_the_last_good_state_at_a_lower_rate(finetune):
    """Three steps of the second epoch are not finite: back to the end of the first, with other steps than before."""
    run = finetune("--epochs 3 --save_every 100", poisoned({4, 5, 6, 7, 8}))
    events = [e["event"] for e in run.lines("events.jsonl")]
    assert events.count("rollback") == run.result["rollbacks"] >= 1
    assert run.rates[:3] == [LR] * 3 and len(run.rates) == 9
    assert all(0 < lr <= LR / 2 for lr in run.rates[3:]), "what diverged at this rate is not tried again at it"
    last = len(run.after) - 1
    same(moved(run, WQ, last), -run.rates[-1] * run.gradients[last][WQ])
    assert not [e for e in finetune("--epochs 3 --guards off", poisoned({4, 5, 6, 7, 8})).lines("events.jsonl")]


def test_a_collapse_is_rolled_back(finetune):
    """The second evaluation finds one class alone and a far lower accuracy, and the loss of its epoch is higher."""
    def change(run):
        scores(dev_acc=[0.9, 0.2, 0.95], collapsed=["", "every prediction is bad", ""])(run)
        real, evaluate, calls = run.task.losses, run.task.evaluate, []

        def found():
            calls.append(1)
            return evaluate()
        exchange(run.task, evaluate=found, losses=lambda batch: real(batch) * (2 if len(calls) == 1 else 1))

    options = "--batch_size 24 --epochs 2 --optimizer adamw --lr 1e-2"  # four steps an epoch
    run = finetune(options, change)
    assert [e["event"] for e in run.lines("events.jsonl")] == ["rollback"] and run.result["rollbacks"] == 1
    assert run.rates[3] == 1e-2 and run.rates[4] <= 5e-3 and [e["dev_acc"] for e in run.epochs] == [0.9, 0.95]
    off = finetune(f"{options} --guards off", change)
    assert not off.lines("events.jsonl") and [e["dev_acc"] for e in off.epochs] == [0.9, 0.2]


def test_detect_anomaly_names_the_operation(finetune):
    """A loss of 0 whose gradient is 0 times infinity."""
    def make(losses):
        return losses + 0 * (losses - losses.detach()).sqrt()

    run = finetune("--detect_anomaly", poisoned({2}, make), code=2)
    assert "--detect_anomaly: Function 'SqrtBackward0' returned nan values" in run.err
    torch.autograd.set_detect_anomaly(False)
    assert finetune("", poisoned({2}, make)).result["skipped_steps"] == 1


def test_check_gradients_refuses_a_loss_that_depends_on_the_pass(finetune):
    def change(run):
        real = run.task.losses
        exchange(run.task, losses=lambda batch: real(batch) * len(batch["labels"]))

    run = finetune("--check_gradients", change, code=2)
    assert "--check_gradients: micro-batches change the gradient" in run.err


@pytest.mark.parametrize("learns", [True, False])
def test_overfit_batch_says_whether_one_batch_can_be_memorised(finetune, learns):
    def change(run):
        if not learns:  # the gradient is that of nothing
            real = run.task.losses
            exchange(run.task, losses=lambda batch: real(batch).detach() + 0 * real(batch))

    run = finetune("--overfit_batch --optimizer adamw --lr 1e-2", change)
    line = next(line for line in run.out.splitlines() if line.startswith("overfit :: one batch"))
    assert ("it can memorise it" in line) is learns and ("IT CANNOT MEMORISE IT" in line) is not learns


# --------------------------------------------------------------------------- the range test


def test_lr_find_goes_from_lr_min_to_lr_max_in_lr_steps_lr_repeats_times(inputs, tmp_path):
    run = main(tmp_path / "find", ["--option", "lr_find", *inputs, *BASE, "--lr_min", "1e-4", "--lr_max", "1e-2",
                                   "--lr_steps", "12", "--lr_repeats", "2", "--output_dir", tmp_path / "find"])
    assert run.code == 0, run.err
    with open(tmp_path / "find/lr_find.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == pytest.approx([*np.geomspace(1e-4, 1e-2, 12)] * 2)
    assert [row["seed"] for row in rows] == ["1337"] * 12 + ["1338"] * 12
    assert len(run.starts) == 2 and "confirm" not in run.out
    for at in (0, 11):
        assert float(rows[at]["lr"]) == pytest.approx(1e-4 * 100 ** (at / 11))
        same(moved(run, NORM, at), -float(rows[at]["lr"]) * run.gradients[at][NORM])


# --------------------------------------------------------------------------- generation and prompting


@pytest.fixture(scope="module")
def talker(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with larger weights and an output layer of its own, so that it has something to say."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("talker") / "model"))
    weights = {name: w * 4 if w.dim() > 1 and "embed" not in name else w
               for name, w in load_file(folder / "model.safetensors").items()}
    table = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
    save_file(weights, folder / "model.safetensors")
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**shape, "tie_word_embeddings": False}), encoding="utf-8")
    return folder


def plain_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    return plain_llama(folder, tokens) @ load_file(folder / "model.safetensors")["lm_head.weight"].T


def test_generate_continues_the_prefix_into_the_files(talker, tmp_path):
    """So many tokens; the greedy text is the plain model's, the other one goes its own way."""
    argv = ["--option", "generate", "--pretrained_model_path", talker, "--prefix", "the film is", "--device", "cpu",
            "--dtype", "float32", "--max_new_tokens", "12", "--generated_sentence_low_temp_out", "low.txt",
            "--generated_sentence_high_temp_out", "high.txt"]
    assert main(tmp_path, argv).code == 0
    tokens = encoder(talker)("the film is")
    for _ in range(12):
        tokens.append(int(plain_logits(talker, tokens)[-1].argmax()))
    want = Tokenizer.from_file(str(talker / "tokenizer.json")).decode(tokens)
    low, high = (Path(name).read_text(encoding="utf-8") for name in ("low.txt", "high.txt"))
    assert low == want and high.startswith("the film is") and high != low
    assert sorted(p.name for p in Path().iterdir()) == ["high.txt", "low.txt"]


def test_prompt_asks_the_question_that_was_given(inputs, talker, files, tmp_path):
    """Each name's log-probability behind sentence and question, by the plain model; the labels' names are in it."""
    predicted, tokens = {}, encoder(talker)
    for text in ("It is {labels}:", "very long"):
        run = main(tmp_path, ["--option", "prompt", *inputs, "--pretrained_model_path", talker, "--device", "cpu",
                              "--dtype", "float32", "--question", text, "--dev_out", "dev.txt"])
        assert run.code == 0, run.err
        want = []
        for sentence in read(files["dev"])[1]:
            start, scores = tokens(sentence) + tokens(" " + text.replace("{labels}", "bad, fine, or good")), []
            for name in ("bad", "fine", "good"):
                ids = tokens(" " + name)
                log_p = plain_logits(talker, start + ids).log_softmax(-1)
                scores.append(sum(log_p[len(start) - 1 + i, token] for i, token in enumerate(ids)))
            want.append(int(torch.stack(scores).argmax()))
        predicted[text] = read(Path("dev.txt"))[0]
        assert predicted[text] == want
    assert len(set(map(tuple, predicted.values()))) == 2, "the two questions have other answers"


# --------------------------------------------------------------------------- is every option in a test?

# Test -> the options that it would miss; in this file where no other is named.
TESTED = {
    "test_the_first_loss_is_that_of_the_model_that_was_asked_for": "n_layers attention pooling max_sentence_len",
    "test_the_head_has_a_bias_where_one_is_asked_for": "head_bias",
    "test_export::test_llama_cpp_goes_on_with_our_tokens": "format gguf_type",
    "test_the_weights_are_those_of_the_path": "pretrained_model_path",
    "test_the_tokens_are_those_of_the_tokenizer": "tokenizer",
    "test_dropout_in_front_of_the_head_is_pytorchs": "hidden_dropout_prob",
    "test_dropout_in_the_stack_is_drawn_in_all_of_its_places": "dropout",
    "test_a_checkpointed_layer_is_computed_twice": "grad_checkpoint",
    "test_freeze::test_what_is_frozen_stays_and_the_rest_is_trained_as_pytorch_does": "freeze",
    "test_dtype_is_the_precision_of_the_products": "dtype",
    "test_device_and_use_gpu_are_asked_for": "device use_gpu",
    "test_own_data::test_the_columns_that_were_typed_are_read": "text_column label_column",
    "test_each_split_is_read_from_its_file": "train dev test label_names dev_out test_out",
    "test_a_dataset_is_short_for_its_four_files": "dataset",
    "test_train_limit_takes_so_many_sentences_at_random": "train_limit",
    "test_batch_size_accumulation_and_epochs_say_how_many_sentences_when": "batch_size grad_accum epochs",
    "test_auto_batch_puts_more_sentences_into_a_pass": "auto_batch",
    "test_train_acc_is_that_of_a_sample_as_large_as_dev_or_of_all": "train_eval",
    "test_a_balanced_sampler_draws_the_rare_class_as_often": "sampler",
    "test_aug_delete_deletes_its_part_of_the_words": "aug_delete",
    "test_aug_swap_moves_words_and_no_more": "aug_swap",
    "test_aug_replace_replaces_its_part_by_near_neighbours": "aug_replace",
    "test_label_smoothing_is_pytorchs": "label_smoothing",
    "test_class_weights_are_scikit_learns": "class_weights",
    "test_r_drop_is_the_divergence_of_two_passes": "r_drop",
    "test_the_ordinal_loss_is_that_of_a_cumulative_link": "loss",
    "test_ordinal_adds_the_scores_of_ordered_classes": "ordinal",
    "test_a_step_of_sgd_is_the_gradient_times_the_rate": "lr optimizer",
    "test_momentum_is_that_of_torchs_sgd": "momentum nesterov",
    "test_adamw_is_torchs_adam_with_the_decay_behind_it": "optimizer",
    "test_lion_goes_by_the_sign": "optimizer",
    "test_adafactor_divides_by_its_rows_and_columns": "optimizer",
    "test_weight_decay_takes_its_part_of_the_weights": "weight_decay decay_all",
    "test_the_gradients_norm_is_clipped_as_pytorch_does": "max_grad_norm",
    "test_the_gradients_numbers_are_clipped_as_pytorch_does": "max_grad_value",
    "test_the_head_has_its_own_rate_and_each_layer_less_than_the_one_above": "head_lr layerwise_lr_decay",
    "test_the_rates_grow_with_the_batch": "lr_scaling base_batch_size",
    "test_the_moving_average_warms_up": "ema",
    "test_the_rate_of_each_step_is_the_schedules_formula":
        "scheduler warmup_steps warmup_epochs warmup_ratio warmup_kind warmup_start min_lr_ratio schedule_every cycles "
        "cycle_mult cycle_decay cyclic_mode step_size milestones gamma decay_rate power pct_start decay_fraction",
    "test_plateau_cuts_the_rate_when_the_monitor_stands_still": "plateau_patience",
    "test_the_monitor_chooses_the_best_evaluation": "monitor",
    "test_patience_and_min_delta_say_when_to_stop": "patience min_delta",
    "test_eval_every_is_a_part_of_an_epoch": "eval_every",
    "test_max_steps_ends_the_run_there_evaluated_with_the_schedule_over_them": "max_steps",
    "test_clock::test_max_minutes_is_so_many_steps_and_the_schedule_over_them": "max_minutes",
    "test_longer::test_a_finished_run_keeps_its_state_only_where_it_is_asked_to": "keep_state",
    "test_longer::test_best_in_bfloat16_is_half_as_large_and_is_what_was_evaluated": "save_dtype",
    "test_save_every_keeps_a_state_of_these_steps": "save_every",
    "test_the_guards_skip_a_step_that_is_not_finite": "guards",
    "test_detect_anomaly_names_the_operation": "detect_anomaly",
    "test_check_gradients_refuses_a_loss_that_depends_on_the_pass": "check_gradients",
    "test_overfit_batch_says_whether_one_batch_can_be_memorised": "overfit_batch",
    "test_lr_find_goes_from_lr_min_to_lr_max_in_lr_steps_lr_repeats_times": "lr_min lr_max lr_steps lr_repeats",
    "test_generate_continues_the_prefix_into_the_files":
        "prefix max_new_tokens generated_sentence_low_temp_out generated_sentence_high_temp_out",
    "test_prompt_asks_the_question_that_was_given": "question",
    "test_run_llama::test_finetune_leaves_a_run_that_evaluate_and_predict_use": "option run input",
    "test_the_seed_draws_the_head_and_the_order": "seed",
    "test_run_llama::test_several_runs_print_the_mean_and_deviation_of_their_results": "seeds folds",
    "test_run_llama::test_a_fold_alone_is_the_fold_among_the_others_so_that_it_can_be_resumed": "fold",
    "test_start::test_a_new_head_takes_the_llama_alone": "new_head",
    "test_run_llama::test_the_switches_of_pytorch_are_set_and_set_back": "deterministic",
    "test_run_llama::test_a_run_with_c_is_the_run_without": "kernels",
    "test_run_llama::test_a_run_folder_that_holds_a_run_is_refused": "output_dir overwrite",
    "test_resume::test_a_signal_saves_and_says_how_to_go_on": "resume",
    "test_plan::test_a_plan_says_what_a_run_does": "plan",
    "test_pictures::test_plots_off_draws_none": "plots",
    "test_predict::test_output_format_says_how_the_answers_are_written": "output_format",
    "test_predict::test_top_k_gives_the_likeliest_first": "top_k",
    "test_predict::test_threshold_says_unsure_below_it": "threshold",
    "test_serve::test_the_service_answers_as_predict_does_and_ends_on_a_signal": "host port",
    "test_lr_find::test_repeats_give_an_interval_and_confirm_ranks_by_dev_loss": "confirm",
    "test_loggers::test_csv_and_tensorboard_have_the_numbers_of_the_jsonl": "logger",
    "test_search::test_method_grid_visits_each_point_once": "method",
    "test_search::test_space_is_what_is_tried": "space",
    "test_search::test_trials_is_a_total_over_all_starts": "trials",
    "test_search::test_timeout_ends_the_trial_at_its_next_evaluation": "timeout",
    "test_search::test_prune_ends_the_trials_that_optuna_ends": "prune",
    "test_search::test_objective_decides_and_is_the_monitor": "objective",
    "test_search::test_storage_is_where_the_trials_are": "storage",
    "test_search::test_finalists_and_final_seeds_say_what_runs_again": "finalists final_seeds",
    "test_adapters::test_the_options_are_those_of_peft": "lora_r lora_alpha lora_targets lora_rs lora_dora",
    "test_adapters::test_lora_dropout_is_drawn_in_front_of_the_adapters": "lora_dropout",
    "test_adapters::test_adapter_goes_on_with_the_adapter_and_the_head_of_a_run": "adapter",
    "test_report::test_n_dev_says_how_much_is_chance": "n_dev",
    "test_report::test_score_names_the_column_of_a_table": "score",
}


def test_every_option_is_in_a_test_that_runs_the_program():
    """An option that is new needs one that fails when the option does nothing, and its place in TESTED."""
    folder = Path(__file__).parent
    for test in TESTED:
        file, _, name = test.rpartition("::")
        path = folder / f"{file}.py" if file else Path(__file__)
        assert f"\ndef {name}(" in path.read_text(encoding="utf-8"), f"there is no {test}"
    tested = {name for names in TESTED.values() for name in names.split()}
    known = {f.name for f in options()}
    assert not known - tested, "options without a test"
    assert not tested - known, "no such options"
