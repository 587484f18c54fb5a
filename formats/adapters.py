"""Low-rank adapters as plain values: what a run or one of PEFT's folders holds, and the base that they belong to."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import Base, InputError, LoraConfig
from formats import files


@dataclass(frozen=True)
class Adapter:
    """The adapters of one model. `tensors`: by their names in a Llama of ours, `layers.0.attention.wq.lora_a`, in
    float32, rows in our order; `head`: by the names of the head's own parameters, {} where there is none; `base`: what
    it was trained on, where that is known; `n_layers`, `attention`: of the Llama that it was trained on."""

    path: Path
    config: LoraConfig
    tensors: dict[str, Tensor]
    head: dict[str, Tensor]
    n_layers: int
    base: Base | None = None
    settings: dict | None = None  # the config.json of a run of ours
    attention: str = "causal"


def row_norms(weight: Tensor) -> Tensor:
    """|w| of each row of a matrix (out, in): (out,), float32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def effective(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s B A of W (out, in), A (r, in) and B (out, r), in float32 (Hu et al. 2021, arXiv 2106.09685, eq. 3)."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)


def merged(name: str, weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """The one matrix that computes what W and its adapter do, float32; with a magnitude (out,) its rows have that
    length (Liu et al. 2024, arXiv 2402.09353, eq. 5). Raises InputError, with the `name`, for what is not finite."""
    both = effective(weight, a, b, scale)
    if magnitude is not None:
        both = both * (magnitude.float() / row_norms(both))[:, None]
    if not torch.isfinite(both).all():
        raise InputError(f"{name}: with its adapter it has numbers that are not finite, so the two cannot be merged "
                         "(has the training of the adapter diverged?)")
    return both


NAME_IT = "say where that one lies: --pretrained_model_path PATH (in Python: load(run, base=PATH))"
PUT_IT_BACK = "put that one there, or take the weights of --option export --format hf, which need no base"


def find_base(base: Base, adapter: Path, typed: str | Path | None = None, advice: str = NAME_IT) -> Path:
    """Where the base of an adapter lies: where it lay when the adapter was trained, or the path that was `typed`.
    Raises FileNotFoundError or InputError, with the `advice`, where it is gone, or is another one by its sha256."""
    path = Path(typed or base.path)
    if not path.is_file() and not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such file or folder; {adapter} holds an adapter, and this is its "
                                f"base; {advice}")
    if files.sha256(path) != base.sha256:
        raise InputError(f"{path}: not the base that the adapter in {adapter} was trained on, or it has changed "
                         f"(sha256); {advice}")
    return path
