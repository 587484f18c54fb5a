"""Which files a run reads where they were typed, and where not."""

from pathlib import Path

import pytest
from conftest import write_split

from commands import inputs
from config import parse_args
from data import prepare


def test_typed_paths_never_mix_with_another_data_set(tiny_data):
    files = inputs.find_files(parse_args(["--train", str(tiny_data["train"]), "--dev", str(tiny_data["dev"])]))
    assert files.test is None and files.name == "toy" and files.label_names == tiny_data["label_names"]


def test_sst_is_used_where_it_is_and_movies_where_not(tmp_path, monkeypatch):
    real = prepare.dataset_paths
    monkeypatch.setattr(prepare, "dataset_paths", lambda name: real(name, tmp_path))
    fetched = []

    def fetch(name):
        fetched.append(name)
        for path in real(name, tmp_path).values():
            path.write_text("0 ||| a\n", encoding="utf-8")

    monkeypatch.setattr(prepare, "fetch", fetch)
    files = inputs.find_files(parse_args([]))
    assert files.name == "movies" and fetched == ["movies"] and "prepare.py sst" in files.notice
    for split in ("train", "dev"):
        write_split(tmp_path / f"sst-{split}.txt", [(0, "a")])
    files = inputs.find_files(parse_args([]))
    assert files.name == "sst" and files.test is None and not files.notice and fetched == ["movies"]


@pytest.mark.parametrize("typed, words", [
    (["--dataset", "sst"], "prepare.py sst"),
    (["--dataset", "mine"], "can be fetched: movies"),
    (["--train", "data/sst-train.txt"], "prepare.py sst"),
    (["--dev", "nowhere.txt"], "check --dev"),
])
def test_a_missing_file_names_the_command_that_fetches_it(tmp_path, monkeypatch, typed, words):
    monkeypatch.chdir(tmp_path)
    real = prepare.dataset_paths
    monkeypatch.setattr(prepare, "dataset_paths", lambda name: real(name, tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file") as error:
        inputs.find_files(parse_args(typed))
    assert words in str(error.value)


@pytest.mark.parametrize("has_weights, missing", [(False, "stories42M.pt"), (True, "stories42M's tokenizer.model")])
def test_what_is_used_instead_of_the_stories_model_says_what_fetches_it(tmp_path, monkeypatch, has_weights, missing):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inputs, "ROOT", tmp_path)
    monkeypatch.setattr(inputs.prepare, "weights_path", lambda name: tmp_path / "models" / f"{name}.gguf")
    monkeypatch.setattr(inputs.prepare, "fetch", lambda name: None)
    if has_weights:
        Path("stories42M.pt").touch()
    assert inputs.find_model(parse_args([])).notice == (
        f"{missing} is not here: using smollm2-135m instead; `python data/prepare.py stories42M` fetches the weights "
        "and their tokenizer (or imports them: --from DIR)")
