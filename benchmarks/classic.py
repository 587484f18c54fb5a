"""The classic teaching loop, written for this comparison: float32, an explicit attention matrix, sentences tokenised
again in every batch, padding to a random batch's longest, an optimizer that goes from tensor to tensor, and after each
epoch a pass over the whole training set. What a course hands out, and what most people run first."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Of stories42M."""

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    hidden_dim: int = 1376
    vocab_size: int = 32000
    context: int = 1024


class Norm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        dim, hidden = shape.dim, shape.hidden_dim
        self.heads = shape.n_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.dropout = nn.Dropout(0.0)

    def attend(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (w(x).view(batch, length, self.heads, -1) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q), self.rotate(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        future = torch.full((length, length), -torch.inf).triu(1)
        weights = self.dropout(F.softmax(scores + future, dim=-1))
        return self.dropout(self.wo((weights @ v).transpose(1, 2).reshape(batch, length, dim)))

    def rotate(self, x: Tensor) -> Tensor:
        half = torch.arange(0, x.shape[-1], 2).float() / x.shape[-1]
        angles = torch.outer(torch.arange(x.shape[1]).float(), 10000.0 ** -half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        inner = self.norm2(x)
        return x + self.dropout(self.w2(F.silu(self.w1(inner)) * self.w3(inner)))


class Classifier(nn.Module):
    def __init__(self, shape: Shape, n_classes: int):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = Norm(shape.dim)
        self.head = nn.Linear(shape.dim, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.log_softmax(self.head(F.dropout(self.norm(x)[:, -1], 0.3, self.training)), dim=-1)


class Adam:
    """AdamW as it is taught: one tensor after the other, a new tensor an operation."""

    def __init__(self, parameters, lr: float):
        self.parameters, self.lr, self.t = list(parameters), lr, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        size = self.lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        for p, (m, v) in zip(self.parameters, self.moments, strict=True):
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            p.addcdiv_(m, v.sqrt().add_(1e-6), value=-size)


def epoch(train: list[tuple[int, str]], dev: list[tuple[int, str]], tokenizer, batch_size: int,
          n_classes: int) -> dict[str, float]:
    """One epoch and its evaluations: seconds of each, and of both."""
    torch.manual_seed(0)
    model = Classifier(Shape(), n_classes)
    optimizer = Adam(model.parameters(), 1e-5)

    def batch(rows) -> tuple[Tensor, Tensor]:
        sentences = [tokenizer.encode(rows[1], bos=True, eos=False) for rows in rows]
        longest = max(map(len, sentences))
        # Padded on the left here, so that the last position is a word: such code pools there.
        return (torch.tensor([[0] * (longest - len(s)) + s for s in sentences]),
                torch.tensor([label for label, _ in rows]))

    start = time.perf_counter()
    model.train()
    order = torch.randperm(len(train)).tolist()
    for i in range(0, len(order), batch_size):
        tokens, labels = batch([train[j] for j in order[i : i + batch_size]])
        loss = F.nll_loss(model(tokens), labels)
        for p in model.parameters():
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()
        loss.item()
    trained = time.perf_counter()
    model.eval()
    with torch.no_grad():
        for split in (train, dev):
            right = 0
            for i in range(0, len(split), batch_size):
                tokens, labels = batch(split[i : i + batch_size])
                right += int((model(tokens).argmax(1) == labels).sum())
    end = time.perf_counter()
    return {"train_seconds": trained - start, "evaluation_seconds": end - trained, "seconds": end - start}
