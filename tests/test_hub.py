"""data/hub.py: a model from the Hugging Face hub; here the hub is a server on this machine, and the client its own."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch
from huggingface_hub import constants

import run_llama
from data import hub
from llama import load_pretrained

COMMIT, OLDER = "a" * 40, "b" * 40
TOKEN = "hf_a_secret_that_nobody_prints"


class Hub(BaseHTTPRequestHandler):
    """Serves `server.models`: by name, the files by revision. Notes each path in `server.asked`."""

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        of_api = re.fullmatch(r"/api/models/(\w+/[\w.-]+)(?:/(revision|tree)/(\w+))?", path)
        of_file = re.fullmatch(r"/(\w+/[\w.-]+)/resolve/(\w+)/(.+)", path)
        if not (of_api or of_file):
            return self.answer(404)
        name, revision = (of_api[1], of_api[3] or "main") if of_api else (of_file[1], of_file[2])
        if name == "tiny/gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, X_Error_Code="GatedRepo")
        if name not in self.server.models:
            return self.answer(401, X_Error_Code="RepoNotFound")
        revision = {"main": COMMIT, "old": OLDER}.get(revision, revision)
        held = self.server.models[name].get(revision)
        if held is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if of_file:
            if self.server.breaks:
                return self.answer(503)
            content = held[of_file[3]]
            return self.answer(200, content, ETag=f'"{hash(content)}"', X_Repo_Commit=revision)
        files = [{"type": "file", "path": name, "size": len(content), "oid": f"{hash(content):x}"}
                 for name, content in held.items()]
        what = files if of_api[2] == "tree" else {
            "id": name, "modelId": name, "sha": revision, "private": False, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": file["path"]} for file in files]}
        return self.answer(200, json.dumps(what).encode(), Content_Type="application/json")

    do_HEAD = do_GET


def be_at(monkeypatch, address):
    """As HF_ENDPOINT does, which the client reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def server(tiny_model, tmp_path, monkeypatch):
    """A hub with tiny/llama, of which another commit has fewer words said, tiny/gated and tiny/empty."""
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    more = {"pytorch_model.bin": b"twice the weights", "README.md": b"#", "original/model.safetensors": b"another's"}
    older = tiny.write_model(tmp_path / "older", ["the film is good"] * 9)
    models = {"tiny/llama": {COMMIT: {**files, **more}, OLDER: {p.name: p.read_bytes() for p in older.iterdir()}},
              "tiny/gated": {COMMIT: files}, "tiny/empty": {COMMIT: {"README.md": b"#"}}}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        running.models, running.asked, running.breaks = models, [], False
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(time, "sleep", lambda _: None)  # between the client's tries
        be_at(monkeypatch, f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running
        running.shutdown()


def test_a_model_of_the_hub_is_fetched_once_and_nothing_else_of_it(server, tiny_model):
    folder = hub.fetch("hf:tiny/llama")
    assert folder.name == COMMIT and hub.origin(folder) == f"hf:tiny/llama@{COMMIT}"
    assert {path.name for path in folder.rglob("*")} == {path.name for path in tiny_model.iterdir()} & {*hub.FILES}
    for name, parameter in load_pretrained(folder).named_parameters():
        assert torch.equal(parameter, load_pretrained(tiny_model).get_parameter(name))
    server.asked.clear()
    assert hub.fetch("hf:tiny/llama@main") == hub.fetch(f"hf:tiny/llama@{COMMIT}") == folder
    assert not [path for path in server.asked if "resolve" in path]


def test_another_revision_is_another_folder(server):
    assert hub.fetch("hf:tiny/llama@old").name == hub.fetch(f"hf:tiny/llama@{OLDER}").name == OLDER


def test_a_run_on_a_model_of_the_hub_names_its_commit_and_resumes_without_the_hub(server, tiny_arguments, tmp_path):
    words = [*tiny_arguments[2:], "--option", "finetune", "--epochs", "1", "--output_dir", "run", "--keep_state"]
    assert run_llama.main([*words, "--pretrained_model_path", "hf:tiny/llama"]) == 0
    args = json.loads((tmp_path / "run/args.json").read_text(encoding="utf-8"))
    assert args["files"]["weights"]["hub"] == f"hf:tiny/llama@{COMMIT}"
    assert args["files"]["weights"]["path"].endswith(COMMIT)
    assert args["options"]["pretrained_model_path"] == "hf:tiny/llama"
    server.models.clear()
    for more in ([], ["--pretrained_model_path", "hf:tiny/llama"]):
        assert run_llama.main(["--resume", "run", "--epochs", str(2 + len(more)), *more]) == 0


@pytest.mark.parametrize(("name", "words"), [
    ("hf:tiny/none", "no such model on http://127.0.0.1.*HF_TOKEN"), ("hf:tiny/llama@never", "no branch.*never"),
    ("hf:tiny/gated", "agree on http://127.0.0.1:[0-9]+/tiny/gated.*HF_TOKEN"), ("hf:tiny/empty", "no config.json"),
    ("hf:tiny", "hf:OWNER/NAME"), ("hf:", "hf:OWNER/NAME"), ("hf:../../etc/passwd", "hf:OWNER/NAME"),
    ("hf:a/b/c", "hf:OWNER/NAME"), ("hf:tiny/llama@", "hf:OWNER/NAME"), ("hf:../..", "hf:../.."),
    ("hf:tiny/-x-", "tiny/-x-"),
])
@pytest.mark.parametrize("token", [None, "hf_another_secret"])
def test_a_model_that_cannot_be_had_is_refused_in_one_message(server, monkeypatch, capsys, name, words, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert run_llama.main(["--option", "generate", "--pretrained_model_path", name]) == 2
    message = capsys.readouterr().err
    assert name in message and re.search(words, message) and "Traceback" not in message
    assert "secret" not in message


def test_a_gated_model_is_fetched_with_the_token(server, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.fetch("hf:tiny/gated").name == COMMIT
    assert TOKEN not in "".join(capsys.readouterr())


def test_a_hub_that_cannot_be_reached_is_named_without_its_password_unless_the_model_is_here(server, monkeypatch):
    folder = hub.fetch("hf:tiny/llama")
    be_at(monkeypatch, "http://me:secret@127.0.0.1:9")
    assert hub.fetch("hf:tiny/llama") == folder
    with pytest.raises(ValueError, match="http://127.0.0.1:9 cannot be reached") as caught:
        hub.fetch("hf:tiny/other")
    assert "secret" not in str(caught.value)


def test_a_hub_that_breaks_off_is_named(server):
    server.breaks = True
    with pytest.raises(ValueError, match="cannot be reached"):
        hub.fetch("hf:tiny/llama")


def test_offline_only_the_cache_is_asked(server, monkeypatch):
    folder = hub.fetch("hf:tiny/llama")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    assert hub.fetch("hf:tiny/llama") == folder
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        hub.fetch("hf:tiny/gated")
    assert not server.asked


def test_a_folder_elsewhere_is_not_of_the_hub(tmp_path):
    assert hub.origin(tmp_path / "models--a--b" / "other" / COMMIT) is None
    assert hub.origin(tmp_path / "a" / "snapshots" / COMMIT) is None
