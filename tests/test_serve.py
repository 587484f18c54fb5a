"""The service: answers as predict gives them, a status for each fault, limits, and a clean end."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from conftest import ROOT, tiny_sentences

import run_llama
from commands import http_service
from commands import serve as serving
from commands.batcher import Batcher, QueueFull, Stopped
from commands.http_service import About, Server
from config import InputError, RunConfig

NAMES = ["bad", "<b>fine</b>", "好 👍"]
TEXTS = [s for _, s in tiny_sentences(20, 3)] + ["", "<script>alert(1)</script>", "一部好电影 🎬"]


def compute(texts):
    """Each text's own probabilities, without a model."""
    if "fail" in texts:
        raise ValueError("the model is broken")
    rows = np.array([[1 + len(text), 2, 3] for text in texts], dtype=float)
    return rows / rows.sum(1, keepdims=True)


@contextmanager
def service(do=compute, most_waiting=100, host="127.0.0.1"):
    batcher = Batcher(do, 8, most_waiting)
    server = Server(host, 0, batcher, About("runs/x", NAMES, "abc"))
    server.start()
    try:
        yield server
    finally:
        server.stop()
        batcher.stop()


@pytest.fixture(scope="module")
def server():
    with service() as running:
        yield running


def ask(server, method="POST", path="/predict", body=None, **headers):
    """(status, the headers, the JSON) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if method == "POST":
        headers.setdefault("Content-Type", "application/json")
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, response.headers, json.loads(content) if content and is_json else content


def raw(server, content: bytes) -> bytes:
    """What comes back for these bytes until the connection is closed."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(1 << 16):
                found += piece
    return found


# --------------------------------------------------------------------------- answers


def test_an_answer_has_label_name_and_probabilities(server):
    status, headers, found = ask(server, body={"texts": ["", "abcdefghi"]})
    assert status == 200 and headers["Access-Control-Allow-Origin"] is None
    assert found == {"answers": [
        {"label": 2, "name": NAMES[2], "probabilities": dict(zip(NAMES, [0.166667, 0.333333, 0.5], strict=True))},
        {"label": 0, "name": "bad", "probabilities": dict(zip(NAMES, [0.666667, 0.133333, 0.2], strict=True))}]}
    top = ask(server, body={"text": "abcdefghi", "top_k": 2})[2]["answers"][0]["probabilities"]
    assert list(top.items()) == [("bad", 0.666667), (NAMES[2], 0.2)]
    assert len(ask(server, body={"text": "a", "top_k": 99})[2]["answers"][0]["probabilities"]) == 3
    assert ask(server, body={"texts": []})[2] == {"answers": []}


