"""training/data_checks.py and training/mistakes.py: against comparing every pair, and against Counter."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import holdout, words
from training import data_checks, mistakes
from training.data_checks import Part

ROWS = st.lists(st.tuples(st.sampled_from(["a b", "A  b!", "a, b", "ab", "c", "C.", "d?!", "...", "!", "4.5", "45"]),
                          st.integers(0, 2)), min_size=1, max_size=30)


def part(name: str, rows) -> Part:
    return Part(name, Path(f"{name}.txt"), [text for text, _ in rows], [label for _, label in rows],
                list(range(1, len(rows) + 1)))


def alike(one: str, other: str) -> bool:
    """Near copies, letter by letter."""
    def letters(text):
        kept = [c for i, c in enumerate(text.lower()) if c.isalnum() or (
            c == "." and text[i - 1:i].isdigit() and text[i + 1:i + 2].isdigit())]
        return kept or text.split()
    return letters(one) == letters(other)


@settings(max_examples=200, deadline=None)
@given(ROWS, ROWS)
def test_copies_leaks_and_contradictions_are_those_of_all_pairs(train_rows, dev_rows):
    train, dev = part("train", train_rows), part("dev", dev_rows)
    inside = data_checks.copies_inside(train)
    assert inside.near == sum(any(alike(text, other) for other, _ in train_rows[:i])
                              for i, (text, _) in enumerate(train_rows))
    assert inside.exact == sum(text in [other for other, _ in train_rows[:i]] for i, (text, _) in enumerate(train_rows))
    assert inside.n_most == max(sum(alike(text, other) for other, _ in train_rows) for text, _ in train_rows)
    found = data_checks.leak(train, dev)
    assert list(found.rows) == [i for i, (text, _) in enumerate(dev_rows) if any(alike(text, t) for t, _ in train_rows)]
    assert found.near == len(found.rows)
    assert found.exact == sum(text in train.texts for text, _ in dev_rows)
    assert found.same_label == sum(any(alike(text, t) and label == other for t, other in train_rows)
                                   for text, label in dev_rows)
    everything = [("train", i, *row) for i, row in enumerate(train_rows)] + [
        ("dev", i, *row) for i, row in enumerate(dev_rows)]
    want = {(name, i) for name, i, text, label in everything
            if any(alike(text, other) and label != another for _, _, other, another in everything)}
    groups = data_checks.contradictions({"train": train, "dev": dev})
    want |= {(name, i) for name, i, text, _ in everything if any(
        alike(text, everything_text) for n, k, everything_text, _ in everything if (n, k) in want)}
    assert {place for one in groups for place in one.places} == want
    assert all(len(one.places) > 1 for one in groups)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_the_balance_is_counters(rows):
    one = part("train", rows)
    counts = Counter(label for _, label in rows)
    assert data_checks.balance(one, 3) == [counts[i] for i in range(3)]


@pytest.mark.parametrize("one, other, is_near", [
    ("A fine film.", "a fine film", True), ("it 's good", "it's good", True), ("well-made", "well made", True),
    ("很好看！", "很 好看", True), ("Ｆine", "fine", True), ("4.5 stars", "45 stars", False), ("!", "?", False),
    ("good 😀", "good 😡", False), ("`` a ''", '"a"', True), ("न", "ना", False), ("", "", True)])
def test_near_copies(one, other, is_near):
    assert (holdout.without_marks(one) == holdout.without_marks(other)) == is_near


@pytest.mark.parametrize("text, want", [
    ("a fine film", ["a", "fine", "film"]), ("don't, well-made 4.5!", ["don't", ",", "well-made", "4.5", "!"]),
    ("很好看。", ["很", "好", "看", "。"]), ("iPhone很贵", ["iPhone", "很", "贵"]), ("", []), ("  ", []),
    ("café", ["café"]),
    ("touching...gives", ["touching", "...", "gives"]), ("영화 좋다", ["영화", "좋다"])])
def test_words(text, want):
    assert [text[a:b] for a, b in words.spans(text)] == want
    assert words.count(text) == sum(any(c.isalnum() for c in word) for word in want)


@given(st.text(max_size=40))
def test_every_letter_is_in_one_word(text):
    spans = words.spans(text)
    assert all(a < b for a, b in spans)
    assert all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False))
    inside = {i for a, b in spans for i in range(a, b)}
    assert {i for i, c in enumerate(text) if c.isalnum()} <= inside


def test_short_sentences_and_limits():
    one = part("train", [("...", 0), ("good", 1), ("好", 1), ("好看", 1), ("a film", 0)])
    assert data_checks.short_ones(one) == ([0], [1, 2])
    lengths = np.array([3, 10, 20, 40, 70])
    assert data_checks.n_cut(lengths, 20) == 2 and data_checks.n_cut(lengths, 70) == 0
    assert data_checks.limits_worth_a_look(lengths) == [64, 32]
    assert data_checks.limits_worth_a_look(np.array([3])) == []


def test_the_hardest_have_the_lowest_probability_of_their_label():
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    assert data_checks.hardest(p, [0, 0, 1], 2) == [1, 2]


# --------------------------------------------------------------------------- mistakes


def test_the_surest_mistakes_come_first():
    p = np.array([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert mistakes.surest_mistakes(p, np.array([1, 1, 1, 0]), 2) == [2, 3]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40))
def test_the_most_confused_pair_counts_both_ways(pairs):
    labels, predicted = (np.array([pair[i] for pair in pairs], dtype=np.int64) for i in (0, 1))
    found = mistakes.most_confused_pair(labels, predicted)
    counts = Counter(frozenset(pair) for pair in pairs if pair[0] != pair[1])
    if not counts:
        assert found is None
        return
    assert counts[frozenset((found.first, found.second))] == max(counts.values()) == found.as_first + found.as_second
    assert found.as_second == pairs.count((found.first, found.second)) >= found.as_first


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=60))
def test_every_sentence_is_in_one_group_of_lengths(rows):
    lengths, right = np.array([n for n, _ in rows]), np.array([r for _, r in rows])
    groups = mistakes.by_length(lengths, right)
    assert len(groups) <= 4 and sum(g.n for g in groups) == len(rows)
    for group in groups:
        inside = [r for n, r in rows if group.shortest <= n <= group.longest]
        assert len(inside) == group.n and group.accuracy == pytest.approx(np.mean(inside))
    assert all(one.longest < other.shortest for one, other in zip(groups, groups[1:], strict=False))
