"""--space: the grammar, the options' own checks, parts with conditions, and what is refused. The judges are counting,
itertools, and the parser of the command line."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import space as spaces
from commands.space import Parameter, Range
from config import InputError, RunConfig, parse_args


def one(text: str) -> Parameter:
    (found,) = spaces.parse(text)
    return found


# --------------------------------------------------------------------------- what a part says


@pytest.mark.parametrize("text, domain", [
    ("lr=log:1e-6..1e-3", Range(1e-6, 1e-3, is_log=True)),
    ("hidden_dropout_prob=0.3|0.5|0.8", (0.3, 0.5, 0.8)),
    ("n_layers=int:4..12", Range(4, 12, is_whole=True)),
    ("n_layers=4..12", Range(4, 12, is_whole=True)),
    ("batch_size=log:8..128", Range(8, 128, is_log=True, is_whole=True)),
    ("warmup_ratio=0..0.2", Range(0.0, 0.2)),
    ("warmup_ratio=0..0.2:0.05", Range(0.0, 0.2, step=0.05)),
    ("n_layers=int:4..12:3", Range(4, 10, is_whole=True, step=3)),
    ("lr=log:1e-6..1e-3:x10", (1e-6, 1e-5, 1e-4, 1e-3)),
    ("batch_size=16|32|80", (16, 32, 80)),
    ("optimizer=adamw|sgd", ("adamw", "sgd")),
    ("nesterov=on|off", (True, False)),
    ("label-smoothing=0.1", (0.1,)),
    ("tokenizer=../a|../b", ("../a", "../b")),
    ("learning_rate=log:1e-6..1e-3", Range(1e-6, 1e-3, is_log=True)),
    ("milestones=2,3|4", ("2,3", "4")),
])
def test_a_part_is_read(text, domain):
    assert one(text).domain == domain


def test_a_file_says_what_a_text_says(tmp_path):
    path = tmp_path / "wide.space"
    path.write_text("# rates\nlr=log:1e-6..1e-3   # wide\n\nbatch_size=16|32\n", encoding="utf-8")
    assert spaces.read(str(path)) == "lr=log:1e-6..1e-3 batch_size=16|32" == spaces.read(
        "lr=log:1e-6..1e-3\n batch_size=16|32")


def test_a_file_of_windows_and_dashes_are_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf--lr=auto\r\n--batch_size=16|32\r\n")
    text = spaces.read(str(tmp_path / "a.txt"))
    assert text == "lr=auto batch_size=16|32" and spaces.has_auto(text)
    assert spaces.with_rates(text, "1e-5..1e-4") == "lr=1e-5..1e-4 batch_size=16|32"
    assert not spaces.has_auto("batch_size=16|32")


def test_parts_with_a_condition_stand_behind_what_they_depend_on():
    found = spaces.parse("step_size[scheduler=step]=int:20..200 scheduler=cosine|step")
    assert [p.name for p in found] == ["scheduler", "step_size"]
    assert found[1].conditions == (("scheduler", ("step",)),)
    assert spaces.walk(found, lambda p: "cosine" if p.name == "scheduler" else 50) == {"scheduler": "cosine"}
    assert spaces.walk(found, lambda p: "step" if p.name == "scheduler" else 50) == {
        "scheduler": "step", "step_size": 50}


# --------------------------------------------------------------------------- the grid


def test_a_grid_has_each_point_once():
    found = spaces.grid(spaces.parse("lr=1e-4|1e-3 batch_size=8|16|32 warmup_ratio=0..0.2:0.1"))
    expected = itertools.product((1e-4, 1e-3), (8, 16, 32), (0.0, 0.1, 0.2))
    assert [tuple(point.values()) for point in found] == list(expected)


def test_a_grid_with_a_condition_has_no_doubles():
    found = spaces.grid(spaces.parse("scheduler=cosine|step step_size[scheduler=step]=int:20..60:20 lr=1e-4|1e-3"))
    plain = [(point["scheduler"], point.get("step_size"), point["lr"]) for point in found]
    assert len(plain) == len({*plain}) == 2 * (1 + 3)


@given(low=st.integers(-50, 50), n=st.integers(2, 40), step=st.sampled_from([0.01, 0.05, 0.1, 0.25, 1.0, 3.0]))
def test_a_range_with_a_step_reaches_its_end(low, n, step):
    """Decimal steps do not add up in binary: the count must not be one short, and no value beyond the end."""
    start, end = low / 100 + 1, low / 100 + 1 + (n - 1) * step
    (found,) = spaces.parse(f"weight_decay={start!r}..{end!r}:{step}")
    values = found.values()
    assert len(values) == n and math.isclose(values[-1], end, rel_tol=1e-9) and len({*values}) == n


# --------------------------------------------------------------------------- as if it had been typed


@given(lr=st.floats(1e-12, 1e5), batch=st.integers(1, 10_000))
def test_a_point_is_the_command_line_with_the_same_words(lr, batch):
    point = {"lr": lr, "batch_size": batch, "milestones": "2,3", "nesterov": True}
    words = ["--option", "finetune", "--lr", repr(lr), "--batch_size", str(batch), "--milestones", "2,3", "--nesterov"]
    assert spaces.configured(RunConfig(option="finetune", given=frozenset({"option"})), point) == parse_args(words)


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("text, words", [
    ("lrr=1e-5|1e-4", "did you mean lr?"),
    ("hidden_dropout=0.1|0.2", "did you mean hidden_dropout_prob?"),
    ("lr", "expected OPTION=VALUES"),
    ("lr=", "expected OPTION=VALUES"),
    ("lr=1e-3..1e-6", "the range is empty"),
    ("lr=1e-3..1e-3", "the range is empty"),
    ("weight_decay=log:0..1", "log: needs a range above 0"),
    ("lr=log:1e-6..abc", "abc is not a number"),
    ("lr=-1..1", "lr -1: it must be above 0"),
    ("lr=nan|1", "lr nan"),
    ("hidden_dropout_prob=0.3|1.5", "hidden_dropout_prob 1.5: it must be at least 0 and below 1"),
    ("hidden_dropout_prob=0..1", "hidden_dropout_prob 1: it must be"),
    ("n_layers=int:0..4", "n_layers 0: it must be 1 or more"),
    ("n_layers=1.5|2", "1.5 is not a whole number"),
    ("lr=int:0.5..3", "int: goes from a whole number"),
    ("scheduler=cosine|setp", "did you mean step?"),
    ("optimizer=adamw..sgd", "cannot be adamw..sgd"),
    ("nesterov=on|maybe", "can be on or off"),
    ("lr=1e-4|1e-4", "a value is there twice"),
    ("lr=1e-4|", "nothing between two |"),
    ("lr=1e-4,1e-3", "several values have | between them"),
    ("lr=1e-4...1e-3", "with two dots"),
    ("learning_rat=1|2", "did you mean learning_rate?"),
    ("# a comment", "a comment can stand in a file only"),
    ("kernels=auto|off", "cannot be searched"),
    ("lr=1e-4|1e-3 lr=1e-2", "in the space twice"),
    ("lr=log:1e-6..1e-3:10", "is a factor"),
    ("lr=log:1e-6..1e-3:x1", "must be a number above 1"),
    ("warmup_ratio=0..0.2:0.5", "the step 0.5 must be"),
    ("warmup_ratio=0..0.2:x2", "elsewhere a distance"),
    ("seed=1|2", "--seeds K"),
    ("output_dir=a|b", "cannot be searched"),
    ("dev=a|b", "cannot be searched"),
    ("step_size[scheduler=step]=20|40", "scheduler is not in the space"),
    ("scheduler=cosine|linear step_size[scheduler=step]=20|40", "scheduler is never step"),
    ("lr=1e-4..1e-3 momentum[lr=1e-4]=0.1|0.9", "lr is a range"),
    ("lr=1|2 momentum[lr]=0.1", "expected another option's value between the brackets"),
    ("scheduler[optimizer=sgd]=step|linear optimizer[scheduler=step]=sgd|adamw", "in a circle"),
    ("lr[lr=1]=1|2", "depends on itself"),
])
def test_a_part_that_cannot_be_is_refused_by_name(text, words):
    with pytest.raises(InputError) as error:
        spaces.parse(text)
    assert words in str(error.value) and "--space" in str(error.value)


def test_a_file_that_is_not_there_or_is_empty_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        spaces.read("wide.space")
    (tmp_path / "empty").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(InputError, match="nothing in it"):
        spaces.read(str(tmp_path / "empty"))


@pytest.mark.parametrize("text, words", [
    ("lr=log:1e-6..1e-3", "lr is a continuous range"),
    ("warmup_ratio=0..0.2", "give it a step, such as warmup_ratio=0..0.2:0.05"),
    ("max_steps=1..1000 lr=log:1e-6..1e-3:x1.001", "over 100000 points"),
])
def test_a_grid_without_end_is_refused(text, words):
    with pytest.raises(InputError) as error:
        spaces.grid(spaces.parse(text))
    assert words in str(error.value)


@pytest.mark.parametrize("text, typed, words", [
    ("lr=1e-4|1e-3", {"lr": 1e-5}, "--lr is typed and is in the space too"),
    ("nesterov=on|off momentum=0|0.9", {"optimizer": "sgd"}, "--nesterov needs a --momentum above 0"),
    ("momentum=0.5|0.9", {}, "momentum has no effect anywhere in this space: --optimizer adamw does not use it"),
    ("warmup_ratio=0|0.1 warmup_steps=0|5", {}, "contradict each other"),
])
def test_a_space_that_contradicts_itself_or_the_options_is_refused(text, typed, words):
    config = RunConfig(option="search", **typed, given=frozenset({"option", *typed}))
    with pytest.raises(InputError) as error:
        spaces.check(spaces.parse(text), config)
    assert words in str(error.value)


def test_a_part_that_has_an_effect_somewhere_is_fine():
    config = RunConfig(option="search", given=frozenset({"option"}))
    assert spaces.check(spaces.parse("optimizer=adamw|sgd momentum[optimizer=sgd]=0.5|0.9"), config) == []
    (line,) = spaces.check(spaces.parse("optimizer=adamw|sgd momentum=0.5|0.9"), config)
    assert "momentum has no effect where optimizer is adamw; momentum[optimizer=sgd]=..." in line


@settings(deadline=None, max_examples=30)
@given(n=st.integers(10, 10**6), rate=st.floats(1e-6, 1e-2), is_ordinal=st.booleans(),
       typed=st.sets(st.sampled_from(["lr", "batch_size", "warmup_ratio", "weight_decay"])))
def test_the_default_space_is_one_that_can_be_searched(n, rate, is_ordinal, typed):
    found = spaces.parse(spaces.default_space(n, rate, is_ordinal, frozenset(typed)))
    assert not typed & {p.name for p in found}
    spaces.check(found, RunConfig(option="search", ordinal=is_ordinal, given=frozenset({"option", *typed})))
