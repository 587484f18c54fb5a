"""A finished run as the start of another."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_sentences, write_split
from safetensors.torch import load_file, save_file
from test_options import main

from classifier import ClassifierConfig, empty_classifier
from formats import files
from formats.weights import read_weights
from llama import load_pretrained
from minllama import load
from training import saved
from training.run_folder import options_of

# A training that changes nothing: what it reports is what it began with.
STILL = ("--epochs 1 --lr 1e-12 --optimizer sgd --scheduler constant --hidden_dropout_prob 0 --batch_size 32 "
         "--device cpu --dtype float32").split()
LEARNED = {"attention": "bidirectional", "pooling": "mean", "loss": "ce"}


@pytest.fixture(scope="module")
def earlier(inputs, tmp_path_factory) -> Path:
    """A run that has learned something, with another pooling and attention than the default ones."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    done = main(folder, ["--option", "finetune", *inputs, "--epochs", "6", "--lr", "1e-2", "--batch_size", "16",
                         "--pooling", "mean", "--attention", "bidirectional", "--output_dir", folder, "--device", "cpu",
                         "--dtype", "float32"])
    assert done.code == 0 and done.result["dev"]["acc"] > 0.6, done.err
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def from_run(inputs, run, *more, option="finetune"):
    """The program with another run in the place of the pretrained weights."""
    words = [*inputs, *STILL, "--output_dir", "later"] if option in ("finetune", "lr_find") else inputs
    words = [*words, "--pretrained_model_path", run, *more]
    return main(Path("later"), ["--option", option, *words])


def result_of(run) -> dict:
    return json.loads((Path(run) / "result.json").read_text(encoding="utf-8"))


