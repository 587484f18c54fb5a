"""How fast greedy generation is: ours and transformers.generate, in turn, on SmolLM2-135M's shape.

    python -m benchmarks.bench_generate [--tokens 75] [--rounds 5] [--dtype float32 bfloat16] [--device cpu]
                                        [--batch 1 16]

Random weights, one prompt of 8 tokens a row. Prints tokens/s of the whole batch, the prompt's time included, the ratio
of the times with its spread, and how near batch 1 comes to the limit that memory sets: each token reads every weight
once. On a processor without bfloat16 units that precision is emulated in every product of matrices, transformers' and
our prompt's. Writes benchmarks/results/generate-<device>.json. Needs requirements-dev.txt.
"""

import argparse
from statistics import median

import torch

import fused
from benchmarks.measure import limits, machine, ratio, seconds, write
from config import LlamaConfig
from llama import Llama

PROMPT = 8


def models(dtype: torch.dtype, device: str) -> dict:
    """Each as a function of (tokens (B, T), how many more) that generates greedily."""
    from transformers import GenerationConfig, LlamaForCausalLM
    from transformers import LlamaConfig as TheirConfig

    torch.manual_seed(0)
    ours = Llama(LlamaConfig(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=49152,
                             max_seq_len=2048, tie_embeddings=True)).eval().to(device, dtype)
    if device == "cpu":
        fused.accelerate(ours)
    theirs = LlamaForCausalLM(TheirConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        pad_token_id=0)).eval().to(device, dtype)

    def their_way(tokens: torch.Tensor, n: int) -> torch.Tensor:
        settings = GenerationConfig(max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            return theirs.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)

    return {"ours": lambda tokens, n: ours.generate(tokens, n, 0.0), "transformers": their_way}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=75)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    result = {"machine": machine(options.device), "tokens": options.tokens}
    for name in options.dtype:
        result[name] = compare(getattr(torch, name), options)
    write(f"generate-{options.device}", result)


def compare(dtype: torch.dtype, options: argparse.Namespace) -> dict:
    """Both ways in one precision, at each batch."""
    ways = models(dtype, options.device)
    before = limits(dtype, options.device)
    result: dict = {"batches": {}}
    for batch in options.batch:
        prompt = torch.randint(1, 49152, (batch, PROMPT), device=options.device)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name, way in ways.items():
                spent = seconds(lambda way=way, prompt=prompt: way(prompt, options.tokens), options.device)
                if turn:  # the first does not count
                    times[name].append(spent)
        speed = ratio(times["transformers"], times["ours"])
        rates = {name: batch * options.tokens / median(found) for name, found in times.items()}
        result["batches"][batch] = {"tokens_per_second": rates, "ours_times_as_fast": speed, "seconds": times}
        print(f"{dtype}, batch {batch}: ours {rates['ours']:.1f} tokens/s, transformers {rates['transformers']:.1f}: "
              f"{speed['of_medians']:.2f} times as fast ({speed['all'][0]:.2f} to {speed['all'][-1]:.2f})", flush=True)
    after = limits(dtype, options.device)
    weights = 134_515_008 * (2 if dtype == torch.bfloat16 else 4)
    most = (before["bytes_per_second"] + after["bytes_per_second"]) / 2 / weights
    result |= {"limits": [before, after], "weight_bytes": weights, "most_tokens_per_second": most}
    if 1 in result["batches"]:
        mine = result["batches"][1]["tokens_per_second"]["ours"]
        result["of_the_bandwidth_limit"] = mine / most
        print(f"batch 1: {mine / most:.0%} of the {most:.0f} tokens/s at which this machine can read "
              f"{weights / 1e6:.0f} MB of weights")
    return result


if __name__ == "__main__":
    main()
