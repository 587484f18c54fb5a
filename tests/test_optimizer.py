"""AdamW against PyTorch's, and against the paper written out in NumPy."""

import numpy as np
import pytest
import torch

from optimizer import AdamW


def train(make, dtype=torch.float64, steps=50):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).to(dtype)
    x, y = torch.randn(20, 5, dtype=dtype), torch.randn(20, 1, dtype=dtype)
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_without_decay_and_eps_it_is_torch_adam():
    """With eps near zero the efficient form and PyTorch's agree."""
    ours = train(lambda p: AdamW(p, lr=1e-2, eps=1e-30))
    torch.testing.assert_close(ours, train(lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-30)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_is_the_papers_formula(correct_bias, weight_decay):
    lr, (b1, b2), eps = 1e-2, (0.8, 0.95), 1e-3
    random = np.random.default_rng(1)
    p, m, v = random.normal(size=(4, 3)), np.zeros((4, 3)), np.zeros((4, 3))
    ours = torch.nn.Parameter(torch.tensor(p))
    optimizer = AdamW([ours], lr=lr, betas=(b1, b2), eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
    for t in range(1, 20):
        g = random.normal(size=p.shape)
        ours.grad = torch.tensor(g)
        optimizer.step()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        rate = lr * np.sqrt(1 - b2**t) / (1 - b1**t) if correct_bias else lr
        p = p - rate * m / (np.sqrt(v) + eps)
        p = p - lr * weight_decay * p  # after the update, scaled by lr alone
    np.testing.assert_allclose(ours.detach().numpy(), p, rtol=1e-12)


def test_a_parameter_without_gradient_stays():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p, q], lr=0.1, weight_decay=0.1)
    p.sum().backward()
    optimizer.step()
    assert torch.equal(q, torch.ones(3)) and not torch.equal(p, torch.ones(3))


def test_a_saved_state_goes_on_where_it_was():
    def run(split):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(6))
        optimizer = AdamW([p], lr=0.1, weight_decay=0.01)
        for i in range(8):
            if i == split:
                saved = optimizer.state_dict()
                optimizer = AdamW([p], lr=0.5)
                optimizer.load_state_dict(saved)
            p.grad = torch.sin(p.detach() + i)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(split=4), run(split=None))


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"eps": -1e-9}, {"weight_decay": -1.0}, {"betas": (1.0, 0.9)}])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError):
        AdamW([torch.nn.Parameter(torch.ones(1))], **bad)
