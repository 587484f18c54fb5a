"""The READMEs: their commands do what they say, and the two languages have the same ones."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, tiny_sentences

ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))


def blocks(text: str) -> list[str]:
    """The shell commands of a README, a block each."""
    return re.findall("^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def own_csv_commands() -> list[str]:
    """From pip install to a prediction in Python on one's own CSV."""
    return next(block for block in blocks(ENGLISH) if "reviews.csv" in block).splitlines()


def test_both_languages_have_the_same_commands():
    assert blocks(ENGLISH) == blocks(CHINESE)

    def table(text: str) -> list[str]:
        return re.findall("^\\|.*\\| `(python run_llama.py .*)` \\|$", text, re.MULTILINE)

    assert [line.split()[:4] for line in table(ENGLISH)] == [line.split()[:4] for line in table(CHINESE)]
    assert len(table(ENGLISH)) > 10


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The program as a user has it, with a tiny model under the name of a real one, and a CSV of the user's own."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copy(ROOT / "fused.c", folder)
    for name in ("commands", "config", "data", "formats", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.txt", "*.json", "__pycache__"))
    sentences = [sentence for _, sentence in tiny_sentences(200, 0)]
    hf = tiny.transformers().LlamaForCausalLM.from_pretrained(tiny.write_model(folder / "hf", sentences * 3, layers=4))
    torch.save(tiny.pt_dict(hf), folder / "stories42M.pt")
    shutil.move(folder / "hf" / "tokenizer.json", folder)
    with open(folder / "reviews.csv", "w", encoding="utf-8", newline="") as file:
        names = ("bad", "fine", "good")
        csv.writer(file).writerows([("review", "verdict"), *((s, names[label]) for label, s in tiny_sentences(300, 1))])
    return folder


def test_from_pip_install_to_a_prediction_in_python_in_four_commands(checkout):
    install, *commands = own_csv_commands()
    assert install == "pip install -r requirements.txt" and len(commands) == 3
    out = ""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=checkout, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        out = done.stdout
    assert re.fullmatch(r"\['(bad|fine|good)'\]\n", out)
    assert list(checkout.glob("runs/reviews/best/model.safetensors"))