def test_health_and_the_page(server):
    assert ask(server, "GET", "/health")[2] == {"status": "ok", "run": "runs/x", "classes": NAMES, "version": "abc"}
    status, headers, page = ask(server, "GET", "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and b"<textarea" in page and "default-src 'none'" in policy and "unsafe" not in policy
    assert b".innerHTML" not in page and not re.findall(rb"https?://|src=|@import", page), "it needs no other file"
    assert ask(server, "HEAD", "/")[2] == b""


@pytest.mark.parametrize("status, method, path, body, headers", [
    (400, "POST", "/predict", b"{nope", {}), (400, "POST", "/predict", b"\xff\xfe", {}),
    (400, "POST", "/predict", b"[" * 100_000, {}), (400, "POST", "/predict", [], {}),
    (400, "POST", "/predict", {"texts": "good"}, {}), (400, "POST", "/predict", {"texts": [1]}, {}),
    (400, "POST", "/predict", {"text": None}, {}), (400, "POST", "/predict", {"text": "a", "texts": []}, {}),
    (400, "POST", "/predict", {"text": "a", "top_k": 0}, {}), (400, "POST", "/predict", {"text": "a", "x": 1}, {}),
    (400, "POST", "/predict", {"text": "a", "top_k": True}, {}), (400, "POST", "/predict", {"text": "\ud800"}, {}),
    (400, "GET", "/health", b"x", {}),
    (404, "GET", "/nothing", None, {}), (404, "POST", "/nothing", {"text": "a"}, {}),
    (404, "GET", "/../commands/serve.py", None, {}),
    (405, "FOO", "/predict", None, {}), (405, "PUT", "/predict", {"text": "a"}, {}),
    (421, "GET", "http://evil.example/health", None, {}),
    (405, "GET", "/predict", None, {}), (405, "POST", "/", {"text": "a"}, {}), (405, "DELETE", "/predict", None, {}),
    (411, "POST", "/predict", None, {"Transfer_Encoding": "chunked"}),
    (413, "POST", "/predict", {"texts": ["a"] * 257}, {}), (413, "POST", "/predict", {"text": "a" * 20_001}, {}),
    (413, "POST", "/predict", b"x" * (1 << 20) + b"x", {}),
    (415, "POST", "/predict", {"text": "a"}, {"Content_Type": "text/plain"}),
    (421, "GET", "/health", None, {"Host": "evil.example:8000"}),
    (500, "POST", "/predict", {"text": "fail"}, {}),
], ids=str)
def test_each_fault_has_its_status_and_a_message(server, status, method, path, body, headers):
    found, sent, content = ask(server, method, path, body, **headers)
    assert found == status and content["error"], content
    assert ("Allow" in sent) == (status == 405)
    assert ask(server, body={"text": "good"})[0] == 200, "the next one is answered"


@pytest.mark.parametrize("head, status", [
    (b"Content-Length: -1", b"400"), (b"Content-Length: 1_6", b"400"), (b"Content-Length: 99", b"400"),
    (b"X: 1", b"411"),
    (b"Content-Length: 16\r\nContent-Length: 3", b"400"), (b"Content-Length: 10000000\r\nExpect: 100-continue", b"413"),
])
def test_a_body_whose_length_is_not_known_ends_the_connection(server, head, status):
    found = raw(server, b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + head
                + b'\r\n\r\n{"text": "good"}')
    assert found.split()[1] == status and found.count(b"HTTP/1.1 ") == 1 and b"Connection: close" in found


@pytest.mark.parametrize("header", [b"x y", b"Host: evil.com"])
def test_a_header_that_would_hide_others_is_refused(server, header):
    found = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + header + b"\r\nContent-Length: 3\r\n\r\nabc")
    assert re.findall(rb"HTTP/1.. (\d+)", found)[0] == b"400"


def test_long_texts_are_limited_together(server):
    assert ask(server, body={"texts": ["a" * 10_000] * 11})[0] == 413
    goes_on = threading.Event()
    batcher = Batcher(lambda texts: np.zeros((len(texts), int(goes_on.wait(30)))), 1, 100, 50)
    first = batcher.submit(["a" * 500])  # one alone is always taken
    while batcher._n_waiting:
        time.sleep(0.01)
    waiting = batcher.submit(["a" * 40])
    with pytest.raises(QueueFull):
        batcher.submit(["a" * 11])
    goes_on.set()
    assert len(first.result(30)) == len(waiting.result(30)) == 1
    batcher.stop()


def test_an_absolute_target_and_an_empty_line_before_it_are_answered(server):
    assert ask(server, "GET", "http://localhost:8000/health")[0] == 200
    assert raw(server, b"\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").split()[1] == b"200"


def held(most=100, **limits):
    """A batcher that computes one text, "0", until the event is set; and the sizes of what it has computed."""
    goes_on, began, sizes = threading.Event(), threading.Event(), []

    def slow(texts):
        sizes.append(len(texts))
        began.set()
        goes_on.wait(30)
        return np.zeros((len(texts), 1))

    batcher = Batcher(slow, 8, most, **limits)
    batcher.submit(["0"])
    assert began.wait(30)
    return batcher, goes_on, sizes


def test_what_is_cancelled_is_not_computed_and_makes_room():
    batcher, goes_on, sizes = held(4)
    left = batcher.submit(["a"] * 4)
    left.cancel()
    taken = batcher.submit(["b"] * 3)
    batcher.submit(["c"]).cancel()
    goes_on.set()
    assert batcher.stop() and sizes == [1, 3] and len(taken.result()) == 3


