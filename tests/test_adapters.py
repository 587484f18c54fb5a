"""Runs with adapters, from the command line to what they leave; peft on transformers computes the same."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import tiny_sentences
from safetensors.torch import load_file, save_file
from test_lora import PROJECTIONS, peft  # noqa: F401  # a fixture
from test_options import main
from tokenizers import Tokenizer

import fused
import lora
from commands.finished import load_model
from config import LORA_TARGETS, LoraConfig, parse_args
from llama import load_pretrained
from minllama import load
from optimizer import parameter_groups
from training import checks, guards
from training import device as devices
from training.device import Device
from training.saved import load_run
from training.trainer import Loop

TRAIN = "--epochs 2 --lr 3e-2 --batch_size 16 --hidden_dropout_prob 0 --device cpu --dtype float32".split()
WHOLE = ("--lora_r 4 --lora_alpha 6 --lora_dropout 0.2 --lora_dora --ema 0.9 --weight_decay 0.01 --layerwise_lr_decay "
         "0.9 --scheduler constant").split()
SCORE = "base_model.model.score.weight"
SENTENCES = [sentence for _, sentence in tiny_sentences(6, 7)]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def ran(inputs, tmp_path_factory):
    """ran("--lora_r 4 ..."): the folder of a finished run with these options; the same ones are run once."""
    done: dict[str, Path] = {}

    def get(*options: str) -> Path:
        text = " ".join(options)
        if text not in done:
            folder = tmp_path_factory.mktemp("ran") / "run"
            run = main(folder, ["--option", "finetune", *inputs, *TRAIN, *text.split(), "--output_dir", folder])
            assert run.code == 0, run.err
            done[text] = folder
        return done[text]
    return get


def copy_of(run: Path, name: str = "run") -> Path:
    return Path(shutil.copytree(run, name))


def values_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "best/model.safetensors")


def in_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Adjacent pairs of each head to halves: what tiny.permute undoes."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def of_peft(peft, base: Path, values: dict[str, torch.Tensor], **settings):  # noqa: F811
    """transformers' classifier on a base, with peft's adapters of these settings, and our numbers in them."""
    model = tiny.transformers().LlamaForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=None)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **settings)).eval()
    ours = {theirs: target for target, theirs in PROJECTIONS.items()}
    heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
    n = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parts = name.split(".")
            at = next(i for i, part in enumerate(parts) if part in ours)
            target, layer = ours[parts[at]], parts[parts.index("layers") + 1]
            kind = {"lora_A": "lora_a", "lora_B": "lora_b"}.get(parts[at + 1], "magnitude")
            value = values[f"llama.layers.{layer}.{LORA_TARGETS[target]}.{kind}"]
            value = in_halves(value, heads[target]) if target in heads and kind != "lora_a" else value
            parameter.data.copy_(value)
            n += 1
    assert n == len([name for name in values if lora.is_adapter(name)])
    model.base_model.model.score.modules_to_save["default"].weight.data.copy_(values["classifier_head.weight"])
    return model


@torch.no_grad()
def probabilities(model, base: Path) -> np.ndarray:
    tokens = Tokenizer.from_file(str(base / "tokenizer.json"))
    rows = [model(torch.tensor([tokens.encode(text, add_special_tokens=False).ids])).logits[0] for text in SENTENCES]
    return torch.stack(rows).softmax(-1).numpy()


# --------------------------------------------------------------------------- what the options do


@pytest.mark.parametrize("options, settings", [
    ("--lora_r 4", dict(r=4, lora_alpha=8)),
    ("--lora_r 3 --lora_alpha 1.5", dict(r=3, lora_alpha=1.5)),
    ("--lora_r 4 --lora_targets q,down", dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])),
    ("--lora_r 4 --lora_rs", dict(r=4, lora_alpha=8, use_rslora=True)),
    ("--lora_r 4 --lora_dora", dict(r=4, lora_alpha=8, use_dora=True)),
])
def test_the_options_are_those_of_peft(ran, tiny_model, peft, options, settings):  # noqa: F811
    """What was trained with them is, in peft with the same settings, the same classifier."""
    run = ran(options)
    settings = {"target_modules": list(PROJECTIONS.values()), **settings}
    expected = probabilities(of_peft(peft, tiny_model, values_of(run), **settings), tiny_model)
    found = load(run).predict_proba(SENTENCES)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    without = load_file(run / "best/model.safetensors")
    for name in without:
        if name.endswith("lora_b"):
            without[name].zero_()
    far = probabilities(of_peft(peft, tiny_model, without, **settings), tiny_model)
    assert np.abs(far - expected).max() > 1e-3, "the adapters must matter here"


def test_lora_dropout_is_drawn_in_front_of_the_adapters(inputs):
    """At the first step B is 0, and so is what comes out; from the second one on it matters."""
    losses = []
    for rate in ("0", "0.5"):
        run = main(Path(rate), ["--option", "finetune", *inputs, *TRAIN, "--lora_r", "4", "--max_steps", "4",
                                "--lora_dropout", rate, "--output_dir", rate])
        assert run.code == 0, run.err
        losses.append(run.losses)
    assert losses[0][0] == losses[1][0] and losses[0][2:] != losses[1][2:]


def test_only_the_adapters_and_the_head_are_trained_and_kept(inputs, tiny_model):
    run = main(Path("run"), ["--option", "finetune", *inputs, *TRAIN, "--lora_r", "2", "--keep_state",
                             "--output_dir", "run"])
    assert run.code == 0, run.err
    changed = {name for name, value in run.after[-1].items() if not torch.equal(value, run.before[name])}
    assert changed == {name for name in run.before if lora.is_adapter(name)} | {"classifier_head.weight"}
    assert run.best.keys() == changed
    settings = json.loads(Path("run/best/config.json").read_text(encoding="utf-8"))
    assert settings["lora"] == {"r": 2, "alpha": 4.0, "dropout": 0.0, "targets": [*LORA_TARGETS], "rs": False,
                                "dora": False}
    assert settings["base"]["path"] == str(tiny_model)
    kept = load_file(next(Path("run/last").glob("step-*/tensors.safetensors")))
    assert {name.removeprefix("model.") for name in kept if name.startswith("model.")} == changed


# --------------------------------------------------------------------------- the rest of the loop holds


def test_a_resumed_run_is_the_straight_one_to_the_bit(inputs):
    common = ["--option", "finetune", *inputs, *TRAIN, *WHOLE, "--keep_state"]
    straight = main(Path("straight"), [*common, "--output_dir", "straight"])
    first = main(Path("run"), [*common, "--output_dir", "run", "--max_steps", "5"])
    again = main(Path("run"), ["--resume", "run", "--max_steps", "12"])
    assert (straight.code, first.code, again.code) == (0, 0, 0), again.err
    for pattern in ("best/model.safetensors", "last/step-12-*/tensors.safetensors"):
        one, other = (load_file(next(folder.glob(pattern))) for folder in (Path("straight"), Path("run")))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), pattern
    assert straight.losses == again.losses


def test_evaluate_predict_and_inspect_give_what_the_run_had(ran, inputs):
    run = copy_of(ran("--lora_r 4 --lora_dora"))
    before = {name: (run / f"{name}-predictions.txt").read_bytes() for name in ("dev", "test")}
    assert main(run, ["--option", "evaluate", "--run", run]).code == 0
    assert {name: (run / f"{name}-predictions.txt").read_bytes() for name in ("dev", "test")} == before
    Path("texts.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    one = main(run, ["--option", "predict", "--run", run, "--input", "texts.txt"])
    assert one.code == 0 and len(one.out.splitlines()) == len(SENTENCES), one.err
    both = main(run, ["--option", "predict", "--run", run, ran("--lora_r 4"), "--input", "texts.txt"])
    assert both.code == 0 and len(both.out.splitlines()) == len(SENTENCES), both.err
    looked = main(run, ["--option", "inspect", "--run", run, "--output_dir", "looked"])
    assert looked.code == 0, looked.err


def test_checkpointed_layers_give_the_same_gradients(inputs):
    """The first layer's input needs no gradient, since the embeddings are frozen; its adapters get theirs."""
    runs = [main(Path(name), ["--option", "finetune", *inputs, *TRAIN, "--lora_r", "4", "--lora_dora", "--max_steps",
                              "3", "--output_dir", name, *more])
            for name, more in (("a", []), ("b", ["--grad_checkpoint"]))]
    assert [run.code for run in runs] == [0, 0], runs[1].err
    for one, other in zip(*(run.gradients for run in runs), strict=True):
        assert one.keys() == other.keys() and "llama.layers.0.attention.wq.lora_b" in one
        for name, gradient in one.items():
            torch.testing.assert_close(gradient, other[name], rtol=1e-5, atol=1e-7)
    assert float(runs[1].gradients[0]["llama.layers.0.attention.wq.lora_b"].abs().max()) > 0


