"""--freeze: what is frozen stays as it is, and what its part computes is kept. The judge is plain PyTorch with
requires_grad switched off by hand, and the same run without the keeping."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import CPU, made
from safetensors.torch import load_file
from torch.nn import functional as F

import run_llama
from commands.classification import ClassificationTask
from config import no_effect, parse_args
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


@pytest.mark.parametrize("part", PARTS)
def test_what_is_frozen_stays_and_the_rest_is_trained_as_pytorch_does(inputs, part):
    """A loop of one's own, on the program's model and batches, with PyTorch's SGD and every layer computed each time."""
    job, config = made(inputs, *SETTINGS)
    model, frozen = job.model, PARTS[part]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(tuple(frozen)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for epoch in range(3):
        for rows in job.task.order(epoch):
            batch = job.task.make_batch(rows, epoch)
            optimizer.zero_grad()
            F.nll_loss(model(batch["tokens"], batch["lengths"]), batch["labels"]).backward()
            optimizer.step()
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