def test_a_batch_has_a_limit_of_characters():
    batcher, goes_on, sizes = held(characters_at_once=10)
    for text in ("a" * 6, "b" * 4, "c" * 50, "d"):
        batcher.submit([text])
    goes_on.set()
    assert batcher.stop() and sizes == [1, 2, 1, 1]


def test_a_stop_with_an_end_fails_what_still_waits():
    batcher, goes_on, _ = held()
    waiting = batcher.submit(["a"])
    assert not batcher.stop(0.01)
    with pytest.raises(Stopped):
        waiting.result(30)
    with pytest.raises(Stopped):
        batcher.submit(["b"])
    goes_on.set()


def test_what_a_client_that_has_left_asked_is_not_computed(monkeypatch):
    monkeypatch.setattr(http_service, "LOOK_SECONDS", 0.02)
    batcher, goes_on, sizes = held()
    running = Server("127.0.0.1", 0, batcher, About("runs/x", NAMES, "abc"))
    running.start()
    body = b'{"text": "a"}'
    with socket.create_connection(("127.0.0.1", running.server_port), timeout=30) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body) + body)
        while not batcher._n_waiting:
            time.sleep(0.01)
    while running._connections:
        time.sleep(0.01)
    goes_on.set()
    assert running.stop() == (0, 0) and batcher.stop() and sizes == [1]


