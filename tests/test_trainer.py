"""The loops: evaluation in file order, the same run twice, the best epoch, the run folder, the device."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import nll_loss

import checkpoint
import dataset
import trainer
from classifier import LlamaEmbeddingClassifier
from config import parse_args
from optimizer import AdamW
from tokenizer import Tokenizer

CPU = trainer.Device(torch.device("cpu"), torch.float32)


@pytest.fixture
def parts(tiny_model, tiny_data):
    torch.manual_seed(0)
    tokenizer = Tokenizer(tokenizer_model=tiny_model)
    llama = checkpoint.load_pretrained(tiny_model)
    model = LlamaEmbeddingClassifier(SimpleNamespace(num_labels=3, hidden_dropout_prob=0.1), llama)
    splits = {n: dataset.load_split(tiny_data[n], tokenizer, 128, n_labels=3) for n in ("train", "dev")}
    return model, splits, tokenizer


def make_task(parts, evaluate=None, save_best=lambda: None):
    model, splits, tokenizer = parts

    def losses(batch):
        return nll_loss(model(batch["tokens"], batch["lengths"]), batch["labels"], reduction="none")

    def scores():
        on_dev = trainer.score(trainer.predict(model, splits["dev"], tokenizer.pad_id, CPU), splits["dev"].labels)
        return {"train_acc": 0.0, **{f"dev_{k}": v for k, v in on_dev.items()}}

    return trainer.Task(model, splits["train"], tokenizer.pad_id, losses, evaluate or scores, save_best)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_predictions_are_in_file_order_and_equal_one_sentence_at_a_time(parts):
    model, splits, tokenizer = parts
    model.train()  # and the mode comes back
    together = trainer.predict(model, splits["dev"], tokenizer.pad_id, CPU)
    assert model.training
    model.eval()
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor(t, dtype=torch.long)[None]) for t in splits["dev"].tokens])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_scores_are_scikit_learns():
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    log_probs = torch.log_softmax(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), 1)
    labels = np.random.default_rng(0).integers(0, 4, 50)
    scores, predicted = trainer.score(log_probs, labels), log_probs.argmax(1).numpy()
    assert scores["acc"] == pytest.approx(accuracy_score(labels, predicted))
    assert scores["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert scores["loss"] == pytest.approx(log_loss(labels, log_probs.double().exp().numpy()), rel=1e-5)


def test_a_step_equals_the_loop_that_anyone_would_write(parts, tmp_path):
    """Two epochs by `fit` end with the weights of a plain loop over the same batches with PyTorch's Adam."""
    import copy

    model, splits, tokenizer = parts
    model.dropout.p = 0.0
    plain = copy.deepcopy(model)
    config = replace(parse_args(["--epochs", "2", "--batch_size", "20", "--lr", "1e-3"]))
    task = make_task(parts)
    trainer.fit(task, AdamW(model.parameters(), lr=1e-3, eps=1e-30), config, CPU, tmp_path)

    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, eps=1e-30)
    train = splits["train"]
    for epoch in range(2):
        for rows in dataset.epoch_order(train.lengths, 20, config.seed, epoch):
            batch = dataset.make_batch(train, rows, tokenizer.pad_id)
            optimizer.zero_grad()
            nll_loss(plain(batch["tokens"], batch["lengths"]), batch["labels"]).backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_the_best_epoch_is_the_highest_accuracy_then_the_lowest_loss(parts, tmp_path, capsys):
    scores = iter([(0.5, 1.0), (0.6, 0.9), (0.6, 0.8), (0.6, 0.85), (0.4, 0.1)])
    saved = []

    def evaluate():
        acc, loss = next(scores)
        return {"train_acc": 0.25, "dev_loss": loss, "dev_acc": acc, "dev_f1": acc}

    config = parse_args(["--epochs", "5", "--batch_size", "96"])
    task = make_task(parts, evaluate, lambda: saved.append(1))
    best = trainer.fit(task, AdamW(parts[0].parameters(), lr=1e-5), config, CPU, tmp_path)
    assert best["epoch"] == 2 and len(saved) == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 5
    assert lines[1].endswith("train acc :: 0.250, dev acc :: 0.600, lr :: 1.00e-05")
    assert [e["epoch"] for e in read_jsonl(tmp_path / "epochs.jsonl")] == list(range(5))
    steps = read_jsonl(tmp_path / "steps.jsonl")
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5]
    assert set(steps[0]) == {"step", "epoch", "lr", "loss", "grad_norm", "tokens", "seconds"}
    assert all(s["tokens"] == parts[1]["train"].lengths.sum() for s in steps)


def test_the_gradient_norm_is_torchs(parts):
    model, splits, tokenizer = parts
    make_task(parts).losses(dataset.make_batch(splits["train"], np.arange(8), 0)).mean().backward()
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(trainer.gradient_norm(model.parameters()), expected)


# --------------------------------------------------------------------------- the run folder


def test_a_default_folder_that_exists_gets_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_args(["--option", "finetune", "--epochs", "3", "--lr", "1e-5"])
    assert [trainer.open_run(config).name for _ in range(3)] == [
        "finetune-3-1e-05", "finetune-3-1e-05-2", "finetune-3-1e-05-3"]


def test_a_folder_with_a_run_is_refused_without_overwrite(tmp_path):
    config = parse_args(["--output_dir", str(tmp_path / "run")])
    folder = trainer.open_run(config)
    assert trainer.open_run(config) == folder  # still empty
    for name in ("args.json", "result.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    (folder / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(FileExistsError, match="--overwrite"):
        trainer.open_run(config)
    trainer.open_run(replace(config, overwrite=True))
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            trainer.open_run(parse_args(["--output_dir", str(bad)]))


# --------------------------------------------------------------------------- the device


def test_use_gpu_without_a_gpu_warns_and_runs_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trainer.choose_device(parse_args(["--use_gpu"])).where.type == "cpu"
    assert "no GPU" in capsys.readouterr().err


def test_auto_precision_is_bfloat16_only_where_it_is_fast(monkeypatch):
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(trainer, "is_fast_at_bfloat16", lambda where, fast=fast: fast)
        assert trainer.choose_device(parse_args([])).dtype == dtype
    assert trainer.choose_device(parse_args(["--dtype", "float32"])).dtype == torch.float32


def test_a_device_that_is_not_there_is_refused():
    for name in ("nonsense", "cuda:77", "meta"):
        with pytest.raises(ValueError, match="--device"):
            trainer.choose_device(parse_args(["--device", name]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_processors_log_probabilities(parts):
    model, splits, tokenizer = parts
    on_cpu = trainer.predict(model, splits["dev"], tokenizer.pad_id, CPU)
    gpu = trainer.Device(torch.device("cuda"), torch.float32)
    on_gpu = trainer.predict(model.to("cuda"), splits["dev"], tokenizer.pad_id, gpu)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-4)
