"""The settings of a run for which none was typed: those of the README's first command, with a rate that fits the number
of layers."""

from collections.abc import Set
from dataclasses import replace
from typing import Any

from commands import start
from commands.inputs import Inputs
from config import RunConfig, counted
from training import logs, run_folder

# Whoever types one of these has the classic defaults for the others: the commands of old shell loops do what they did.
LAYER_RATE, ADAPTER_RATE, HEAD_RATE = 1e-3, 5e-3, 1e-2  # see `rate_of`, docs/tuning.md and docs/lora.md
SETTINGS = ("attention", "pooling", "batch_size", "grad_accum", "hidden_dropout_prob", "optimizer", "lr", "head_lr",
            "lr_scaling")


def with_defaults(config: RunConfig, inputs: Inputs, searched: Set[str] = frozenset()) -> RunConfig:
    """The options of a training run, with the settings that are chosen where none was typed; a line says which, but for
    those that are `searched` and so have another value in each trial.

    The classic pair, SST with stories42M, keeps the classic defaults, and a resumed run has its own. What the head of a
    finished run has learned with comes first.
    """
    typed = config.given
    config = start.with_learned(config, inputs)
    is_classic = inputs.files.name == "sst" and inputs.weights.path.stem == "stories42M"
    if config.resume or is_classic:
        return config
    n_layers = config.n_layers or inputs.weights.config.n_layers
    rate, said_of_rate = rate_of(config, n_layers)
    chosen: dict[str, Any] = {"attention": "bidirectional", "pooling": "mean", "batch_size": 32,
                              "hidden_dropout_prob": 0.1, "lr": rate}
    if typed & {*SETTINGS}:
        classic = {name: getattr(config, name) for name in chosen if name not in config.given | searched}
        if classic:
            some = ", ".join(f"--{name}" for name in SETTINGS if name in typed)
            logs.notice(f"settings :: {in_words(classic)} (the classic defaults, since {some} "
                        f"{'was' if len(typed & {*SETTINGS}) == 1 else 'were'} typed; without: "
                        f"{in_words({name: chosen[name] for name in classic})})")
        return config
    chosen = {name: value for name, value in chosen.items() if name not in config.given}
    told = {name: value for name, value in chosen.items() if name not in searched}
    why = f"; {said_of_rate}" if "lr" in told else ""
    if told:
        logs.notice(f"settings :: {in_words(told)} (chosen, since none of these was typed{why}. Type all of them to "
                    "change one: beside one that is typed alone, the others have their classic defaults)")
    return replace(config, **chosen, given=config.given | chosen.keys())


def in_words(chosen: dict[str, Any]) -> str:
    """The settings as one types them."""
    return " ".join(word for name, value in chosen.items() for word in run_folder.option_words(name, value))


def rate_of(config: RunConfig, n_layers: int) -> tuple[float, str]:
    """The learning rate for what a run trains, and in words, what that is."""
    if config.freeze == "backbone":
        return HEAD_RATE, "the rate is that for a head alone"
    what = f"the rate is that for {counted(n_layers, 'layer')}"
    if config.lora_r:
        return rate_for(n_layers, ADAPTER_RATE), f"{what} with adapters"
    return rate_for(n_layers), what


def rate_for(n_layers: int, one_layer: float = LAYER_RATE) -> float:
    """The learning rate for the first `n_layers` layers of a pretrained stack: that of one layer over their cube root,
    since a deeper one wants a lower rate. Measured on movies with SmolLM2-135M, see docs/tuning.md."""
    return float(f"{one_layer / n_layers ** (1 / 3):.1e}")