def test_each_layers_adapters_have_the_layers_rate():
    llama = tiny.llama()
    lora.add(llama, LoraConfig(2, 4.0))
    groups = parameter_groups(llama, 1.0, 0.0, layerwise_lr_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in llama.named_parameters() if "wq.lora_a" in name} == {
        "layers.0.attention.wq.lora_a": 0.5, "layers.1.attention.wq.lora_a": 1.0}


def test_the_base_is_held_in_the_devices_precision(inputs):
    """... and its norms and the adapters in float32; the check of the gradients computes all of it in float32."""
    seen = {}

    def look(run):
        seen.update({name: p.dtype for name, p in run.model.named_parameters()})
        loop = Loop(run, run.task.config, Device(torch.device("cpu"), torch.bfloat16))
        assert checks.check_gradients(loop) < 1e-4

    words = [word if word != "float32" else "bfloat16" for word in TRAIN]
    run = main(Path("run"), ["--option", "finetune", *inputs, *words, "--lora_r", "4", "--max_steps", "2",
                             "--output_dir", "run"], look)
    assert run.code == 0, run.err
    low = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert low == {name for name, p in run.before.items() if p.dim() > 1 and not lora.is_adapter(name)
                   and name != "classifier_head.weight"}
    again = load_run("run").model  # as evaluate has it
    devices.accelerate(parse_args([]), again, Device(torch.device("cpu"), torch.bfloat16))
    assert {name for name, p in again.named_parameters() if p.dtype == torch.bfloat16} == low


