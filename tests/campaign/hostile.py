"""Hostile files: no traceback, no hang, no write outside, exit code 0, 2 or 3.

    python tests/campaign/hostile.py --n 400 --seed 0

Mutations of everything that the program reads: args.json, state.json, manifests, result.json, best/ and its tokenizer,
a model's config and tokenizer, label names, data files, and the headers of safetensors, GGUF and .pt; links, pipes and
devices in the place of files. Checksums are made right again where an attacker could, so that what reads a file has to
hold by itself.
"""

import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from common import Sandbox, Tally, call, draw_of, main, reseal

DEEP = 100_000
HUGE = (0, -1, 1, 2, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, 1e308, 1e-310, float("nan"),
        float("inf"), -float("inf"), 0.5, -0.0)
ODD = (None, True, False, "", "x", "x" * 20000, [], {}, [[]], {"": None}, [None] * 50, "\x1b[31mred\x07", "\ud800",
       "nan", "1", "/dev/zero", "/dev/stdin", "../victim.txt", "../../base/victim.txt", "VICTIM", "VICTIM-FOLDER",
       "a\x00b", ["a", "a"], {"tensor": "no"}, {"dict": [[1]]}, {"list": 5}, {"tuple": [[[]]]}, {"dict": [[[], 1]]})

# --------------------------------------------------------------------------- mutations


def places(value, found: list | None = None) -> list:
    """Every (container, key) of a JSON value."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        places(item, found)
    return found


def odd_value(draw, sandbox: Sandbox):
    value = draw.choice(HUGE if draw.random() < 0.5 else ODD)
    victims = {"VICTIM": str(sandbox.base / "victim.txt"), "VICTIM-FOLDER": str(sandbox.base / "victim-folder")}
    return victims.get(value, value) if isinstance(value, str) else value


def mutated_json(text: str, draw, sandbox: Sandbox) -> bytes:
    """A JSON text with some places changed, or broken as a whole."""
    whole = draw.random()
    if whole < 0.12:
        return draw.choice((b"", b"null", b"[]", b"{}", b"0", b'"x"', b"[" * DEEP, b'{"a":' * DEEP, b"9" * 6000,
                            b"\x00" * 64, text.encode()[: len(text) // 2], b"\xef\xbb\xbf" + text.encode(),
                            text.encode("utf-16"), b"\xff\xfe\xfa", text.encode() + b"}", b"NaN"))
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        everywhere = places(value)
        if not everywhere:
            break
        # A place near the root is as likely as one of the thousand deep ones: those are of a few kinds.
        container, key = draw.choice(everywhere if draw.random() < 0.5 else everywhere[:40])
        how = draw.random()
        if how < 0.15:
            del container[key]
        elif how < 0.25 and isinstance(container, dict):
            container[draw.choice(("", "x", "__class__", "\x1b[2J", "../x", str(sandbox.base / "victim.txt")))] = (
                container.pop(key))
        elif how < 0.35 and isinstance(container[key], str | list):
            container[key] = container[key] * draw.choice((0, 2, 50))
        elif how < 0.5 and isinstance(container[key], int | float):
            container[key] = draw.choice(HUGE)
        else:
            container[key] = odd_value(draw, sandbox)
    return json.dumps(value).encode("utf-8", errors="surrogatepass")


def mutated_bytes(data: bytes, draw, header: int) -> bytes:
    """Some of the first `header` bytes changed: numbers made huge, parts cut out, doubled or turned."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(max(1, min(header, len(data))))
        how = draw.randrange(6)
        if how == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            data[at : at + 8] = struct.pack("<Q", draw.choice((0, 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1)))
        elif how == 2:
            data[at : at + 4] = struct.pack("<I", draw.choice((0, 1, 4, 9, 255, 2**31, 2**32 - 1)))
        elif how == 3:
            del data[at : at + draw.choice((1, 7, 100))]
        elif how == 4:
            data[at:at] = data[at : at + draw.choice((1, 16, 200))] + b"\x1b[31m"
        else:
            del data[draw.randrange(len(data)):]
            data = data or bytearray(b"x")
    return bytes(data)


