"""--run: the finished run that a command uses."""

from config import RunConfig, only_run
from formats.columns import Usual
from minllama import Model
from training import logs, saved
from training.run_folder import RunFolder, options_in
from training.saved import SavedRun


def load_run(config: RunConfig) -> SavedRun:
    """The classifier of --run, checked. Raises InputError or FileNotFoundError with what to do."""
    run = saved.load_run(only_run(config))
    warn_of_fixed(config)
    return run


def warn_of_fixed(config: RunConfig) -> None:
    """Warns of typed options that the saved run decides."""
    fixed = config.given & {"pretrained_model_path", "tokenizer", "n_layers", "attention", "pooling",
                            "max_sentence_len", "hidden_dropout_prob", "dropout", "batch_size"}
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
