"""--option predict: the class of each line of a file or of stdin, `label<TAB>name<TAB>p0 p1 ...`, and only that on
stdout."""

import sys
from pathlib import Path

import numpy as np

import dataset
from commands import results
from commands.saved import load_run
from config import InputError, RunConfig, counted
from formats import tables
from training import device as devices
from training import logs, metrics, streams


def run(config: RunConfig) -> int:
    if streams.stdout_is_closed:
        raise InputError("standard output is closed, and it is where --option predict writes; send it to a file")
    results.check_outputs(config)
    if not config.input:
        raise InputError("--option predict needs --input FILE, with a sentence a line; - is stdin")
    saved = load_run(config)
    source = "stdin" if config.input == "-" else config.input
    text = tables.decode(read_stdin(), source) if config.input == "-" else tables.read_text(source)
    sentences = tables.split_lines(text)
    if not sentences[-1]:
        sentences.pop()  # behind the last line's end there is no line
    if not sentences:
        raise InputError(f"{source}: there is no sentence in it; write one a line")
    context, longest = saved.model.llama.config.max_seq_len, saved.settings.max_sentence_len
    tokens, n_cut = dataset.tokenize([s.strip() for s in sentences], saved.tokenizer, context, longest)
    if n_cut:
        logs.warn(f"{source}: {counted(n_cut, 'sentence')} cut to {counted(longest or context, 'token')}")
    split = dataset.Split(Path(source), sentences, tokens, np.zeros(len(tokens), dtype=np.int64), n_cut)
    device = devices.choose_device(config)
    devices.accelerate(config, saved.model.to(device.where), device)
    outputs = metrics.predict(saved.model, split, saved.tokenizer.pad_id, device)
    results.check_finite(outputs, str(saved.typed))
    for row in outputs.exp().tolist():
        label = row.index(max(row))
        print(f"{label}\t{saved.settings.label_names[label]}\t{' '.join(f'{p:.6f}' for p in row)}")
    return 0


def read_stdin() -> bytes:
    """All of stdin. Raises OSError where it cannot be read; a closed one is empty."""
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise OSError(f"stdin: it cannot be read ({error.strerror}); give --input a file, or pipe the sentences into "
                      "this") from None