def hostile_lines(draw, good: str) -> bytes:
    """A data file that is none."""
    lines = good.splitlines()
    bad = draw.choice((
        b"", b"\n\n\n", b"\x00" * 1000, b"1 ||| ", b"||| x\n", b"1e3 ||| x\n", b"-1 ||| x\n", b"nan ||| x\n",
        b"99999999999999999999 ||| x\n", b"0 ||| \xff\xfe\n", b"0 ||| " + b"y" * 200000 + b"\n",
        b"0 |||" * 1000 + b"\n", b"\x1b[31m ||| x\n", b"1000000 ||| x\n", "\u0663 ||| x\n".encode(),
        "0 ||| \u2028 a \u0085 b\n".encode(), b"0 ||| a\r", b"True ||| x\n", b" 0  |||  \n", b"0\n"))
    how = draw.randrange(6)
    if how == 0:
        return bad
    if how == 1:
        return ("\r".join(lines)).encode()
    if how == 2:
        return good.encode("utf-16")
    if how == 3:
        return good.encode()[: draw.randrange(len(good))]
    if how == 4:
        return b"\xef\xbb\xbf" + good.encode() + bad
    at = draw.randrange(len(lines))
    return "\n".join(lines[:at]).encode() + b"\n" * bool(at) + bad + "\n".join(lines[at:]).encode() + b"\n"


# --------------------------------------------------------------------------- the same weights as GGUF and .pt


def weights_of(sandbox: Sandbox) -> tuple[dict, dict]:
    from safetensors.torch import load_file

    config = json.loads((sandbox.model / "config.json").read_text(encoding="utf-8"))
    return config, load_file(sandbox.model / "model.safetensors")


def write_gguf(path: Path, sandbox: Sandbox) -> Path:
    import tiny
    from gguf import GGUFWriter

    config, state = weights_of(sandbox)
    writer = GGUFWriter(path, "llama")
    for name, value in dict(
            vocab_size=config["vocab_size"], context_length=128, embedding_length=32, block_count=2,
            feed_forward_length=64, head_count=4, head_count_kv=2, layer_norm_rms_eps=1e-5, rope_freq_base=10000.0,
            rope_dimension_count=8).items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in tiny.renamed(state, tiny.GGUF_NAMES).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pt_value(sandbox: Sandbox) -> dict:
    import tiny

    config, state = weights_of(sandbox)
    state = tiny.renamed(state, tiny.PT_NAMES)
    state["output.weight"] = state["tok_embeddings.weight"]
    return {"model_args": dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=config["vocab_size"],
                               hidden_dim=64, multiple_of=4, norm_eps=1e-5, max_seq_len=128, dropout=0.0),
            "model": state, "iter_num": 1}


class Attack:
    """What a pickle may try: a program, and a file that is removed."""

    def __init__(self, sandbox: Sandbox, draw):
        victim = str(sandbox.base / "victim.txt")
        self.call = draw.choice(((os.system, ("true",)), (os.remove, (victim,)), (eval, ("1+1",)),
                                 (open, (victim, "w"))))

    def __reduce__(self):
        return self.call


