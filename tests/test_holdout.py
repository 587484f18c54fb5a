"""formats/holdout.py: what is held out stays held out, copies stay together, and every class has its part."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import holdout

ROWS = st.lists(st.tuples(st.text("ab cAB é", max_size=4), st.integers(0, 4)), max_size=60)


@pytest.mark.parametrize("one, other", [("A  fine film ", "a fine\tfilm"), ("Straße", "STRASSE"), ("ｆｉｎｅ", "fine"),
                                        ("好\u3000看", "好 看"), ("ﬁne", "fine"), ("É", "é"), ("a\nb", "A B")])
def test_copies_differ_in_case_width_and_spaces(one, other):
    assert holdout.folded(one) == holdout.folded(other)
    assert holdout.folded("a b") != holdout.folded("ab")


def test_the_place_of_a_text_is_its_sha256():
    digest = hashlib.sha256(b"a fine film").hexdigest()
    assert holdout.fraction("A fine  film") == pytest.approx(int(digest, 16) / 2**256, abs=1e-15)


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_every_class_has_its_part_and_copies_stay_together(rows):
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    is_out = holdout.held_out(texts, labels)
    assert is_out.shape == (len(rows),)
    for label in set(labels):
        assert not all(out for out, found in zip(is_out, labels, strict=True) if found == label), "train has all"
    sides = {}
    for text, out in zip(texts, is_out, strict=True):
        assert sides.setdefault(holdout.folded(text), out) == out


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=200, unique=True), st.integers(1, 4))
def test_a_class_of_two_texts_has_one_in_dev(numbers, n_classes):
    texts, labels = [f"text {i}" for i in numbers], [i % n_classes for i in range(len(numbers))]
    is_out = holdout.held_out(texts, labels)
    for label in set(labels):
        of_class = [out for out, found in zip(is_out, labels, strict=True) if found == label]
        assert len(of_class) == 1 and not of_class[0] or 0 < sum(of_class) < len(of_class)


def test_about_a_tenth_is_held_out_and_stays_so_when_lines_are_added():
    texts = [f"sentence number {i}" for i in range(4000)]
    labels = [i % 2 for i in range(4000)]
    is_out = holdout.held_out(texts, labels)
    assert abs(is_out.sum() - 400) < 5 * np.sqrt(4000 * 0.1 * 0.9)
    assert (holdout.held_out(texts[:1000], labels[:1000]) == is_out[:1000]).all()
    mixed = np.random.default_rng(0).permutation(4000)
    assert (holdout.held_out([texts[i] for i in mixed], [labels[i] for i in mixed]) == is_out[mixed]).all()
