"""training/copies.py, and what pairs.py makes of a single run beside several seeds: one run is counted once."""

from dataclasses import replace

from formats.past_run import Epoch, PastRun
from training import pairs
from training.copies import copies

EPOCHS = tuple(Epoch(i, 1.5 - i / 10, .3 + i / 10, .3 + i / 20) for i in range(3))


def run(name: str, known_by: str = "folder", moved: float = 0.0, **options: str) -> PastRun:
    epochs = tuple(replace(e, dev_acc=e.dev_acc + moved) for e in EPOCHS)
    return PastRun(name, name, options=options, known_by=known_by, given=frozenset(options), epochs=epochs, n_dev=1101)


def test_a_folder_and_its_log_are_one_run():
    folder = run("a", lr="0.001", seed="1")
    for log in (run("log", ""), run("log", "heading", lr="0.001"), run("log", "command", lr="0.001", seed="1")):
        assert [(one.name, other.name) for one, other in copies([log, folder])] in ([("log", "a")], [("a", "log")])


def test_other_numbers_and_other_options_are_other_runs():
    first = run("a", lr="0.001")
    assert not copies([first, run("b", moved=.001, lr="0.001")])
    assert not copies([first, run("b", lr="0.002")]) and not copies([first, run("b", "heading", lr="0.002")])
    one_epoch = [replace(run(name, ""), epochs=EPOCHS[:1]) for name in "ab"]
    assert not copies(one_epoch), "three equal numbers may be chance"


def test_one_run_stands_beside_the_run_with_its_seed_of_several():
    seeds = [run(f"s{i}", moved=i / 100, lr="0.001", seed=str(i)) for i in (1, 2)]
    single = run("b", moved=.1, lr="0.002", seed="1")
    (pair,) = pairs.pairs(pairs.settings([*seeds, single]), None)
    assert (pair.option, {pair.first.name, pair.second.name}) == ("lr", {"s1", "b"})
    assert not pairs.pairs(pairs.settings([*seeds, run("b", moved=.1, lr="0.002", seed="3")]), None)
    others = [run(f"t{i}", moved=i / 50, lr="0.002", seed=str(i)) for i in (1, 2)]
    (pair,) = pairs.pairs(pairs.settings([*seeds, *others]), None)
    assert len(pair.first.runs) == len(pair.second.runs) == 2, "two of several are compared as such, and once"


def test_what_a_log_does_not_say_is_no_difference():
    folder = replace(run("a", lr="0.001", dropout="0.1", pooling="last"), given=frozenset({"lr"}))
    assert pairs.differing([folder, run("log", "")]) == []
    assert pairs.differing([folder, run("log", "heading", lr="0.002")]) == ["lr"]
    assert pairs.differing([folder, run("log", "command", lr="0.002", dropout="0.3")]) == ["lr"]
    assert pairs.differing([folder, replace(folder, options={"lr": "0.001"})]) == ["dropout", "pooling"]