def test_the_soft_limit_of_open_files_is_raised_or_kept_to(monkeypatch):
    resource = pytest.importorskip("resource")
    soft_and_hard = [(256, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: soft_and_hard[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: soft_and_hard.append(pair))
    assert serving.connections_allowed() == 512 and soft_and_hard.pop() == (576, 4096)
    soft_and_hard[0] = (256, 256)
    assert serving.connections_allowed() == 192


def test_rubbish_behind_a_request_is_no_request(server):
    found = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
                b"\x16\x03\x01 rubbish\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    assert re.findall(rb"HTTP/1.. (\d+)", found) == [b"200", b"400"]


def test_a_connection_is_kept_for_the_next_request(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    for body in ('{"text": "a"}', "{", '{"text": "b"}'):
        connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        assert response.status == (400 if body == "{" else 200) and not response.will_close
    connection.close()


# --------------------------------------------------------------------------- limits


def test_a_trickle_of_bytes_is_cut_off(monkeypatch):
    monkeypatch.setattr(http_service, "REQUEST_SECONDS", 0.3)
    with service() as running, socket.create_connection(("127.0.0.1", running.server_port), timeout=30) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        found = b""
        with suppress(ConnectionError):
            slow.settimeout(0.05)
            for _ in range(600):  # bytes that come one by one move no deadline
                slow.sendall(b" ")
                with suppress(TimeoutError):
                    piece = slow.recv(1 << 16)
                    found += piece
                    if not piece:
                        break
        assert found.split()[1] == b"408"


def test_a_full_queue_is_said(monkeypatch):
    goes_on, began = threading.Event(), threading.Event()

    def slow(texts):
        began.set()
        goes_on.wait(30)
        return compute(texts)

    with service(slow, most_waiting=2) as running:
        found = []
        clients = [threading.Thread(target=lambda n=n: found.append(ask(running, body={"texts": ["a"] * n})[0]))
                   for n in (1, 2)]
        clients[0].start()
        began.wait(30)
        clients[1].start()
        while not running.batcher._n_waiting:
            time.sleep(0.01)
        status, headers, _ = ask(running, body={"text": "one too many"})
        assert status == 503 and headers["Retry-After"]
        goes_on.set()
        for client in clients:
            client.join()
        assert found == [200, 200] and ask(running, body={"text": "a"})[0] == 200


def test_of_too_many_connections_the_one_that_is_idle_for_longest_goes(monkeypatch):
    monkeypatch.setattr(http_service, "MOST_CONNECTIONS", 3)
    with service() as running:
        idle = []
        for n in range(3):
            idle.append(socket.create_connection(("127.0.0.1", running.server_port), timeout=30))
            while len(running._connections) <= n:
                time.sleep(0.01)
        assert ask(running, body={"text": "a"})[0] == 200, "a client that asks is answered"
        assert idle[0].recv(1) == b"", "closed"
        for connection in idle[1:]:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
        for connection in idle:
            connection.close()


def test_what_waits_is_computed_together_and_in_its_order():
    sizes, first = [], threading.Event()

    def slow(texts):
        sizes.append(len(texts))
        first.wait(30)
        return np.array([[float(text)] for text in texts])

    batcher = Batcher(slow, 4, 100)
    futures = [batcher.submit(["0"])]
    while not sizes:
        time.sleep(0.01)
    futures += [batcher.submit([str(i), str(i + 1)]) for i in range(1, 9, 2)]
    with pytest.raises(QueueFull):
        batcher.submit(["1"] * 93)
    first.set()
    batcher.stop()
    assert sizes == [1, 4, 4]
    assert [future.result().ravel().tolist() for future in futures] == [[0], [1, 2], [3, 4], [5, 6], [7, 8]]


def test_a_stop_answers_what_is_in_flight_and_takes_nothing_new():
    goes_on, began = threading.Event(), threading.Event()

    def slow(texts):
        began.set()
        goes_on.wait(30)
        return compute(texts)

    found = []
    batcher = Batcher(slow, 8, 100)
    server = Server("127.0.0.1", 0, batcher, About("runs/x", NAMES, None))
    server.start()
    client = threading.Thread(target=lambda: found.append(ask(server, body={"text": "a"})))
    client.start()
    began.wait(30)
    stopping = threading.Thread(target=lambda: found.append(server.stop()))
    stopping.start()
    while not server.is_stopping:
        time.sleep(0.01)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.server_port), timeout=5)
    goes_on.set()
    client.join()
    stopping.join()
    batcher.stop()
    answered = next(one for one in found if len(one) == 3)
    assert answered[0] == 200 and answered[1]["Connection"] == "close" and (1, 0) in found


# --------------------------------------------------------------------------- the command


def test_a_port_in_use_and_a_host_that_is_none_are_one_message(server):
    for config, words in ((RunConfig(option="serve", port=server.server_port), f"--port {server.server_port}: "),
                          (RunConfig(option="serve", host="no such host", port=0), "--host no such host: "),
                          (RunConfig(option="serve", host="a..b", port=0), "--host a..b: ")):
        with pytest.raises(InputError, match=words):
            serving.listen(config, server.batcher, server.about)


def test_the_service_answers_as_predict_does_and_ends_on_a_signal(inputs, tmp_path, monkeypatch, capsys):
    """The whole program, at the --host and --port that were typed."""
    monkeypatch.chdir(tmp_path)
    command = ["--option", "finetune", *inputs, "--epochs", "1", "--lr", "3e-3", "--output_dir", "run"]
    assert run_llama.main(command) == 0
    (tmp_path / "in.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    capsys.readouterr()
    assert run_llama.main(["--option", "predict", "--run", "run", "--input", "in.txt", "--output_format", "jsonl"]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with socket.socket() as one:  # a port that is free
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(ROOT / "run_llama.py"), "--option", "serve", "--run", "run",
                                "--host", "localhost", "--port", str(port)], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == f"serving :: http://localhost:{port} (run, 3 classes)\n"
        running = type("Running", (), {"server_port": port})
        for texts in (TEXTS, TEXTS[:1]):
            found = ask(running, body={"texts": texts}, Host="localhost")[2]["answers"]
            for one, other in zip(found, expected, strict=False):
                assert (one["label"], one["name"]) == (other["label"], other["name"])
                assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
        assert len(ask(running, "GET", "/health")[2]["version"]) == 64
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    if sys.platform != "win32":
        assert process.returncode == 143 and "stopped\n" in err and "Traceback" not in err and out == ""
