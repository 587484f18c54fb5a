"""What is said at the end of a run."""

import math

import numpy as np

from training.diagnosis import diagnose


def evaluations(*rows, ratio=1e-3):
    return [{"epoch": i, "train_loss": a, "train_acc": b, "dev_loss": c, "dev_acc": d,
             "update_ratio": {"llama.layers.0": ratio, "classifier_head": 9.0}} for i, (a, b, c, d) in enumerate(rows)]


def said(epochs, predicted, labels, f1=0.9, **more):
    majority = float(np.bincount(labels).max() / len(labels)) if len(labels) else 0.0
    options = {"best_epoch": len(epochs) - 1, "guessing_loss": math.log(2), "majority": majority, "mean_loss": 0.5,
               "lr": 1e-3, "rollbacks": 0, "stopped": "patience", **more}
    return diagnose(epochs, predicted=np.array(predicted), labels=np.array(labels), names=["bad", "good"], f1=f1,
                    **options)


HALF = [0, 1] * 50
FINE = (0.3, 0.9, 0.3, 0.9)
NOTHING = (0.69, 0.5, 0.69, 0.5)  # has been learned


def test_nothing_is_said_of_a_run_without_fault():
    assert said(evaluations(FINE, FINE), HALF, HALF) == []
    assert said([], [], []) == []


def test_nearly_all_in_one_class_is_said_with_the_size_of_the_steps():
    (line,) = said(evaluations(NOTHING, ratio=2.6e-5), [1] * 97 + [0] * 3, HALF, f1=0.3)
    assert line.startswith("97 of 100 dev sentences were put into one class (good), macro-F1 0.300: no better")
    assert "2.6e-05" in line and "far too small" in line and line.endswith("raise --lr")
    (line,) = said(evaluations(NOTHING, ratio=0.5), [1] * 100, HALF, f1=0.3)
    assert line.endswith("far too large (1e-3 is healthy): lower --lr")
    (line,) = said(evaluations(NOTHING), [0, 0, 1, 1] * 25, HALF, f1=0.5)
    assert line.startswith("dev acc 0.500 is not better, by more than chance, than always answering the most frequent "
                           "class (0.500): try another --lr")


def test_small_steps_at_the_end_of_a_schedule_are_no_fault():
    epochs = [*evaluations(NOTHING), *evaluations(NOTHING, ratio=1e-6)]
    (line,) = said(epochs, [1] * 100, HALF, f1=0.3)
    assert "far too small" not in line


def test_a_rare_class_that_is_found_is_no_fault():
    labels = [0] * 97 + [1] * 3
    assert said(evaluations(FINE), [0] * 98 + [1] * 2, labels, f1=0.9) == []


def test_overfitting_is_said_with_both_accuracies():
    rows = evaluations((0.6, 0.6, 0.6, 0.6), (0.01, 0.99, 2.0, 0.6))
    (line,) = said(rows, [0] * 20 + [1] * 20 + HALF[40:], HALF, best_epoch=0)
    assert line.startswith("it overfits: at the end train acc 0.990, dev acc 0.600; dev loss rose from 0.600 (epoch 0) "
                           "to 2.000. Kept is epoch 0")
    assert said(rows[1:], [0] * 20 + [1] * 20 + HALF[40:], HALF, best_epoch=0) == [], "one epoch cannot be fewer"


def test_a_wild_loss_and_a_run_that_diverged_are_said_and_no_higher_rate_is_advised():
    first, second = said(evaluations((548.0, 0.5, 80.0, 0.5), ratio=1e-6), [1] * 100, HALF, f1=0.3, mean_loss=548.0)
    assert first.startswith("the training loss of the last epoch is 548; guessing has 0.693. The learning rate is far")
    assert "raise" not in second
    (first,) = said(evaluations((None, 0.9, 0.3, 0.9)), HALF, HALF, mean_loss=None)
    assert first.startswith("in the last epoch no loss was finite")
    (line,) = said([], [], [], rollbacks=3, stopped="diverged", lr=0.1)
    assert line == "it diverged at lr 1.0e-01, 1.0e-02, 1.0e-03, 1.0e-04: try 1.0e-05 or less"
    (line,) = said(evaluations(FINE), HALF, HALF, rollbacks=1, lr=0.1)
    assert line == "it diverged at lr 1.0e-01 and was rolled back once: what it has was trained at lr 1.0e-02"


def test_a_run_that_still_improves_is_said():
    rows = evaluations((0.6, 0.8, 0.6, 0.8), (0.5, 0.85, 0.5, 0.85))
    (line,) = said(rows, HALF, HALF, stopped="")
    assert line == "it was still improving at the end (epoch 1 was the best): try more --epochs"
    assert said(rows, HALF, HALF) == [], "it stopped for another reason"
    assert said(evaluations((0.6, 0.8, 0.6, 0.8), (0.1, 1.0, 0.1, 1.0)), HALF, HALF, stopped="") == [], "perfect"
