"""Curves of runs whose verdict is known, and the noise of a dev set of 1,101 sentences on top of them."""

import math
from dataclasses import dataclass

import numpy as np

from formats.past_run import Epoch, PastRun

N = 1101  # sentences in SST-5's dev set
DRAWS = 200


@dataclass(frozen=True)
class Curve:
    """The true training loss, training accuracy and dev accuracy of each epoch. `constant_from`: from there on every
    prediction is one class, so that the accuracies have the same noise each time."""

    name: str
    verdict: str
    loss: np.ndarray
    train: np.ndarray
    dev: np.ndarray
    constant_from: int | None = None
    majority: float | None = None

    def draw(self, rng: np.random.Generator, n: int = N) -> PastRun:
        """The run as its log has it: accuracies that n sentences gave, three decimals."""
        train, dev = (rng.binomial(n, np.clip(p, 0, 1)) / n for p in (self.train, self.dev))
        if self.constant_from is not None:
            train[self.constant_from:], dev[self.constant_from:] = train[self.constant_from], dev[self.constant_from]
        loss = self.loss * (1 + 0.005 * rng.standard_normal(len(self.loss)))
        epochs = tuple(Epoch(i, round(float(x), 3), round(float(a), 3), round(float(d), 3))
                       for i, (x, a, d) in enumerate(zip(loss, train, dev, strict=True)))
        return PastRun(self.name, "drawn", epochs=epochs)


def to_level(start: float, level: float, n: int, rate: float) -> np.ndarray:
    """An exponential approach: at `start` in epoch 0, and 1/e of the way left after `rate` epochs."""
    return level + (start - level) * np.exp(-np.arange(n) / rate)


def line(start: float, end: float, n: int) -> np.ndarray:
    return np.linspace(start, end, n)


def peaked(start: float, peak: float, end: float, n: int, at: int) -> np.ndarray:
    """Up to the peak at epoch `at`, down to the end."""
    return np.concatenate([line(start, peak, at + 1), line(peak, end, n - at)[1:]])


def held(values: list[float]) -> np.ndarray:
    return np.array(values)


