"""--run: the finished run that a command uses."""

from pathlib import Path

from commands import inputs
from config import RunConfig, only_run
from formats.columns import Usual
from minllama import Model
from training import logs, saved
from training.run_folder import RunFolder, options_in
from training.saved import SavedRun


def load_run(config: RunConfig) -> SavedRun:
    """The classifier of --run, checked. Raises InputError or FileNotFoundError with what to do."""
    settings, best = saved.read_settings(only_run(config))
    run = saved.load_checked(Path(only_run(config)), settings, best, base_of(config) if settings.lora else None)
    warn_of_fixed(config, bool(run.settings.lora))
    return run


def base_of(config: RunConfig) -> str | None:
    """Where the base of a run with adapters lies, as far as it was typed; else the run knows it."""
    return str(inputs.find_weights(config.pretrained_model_path)) if config.pretrained_model_path else None


def warn_of_fixed(config: RunConfig, has_adapters: bool) -> None:
    """Warns of typed options that the saved run decides; where the base of adapters lies is not one of them."""
    fixed = config.given & {"pretrained_model_path", "tokenizer", "n_layers", "attention", "pooling",
                            "max_sentence_len", "hidden_dropout_prob", "dropout", "batch_size"}
    fixed -= {"pretrained_model_path"} if has_adapters else set()
    if fixed:
        logs.warn(f"--{', --'.join(sorted(fixed))}: no effect, the saved run decides")


def columns_of(home: RunFolder) -> Usual:
    """The columns of texts and of labels that were typed for the run. A best/ alone does not know them."""
    options = options_in(home)
    text, label = (options.get(name) for name in ("text_column", "label_column"))
    return text if isinstance(text, str) else None, label if isinstance(label, str) else None


def load_model(config: RunConfig) -> Model:
    """The classifier of --run, on the device that was asked for, as a Python program gets it too."""
    return Model(load_run(config), config)
