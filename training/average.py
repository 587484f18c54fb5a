"""--ema: a moving average of the weights, which is evaluated and kept in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """The moving average of some parameters; nothing at all with a decay of 0. `values`: a tensor for each, or []."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values: list[Tensor] = [p.detach().clone() for p in parameters] if decay else []

    def update(self, t: int) -> None:
        """One step: average = d average + (1 - d) weights.

        d rises to the decay that was asked for, min(decay, (1 + t) / (10 + t)) at update t = 0, 1, ...: else the
        average of a short run would be mostly the initial weights (TensorFlow's ExponentialMovingAverage, num_updates).
        """
        if self.values:
            decay = min(self.decay, (1 + t) / (10 + t))
            torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's weights are their moving average, if there is one."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        if self.values:
            for p, mean in zip(self.parameters, self.values, strict=True):
                p.data, mean.data = mean.data, p.data
