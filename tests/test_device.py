"""The device and its precision."""

import pytest
import torch

from config import parse_args
from training import device


def test_use_gpu_without_a_gpu_warns_and_runs_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose_device(parse_args(["--use_gpu"])).where.type == "cpu"
    assert "no GPU" in capsys.readouterr().err


def test_auto_precision_is_bfloat16_only_where_it_is_fast(monkeypatch):
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device, "is_fast_at_bfloat16", lambda where, fast=fast: fast)
        assert device.choose_device(parse_args([])).dtype == dtype
    assert device.choose_device(parse_args(["--dtype", "float32"])).dtype == torch.float32


def test_a_device_that_is_not_there_is_refused():
    for name in ("nonsense", "cuda:77", "meta"):
        with pytest.raises(ValueError, match="--device"):
            device.choose_device(parse_args(["--device", name]))


def test_the_random_state_of_an_apple_gpu_is_saved(monkeypatch):
    state, restored = torch.arange(4, dtype=torch.uint8), []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    gpu = device.Device(torch.device("mps"), torch.float32)
    saved = device.random_state(gpu)
    device.set_random_state(gpu, saved)
    assert saved["mps"] is state and restored == [state]
