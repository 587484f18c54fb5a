"""The service under load and under hostile clients, its answers compared with predict's.

    python -m benchmarks.bench_serve --run runs/small

Starts `--option serve` on a free port. First --clients clients ask for --seconds, each one text a request over a
connection that stays open, one request after another. Then comes what nobody should send; after each of these an
honest client must get its answer within seconds. The load is made by the same machine's cores.
"""

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from statistics import quantiles

from benchmarks.measure import ROOT, machine, need, write

PREDICT = [sys.executable, "run_llama.py", "--option", "predict", "--input", "-", "--output_format", "jsonl"]
SERVE = [sys.executable, "run_llama.py", "--option", "serve", "--port", "0"]


def request(body: bytes, *headers: str) -> bytes:
    lines = ["POST /predict HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def ask(text: str) -> bytes:
    body = json.dumps({"texts": [text]}).encode()
    return request(body, f"Content-Length: {len(body)}")


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of a response."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))
    return int(head.split()[1]), await reader.readexactly(length)


def difference(body: bytes, expected: dict) -> float:
    """The largest difference of a probability; infinite for another class."""
    found = json.loads(body)["answers"][0]
    if found["label"] != expected["label"]:
        return float("inf")
    return max(abs(found["probabilities"][name] - p) for name, p in expected["probabilities"].items())


async def load(port: int, known: list[dict], clients: int, seconds: float) -> dict:
    """The figures of so many clients for so long."""
    end, seen, errors, worst = time.perf_counter() + seconds, [], Counter(), [0.0]

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        turn = number
        while time.perf_counter() < end:
            expected = known[turn % len(known)]
            turn += clients
            start = time.perf_counter()
            try:
                writer.write(ask(expected["text"]))
                status, body = await answer(reader)
            except (OSError, asyncio.IncompleteReadError) as error:
                errors[type(error).__name__] += 1
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                continue
            seen.append(time.perf_counter() - start)
            if status == 200:
                worst.append(difference(body, expected))
            else:
                errors[str(status)] += 1
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    spent, cuts = time.perf_counter() - start, quantiles(seen, n=100)
    return {"clients": clients, "seconds": spent, "requests": len(seen), "requests_per_second": len(seen) / spent,
            "p50_seconds": cuts[49], "p99_seconds": cuts[98], "errors": dict(errors),
            "other_class": worst.count(float("inf")), "largest_difference": max(d for d in worst if d < 1)}


# --------------------------------------------------------------------------- hostile clients


def sent(port: int, *parts: bytes, pause: float = 0.0, patience: float = 40.0) -> str:
    """Send these parts on a new connection; the statuses that come back until it is closed."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        with suppress(OSError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            while piece := connection.recv(1 << 16):
                found += piece
    statuses = [part[:3].decode() for part in found.split(b"HTTP/1.1 ")[1:] + found.split(b"HTTP/1.0 ")[1:]]
    return " ".join(statuses) or "closed"


def idle(port: int, n: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(n)]


def hostile(port: int, known: dict) -> dict:
    """What each of them got, and how long an honest client then waited for its answer, in seconds."""
    chunked = request(b"", "Transfer-Encoding: chunked")
    slow = [bytes([byte]) for byte in ask("slow")]
    html = "<script>alert(1)</script>"
    attacks = {
        "10 MB body": lambda: sent(port, request(b"x" * 10_000_000, "Content-Length: 10000000")),
        "invalid JSON": lambda: sent(port, request(b"{nope", "Content-Length: 5")),
        "100,000 brackets": lambda: sent(port, request(b"[" * 100_000, "Content-Length: 100000")),
        "1,000 texts": lambda: sent(port, request(body := json.dumps({"texts": ["x"] * 1000}).encode(),
                                                  f"Content-Length: {len(body)}")),
        "HTML in a text": lambda: sent(port, ask(html)),
        "rubbish behind a request": lambda: sent(port, ask("good") + b"\x16\x03\x01 rubbish\r\n\r\n"),
        "Content-Length too small": lambda: sent(port, request(b'{"text": "good"}', "Content-Length: 9")),
        "Content-Length too large": lambda: sent(port, request(b'{"text": "good"}', "Content-Length: 99")),
        "Content-Length -1": lambda: sent(port, request(b'{"text": "good"}', "Content-Length: -1")),
        "two Content-Lengths": lambda: sent(port, request(b'{"text": "good"}', "Content-Length: 16",
                                                          "Content-Length: 3")),
        "chunked body": lambda: sent(port, chunked + b"10\r\n{\"text\": \"good\"}\r\n0\r\n\r\n"),
        "a byte a second": lambda: sent(port, *slow[:14], pause=1.0),
    }
    found = {}
    for name, attack in attacks.items():
        start = time.perf_counter()
        got = attack()
        found[name] = {"got": got, "seconds": time.perf_counter() - start, "honest_seconds": honest(port, known)}
    kept = idle(port, 1000)
    found["1,000 idle connections"] = {"got": f"{still_open(kept)} of 1000 stay open",
                                       "honest_seconds": honest(port, known)}
    for connection in kept:
        connection.close()
    for name, one in found.items():
        print(f"{name:26} {one['got']:28} an honest client waits {1000 * one['honest_seconds']:.0f} ms")
    return found


def still_open(connections: list[socket.socket]) -> int:
    time.sleep(1)
    n = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            n += bool(connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            n += 1
        except OSError:
            pass
    return n


def honest(port: int, known: dict) -> float:
    """How long the answer to one text takes, over a new connection. It must be the right one."""
    async def once() -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ask(known["text"]))
        found = await answer(reader)
        writer.close()
        return found

    start = time.perf_counter()
    status, body = asyncio.run(once())
    assert status == 200 and difference(body, known) < 1e-5, (status, body)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="the folder of a finished run")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    need("data/movies-dev.txt")
    lines = (ROOT / "data/movies-dev.txt").read_text(encoding="utf-8").splitlines()
    texts = "\n".join(line.partition(" ||| ")[2] for line in lines)
    told = subprocess.run([*PREDICT, "--run", options.run], cwd=ROOT, input=texts.encode(), check=True,
                          stdout=subprocess.PIPE).stdout
    known = [json.loads(line) for line in told.splitlines()]
    server = subprocess.Popen([*SERVE, "--run", options.run], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        first = server.stdout.readline()
        print(first, end="")
        port = int(first.split(" (")[0].rpartition(":")[2])
        under_load = asyncio.run(load(port, known, options.clients, options.seconds))
        print(under_load)
        attacked = hostile(port, known[0])
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    print(f"SIGTERM: exit code {code}")
    write("serve-cpu", {"machine": machine(), "load": under_load, "hostile": attacked})


if __name__ == "__main__":
    main()
