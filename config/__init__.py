"""The model's shape, the run's options, and the argument parser that is made from them.

Nothing here imports torch, so `python run_llama.py --help` answers at once.
"""

from config.model import LORA_TARGETS, Base, LlamaConfig, LoraConfig, RopeScaling
from config.parser import MEANT, integers, make_parser, parse_args, value_type
from config.run import (
    COMMANDS,
    LOGGERS,
    OPTIMIZERS,
    POOLINGS,
    RunConfig,
    contradiction,
    frozen_layers,
    lora_config,
    names_in,
    no_effect,
    only_run,
    options,
)
from config.words import InputError, byte_size, counted, duration, millions, shown

__all__ = ["COMMANDS", "LOGGERS", "LORA_TARGETS", "MEANT", "OPTIMIZERS", "POOLINGS", "Base", "InputError",
           "LlamaConfig", "LoraConfig", "RopeScaling", "RunConfig", "byte_size", "contradiction", "counted", "duration",
           "frozen_layers", "integers", "lora_config", "make_parser", "millions", "names_in", "no_effect",
           "only_run", "options", "parse_args", "shown", "value_type"]