def hostile_pt(path: Path, sandbox: Sandbox, draw) -> None:
    import torch

    value, how = pt_value(sandbox), draw.randrange(6)
    if how == 0:
        value[draw.choice(("model", "model_args", "x\x1b[31m"))] = Attack(sandbox, draw)
    elif how == 1:
        value["model_args"][draw.choice(list(value["model_args"]))] = odd_value(draw, sandbox)
    elif how == 2:
        name = draw.choice(list(value["model"]))
        tensor = value["model"][name]
        value["model"][name] = draw.choice((
            tensor[:1], tensor.to(torch.complex64), tensor.bool(), tensor * float("nan"), tensor.to_sparse(), None, "x",
            tensor.flatten(), torch.zeros(1).expand(10**6, 10**6), tensor.to("meta"), [1.0]))
    elif how == 3:
        value = draw.choice((None, [], {}, 1, {"model": {}}, {"model_args": {}}, {"model": value["model"]},
                             {"model_args": value["model_args"], "model": []}, [value], torch.zeros(3)))
    elif how == 4:
        path.write_bytes(pickle.dumps({"model": Attack(sandbox, draw)}))
        return
    torch.save(value, path)
    if how == 5:
        path.write_bytes(mutated_bytes(path.read_bytes(), draw, 4000))


def mutated_safetensors(path: Path, draw, sandbox: Sandbox) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    if draw.random() < 0.3:
        path.write_bytes(mutated_bytes(data, draw, size + 8))
        return
    header = mutated_json(data[8 : 8 + size].decode(), draw, sandbox)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])


def not_finite(path: Path, draw) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    state[draw.choice(list(state))].fill_(draw.choice((float("nan"), float("inf"), 3e38, 0.0)))
    save_file(state, path)


# --------------------------------------------------------------------------- the cases: each returns the command


def newest(place: Path) -> Path:
    return max((place / "run/last").glob("step-*-*"), key=lambda p: int(p.name.rpartition("-")[2]))


EVALUATE = ["--option", "evaluate", "--run", "run"]
RESUME = ["--resume", "run"]


def ask(sandbox: Sandbox, draw) -> list[str]:
    return draw.choice((EVALUATE, ["--option", "predict", "--run", "run", "--input", str(sandbox.base / "lines.txt")]))


def change_json(path: Path, draw, sandbox: Sandbox, run: Path | None = None) -> None:
    if not path.exists():
        path.write_text("{}", encoding="utf-8")
    path.write_bytes(mutated_json(path.read_text(encoding="utf-8"), draw, sandbox))
    if run:
        reseal(run, path)


def run_file(name: str, kind: str):
    """A case that changes one JSON file of a run folder."""
    def case(place: Path, draw, sandbox: Sandbox) -> list[str]:
        shutil.copytree(sandbox.done() if kind == "finished" else sandbox.stopped(), place / "run")
        path = newest(place) / name.removeprefix("last/") if name.startswith("last/") else place / "run" / name
        change_json(path, draw, sandbox, place / "run")
        return RESUME if kind == "stopped" else ask(sandbox, draw) if name.startswith("best/") else EVALUATE
    return case


def logs_of_others(place: Path, draw, sandbox: Sandbox) -> list[str]:
    """A state whose logs are somebody else's files."""
    shutil.copytree(sandbox.stopped(), place / "run")
    path = newest(place) / "state.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    logs = next(item for key, item in value["dict"] if key == "logs")
    logs["dict"].append([draw.choice((str(sandbox.base / "victim.txt"), "../../base/victim.txt", "args.json",
                                      "best/config.json", "..")), draw.choice((0, 3, -1, "0", 1e9))])
    path.write_text(json.dumps(value), encoding="utf-8")
    reseal(place / "run", path)
    return RESUME


def outputs_of_others(place: Path, draw, sandbox: Sandbox) -> list[str]:
    """An args.json whose outputs and inputs are somebody else's files."""
    kind = draw.choice(("finished", "stopped"))
    shutil.copytree(sandbox.done() if kind == "finished" else sandbox.stopped(), place / "run")
    path = place / "run/args.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    victim = draw.choice((str(sandbox.base / "victim.txt"), "../base/victim.txt", "/dev/full", "run/best/config.json",
                          str(sandbox.base / "new-file.txt")))
    name = draw.choice(("dev_out", "test_out", "output_dir", "resume", "run", "input", "dev",
                        "generated_sentence_low_temp_out"))
    value["options"][name] = victim
    value["given"] = sorted({*value["given"], name})
    if draw.random() < 0.5:
        value["files"][draw.choice(("dev", "test", "label_names", "tokenizer", "weights", "train"))]["path"] = (
            draw.choice(("/dev/zero", "/dev/stdin", victim, str(sandbox.base), "/proc/self/mem")))
    path.write_text(json.dumps(value), encoding="utf-8")
    reseal(place / "run", path)
    return EVALUATE if kind == "finished" else RESUME


