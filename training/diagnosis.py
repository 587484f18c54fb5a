"""What is wrong with a run that has ended, in a line or two with the numbers, and what to try.

Read from the evaluations and the predictions alone. Nothing is said of a run without fault.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

ONE_CLASS = 0.9  # of all predictions in one class
SMALL_STEP, LARGE_STEP = 1e-4, 1e-2  # update / weight of a layer; 1e-3 is healthy (Karpathy's rule of thumb)
GAP = 0.2  # train acc above dev acc
MOST = 2  # lines


def diagnose(epochs: Sequence[dict[str, Any]], best_epoch: float, predicted: np.ndarray, labels: np.ndarray,
             names: Sequence[str], f1: float, majority: float, guessing_loss: float, mean_loss: float | None, lr: float,
             rollbacks: int, stopped: str) -> list[str]:
    """At most two lines, the gravest first.

    `epochs`: the lines of epochs.jsonl. `predicted` and `labels` (N,): of dev, at the best epoch. `f1`: macro-F1 there.
    `majority`: dev accuracy of the most frequent class of training. `guessing_loss`: of an untrained model.
    `mean_loss`: of the last whole epoch, without class weights. `lr` and `rollbacks`: the rate that was asked for, and
    how often it was cut to a tenth. `stopped`: why training ended before its last epoch, or "".
    """
    found = []
    if stopped == "diverged":
        found.append(f"it diverged at lr {', '.join(f'{lr / 10**i:.1e}' for i in range(rollbacks + 1))}: try "
                     f"{lr / 10 ** (rollbacks + 1):.1e} or less")
    elif rollbacks:
        times = "once" if rollbacks == 1 else f"{rollbacks} times"
        found.append(f"it diverged at lr {lr:.1e} and was rolled back {times}: what it has was trained at lr "
                     f"{lr / 10**rollbacks:.1e}")
    elif epochs and epochs[-1]["train_loss"] is None:
        found.append("in the last epoch no loss was finite: the learning rate is far too high")
    elif mean_loss is not None and mean_loss > 2 * guessing_loss:
        found.append(f"the training loss of the last epoch is {mean_loss:.3g}; guessing has {guessing_loss:.3g}. The "
                     "learning rate is far too high: try a tenth of it")
    if epochs and len(labels):
        steps = "" if found else _size_of_steps(epochs)
        found += [_no_better_than_one_class(predicted, labels, names, f1, majority, steps),
                  _overfits(epochs, best_epoch, len(labels))]
        if not any(found):
            found.append(_still_improving(epochs, best_epoch, not stopped))
    return [line for line in found if line][:MOST]


def _no_better_than_one_class(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str], f1: float,
                              majority: float, steps: str) -> str:
    """The accuracy is not above what always answering the most frequent class has by more than chance explains. Where
    nearly all are of one class that says little: there the macro-F1 must be no better either."""
    n, counts = len(labels), np.bincount(predicted)
    acc = float((predicted == labels).mean())
    f1_of_majority = 2 * majority / (1 + majority) / len(np.unique(np.concatenate((labels, predicted))))
    tells_rare_classes = majority > 0.8 and f1 > f1_of_majority + 0.1
    if acc - majority > 2 * math.sqrt(majority * (1 - majority) / n) or acc == 1 or tells_rare_classes:
        return ""
    top = int(counts.argmax())
    line = (f"dev acc {acc:.3f} is not better, by more than chance, than always answering the most frequent class "
            f"({majority:.3f})")
    if counts[top] >= ONE_CLASS * n:
        line = (f"{counts[top]} of {n} dev sentences were put into one class ({names[top]}), macro-F1 {f1:.3f}: no "
                "better than always answering the most frequent one")
    return line + (steps or ": try another --lr (--option lr_find), more --epochs, or --class_weights balanced for "
                            "rare classes")


def _size_of_steps(epochs: Sequence[dict[str, Any]]) -> str:
    """What is wrong with how far a step moves the layers, going by the largest ratio of any epoch: towards the end the
    schedule makes steps small in a healthy run too."""
    ratios = [ratio for line in epochs for name, ratio in line.get("update_ratio", {}).items() if ".layers." in name]
    ratio = max(ratios, default=math.nan)
    if not math.isfinite(ratio) or SMALL_STEP <= ratio <= LARGE_STEP:
        return ""
    size, advice = ("small", "raise --lr") if ratio < SMALL_STEP else ("large", "lower --lr")
    return (f". A step changed the layers by {ratio:.1e} of their size, which is far too {size} (1e-3 is healthy): "
            f"{advice}")


def _overfits(epochs: Sequence[dict[str, Any]], best_epoch: float, n: int) -> str:
    """At the end, the accuracy on training sentences is far above that on dev."""
    last, lowest = epochs[-1], min(epochs, key=lambda e: e["dev_loss"])
    a, b = last["train_acc"], last["dev_acc"]
    if len(epochs) < 2 or a - b < max(GAP, 3 * math.sqrt((a * (1 - a) + b * (1 - b)) / n)):
        return ""
    line = f"it overfits: at the end train acc {a:.3f}, dev acc {b:.3f}"
    if last["dev_loss"] > 1.1 * lowest["dev_loss"]:
        line += f"; dev loss rose from {lowest['dev_loss']:.3f} (epoch {lowest['epoch']}) to {last['dev_loss']:.3f}"
    return line + (f". Kept is epoch {best_epoch}; try more data, fewer --epochs, a lower --lr, "
                   "--hidden_dropout_prob or --weight_decay")


def _still_improving(epochs: Sequence[dict[str, Any]], best_epoch: float, ended_by_epochs: bool) -> str:
    """The last evaluation was better than all before it, by accuracy and by loss, and is not perfect."""
    *earlier, last = epochs
    is_best = last["epoch"] == best_epoch and all(
        last["dev_acc"] > e["dev_acc"] and last["dev_loss"] < e["dev_loss"] for e in earlier)
    if not ended_by_epochs or not earlier or not is_best or last["dev_acc"] == 1:
        return ""
    return f"it was still improving at the end (epoch {last['epoch']} was the best): try more --epochs"
