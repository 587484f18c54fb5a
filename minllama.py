"""The door for Python: a finished run as a classifier, with scikit-learn's names.

    from minllama import load

    model = load("runs/finetune-1-0.00063")
    model.predict(["a charming film"])        # array(['good'], ...): elements of model.classes_
    model.predict_proba(["a charming film"])  # array([[0.02, ..., 0.71]]), (N, C), columns as in model.classes_

The commands predict and serve answer through this room too.
"""

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import dataset
from config import InputError, RunConfig, counted
from dataset import Split
from training import device as devices
from training import metrics
from training.saved import SavedRun, load_run

BATCH_SIZE = 64
# A forward pass uses every core already: a second one beside it would only take the memory twice. For the process and
# not for each model, so that a model can be copied and pickled.
_ONE_AT_A_TIME = threading.Lock()


def load(run: str | Path, device: str | None = None, dtype: str = "float32", base: str | Path | None = None) -> "Model":
    """The best epoch of a finished run: `run` is its folder, or its best/. `base`: of a run with adapters (--lora_r),
    where its pretrained weights lie now, if they have been moved.

    `device`: cpu (the default), cuda, cuda:1, mps. `dtype`: float32 or bfloat16, which is faster where the device has
    units for it, and rounds a sentence's numbers otherwise in another batch. Raises InputError (a ValueError) or
    FileNotFoundError, with what to do, for a folder without a sound classifier.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype is {dtype!r}; it can be float32 or bfloat16")
    return Model(load_run(run, base), RunConfig(option="predict", device=device, dtype=dtype))


@dataclass(frozen=True)
class Answers:
    """`probabilities` (N, C) float32, each row's sum 1; `n_cut`: how many texts were too long and lost their end."""

    probabilities: np.ndarray
    n_cut: int


class Model:
    """A classifier: its answer for a text does not depend on the other texts of the call, nor on the batch size, but
    for the last bits of float32 (docs/python.md has the figure). Its methods can be called from several threads.

    `classes_`: the classes' names, (C,), in the order of their numbers. They are texts where the classes are numbers
    too: "0", "1", ... `saved`: the run.
    """

    def __init__(self, saved: SavedRun, config: RunConfig):
        """`config`: where and how to compute (--device, --dtype, --kernels); of --dtype, auto is float32 here."""
        self.saved = saved
        self.classes_ = np.array(saved.settings.label_names)
        self._device = devices.choose_device(replace(config, dtype="float32") if config.dtype == "auto" else config)
        devices.accelerate(config, saved.model.to(self._device.where), self._device)

    @property
    def longest(self) -> int:
        """How many tokens of a text are looked at."""
        return self.saved.settings.max_sentence_len or self.saved.model.llama.config.max_seq_len

    def predict(self, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> np.ndarray:
        """The likeliest class of each text: (N,), elements of `classes_`. See `predict_proba`."""
        return self.classes_[self.predict_proba(texts, batch_size).argmax(1)]

    def predict_proba(self, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> np.ndarray:
        """The probability of each class for each text: (N, C) float32.

        `batch_size`: so many texts a forward pass at most. Warns (UserWarning) where texts were too long and cut.
        Raises TypeError for one text alone, or what is no text, and InputError for weights that are damaged.
        """
        answers = self.answer(texts, batch_size)
        n = len(answers.probabilities)
        if answers.n_cut:  # Python's own warnings: a caller can silence them, and a loop is warned once
            warnings.warn(f"{answers.n_cut} of {counted(n, 'text')} cut to {counted(self.longest, 'token')}",
                          stacklevel=2)
        return answers.probabilities

    def answer(self, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> Answers:
        """`predict_proba` that returns how many texts were cut, and warns of nothing."""
        if isinstance(texts, str | bytes):
            raise TypeError(f"expected a list of texts, found one text; pass a list: [{texts[:30]!r}]")
        sentences = list(texts)
        for i, text in enumerate(sentences):
            if not isinstance(text, str):
                raise TypeError(f"text {i} is {text!r:.60} ({type(text).__name__}); expected a str")
            if (place := lone_surrogate(text)) is not None:
                raise InputError(f"text {i}: character {place} is one half of a surrogate pair, and not a character")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        if not sentences:
            return Answers(np.zeros((0, len(self.classes_)), dtype=np.float32), 0)
        run = self.saved
        tokens, n_cut = dataset.tokenize([text.strip() for text in sentences], run.tokenizer,
                                         run.model.llama.config.max_seq_len, run.settings.max_sentence_len)
        split = Split(run.best, sentences, tokens, np.zeros(len(tokens), dtype=np.int64), n_cut)
        with _ONE_AT_A_TIME:
            outputs = metrics.predict(run.model, split, run.tokenizer.pad_id, self._device, None, batch_size)
        metrics.check_finite(outputs, str(run.typed))
        return Answers(outputs.exp().numpy(), n_cut)


def lone_surrogate(text: str) -> int | None:
    r"""Where half of a surrogate pair stands in a text (JSON's "\ud800"), which cannot be encoded; None: nowhere."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None