@pytest.mark.parametrize("config", [LoraConfig(4, 8.0), LoraConfig(4, 8.0, dora=True)], ids=str)
def test_a_base_in_bfloat16_gives_the_products_of_one_in_float32(config):
    """... to the bit, since autocast rounds each matrix; DoRA's norms are those of the rounded one."""
    logits = []
    for held in (torch.float32, torch.bfloat16):
        llama = torch.nn.ModuleDict({"llama": tiny.llama()})
        lora.add(llama["llama"], config)
        embeddings = llama["llama"].tok_embeddings.weight.data
        lora.hold_base(llama, held)
        llama["llama"].tok_embeddings.weight.data = embeddings
        torch.manual_seed(1)
        for name, p in llama.named_parameters():
            if name.endswith(("lora_a", "lora_b")):
                p.data.copy_(torch.randn_like(p) / 8)
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(llama["llama"].hidden(tiny.tokens(3, 11)).detach())
    if config.dora:
        torch.testing.assert_close(logits[1], logits[0], rtol=0.05, atol=0.05)
    else:
        assert torch.equal(logits[0], logits[1])


@pytest.mark.skipif(fused.library() is None, reason="no C compiler here")
@pytest.mark.parametrize("config", [LoraConfig(4, 8.0), LoraConfig(4, 8.0, dora=True)], ids=str)
def test_with_c_the_logits_and_gradients_are_the_plain_ones(config):
    def one(is_fast: bool):
        llama = tiny.llama()
        lora.add(llama, config)
        torch.manual_seed(1)
        for name, p in llama.named_parameters():
            if lora.is_adapter(name):
                p.data.add_(torch.randn_like(p) / 8)
        if is_fast:
            assert fused.accelerate(llama)
            assert all(isinstance(module.ops, fused.Operations) for _, module in lora.adapted(llama))
        logits = llama(tiny.tokens(3, 11))[0]
        logits.square().mean().backward()
        return logits.detach(), {name: p.grad for name, p in llama.named_parameters() if p.requires_grad}

    (plain, gradients), (fast, others) = one(False), one(True)
    torch.testing.assert_close(fast, plain, rtol=3e-5, atol=3e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_a_plan_counts_what_is_trained(inputs):
    plan = main(Path("plan"), ["--option", "finetune", *inputs, *TRAIN, "--lora_r", "32", "--plan",
                               "--output_dir", "p"])
    widths = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32), "gate": (32, 64), "up": (32, 64),
              "down": (64, 32)}
    n = 2 * sum(32 * (a + b) for a, b in widths.values()) + 3 * 32
    assert plan.code == 0 and f"plan :: {n:,} trainable parameters" in plan.out, plan.out
    assert "adapters of rank 32, times 2, beside q, k, v, o, gate, up, down of each layer" in plan.out
    assert f"a saved state takes {12 * n / 2**20:.1f} MiB" in plan.out, "the numbers, and AdamW's two of each"