def links(place: Path, draw, sandbox: Sandbox) -> list[str]:
    """A link, a pipe or a folder where a run has a file or a folder."""
    kind = draw.choice(("finished", "stopped"))
    shutil.copytree(sandbox.done() if kind == "finished" else sandbox.stopped(), place / "run")
    name = draw.choice(("dev-predictions.txt", "test-predictions.txt", "steps.jsonl", "epochs.jsonl", "events.jsonl",
                        "args.json", "result.json", "best", "last", "best/config.json", "best/model.safetensors",
                        "best/tokenizer.json", ".lock", "best/manifest.json"))
    path = place / "run" / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    target = draw.choice(("victim.txt", "victim-folder", "new-file.txt", "/dev/zero", "pipe", "folder", "itself"))
    if target == "pipe" and hasattr(os, "mkfifo"):
        os.mkfifo(path)
    elif target in ("folder", "pipe"):
        path.mkdir()
    else:
        path.symlink_to(path.name if target == "itself" else target if target[0] == "/" else sandbox.base / target)
    return draw.choice((RESUME, RESUME, EVALUATE, sandbox.finetune("--epochs", "1", "--overwrite")))


def best_weights(place: Path, draw, sandbox: Sandbox) -> list[str]:
    kind = draw.choice(("finished", "finished", "stopped"))
    shutil.copytree(sandbox.done() if kind == "finished" else sandbox.stopped(), place / "run")
    path = place / "run/best/model.safetensors"
    not_finite(path, draw) if draw.random() < 0.3 else mutated_safetensors(path, draw, sandbox)
    reseal(place / "run", path)
    return RESUME if kind == "stopped" else ask(sandbox, draw)


def model_command(place: Path, draw, sandbox: Sandbox, model: Path, tokenizer: Path | None = None) -> list[str]:
    more = ["--tokenizer", str(tokenizer)] if tokenizer else []
    data = [word for name in ("train", "dev", "label_names") for word in (f"--{name}", str(sandbox.data[name]))]
    own = ["--pretrained_model_path", str(model), *more]
    return draw.choice((
        ["--option", "generate", *own, "--max_new_tokens", "3", "--prefix", "the film"],
        ["--option", "generate", *own, "--max_new_tokens", "3", "--prefix", "the film"],
        ["--option", "prompt", *own, *data],
        ["--option", "finetune", *own, *data, "--epochs", "1", "--output_dir", "run"]))


def model_file(name: str):
    def case(place: Path, draw, sandbox: Sandbox) -> list[str]:
        model = Path(shutil.copytree(sandbox.model, place / "model"))
        if name == "model.safetensors":
            not_finite(model / name, draw) if draw.random() < 0.2 else mutated_safetensors(model / name, draw, sandbox)
        else:
            change_json(model / name, draw, sandbox)
        return model_command(place, draw, sandbox, model)
    return case


