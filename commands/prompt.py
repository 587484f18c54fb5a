"""--option prompt: ask the pretrained model, without training, which label's name it would go on with."""

from dataclasses import replace
from pathlib import Path

from classifier import LlamaZeroShotClassifier, ask
from commands import inputs as run_inputs
from commands import results, start
from config import InputError, RunConfig
from llama import load_pretrained
from training import device as devices
from training import metrics
from training.streams import without_readers


@without_readers()
def run(config: RunConfig) -> int:
    results.check_outputs(config)
    inputs = run_inputs.load(config, need=("dev",))
    baselines = results.print_baselines(config, inputs.files.train, inputs.splits)
    device = devices.choose_device(config)
    start.warn_of_classifier(inputs.weights)
    llama = load_pretrained(inputs.weights, config.n_layers, dtype=device.dtype)
    model = LlamaZeroShotClassifier(config, inputs.tokenizer, inputs.names, llama).to(device.where)
    devices.accelerate(config, model, device)
    outputs = {}
    for name, split in inputs.splits.items():
        asked = ask(model, split.tokens, inputs.tokenizer, config.question, inputs.names)
        outputs[name] = metrics.predict(model, replace(split, tokens=asked), inputs.tokenizer.pad_id, device, name)
        if outputs[name].isnan().any():
            raise InputError(f"{inputs.weights.path}: the model's output is not a number: the weights hold numbers "
                             "that are not, or that are far too large; fetch or copy the file again")
    default_out = {name: Path(f"{inputs.files.name}-{name}-prompting-output.txt") for name in outputs}
    results.report_splits(config, inputs.splits, outputs, default_out, inputs.names, baselines)
    return 0