def test_a_range_test_measures_adapters(inputs):
    """Its first loss is that of the model as it is, which untrained adapters do not change; later ones are others."""
    words = ["--option", "lr_find", *inputs, "--lr_steps", "20", "--batch_size", "16", "--hidden_dropout_prob", "0",
             "--device", "cpu", "--dtype", "float32"]
    losses = []
    for name, more in (("plain", []), ("adapted", ["--lora_r", "4"])):
        done = main(Path(name), [*words, *more, "--output_dir", name])
        assert done.code == 0, done.err
        rows = Path(name, "lr_find.csv").read_text(encoding="utf-8").splitlines()[1:]
        losses.append([float(row.split(",")[2]) for row in rows])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6) and losses[0][-1] != losses[1][-1]
    assert "--lora_r 4" in done.out.splitlines()[-1]


def test_a_steps_share_of_adapters_is_not_told(ran):
    """They begin at zero, so that each first step would be far too large."""
    line = json.loads((ran("--lora_r 4") / "epochs.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert [*line["update_ratio"]] == ["classifier_head"]


@pytest.mark.parametrize("option", ["--seeds", "--folds"])
def test_each_run_of_a_series_has_adapters_of_its_own(inputs, option):
    done = main(Path("series"), ["--option", "finetune", *inputs, *TRAIN, "--lora_r", "2", option, "2", "--output_dir",
                                 "series"])
    assert done.code == 0, done.err
    one, other = (load_file(path) for path in sorted(Path("series").glob("*/best/model.safetensors")))
    assert one.keys() == other.keys() and all(lora.is_adapter(n) or n == "classifier_head.weight" for n in one)
    name = "llama.layers.0.attention.wq.lora_b"
    assert one[name].abs().max() > 0 and not torch.equal(one[name], other[name])
    Path("texts.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    together = main(Path("series"), ["--option", "predict", "--run", "series", "--input", "texts.txt"])
    assert together.code == 0 and len(together.out.splitlines()) == len(SENTENCES), together.err


def test_the_service_has_the_adapters(ran, inputs):
    run = ran("--lora_r 4 --lora_dora")
    served = load_model(parse_args(["--option", "serve", "--run", str(run)]))
    np.testing.assert_array_equal(served.predict_proba(SENTENCES), load(run).predict_proba(SENTENCES))


def test_a_search_tries_ranks_and_targets(inputs):
    search = main(Path("s"), ["--option", "search", *inputs, *TRAIN, "--method", "grid", "--space",
                              "lora_r=2|4 lora_targets=q,v|all", "--finalists", "0", "--output_dir", "s"])
    assert search.code == 0, search.err
    sizes = {len(values_of(folder.parent)) for folder in Path("s").rglob("best") if folder.is_dir()}
    assert sizes == {1 + 2 * 2 * 2, 1 + 2 * 7 * 2}


def test_a_rate_at_which_it_collapses_is_said_and_leaves_usable_weights(inputs):
    """A rate far too high for a large rank."""
    run = main(Path("run"), ["--option", "finetune", *inputs, *TRAIN, "--lora_r", "32", "--lora_alpha", "128",
                             "--epochs", "12", "--patience", "0", "--lr", "5", "--output_dir", "run"])
    assert run.code in (0, 3), run.err
    assert "rollback" in run.err and "Back to step" in run.err
    assert all(torch.isfinite(value).all() for value in run.best.values())
    assert run.result["dev"]["loss"] < guards.ABOVE * np.log(3)
    assert np.isfinite(load("run").predict_proba(SENTENCES)).all()


# --------------------------------------------------------------------------- a start of another run

STILL = ("--epochs 1 --lr 1e-12 --optimizer sgd --scheduler constant --hidden_dropout_prob 0 --batch_size 32 "
         "--device cpu --dtype float32").split()


def test_the_weights_of_a_run_are_merged_where_another_begins(ran, inputs):
    run = ran("--lora_r 4 --lora_dora")
    later = main(Path("later"), ["--option", "finetune", *inputs, *STILL, "--pretrained_model_path", run,
                                 "--output_dir", "later"])
    assert later.code == 0, later.err
    assert not any(lora.is_adapter(name) for name in later.before) and "llama.tok_embeddings.weight" in later.best
    before = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert later.result["dev"]["loss"] == pytest.approx(before["dev"]["loss"], rel=1e-4)


def test_an_adapter_on_a_run_with_adapters_is_an_adapter_on_their_sum(ran, inputs):
    run = ran("--lora_r 4 --lora_dora")
    later = main(Path("later"), ["--option", "finetune", *inputs, *STILL, "--pretrained_model_path", run,
                                 "--lora_r", "2", "--output_dir", "later"])
    assert later.code == 0, later.err
    np.testing.assert_allclose(load("later").predict_proba(SENTENCES), load(run).predict_proba(SENTENCES), atol=1e-5)


def test_adapter_goes_on_with_the_adapter_and_the_head_of_a_run(ran, inputs):
    """... on as many layers, which nobody has to type again."""
    run = ran("--lora_r 3 --lora_alpha 1.5 --n_layers 1")
    later = main(Path("later"), ["--option", "finetune", *inputs[2:], *STILL, "--adapter", run, "--keep_state",
                                 "--output_dir", "later"])
    assert later.code == 0, later.err
    earlier = values_of(run)
    assert all(torch.equal(later.before[name], value) for name, value in earlier.items())
    assert json.loads(Path("later/best/config.json").read_text(encoding="utf-8"))["lora"]["alpha"] == 1.5
    other = main(Path("b"), ["--option", "finetune", *inputs[2:], *STILL, "--adapter", run, "--lora_r", "8",
                             "--n_layers", "2", "--output_dir", "b"])
    assert other.code == 2 and "--lora_r 8 (it has 3), --n_layers 2 (it has 1)" in other.err
    Path("later/result.json").unlink()  # as if it had been killed just before its end
    again = main(Path("later"), ["--resume", "later"])
    assert again.code == 0 and again.result["dev"] == later.result["dev"], again.err


@pytest.fixture
def from_peft(ran, tiny_model, peft, tmp_path):  # noqa: F811
    """A folder as peft writes it, with the numbers of a run of ours, and what transformers says with it."""
    def make(**settings) -> tuple[Path, np.ndarray, dict[str, torch.Tensor]]:
        values = values_of(ran("--lora_r 4 --lora_dora"))
        model = of_peft(peft, tiny_model, values, r=4, lora_alpha=8, use_dora=True,
                        target_modules=list(PROJECTIONS.values()), **settings)
        model.save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs", probabilities(model, tiny_model), values
    return make


def test_pefts_adapter_predicts_and_is_a_start(from_peft, inputs, tiny_model):
    folder, expected, values = from_peft()
    Path("texts.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    predicted = main(folder, ["--option", "predict", "--adapter", folder, "--pretrained_model_path", tiny_model,
                              "--input", "texts.txt", "--output_format", "jsonl", "--dtype", "float32"])
    assert predicted.code == 0, predicted.err
    found = [list(json.loads(line)["probabilities"].values()) for line in predicted.out.splitlines()]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    later = main(Path("later"), ["--option", "finetune", *inputs, *STILL, "--adapter", folder, "--output_dir", "later"])
    assert later.code == 0, later.err
    for name, value in values.items():
        torch.testing.assert_close(later.before[name], value, rtol=0, atol=0)


# --------------------------------------------------------------------------- what is refused


def refused(*argv) -> str:
    run = main(Path("refused"), [*argv])
    assert run.code == 2, run.err
    return run.err


def test_a_base_that_is_gone_or_another_one_is_refused_and_can_be_named(ran, inputs, tiny_model, tmp_path):
    moved, other = shutil.copytree(tiny_model, tmp_path / "moved"), shutil.copytree(tiny_model, tmp_path / "other")
    run = copy_of(ran("--lora_r 4"))
    path = run / "best/config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base"]["path"] = str(tmp_path / "gone")
    path.write_text(json.dumps(settings), encoding="utf-8")
    shutil.move(run / "best", "alone")  # a best/ alone, of an older version, which has no checksums
    Path("alone/manifest.json").unlink()
    best = Path("alone")
    values = load_file(other / "model.safetensors")
    values["model.norm.weight"][0] += 1
    save_file(values, other / "model.safetensors")
    said = refused("--option", "evaluate", "--run", best, "--dev", inputs[5])
    assert "gone" in said and "--pretrained_model_path PATH" in said
    said = refused("--option", "evaluate", "--run", best, "--dev", inputs[5], "--pretrained_model_path", other)
    assert "not the base" in said and "sha256" in said
    found = main(best, ["--option", "evaluate", "--run", best, "--dev", inputs[5], "--pretrained_model_path",
                       moved])
    assert found.code == 0, found.err
    assert load(best, base=moved).predict(SENTENCES).tolist() == load(ran("--lora_r 4")).predict(
        SENTENCES).tolist()


def test_an_adapter_for_another_base_is_refused(ran, inputs, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    values = load_file(other / "model.safetensors")
    values["model.norm.weight"][0] += 1
    save_file(values, other / "model.safetensors")
    said = refused("--option", "finetune", *inputs, *STILL, "--adapter", ran("--lora_r 4"), "--pretrained_model_path",
                   other)
    assert str(other) in said and "not the base" in said


def test_a_base_that_is_no_file_is_refused(ran, inputs):
    run = copy_of(ran("--lora_r 4"))
    path = run / "best/config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base"]["path"] = os.devnull
    path.write_text(json.dumps(settings), encoding="utf-8")
    best = Path(shutil.move(run / "best", "alone"))
    (best / "manifest.json").unlink()
    assert "there is no such file or folder" in refused("--option", "evaluate", "--run", best, "--dev", inputs[5])
    said = refused("--option", "finetune", *inputs[2:], *STILL, "--pretrained_model_path", best)
    assert "put that one there" in said and "--pretrained_model_path PATH" not in said


def test_a_series_that_began_with_an_adapter_goes_on(ran, inputs):
    done = main(Path("s"), ["--option", "finetune", *inputs[2:], *STILL, "--adapter", ran("--lora_r 4"), "--seeds", "2",
                            "--output_dir", "s"])
    assert done.code == 0, done.err
    Path("s/result.json").unlink()
    again = main(Path("s"), ["--resume", "s"])
    assert again.code == 0 and again.result["test"] == done.result["test"], again.err


def test_what_contradicts_an_adapter_is_refused_before_anything_is_written(ran, inputs, from_peft):
    folder, _, _ = from_peft()
    assert "has a rank above 32" in refused("--option", "finetune", *inputs, *STILL, "--lora_r", "99")
    assert "neither one of PEFT's" in refused("--option", "finetune", *inputs, *STILL, "--adapter", inputs[1])
    assert "leave one of them out" in refused("--option", "predict", "--run", ran("--lora_r 4"), "--adapter", folder,
                                              "--input", "x.txt")
    assert "none of the adapters that --lora_r asks for would be trained" in refused(
        "--option", "finetune", *inputs, *STILL, "--lora_r", "4", "--freeze", "first:2")
    assert "lora_r: --adapter" in refused("--option", "search", *inputs, "--adapter", folder, "--space", "lora_r=2|8",
                                          "--output_dir", "s", "--device", "cpu")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file({**tensors, name: tensors[name][:, 1:].contiguous()}, file)
    said = refused("--option", "finetune", *inputs, *STILL, "--adapter", folder, "--output_dir", "r", "--seeds", "2")
    assert "is the adapter for another base" in said
    assert sorted(path.name for path in Path().iterdir()) == ["theirs"]


def test_in_a_search_an_option_of_adapters_has_an_effect_where_the_space_has_some(inputs):
    done = main(Path("s"), ["--option", "search", *inputs, "--space", "lora_r=1|2", "--lora_alpha", "8", "--momentum",
                            "0.5", "--method", "grid", "--epochs", "1", "--lr", "1e-3", "--finalists", "0", "--device",
                            "cpu", "--output_dir", "s"])
    assert done.code == 0 and "--lora_alpha" not in done.err and "no effect: --momentum" in done.err


@pytest.mark.parametrize("options, said", [
    (["--lora_r", "0"], "--lora_r"), (["--lora_r", "4", "--lora_targets", "q,x"], "--lora_targets"),
    (["--lora_r", "4", "--lora_targets", ","], "--lora_targets"), (["--adapter", "nowhere"], "nowhere")])
def test_options_that_cannot_be_are_refused(inputs, options, said, capsys):
    try:
        code = main(Path("refused"), ["--option", "finetune", *inputs, *options])
        assert code.code == 2 and said in code.err
    except SystemExit as error:
        assert error.code == 2


@pytest.mark.parametrize("change, said", [
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"), ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    ({"bias": "all"}, "biases"), ({"lora_bias": True}, "biases"),
    ({"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
    ({"r": 0}, "r is 0"), ({"peft_type": "IA3"}, "IA3"), ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ({"layers_to_transform": [0]}, "layers_to_transform"), ({"r": 5}, "another base"),
    ({"modules_to_save": 5}, "a list of names"), ({"modules_to_save": [["score"]]}, "a list of names"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"), ({"something_new": 1}, "something_new")], ids=str)
def test_what_peft_computes_otherwise_is_refused_by_name(from_peft, inputs, change, said):
    folder, _, _ = from_peft()
    path = folder / "adapter_config.json"
    settings = {**json.loads(path.read_text(encoding="utf-8")), **change}
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert said in refused("--option", "finetune", *inputs, *STILL, "--adapter", folder)


@pytest.mark.parametrize("change, said", [
    (lambda v: {n: t for n, t in v.items() if "score" not in n}, "no head"),
    (lambda v: {n: t[:, :16].contiguous() if "q_proj.lora_A" in n else t for n, t in v.items()}, "another base"),
    (lambda v: {n: t[:1].contiguous() if n == SCORE else t for n, t in v.items()}, "two classes or more"),
    (lambda v: {n: t[0].contiguous() if n == SCORE else t for n, t in v.items()}, "two classes or more"),
    (lambda v: {n: t[:, 1:].contiguous() if n == SCORE else t for n, t in v.items()}, "hidden states of 31"),
    (lambda v: {**v, SCORE.replace("weight", "bias"): torch.zeros(5)}, "two classes or more"),
    (lambda v: {n.replace("weight", "bias") if n == SCORE else n: t for n, t in v.items()}, "two classes or more"),
    (lambda v: {n.replace("layers.1", "layers.2"): t for n, t in v.items()}, "another base"),
    (lambda v: {**v, "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 2)}, "embed_tokens")])
def test_tensors_of_another_model_are_refused(from_peft, tiny_model, change, said):
    folder, _, _ = from_peft()
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    Path("texts.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    assert said in refused("--option", "predict", "--adapter", folder, "--pretrained_model_path", tiny_model, "--input",
                           "texts.txt")


def test_the_llama_of_a_run_with_adapters_is_the_merged_one(ran, tiny_model):
    run = ran("--lora_r 4")
    llama = load_pretrained(tiny_model)
    lora.add(llama, LoraConfig(4, 8.0))
    own = dict(llama.named_parameters())
    for name, value in values_of(run).items():
        if lora.is_adapter(name):
            own[name.removeprefix("llama.")].data.copy_(value)
    merged, found = lora.merge(llama), dict(load_pretrained(run / "best").named_parameters())
    for name, value in found.items():
        torch.testing.assert_close(value.detach(), merged[name], rtol=0, atol=0)