def tokenizer_config(place: Path, draw, sandbox: Sandbox) -> list[str]:
    model = Path(shutil.copytree(sandbox.model, place / "model"))
    value = {name: draw.choice(("<s>", "</s>", {"content": "<s>"}, odd_value(draw, sandbox)))
             for name in ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token")}
    (model / "tokenizer_config.json").write_text(json.dumps(value), encoding="utf-8")
    return model_command(place, draw, sandbox, model)


def gguf(place: Path, draw, sandbox: Sandbox) -> list[str]:
    path = write_gguf(place / "model.gguf", sandbox)
    path.write_bytes(mutated_bytes(path.read_bytes(), draw, 1500))
    return model_command(place, draw, sandbox, path, sandbox.model / "tokenizer.json" if draw.random() < 0.8 else None)


def pt(place: Path, draw, sandbox: Sandbox) -> list[str]:
    hostile_pt(place / "model.pt", sandbox, draw)
    return model_command(place, draw, sandbox, place / "model.pt", sandbox.model / "tokenizer.json")


def label_names(place: Path, draw, sandbox: Sandbox) -> list[str]:
    path = place / "labels.json"
    path.write_bytes(draw.choice((
        mutated_json('["bad", "good"]', draw, sandbox), mutated_json('{"bad": 0, "good": 1}', draw, sandbox),
        b'["a", "a"]', b'["\\u001b[31mred", "b"]', json.dumps([f"n{i}" for i in range(100_000)]).encode(),
        b'["\\ud800", "b"]', b'["\\n", "\\t"]', b'["only"]', b'["a", "b", "c"]')))
    more = sandbox.finetune("--epochs", "1", "--label_names", str(path))
    return draw.choice((more, ["--option", "prompt", *sandbox.inputs(), "--label_names", str(path)]))


def data_file(place: Path, draw, sandbox: Sandbox) -> list[str]:
    name = draw.choice(("train", "dev", "test"))
    path = place / f"bad-{name}.txt"
    path.write_bytes(hostile_lines(draw, sandbox.data[name].read_text(encoding="utf-8")))
    if draw.random() < 0.2:
        shutil.copytree(sandbox.done(), place / "run")
        return ["--option", "predict", "--run", "run", "--input", str(path)]
    return sandbox.finetune("--epochs", "1", f"--{name}", str(path))


CASES = {
    "args.json, evaluate": run_file("args.json", "finished"), "args.json, resume": run_file("args.json", "stopped"),
    "state.json": run_file("last/state.json", "stopped"),
    "manifest of last/": run_file("last/manifest.json", "stopped"),
    "result.json": run_file("result.json", "finished"), "best/config.json": run_file("best/config.json", "finished"),
    "best/manifest.json": run_file("best/manifest.json", "finished"),
    "best/tokenizer.json": run_file("best/tokenizer.json", "finished"),
    "best/tokenizer_config.json": run_file("best/tokenizer_config.json", "finished"),
    "best/config.json, resume": run_file("best/config.json", "stopped"),
    "best/model.safetensors": best_weights, "logs of others": logs_of_others, "outputs of others": outputs_of_others,
    "links": links, "config.json of a model": model_file("config.json"),
    "tokenizer.json of a model": model_file("tokenizer.json"), "tokenizer_config.json of a model": tokenizer_config,
    "model.safetensors": model_file("model.safetensors"), "GGUF": gguf, ".pt": pt, "label names": label_names,
    "data": data_file,
}


def run(tally: Tally, cases: Iterable[int], sandbox: Sandbox) -> None:
    sandbox.done(), sandbox.stopped()
    sandbox.keep()
    kinds = list(CASES)
    for case in cases:
        draw, place, kind = draw_of(tally.seed, case), sandbox.fresh(), kinds[case % len(kinds)]
        argv = CASES[kind](place, draw, sandbox)
        own = ["run"] if "--option" not in argv or argv[1] in ("evaluate", "predict", "finetune") else ["."]
        ran = call(argv, place, allowed=[place / name for name in own], timeout=30)
        tally.count("hung" if ran.hung else f"exit code {ran.code}")
        found = ran.faults() + sandbox.changes()
        if found:
            tally.count(f"failed: {kind}")
            tally.fail(case, f"{kind}, {' '.join(argv[:2])}: {'; '.join(found[:3])}")
        shutil.rmtree(place)


if __name__ == "__main__":
    sys.exit(main("hostile", __doc__, run, 400))
