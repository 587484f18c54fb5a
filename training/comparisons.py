"""What can be said between two runs, and between many: differences with their intervals, and which are no chance.

Sources: McNemar 1947 (paired, exact); Agresti and Min 2005 (its interval); Agresti and Caffo 2000 (two independent
accuracies); Student and Welch (seeds); Holm 1979 (many comparisons at once); Tukey 1953 (the best of many).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

ALPHA = 0.05
Z = 1.959964  # of a 95% interval
ROUNDED = 0.0005  # what three decimals leave out


@dataclass(frozen=True)
class Difference:
    """Accuracy of the second minus that of the first, its 95% interval, and p: how likely one as large is by chance.
    `how`: the method, in words."""

    value: float
    low: float
    high: float
    p: float
    how: str

    def words(self) -> str:
        return f"{self.value:+.3f} (95%: {self.low:+.3f} to {self.high:+.3f})"


def independent(first: float, second: float, n_first: int, n_second: int) -> Difference:
    """Two accuracies on n sentences each, where nothing else is known: as if they were different sentences, which
    asks for more than runs on the same ones need. Interval and p come from the accuracies with one right and one wrong
    sentence added to each (Agresti and Caffo)."""
    a, b = ((acc * n + 1) / (n + 2) for acc, n in ((first, n_first), (second, n_second)))
    error = math.sqrt(a * (1 - a) / (n_first + 2) + b * (1 - b) / (n_second + 2))
    p = math.erfc(abs(b - a) / error / math.sqrt(2))
    return Difference(second - first, b - a - Z * error, b - a + Z * error, p, "binomial")


def paired(only_first: int, only_second: int, n: int) -> Difference:
    """Two runs' predictions on the same n sentences, of which `only_first` are right in the first run alone. p is
    McNemar's, exact; the interval has half a sentence added to each of the four counts (Agresti and Min)."""
    unequal, p = only_first + only_second, mcnemar_p(only_first, only_second)
    middle, size = (only_second - only_first) / (n + 2), n + 2
    error = math.sqrt(max(0.0, unequal + 1 - (only_second - only_first) ** 2 / size)) / size
    return Difference((only_second - only_first) / n, middle - Z * error, middle + Z * error, p,
                      f"McNemar, {only_second} to {only_first}")


def mcnemar_p(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided (McNemar 1947): how likely so unequal a split of the sentences that only one of
    two classifiers gets right is, where each of them is a toss of a fair coin."""
    from scipy.special import bdtr  # scipy.stats, which has binomtest, takes a second to import

    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def over_sentences(gains: Sequence[float]) -> Difference:
    """What each of n sentences gains (-1 to 1, the second's answer against the mean answer of several others): their
    mean. Where each gain is -1, 0 or 1 the interval is that of `paired`: two sentences are added, half a one that gains
    and half a one that loses among them."""
    n, size = len(gains), len(gains) + 2
    middle = math.fsum(gains) / size
    error = math.sqrt(max(0.0, math.fsum(gain * gain for gain in gains) + 1 - middle * middle * size)) / size
    p = math.erfc(abs(middle) / error / math.sqrt(2))
    return Difference(math.fsum(gains) / n, middle - Z * error, middle + Z * error, p, f"paired over {n} sentences")


def over_seeds(first: dict[str, float], second: dict[str, float], unit: str = "seeds") -> Difference:
    """Two settings with several seeds (or folds: the `unit`) each, by their seeds: where they share two or more, the
    differences of these (Student), else the two groups (Welch). Over seeds the interval holds for these dev sentences
    alone: what other sentences would change is not in it."""
    from scipy.special import stdtr, stdtrit

    shared = sorted(first.keys() & second.keys())
    if len(shared) >= 2:
        each = [second[seed] - first[seed] for seed in shared]
        value, df = statistics.mean(each), float(len(each) - 1)
        error = statistics.stdev(each) / math.sqrt(len(each))
        how = f"paired over {len(each)} {unit}"
    else:
        value = statistics.mean(second.values()) - statistics.mean(first.values())
        parts = [(statistics.variance(group.values()) / len(group), len(group)) for group in (first, second)]
        error = math.sqrt(sum(part for part, _ in parts))
        below = sum(part**2 / (n - 1) for part, n in parts)
        df = error**4 / below if below else float(sum(n for _, n in parts) - 2)
        how = f"over {len(first)} and {len(second)} {unit}"
    error = max(error, ROUNDED)  # two seeds that gave the same three decimals prove nothing
    reach = float(stdtrit(df, 1 - ALPHA / 2)) * error
    return Difference(value, value - reach, value + reach, 2 * float(stdtr(df, -abs(value) / error)), how)


def smallest_shown(values: Sequence[float], n_dev: int = 0) -> float:
    """How large a difference between two settings so many seeds each could have shown: the least one that a test at
    0.05 finds in four of five cases, from the standard deviation of these seeds (the normal approximation by t). Of
    accuracies on n_dev sentences it is one sentence at least."""
    from scipy.special import stdtrit

    n, df = len(values), 2 * (len(values) - 1)
    reach = float(stdtrit(df, 1 - ALPHA / 2)) + float(stdtrit(df, 0.8))
    return max(reach * max(statistics.stdev(values), ROUNDED) * math.sqrt(2 / n), 1 / n_dev if n_dev else 0.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: each p as it counts among so many comparisons. One of them at 0.05 or less is wrong, over all
    of them together, in at most one case of twenty."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def tukey(p: float, n: int) -> float:
    """The p of a comparison with the leader, as it counts where the leader is the best of n: how likely the best and
    the worst of n equal ones are so far apart by chance. (The range of n standard normal numbers, integrated.)"""
    if p <= 1e-15:
        return 0.0
    normal = statistics.NormalDist()
    apart = math.sqrt(2) * normal.inv_cdf(1 - min(p, 1.0) / 2)
    step = 0.05
    places = [-8 + step * i for i in range(round((16 + apart) / step) + 1)]
    inside = n * step * sum(normal.pdf(x) * (normal.cdf(x) - normal.cdf(x - apart)) ** (n - 1) for x in places)
    return min(1.0, max(p, 1 - inside))


def critical_p(n: int) -> float:
    """The p below which a setting is told from the best of n: the one that `tukey` makes 0.05."""
    low, high = 1e-14, ALPHA
    for _ in range(40 if n > 2 else 0):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if tukey(middle, n) > ALPHA else (middle, high)
    return high
