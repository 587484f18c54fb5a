"""A saved classifier comes back."""

import os
import stat

import pytest
import tiny
import torch
from conftest import refused

from classifier import ClassifierConfig, LlamaEmbeddingClassifier, empty_classifier
from formats import files
from training import saved as saved_runs

SETTINGS = {"num_labels": 3, "label_names": ["a", "b", "c"], "max_sentence_len": None, "hidden_dropout_prob": 0.1,
            "pooling": "mean", "loss": "ce"}


def settings_of(llama) -> ClassifierConfig:
    return ClassifierConfig(**SETTINGS, llama=llama.config)


def classifier(**more) -> LlamaEmbeddingClassifier:
    llama = tiny.llama(**more)
    return LlamaEmbeddingClassifier(settings_of(llama), llama)


class NoTokenizer:
    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_classifier_comes_back_with_equal_weights_and_can_be_read_by_everybody(tmp_path, tied):
    model = classifier(tie_embeddings=tied).eval()
    saved_runs.save_classifier(tmp_path / "best", model, NoTokenizer(), settings_of(model.llama))
    assert stat.S_IMODE((tmp_path / "best" / "model.safetensors").stat().st_mode) == 0o644
    assert sorted(os.listdir(tmp_path / "best")) == [
        "config.json", "manifest.json", "model.safetensors", "tokenizer.json"]

    path = tmp_path / "best" / "config.json"
    described = ClassifierConfig.read(files.read_json(path), path)
    assert described == settings_of(model.llama)
    back = empty_classifier(described, path).eval()
    saved_runs.load_classifier_state(tmp_path / "best", back)
    ids, lengths = tiny.tokens(4, 9), torch.tensor([9, 1, 4, 7])
    assert torch.equal(back(ids, lengths), model(ids, lengths))

    other = classifier(tie_embeddings=tied, seed=9).eval()
    assert not torch.allclose(other(ids, lengths), model(ids, lengths))
    saved_runs.load_classifier_state(tmp_path / "best", other)  # in place
    assert torch.equal(other(ids, lengths), model(ids, lengths))


def test_weights_of_another_shape_or_a_damaged_file_are_no_state(tmp_path):
    model = classifier()
    saved_runs.save_classifier(tmp_path, model, NoTokenizer(), settings_of(model.llama))
    deeper = classifier(n_layers=3)
    with refused(tmp_path, "do not belong together"):
        saved_runs.load_classifier_state(tmp_path, deeper)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with refused(tmp_path, "damaged"):
        saved_runs.load_classifier_state(tmp_path, model)


@pytest.mark.parametrize("fault", [{"llama": None}, {"llama": {"dim": "x"}}, {"llama": {"n_layers": 0}},
                                   {"llama": {"unknown": 1}}, {"num_labels": "3"}, {"num_labels": None},
                                   {"num_labels": -1}, {"num_labels": 2**62}, {"hidden_dropout_prob": "x"},
                                   {"llama": {"vocab_size": 2**62}}, {"llama": {"hidden_dim": "x"}}], ids=str)
def test_settings_that_describe_no_classifier_are_refused(tmp_path, fault):
    with refused(tmp_path / "config.json"):
        path = tmp_path / "config.json"
        empty_classifier(ClassifierConfig.read({**SETTINGS, "llama": {}, **fault}, path), path)