def logits_of(run) -> torch.Tensor:
    """Of the classifier in a run's best/, for some random sentences."""
    path = Path(run) / "best" / "config.json"
    model = empty_classifier(ClassifierConfig.read(files.read_json(path), path), path)
    saved.load_classifier_state(path.parent, model)
    tokens = torch.randint(200, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(tokens, torch.tensor([9, 1, 4, 7]))


@pytest.mark.parametrize("typed", ["", "best"])
def test_a_run_begins_where_the_earlier_one_ended(earlier, inputs, typed):
    later = from_run(inputs, earlier / typed)
    assert later.code == 0, later.err
    before, after = result_of(earlier), later.result
    for split in ("dev", "test"):
        assert after[split]["acc"] == before[split]["acc"]
        assert after[split]["loss"] == pytest.approx(before[split]["loss"], rel=1e-5)
        name = f"{split}-predictions.txt"
        assert Path("later", name).read_bytes() == (earlier / name).read_bytes()
    torch.testing.assert_close(logits_of("later"), logits_of(earlier), rtol=0, atol=1e-6)
    assert later.losses[0] < np.log(3) - 0.5 and "an untrained head" not in later.err
    described = json.loads(Path("later/args.json").read_text(encoding="utf-8"))
    assert {name: described["options"][name] for name in LEARNED} == LEARNED
    assert described["files"]["weights"] == {"path": str(earlier / "best"), "sha256": files.sha256(earlier / "best")}
    assert described["files"]["tokenizer"]["path"] == str(earlier / "best" / "tokenizer.json")
    assert (f"start :: {earlier / 'best'}: its Llama and its head; as in that run: --attention bidirectional --pooling "
            "mean --loss ce\n") in later.err


def test_a_new_head_takes_the_llama_alone(earlier, inputs):
    later = from_run(inputs, earlier, "--new_head", "--n_layers", "1", "--pooling", "last")
    assert later.code == 0, later.err
    before = load_file(earlier / "best/model.safetensors")
    same = {name for name, tensor in later.before.items() if torch.equal(tensor, before[name])}
    assert same == {name for name in before if name.startswith("llama.") and ".layers.1." not in name}
    assert not torch.equal(later.before["classifier_head.weight"], before["classifier_head.weight"])
    assert later.losses[0] == pytest.approx(np.log(3), abs=0.2)
    described = json.loads(Path("later/args.json").read_text(encoding="utf-8"))["options"]
    assert (described["attention"], described["pooling"]) == ("bidirectional", "last")
    assert "its Llama, and a new head; as in that run: --attention bidirectional\n" in later.err


@pytest.mark.parametrize("more, said", [
    (["--label_names", "names.json"], "the labels of that run are ['0', '1', '2'], and those of "),
    (["--label_names", "names.json"], " are ['bad', 'fine', 'good']"),
    (["--loss", "ordinal"], "the head of that run has learned with --loss ce, and --loss is ordinal"),
    (["--n_layers", "1"], "the head of that run has learned on 2 layers, and --n_layers is 1"),
])
def test_what_the_head_cannot_be_used_with_is_refused_and_taken_with_a_new_one(earlier, inputs, more, said):
    Path("names.json").write_text('["bad", "fine", "good"]', encoding="utf-8")
    for option in ("finetune", "lr_find"):
        later = from_run(inputs, earlier, *more, option=option)
        assert later.code == 2 and said in later.err and "take the Llama alone with --new_head" in later.err
        assert f"error: {earlier / 'best'}: " in later.err and not Path("later").exists()
    assert from_run(inputs, earlier, *more, "--new_head").code == 0
    assert from_run(inputs, earlier, *more, "--new_head", "--n_layers", "3", "--overwrite").code == 2, "it has 2"


def test_another_pooling_or_attention_is_taken_with_a_warning(earlier, inputs):
    later = from_run(inputs, earlier, "--pooling", "max", "--attention", "causal", "--loss", "ce")
    assert later.code == 0 and ("warning: --attention causal instead of bidirectional, --pooling max instead of mean: "
                                f"{earlier / 'best'} has learned with the latter\n") in later.err
    described = json.loads(Path("later/args.json").read_text(encoding="utf-8"))["options"]
    assert (described["attention"], described["pooling"]) == ("causal", "max")
    assert later.result["dev"]["loss"] != pytest.approx(result_of(earlier)["dev"]["loss"], rel=1e-3)


def test_new_head_without_a_run_does_nothing_and_says_so(inputs, tiny_model):
    later = from_run(inputs, tiny_model, "--new_head")
    assert later.code == 0 and f"no effect: --new_head: {tiny_model} is not a finished run" in later.err


def test_a_run_from_a_run_is_resumed_with_its_own_options(earlier, inputs):
    first = from_run(inputs, earlier, "--keep_state")
    Path("later/result.json").unlink()  # as if it had been killed just before its end
    again = main(Path("later"), ["--resume", "later"])
    assert again.code == 0 and again.result["dev"] == first.result["dev"], again.err


def test_lr_find_begins_with_the_head_too(earlier, inputs):
    assert from_run(inputs, earlier, "--lr_steps", "12", option="lr_find").code == 0
    with open("later/lr_find.csv", encoding="utf-8") as file:
        first = next(iter(csv.DictReader(file)))
    assert float(first["loss"]) < np.log(3) - 0.5


def test_prompt_and_generate_take_the_llama_of_a_run(inputs, tiny_model):
    """Of one that has changed nothing they say what they say of the pretrained weights."""
    assert from_run(inputs, tiny_model).code == 0
    texts = []
    for weights in (tiny_model, "later"):
        done = from_run(inputs, weights, "--prefix", "the film is", "--max_new_tokens", "9", option="generate")
        texts.append(done.out.replace(str(weights), ""))
        done = from_run(inputs, weights, option="prompt")
        assert done.code == 0 and ("is a finished run: its Llama has learned to classify" in done.err) == (
            weights == "later")
        texts.append(Path("toy-dev-prompting-output.txt").read_text(encoding="utf-8"))
    assert texts[1] == texts[3] and texts[0].split("Temperature")[1:] == texts[2].split("Temperature")[1:]


def test_weights_in_bfloat16_are_read_too(earlier, inputs):
    best = Path(shutil.copytree(earlier / "best", "copied"))
    state = load_file(best / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, best / "model.safetensors")
    (best / "manifest.json").unlink()
    later = from_run(inputs, best)
    assert later.code == 0 and "without checksums" in later.err
    for name, tensor in later.before.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[name].bfloat16().float())


def test_without_tied_embeddings_a_run_is_a_start_but_has_no_words(inputs, tiny_model):
    untied = Path(shutil.copytree(tiny_model, "untied"))
    state = load_file(untied / "model.safetensors")
    state["lm_head.weight"] = -state["model.embed_tokens.weight"]
    save_file(state, untied / "model.safetensors")
    settings = json.loads((untied / "config.json").read_text(encoding="utf-8"))
    (untied / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}), encoding="utf-8")
    assert from_run(inputs, untied).code == 0
    Path("later").rename("first")
    assert from_run(inputs, "first").code == 0
    assert result_of("later")["dev"] == result_of("first")["dev"]
    for option in ("generate", "prompt"):
        done = from_run(inputs, "first", option=option)
        assert done.code == 2 and "first/best: a finished run of this model has no output layer" in done.err.replace(
            "\\", "/")


def test_a_damaged_run_is_no_start(earlier, inputs):
    run = Path(shutil.copytree(earlier, "damaged"))
    weights = run / "best/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for option in ("finetune", "generate", "prompt", "lr_find"):
        done = from_run(inputs, run, option=option)
        assert done.code == 2 and str(weights) in done.err and not Path("later").exists()


@pytest.mark.parametrize("fault", [{"llama": None}, {"llama": {"dim": "x"}}, {"llama": {"unknown": 1}}, {"loss": "x"},
                                   {"label_names": []}, {"pooling": "odd"}], ids=str)