def curves() -> list[Curve]:
    up = to_level
    nan = math.nan
    return [
        # Training hardly fits its own sentences, and nothing rises any more.
        Curve("a rate far too low", "underfitting", line(1.60, 1.57, 10), line(.27, .29, 10), line(.27, .28, 10)),
        Curve("a frozen run", "underfitting", line(1.58, 1.56, 20), line(.31, .33, 20), line(.30, .31, 20)),
        Curve("two classes, hardly learned", "underfitting", line(.692, .685, 10), line(.53, .55, 10),
              line(.53, .54, 10)),
        Curve("too much dropout", "underfitting", up(1.62, 1.55, 8, 2), up(.28, .32, 8, 1), up(.28, .32, 8, 1)),
        # A rise, a plateau, a small gap.
        Curve("SST-5 as it should be", "good", up(1.5, 1.2, 10, 2), up(.34, .50, 10, 1.2), up(.34, .44, 10, .8)),
        Curve("a long plateau", "good", up(1.4, .95, 20, 3), up(.40, .56, 20, 2), up(.38, .45, 20, 1)),
        Curve("two classes, well learned", "good", up(.5, .2, 8, 1.5), up(.78, .93, 8, 1), up(.78, .88, 8, .8)),
        Curve("flat from the start", "good", line(1.25, 1.15, 12), line(.46, .49, 12), line(.44, .44, 12)),
        Curve("five epochs", "good", up(1.3, 1.1, 5, 1), up(.42, .52, 5, .7), up(.42, .46, 5, .3)),
        # Dev falls while training rises, or training goes far ahead for nothing.
        Curve("dev falls slowly", "overfitting", up(1.4, .2, 20, 5), up(.40, .97, 20, 6),
              peaked(.35, .45, .36, 20, 5)),
        Curve("dev falls fast", "overfitting", up(1.4, .05, 10, 2), up(.40, 1, 10, 2), peaked(.38, .46, .36, 10, 2)),
        Curve("it knows its sentences by heart", "overfitting", up(1.5, .02, 20, 4), up(.36, 1, 20, 5),
              up(.34, .404, 20, 1.2)),
        Curve("two classes, by heart", "overfitting", up(.5, .01, 10, 2), up(.76, 1, 10, 1.5),
              peaked(.76, .80, .70, 10, 2)),
        Curve("six epochs", "overfitting", held([1.4, 1.1, .7, .4, .2, .1]), held([.42, .55, .74, .88, .95, .98]),
              held([.40, .46, .45, .42, .38, .36])),
        # Swings that no dev set's noise explains.
        Curve("up and down", "unstable", up(1.5, 1.1, 12, 4), up(.36, .5, 12, 4) - held([0, .12] * 6),
              up(.36, .44, 12, 2) - held([0, .12] * 6)),
        Curve("one deep fall", "unstable", held([1.5, 1.3, 1.2, 1.6, 1.3, 1.15, 1.1, 1.05]),
              held([.36, .44, .48, .28, .42, .48, .50, .52]), held([.35, .41, .43, .26, .40, .43, .44, .44])),
        Curve("the loss jumps again and again", "unstable", held([1.5, 1.2, 1.5, 1.1, 1.4, 1.0, 1.35, 1.0, 1.3, .95]),
              held([.36, .46, .38, .48, .40, .50, .41, .52, .43, .53]),
              held([.35, .42, .36, .43, .37, .44, .37, .44, .38, .44])),
        Curve("falls and recoveries", "unstable", up(1.5, 1.0, 15, 5),
              up(.36, .5, 15, 3) - held(([0] * 4 + [.13]) * 3), up(.35, .44, 15, 2) - held(([0, 0, 0, .13, 0]) * 3)),
        # The loss is lost.
        Curve("not a number", "diverged", held([1.5, 1.3, 1.2, nan, nan]), held([.36, .44, .48, .27, .27]),
              held([.35, .41, .43, .26, .26])),
        Curve("a rate far too high", "diverged", held([1.7, 1.9, 2.4, 3.5, 5.0, 6.0]), line(.26, .22, 6),
              line(.26, .22, 6)),
        Curve("it falls, then flies away", "diverged", held([1.4, 1.2, 1.1, 1.5, 2.2, 2.8, 3.0, 3.1]),
              held([.40, .48, .52, .36, .26, .24, .25, .25]), held([.39, .43, .44, .33, .26, .25, .25, .25])),
        Curve("two classes, lost", "diverged", held([.6, .55, .9, 1.5, 2.0]), held([.7, .74, .6, .5, .5]),
              held([.7, .73, .6, .5, .5])),
        # Every prediction becomes one class.
        Curve("one class from the start", "collapsed", line(1.58, 1.57, 8), line(.27, .27, 8), line(.26, .26, 8), 0),
        Curve("one class after a good start", "collapsed", held([1.5, 1.35, 1.25, 1.55, 1.57, 1.57, 1.57, 1.57]),
              held([.36, .42, .47, .27, .27, .27, .27, .27]), held([.35, .40, .43, .26, .26, .26, .26, .26]), 3),
        Curve("almost one class", "collapsed", held([1.4, 1.25, 1.2, 1.18, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]),
              held([.40, .46, .48, .49, .29, .28, .28, .28, .28, .28]),
              held([.39, .43, .44, .44, .28, .27, .27, .27, .27, .27])),
        Curve("two classes become one", "collapsed", held([.6, .5, .45, .69, .69, .69]),
              held([.70, .78, .80, .50, .50, .50]), held([.69, .76, .78, .51, .51, .51]), 3),
        # Dev still rises when the epochs are over.
        Curve("a steady rise", "still improving", line(1.58, 1.2, 20), line(.28, .48, 20), line(.28, .46, 20)),
        Curve("three epochs", "still improving", held([1.55, 1.4, 1.25]), held([.30, .39, .46]),
              held([.29, .37, .44])),
        Curve("ten epochs", "still improving", line(1.55, 1.1, 10), line(.30, .52, 10), line(.30, .47, 10)),
        Curve("a late start", "still improving", held([1.6] * 5 + [1.5, 1.4, 1.3, 1.2, 1.1]),
              held([.27] * 5 + [.31, .36, .41, .45, .49]), held([.27] * 5 + [.30, .34, .38, .42, .45])),
    ]


def flat_curves() -> list[Curve]:
    """Dev neither rises nor falls: whoever says "overfitting" takes chance for a fact."""
    return [
        Curve(f"{n} epochs at {dev}", "", np.linspace(loss, 0.9 * loss, n), np.linspace(dev + .01, dev + up, n),
              np.full(n, dev))
        for n in (5, 10, 20, 40) for dev, loss in ((.40, 1.3), (.75, .55), (.90, .3)) for up in (.02, .09)]
