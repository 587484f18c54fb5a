"""--adapter for predict: an adapter of PEFT's with a head, on its base, as a classifier."""

from pathlib import Path

import lora
import tokenizer as tokenizers
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from commands import inputs
from config import InputError, RunConfig
from formats import files, peft, weights
from llama import load_pretrained
from tokenizer import Tokenizer
from training import logs
from training.run_folder import RunFolder
from training.saved import SavedRun


def load(config: RunConfig) -> SavedRun:
    """The classifier that an adapter of PEFT's makes of its base: --pretrained_model_path, or what the adapter names.
    Raises InputError or FileNotFoundError with what to do."""
    folder = Path(config.adapter or "")
    if not peft.is_peft(folder):
        raise InputError(f"--adapter {folder}: there is no adapter of PEFT's here (no adapter_config.json); for a run "
                         "with --lora_r, say --run")
    found = inputs.find_model(config)
    with logs.doing(f"reading {found.weights}"):
        read = weights.read_weights(found.weights)
        adapter = inputs.read_adapter(config, read)
        assert adapter
        if not adapter.head:
            raise InputError(f"--adapter {folder}: it has no head (no score.weight), so it says no classes; train one "
                             f"with --option finetune --adapter {folder}")
        llama = load_pretrained(read, adapter.n_layers, attention=adapter.attention, has_output=False)
    n = len(adapter.head["weight"])
    settings = ClassifierConfig(n, label_names(n, [folder, found.weights]), "last", "ce", 0.0, None, llama.config,
                                "bias" in adapter.head, adapter.config)
    model = LlamaEmbeddingClassifier(settings, llama)
    lora.add(llama, adapter.config)
    lora.load(llama, adapter)
    model.classifier_head.load_state_dict(adapter.head)
    tokenizer = Tokenizer(tokenizer_model=found.tokenizer)
    tokenizers.check_vocabulary(tokenizer, llama.config)
    return SavedRun(folder, RunFolder(folder), folder, model.eval(), tokenizer, settings)


def label_names(n: int, places: list[Path]) -> list[str]:
    """The classes' names as the `id2label` of a config has them, the first one that fits; else their numbers."""
    for path in (place / name for place in places for name in (peft.BESIDE, "config.json")):
        names = files.read_json(path).get("id2label") if path.is_file() else None
        if isinstance(names, dict) and names.keys() == {str(i) for i in range(n)}:
            found = [names[str(i)] for i in range(n)]
            if all(isinstance(name, str) and name.isprintable() for name in found):
                return found
    return [str(i) for i in range(n)]