def test_settings_that_are_no_classifiers_are_refused(earlier, inputs, fault):
    best = Path(shutil.copytree(earlier / "best", "odd"))
    (best / "manifest.json").unlink()
    settings = json.loads((best / "config.json").read_text(encoding="utf-8"))
    (best / "config.json").write_text(json.dumps({**settings, **fault}), encoding="utf-8")
    done = from_run(inputs, best)
    assert done.code == 2 and str(best / "config.json") in done.err and not Path("later").exists()


def test_a_run_that_is_older_than_head_bias_has_one_and_keeps_it(earlier, inputs):
    """Its config.json does not say so."""
    best = Path(shutil.copytree(earlier / "best", "older"))
    (best / "manifest.json").unlink()
    state = {**load_file(best / "model.safetensors"), "classifier_head.bias": torch.tensor([5.0, -2.0, 1.0])}
    save_file(state, best / "model.safetensors")
    settings = json.loads((best / "config.json").read_text(encoding="utf-8"))
    assert settings.pop("head_bias") is False
    (best / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert load(best).saved.model.classifier_head.bias.tolist() == [5.0, -2.0, 1.0]
    later = from_run(inputs, best)
    assert later.code == 0 and later.before["classifier_head.bias"].tolist() == [5.0, -2.0, 1.0], later.err
    assert json.loads(Path("later/best/config.json").read_text(encoding="utf-8"))["head_bias"] is True
    options = json.loads(Path("later/args.json").read_text(encoding="utf-8"))["options"]
    assert options.pop("head_bias") is True and options_of({"options": options})["head_bias"] is True
    refused = from_run(inputs, earlier, "--head_bias", "--overwrite")
    assert refused.code == 2 and "the head of that run has no bias, and --head_bias asks for one" in refused.err


def test_a_head_of_another_shape_is_refused(earlier, inputs):
    best = Path(shutil.copytree(earlier / "best", "odd"))
    (best / "manifest.json").unlink()
    state = load_file(best / "model.safetensors")
    for change in ({"classifier_head.weight": torch.zeros(4, 32)}, {"more.weight": torch.zeros(1)},
                   {"classifier_head.bias": torch.zeros(3, dtype=torch.int8)}):
        save_file({**state, **change}, best / "model.safetensors")
        assert from_run(inputs, best, "--overwrite").code == 2


def test_a_folder_of_several_runs_and_a_name_like_a_runs_are_answered(earlier, inputs):
    for name in ("a", "b"):
        shutil.copytree(earlier, Path("runs", name))
    (Path("runs") / "args.json").write_text("{}", encoding="utf-8")  # as that of a series
    done = from_run(inputs, "runs")
    assert done.code == 2 and f"name one of them: --pretrained_model_path {Path('runs/a')}" in done.err
    Path("runs/a").rename("runs/finetune-1-0.001")
    done = from_run(inputs, "runs/finetune-1-1e-3")
    assert done.code == 2 and f"did you mean {Path('runs/finetune-1-0.001')}?" in done.err


def test_an_ordinal_head_is_taken_too(inputs):
    assert from_run(inputs, inputs[1], "--loss", "ordinal", "--lr", "0.1", "--epochs", "3").code == 0
    Path("later").rename("first")
    later = from_run(inputs, "first")
    assert later.code == 0 and "--loss ordinal" in later.err
    torch.testing.assert_close(logits_of("later"), logits_of("first"), rtol=0, atol=1e-6)


def test_the_reader_gives_the_llama_of_the_classifier(earlier):
    weights = read_weights(earlier / "best")
    assert weights.head and weights.head.settings["label_names"] == ["0", "1", "2"]
    assert {name: tuple(read().shape) for name, read in weights.readers.items()} == weights.shapes
    llama = load_pretrained(weights, attention="bidirectional")
    path = earlier / "best/config.json"
    judge = empty_classifier(ClassifierConfig.read(files.read_json(path), path), path)
    saved.load_classifier_state(path.parent, judge)
    tokens = torch.randint(200, (2, 7), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([7, 3])
    with torch.no_grad():
        torch.testing.assert_close(llama.hidden(tokens, lengths), judge.eval().llama.hidden(tokens, lengths))


def test_more_labelled_sentences_go_on_from_a_run(earlier, inputs):
    """What the option is for: the same labels, other sentences, better than where it began."""
    write_split(Path("more-train.txt"), tiny_sentences(96, 5))
    later = from_run(inputs, earlier, "--train", "more-train.txt", "--lr", "1e-2", "--optimizer", "adamw", "--epochs",
                     "3")
    assert later.code == 0 and later.result["dev"]["loss"] < result_of(earlier)["dev"]["loss"]
