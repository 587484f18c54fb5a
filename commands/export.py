"""--option export: a finished run, or pretrained weights, for other programs.

    python run_llama.py --option export --run runs/finetune-10-1e-05 --format hf --output_dir my-model

hf: transformers; peft: PEFT, beside it; gguf: llama.cpp; llama2c: llama2.c. The folder is new and whole, or not there.
"""

from collections.abc import Callable
from pathlib import Path

from commands import export_hf, export_tokenizer, exported
from commands.exported import Exported
from config import InputError, RunConfig, no_effect
from formats import export_gguf, export_llama2c, new_folder
from training import logs
from training.streams import without_readers

Writer = Callable[[Path, Exported, RunConfig], str]  # fills a folder; returns what reads it, in words


@without_readers()
def run(config: RunConfig) -> int:
    for line in no_effect(config):
        logs.warn(f"no effect: {line}")
    if not config.output_dir:
        raise InputError("--option export needs --output_dir DIR, a new folder for what is written")
    folder = Path(config.output_dir)
    new_folder.check_new(folder, "--output_dir")
    model = exported.load(config)
    readers: list[str] = []
    with logs.doing(f"writing {folder}"):
        new_folder.write_folder(folder, lambda path: readers.append(WRITERS[config.format](path, model, config)),
                                "--output_dir")
    size = sum(path.stat().st_size for path in folder.iterdir())
    logs.say(f"export :: {folder}: {model.path} as {config.format}, {size / 1e6:.1f} MB, for {readers[0]}")
    return 0


def write_hf(folder: Path, model: Exported, config: RunConfig) -> str:
    return export_hf.write(folder, model)


def write_peft(folder: Path, model: Exported, config: RunConfig) -> str:
    return export_hf.write_peft(folder, model)


def write_gguf(folder: Path, model: Exported, config: RunConfig) -> str:
    """model.gguf: the language model; of a classifier the Llama below its head."""
    vocabulary = export_tokenizer.gguf_metadata(model.tokenizer, model.config.vocab_size)
    export_gguf.write_gguf(folder / "model.gguf", exported.with_output(model), model.config, vocabulary,
                           config.gguf_type, model.path.name)
    _say_without_head(model)
    return f"llama.cpp (model.gguf, {config.gguf_type})"


def write_llama2c(folder: Path, model: Exported, config: RunConfig) -> str:
    """model.pt, and the tokenizer as we read it."""
    export_llama2c.write_pt(folder / "model.pt", model.weights, model.config)
    model.tokenizer.save(folder)
    _say_without_head(model)
    return "llama2.c (model.pt)"


def _say_without_head(model: Exported) -> None:
    if model.settings:
        logs.notice(f"{model.path}: its head is not in this format, which has the language model alone; it has learned "
                    "to classify, and may have forgotten how to go on with a text")


WRITERS: dict[str, Writer] = {"hf": write_hf, "peft": write_peft, "gguf": write_gguf, "llama2c": write_llama2c}
