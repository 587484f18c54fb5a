"""The door for Python: what it answers is what the run's files say, whatever the batch and the thread."""

import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import refused, tiny_sentences
from safetensors.torch import load_file, save_file

import run_llama
from minllama import load
from training import saved


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A run whose classes are named 0, 1 and 2."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run_llama.main(["--option", "finetune", *inputs, "--epochs", "1", "--lr", "3e-3", "--batch_size", "16",
                           "--max_sentence_len", "12", "--dtype", "float32", "--output_dir", str(folder)]) == 0
    return folder


TEXTS = [s for _, s in tiny_sentences(40, 7)] + ["", "  good film ", "一部好电影 🎬"]


def test_predict_follows_scikit_learns_conventions(run):
    model = load(run)
    p = model.predict_proba(TEXTS)
    assert model.classes_.tolist() == ["0", "1", "2"] and p.shape == (43, 3) and p.dtype.kind == "f"
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    found = model.predict(np.array(TEXTS))
    assert found.tolist() == model.classes_[p.argmax(1)].tolist()
    assert model.predict([]).shape == (0,) and model.predict_proba([]).shape == (0, 3)
    assert model.predict([]).dtype == model.classes_.dtype
    np.testing.assert_array_equal(load(str(run / "best")).predict_proba(TEXTS), p)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(TEXTS), p)


def test_the_numbers_are_the_models_for_each_text_alone(run):
    """Against the forward pass of one text, in another batch, in other company and in eight threads."""
    model, classifier = load(run), saved.load_run(run)
    alone = []
    for text in TEXTS:
        ids = classifier.tokenizer.encode(text.strip(), bos=classifier.tokenizer.add_bos, eos=False)[:12] or [
            classifier.tokenizer.eos_id]
        with torch.no_grad():
            alone.append(classifier.model(torch.tensor([ids])).exp()[0].numpy())
    for size in (1, 7, 64):
        np.testing.assert_allclose(model.answer(TEXTS, size).probabilities, alone, atol=1e-6)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda i: model.answer(TEXTS[i:] + TEXTS[:i], 3).probabilities, range(16)):
            assert found.shape == (43, 3)
        parts = list(pool.map(lambda i: model.answer(TEXTS[i:i + 5], 2).probabilities, range(0, 43, 5)))
    np.testing.assert_allclose(np.concatenate(parts), alone, atol=1e-6)


def test_what_is_no_list_of_texts_is_refused(run):
    model = load(run)
    for texts, words in (("good", "pass a list"), (["a", 3], "text 1 is 3"), ([None], "text 0 is None")):
        with pytest.raises(TypeError, match=words):
            model.predict(texts)
    with pytest.raises(ValueError, match="half of a surrogate"):
        model.predict(["\ud800"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        model.predict(["a"], batch_size=0)


def test_a_text_that_is_cut_is_said(run):
    model = load(run)
    with pytest.warns(UserWarning, match="1 of 2 texts cut to 12 tokens"):
        model.predict(["very " * 50, "good"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(["good"])


def test_a_folder_without_a_sound_run_is_refused(run, tmp_path):
    with refused(tmp_path, "no saved classifier"):
        load(tmp_path)
    (tmp_path / "best").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "best" / name).write_bytes((run / "best" / name).read_bytes())
    state = load_file(run / "best" / "model.safetensors")
    save_file({name: t * torch.nan for name, t in state.items()}, tmp_path / "best" / "model.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        load(tmp_path).predict(["good"])


