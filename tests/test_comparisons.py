"""training/comparisons.py and pairs.py: intervals against scipy and closed forms, and how often chance passes for a
difference."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from curves import N
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from formats import run_logs
from formats.past_run import PastRun
from training import comparisons, pairs

DRAWS = 1000


def run(name: str, score: float, **options: str) -> PastRun:
    return PastRun(name, name, options=options, known_by="command", given=frozenset(options), dev=score, n_dev=N)


def test_the_interval_of_two_accuracies_is_that_of_agresti_and_caffo():
    """Worked out by hand: 449 and 467 of 1,101 right, one right and one wrong added to each."""
    found = comparisons.independent(449 / 1101, 467 / 1101, 1101, 1101)
    a, b = 450 / 1103, 468 / 1103
    error = (a * (1 - a) / 1103 + b * (1 - b) / 1103) ** 0.5
    assert found.low == pytest.approx(b - a - stats.norm.ppf(.975) * error)
    assert found.high == pytest.approx(b - a + stats.norm.ppf(.975) * error)
    assert found.p == pytest.approx(2 * stats.norm.sf((b - a) / error))
    assert f"{found.value:+.3f}" == "+0.016"


def test_the_interval_of_two_accuracies_covers_the_truth():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(DRAWS):
        found = comparisons.independent(rng.binomial(N, .40) / N, rng.binomial(N, .43) / N, N, N)
        inside += found.low <= .03 <= found.high
    assert .93 <= inside / DRAWS <= .97


def test_paired_predictions_are_compared_by_mcnemar():
    found = comparisons.paired(30, 55, 1101)
    assert found.p == pytest.approx(stats.binomtest(30, 85).pvalue)
    assert found.value == pytest.approx(25 / 1101)
    size, difference = 1103, 25 / 1103
    error = ((85 + 1) / size - difference**2) ** .5 / size**.5
    assert found.low == pytest.approx(difference - stats.norm.ppf(.975) * error)
    assert comparisons.paired(0, 0, 10).p == 1


def test_seeds_are_compared_as_scipy_does():
    first = {str(i): x for i, x in enumerate([.40, .42, .41, .43, .39])}
    second = {str(i): x for i, x in enumerate([.42, .43, .44, .43, .41])}
    found = comparisons.over_seeds(first, second)
    other = stats.ttest_rel(list(second.values()), list(first.values()))
    assert (found.p, *other.confidence_interval()) == pytest.approx((other.pvalue, found.low, found.high))
    elsewhere = {f"{seed}00": x for seed, x in second.items() if seed != "0"}
    found = comparisons.over_seeds(first, elsewhere)
    other = stats.ttest_ind(list(elsewhere.values()), list(first.values()), equal_var=False)
    assert (found.p, *other.confidence_interval()) == pytest.approx((other.pvalue, found.low, found.high))


def test_two_seeds_that_agree_to_the_last_digit_prove_nothing():
    assert comparisons.over_seeds({"1": .40, "2": .41}, {"1": .402, "2": .412}).p > .05


def test_holms_correction():
    """Against the definition, worked out: m p, (m - 1) p, ..., none below the one before it."""
    assert comparisons.holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert comparisons.holm([]) == []


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("p", [.5, .05, .001])
def test_the_leader_is_judged_by_the_studentized_range(p, n):
    apart = np.sqrt(2) * stats.norm.isf(p / 2)
    assert comparisons.tukey(p, n) == pytest.approx(stats.studentized_range.sf(apart, n, 1e7), abs=1e-4)
    assert comparisons.tukey(comparisons.critical_p(n), n) == pytest.approx(.05, abs=1e-6)


def test_how_large_a_difference_so_many_seeds_could_have_shown():
    """In four of five draws such a difference is found."""
    rng = np.random.default_rng(0)
    size = comparisons.smallest_shown([-1.0, -.5, 0.0, .5, 1.0])
    deviation = np.std([-1, -.5, 0, .5, 1], ddof=1)
    a, b = rng.normal(0, deviation, (2000, 5)), rng.normal(size, deviation, (2000, 5))
    assert (stats.ttest_ind(a, b, axis=1).pvalue < .05).mean() == pytest.approx(.8, abs=.05)


# --------------------------------------------------------------------------- runs that are equal


def test_equal_runs_are_seldom_told_apart():
    """1,000 reports on 8 runs that are equally good, 16 pairs each: "X is better than Y" is in 5% at most."""
    rng = np.random.default_rng(0)
    wrong, wrong_leader = 0, 0
    for _ in range(DRAWS):
        found = pairs.settings([run(f"{lr} {p}", rng.binomial(N, .42) / N, lr=lr, hidden_dropout_prob=p)
                                for lr in ("1e-05", "3e-05") for p in ("0.1", "0.3", "0.5", "0.8")])
        compared = pairs.pairs(found, None)
        assert len(compared) == 2 * 6 + 4
        wrong += any(pair.is_told_apart() for pair in compared)
        wrong_leader += pairs.leader(found, None).n_behind > 0
    assert wrong <= .05 * DRAWS + 14 and wrong_leader <= .05 * DRAWS + 14, (wrong, wrong_leader)  # 14: two deviations


def test_a_thousand_pairs_of_equal_runs():
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(DRAWS):
        found = pairs.settings([run(lr, rng.binomial(N, .42) / N, lr=lr) for lr in ("1e-05", "3e-05")])
        wrong += any(pair.is_told_apart() for pair in pairs.pairs(found, None))
    assert .02 * DRAWS < wrong <= .05 * DRAWS  # and not because it never says anything


def test_a_real_difference_is_found():
    found = pairs.settings([run("a", .36, lr="1e-05"), run("b", .44, lr="3e-05")])
    pair, = pairs.pairs(found, None)
    assert pair.is_told_apart() and (pair.option, pair.old, pair.new) == ("lr", "1e-05", "3e-05")
    assert pairs.leader(found, None).setting.name == "b" and pairs.leader(found, None).n_behind == 1


# --------------------------------------------------------------------------- which runs are compared


def test_only_runs_that_differ_in_one_option_are_a_pair():
    found = pairs.settings([
        run("a", .40, lr="1e-05"), run("b", .41, lr="1e-05", hidden_dropout_prob="0.8"),
        run("c", .42, lr="3e-05", hidden_dropout_prob="0.5"), run("d", .43, lr="1e-05", output_dir="elsewhere")])
    compared = {(pair.first.name, pair.second.name): (pair.option, pair.old, pair.new)
                for pair in pairs.pairs(found, None)}
    assert compared == {("a", "b"): ("hidden_dropout_prob", "not given", "0.8"),
                        ("d", "b"): ("hidden_dropout_prob", "not given", "0.8")}


def test_runs_with_another_seed_belong_together_and_those_with_the_same_do_not():
    found = pairs.settings([run("a", .40, lr="1e-05", seed="1"), run("b", .42, lr="1e-05", seed="2"),
                            run("c", .41, lr="1e-05", seed="2"), run("d", .41, lr="1e-05")])
    assert [[one.name for one in setting.runs] for setting in found] == [["a", "b"], ["c"], ["d"]]
    assert found[0].mean() == pytest.approx(.41)


def test_nobody_asks_what_a_seed_or_a_fold_did():
    found = pairs.settings([run("a", .40, lr="1", seed="1"), run("b", .42, lr="1", seed="2"),
                            run("c", .41, lr="1", seed="2"), run("d", .41, lr="1", folds="2", fold="0"),
                            run("e", .43, lr="1", folds="2", fold="1"), run("f", .43, lr="1")])
    assert [setting.name for setting in found] == ["a and another seed", "c", "d and another fold", "f"]
    assert pairs.pairs(found, None) == []


@pytest.mark.parametrize("name, text", [
    ("dev.csv", "text,label\n" + "".join(f'"sentence, {i}",{i % 2}.0\n' for i in range(200))),
    ("dev-split.jsonl", "".join(f'{{"label": "{i % 2}", "text": "sentence {i}"}}\n' for i in range(200)))])
def test_the_dev_file_may_be_a_table(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "out.txt").write_text("".join(f"{(i + (i < 30)) % 2} ||| sentence {i}\n" for i in range(200)),
                                      encoding="utf-8")
    one = PastRun("a", "a", options={"text_column": "text"} if name == "dev.csv" else {"text_column": "body"}, dev=.85,
                  predictions=tmp_path / "out.txt", dev_file=tmp_path / name)
    assert pairs.which_are_right(one) == (False,) * 30 + (True,) * 170


def test_runs_whose_options_are_unknown_are_no_pair():
    unknown = [PastRun(name, name, dev=.4) for name in "ab"]
    assert pairs.pairs(pairs.settings(unknown), None) == []


def test_runs_on_other_dev_sentences_are_not_compared():
    def on(name: str, sha256: str, score: float, **options: str) -> PastRun:
        return PastRun(name, name, options=options, known_by="folder", dev=score, n_dev=N, dev_sha256=sha256)

    found = pairs.settings([on("a", "1", .9, lr="1"), on("b", "2", .4, lr="2"), on("c", "2", .3, lr="3")])
    assert [[one.name for one in group] for group in pairs.on_the_same_sentences(found)] == [["b", "c"], ["a"]]
    assert pairs.compare(found[0], found[1], None) is None and pairs.compare(found[1], found[2], None) is not None


def test_predictions_on_the_same_file_are_compared_sentence_by_sentence(tmp_path):
    (tmp_path / "dev.txt").write_text("".join(f"{i % 2} ||| sentence {i}\n" for i in range(200)), encoding="utf-8")

    def with_errors(name: str, wrong: range) -> PastRun:
        (tmp_path / name).write_text("".join(f"{(i + (i in wrong)) % 2} ||| sentence {i}\n" for i in range(200)),
                                     encoding="utf-8")
        return PastRun(name, name, options={"lr": name}, known_by="folder", dev=1 - len(wrong) / 200, n_dev=200,
                       predictions=tmp_path / name, dev_file=tmp_path / "dev.txt", dev_sha256="x")

    first, second = pairs.settings([with_errors("a", range(0, 40)), with_errors("b", range(30, 50))])
    assert pairs.compare(first, second, None) == comparisons.paired(10, 30, 200)
    (tmp_path / "b").unlink()
    pairs._labels.cache_clear()
    assert pairs.compare(first, second, None) == comparisons.independent(.8, .9, 200, 200)


# --------------------------------------------------------------------------- logs: which dev sentences, which series

EPOCH = "epoch 0: train loss :: 1.5, train acc :: 0.3, dev acc :: {}\n"


@pytest.mark.parametrize("one, other, are_others", [
    ({"dev": "a/dev.txt"}, {"dev": "b/dev.txt"}, True), ({"dev": "./a/dev.txt"}, {"dev": "a\\dev.txt"}, False),
    ({"dataset": "sst"}, {"dataset": "movies"}, True), ({"dataset": "sst"}, {"dev": "data/sst-dev.txt"}, False),
    ({"train": "a.txt"}, {"train": "b.txt"}, True), ({"dev": "d", "train": "a"}, {"dev": "d", "train": "b"}, False),
    ({"folds": "3", "fold": "0"}, {"folds": "3", "fold": "1"}, False), ({"folds": "3"}, {}, True),
    ({"folds": "3", "seed": "1"}, {"folds": "3", "seed": "2"}, True)])
def test_what_was_typed_says_whether_the_dev_sentences_are_the_same(one, other, are_others):
    first, second = (run("r", .4, **options) for options in (one, other))
    assert pairs.are_on_others(first, second) == are_others == pairs.are_on_others(second, first)


def test_how_many_sentences_were_read_says_it_too():
    first, second = run("a", .4), replace(run("b", .9), n_dev=245)
    unknown = PastRun("c", "c", dev=.5)
    assert pairs.are_on_others(first, second) and not pairs.are_on_others(first, unknown)
    found = pairs.settings([first, second, replace(first, name="d")])
    assert [[one.name for one in group] for group in pairs.on_the_same_sentences(found)] == [["a", "d"], ["b"]]


def test_logged_runs_on_other_dev_files_have_no_leader_in_common():
    found = pairs.settings([run("a", .9, lr="1", dev="a.txt"), run("b", .4, lr="1", dev="b.txt"),
                            run("c", .3, lr="2", dev="b.txt")])
    assert [[one.name for one in group] for group in pairs.on_the_same_sentences(found)] == [["b", "c"], ["a"]]
    assert {(pair.option, pair.difference is None) for pair in pairs.pairs(found, None)} == {
        ("dev", True), ("lr", False)}
    assert pairs.dev_words(found[0]) == "a.txt"


def test_a_log_belongs_to_the_folder_whose_dev_file_was_typed_the_same():
    folder = PastRun("f", "f", options={"dev": "a.txt", "lr": "1"}, known_by="folder", dev=.5, n_dev=N, dev_sha256="1")
    other = replace(folder, name="g", options={"dev": "b.txt"}, dev_sha256="2")
    found = pairs.settings([folder, other, run("log", .6, dev="a.txt")])
    assert [[one.name for one in group] for group in pairs.on_the_same_sentences(found)] == [["f", "log"], ["g"]]


@pytest.mark.parametrize("unit", ["fold", "seed"])
def test_what_a_series_printed_is_one_setting(unit):
    """Two series after each other in one file, without their command lines."""
    text = "".join(f"{unit}-{i}:\n{EPOCH.format(acc)}" for acc_0 in (.40, .60) for i, acc in enumerate(
        (acc_0, acc_0 + .01, acc_0 + .02)))
    runs = run_logs.read_runs(text, "x.log")
    found = pairs.settings(sorted(runs, key=lambda one: -one.peak()))
    assert [(len(one.runs), one.unit, round(one.mean(), 3)) for one in found] == [
        (3, f"{unit}s", .61), (3, f"{unit}s", .41)]


def test_a_lone_fold_is_compared_with_nothing():
    found = pairs.settings([run("a", .9, lr="1", folds="3", fold="1"), run("b", .4, lr="1"), run("c", .5, lr="2")])
    assert [[one.name for one in group] for group in pairs.on_the_same_sentences(found)] == [["b", "c"]]
    compared, = pairs.pairs(found, None)
    assert compared.option == "lr"


def test_another_test_file_is_no_other_setting():
    found = pairs.settings([run("a", .4, lr="1", seed="1", test="a.txt", label_names="n.json"),
                            run("b", .5, lr="1", seed="2", test="b.txt")])
    assert [one.name for one in found] == ["a and another seed"]


def test_who_is_ahead_sentence_by_sentence_is_not_behind(monkeypatch):
    """With several seeds the best by their mean can be worse in the seed whose predictions are there."""
    monkeypatch.setattr(comparisons, "independent", lambda *_: comparisons.Difference(-.1, -.2, -.05, 1e-9, ""))
    lead = pairs.leader(pairs.settings([run("a", .5, lr="1"), run("b", .4, lr="2")]), None)
    assert lead.n_behind == 0 and [one.name for one in lead.alike] == ["b"]


def test_no_difference_is_smaller_than_one_sentence():
    assert comparisons.smallest_shown([.4, .4, .4], 50) == 1 / 50
    wide = comparisons.smallest_shown([.3, .4, .5])
    assert comparisons.smallest_shown([.3, .4, .5], 50) == wide > 1 / 50


# --------------------------------------------------------------------------- many options


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.sampled_from("12"), max_size=4), max_size=12))
def test_the_pairs_are_those_that_differ_in_one_option(options):
    found = pairs.settings([run(str(i), .4, **own) for i, own in enumerate(options)])
    brute = {frozenset((i, j)) for (i, a), (j, b) in combinations(enumerate(options), 2)
             if sum(a.get(name) != b.get(name) for name in "abcd") == 1}
    assert {frozenset((int(pair.first.name), int(pair.second.name))) for pair in pairs.pairs(found, None)} == brute


def test_many_runs_with_an_option_of_their_own_are_looked_at_once(monkeypatch):
    """Each option of each run is read a few times, and not once for each other option."""
    n_read = 0

    class Counting(dict):
        def items(self):
            nonlocal n_read
            n_read += len(self)
            return super().items()

        def get(self, *name):
            nonlocal n_read
            n_read += 1
            return super().get(*name)

    real = pairs._own
    monkeypatch.setattr(pairs, "_own", lambda setting: Counting(real(setting)))
    found = pairs.settings([run(str(i), .4, **{f"opt{i}": "1"}) for i in range(200)])
    assert pairs.pairs(found, None) == [] and 200 <= n_read <= 2000


def test_many_seeds_are_looked_at_once():
    class Seed(str):
        n_compared = 0

        def __eq__(self, other):
            Seed.n_compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    found = pairs.settings([run(str(i), .4, lr="1", seed=Seed(i)) for i in range(300)])
    assert len(found) == 1 and Seed.n_compared <= 3000
