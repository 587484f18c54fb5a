"""--option generate: continue the prefix, greedily and at temperature 1.0, to stdout and two files."""

from pathlib import Path

import torch

import tokenizer as tokenizers
from commands import inputs, results
from commands.start import warn_of_classifier
from config import InputError, RunConfig
from formats import files, weights
from llama import load_pretrained
from tokenizer import Tokenizer
from training import device as devices
from training import logs
from training.streams import without_readers


@without_readers()
def run(config: RunConfig) -> int:
    results.check_outputs(config)
    found = inputs.find_model(config)
    logs.notice(found.notice)
    device = devices.choose_device(config)
    tokenizer = Tokenizer(max_len=config.max_sentence_len, tokenizer_model=found.tokenizer)
    read = weights.read_weights(found.weights)
    tokenizers.check_vocabulary(tokenizer, read.config)
    warn_of_classifier(read)
    # In the device's precision once, and not by autocast at each token: reading the weights is what takes the time.
    llama = load_pretrained(read, config.n_layers, dtype=device.dtype).to(device.where)
    devices.accelerate(config, llama, device)
    logs.say(f"load model from {found.weights}")
    start = tokenizer.encode(config.prefix, bos=tokenizer.add_bos, eos=False)
    if not start:
        raise InputError("--prefix is empty, and this model has no begin token to start from; give it some words")
    torch.manual_seed(config.seed)
    for temperature, path in ((0.0, config.generated_sentence_low_temp_out),
                              (1.0, config.generated_sentence_high_temp_out)):
        tokens = llama.generate(torch.tensor([start], device=device.where), config.max_new_tokens, temperature)
        sentence = tokenizer.decode(tokens[0].tolist())
        logs.say(f"Temperature is {temperature}\n{sentence}\n---------------")
        files.write_text(Path(path), sentence)
        logs.say(f"Wrote generated sentence to {path}.")
    return 0
