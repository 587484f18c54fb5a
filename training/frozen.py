"""--freeze: the first part of a classifier is not trained. It has no gradient and no optimizer state, runs without
autograd, and gives the same for a sentence in every epoch (`training/kept.py` keeps that)."""

from torch import nn

import lora
from classifier import LlamaEmbeddingClassifier
from config import InputError, RunConfig, counted, frozen_layers


def check_run(config: RunConfig, n_layers: int) -> None:
    """Raises InputError for more frozen layers than there are, and for new adapters that are all among them."""
    check(config.freeze, n_layers)
    if config.lora_r and not config.adapter and frozen_layers(config.freeze) == n_layers:
        raise InputError(f"--freeze {config.freeze}: the model has {counted(n_layers, 'layer')}, so none of the "
                         "adapters that --lora_r asks for would be trained; freeze fewer")


def check(freeze: str, n_layers: int) -> None:
    """Raises InputError for more frozen layers than there are."""
    k = frozen_layers(freeze)
    if k is not None and k > n_layers:
        raise InputError(f"--freeze {freeze}: the model has {counted(n_layers, 'layer')}; freeze so many at most, or "
                         "all but the head with --freeze backbone")


def freeze(model: LlamaEmbeddingClassifier, what: str) -> None:
    """Let that part of a classifier be as it is: "none", "embeddings", "first:K", which is the embeddings and the first
    K layers, or "backbone", which is all but the head. Adapters in that part stay as they are too: new ones, which are
    zero, add nothing there. Raises InputError for more layers than there are."""
    check(what, model.llama.config.n_layers)
    for module in part(model, what):
        module.requires_grad_(False)
        for _, adapter in lora.adapted(module):
            adapter.dropout = 0.0  # which is for training
    model.is_backbone_frozen = what == "backbone"
    model.llama.n_frozen = model.llama.config.n_layers if what == "backbone" else frozen_layers(what) or 0


def part(model: LlamaEmbeddingClassifier, what: str) -> list[nn.Module]:
    """The modules that --freeze names."""
    if what in ("none", "backbone"):
        return [model.llama] if what == "backbone" else []
    return [model.llama.tok_embeddings, *model.llama.layers[: frozen_layers(what) or 0]]


def in_words(freeze: str) -> str:
    """What --freeze names."""
    k = frozen_layers(freeze)
    first = f"the embeddings and the first {'layer' if k == 1 else f'{k} layers'}"
    return first if k else "all but the head" if freeze == "backbone" else "the embeddings"


def why_not_kept(config: RunConfig) -> str:
    """In words, why what the frozen first part gives for a sentence is another thing in each epoch; "" where it is the
    same, and where there is no such part."""
    if config.freeze in ("none", "embeddings"):
        return ""
    if config.dropout:
        return "--dropout is at work inside it"
    changing = [f"--{name}" for name in ("aug_delete", "aug_swap", "aug_replace") if getattr(config, name)]
    return f"{' and '.join(changing)} {'changes' if len(changing) == 1 else 'change'} the sentences" if changing else ""


def notice(config: RunConfig) -> str:
    """What is to be said before such a run; "" where it is nothing."""
    why = why_not_kept(config)
    return why and (f"--freeze {config.freeze}: what the frozen part computes is not kept from epoch to epoch, since "
                    f"{why}; the numbers are the same, and each epoch computes it again")
