"""The HTTP side of serve: a thread a connection, limits on everything that a client sends, and answers in JSON."""

import base64
import hashlib
import io
import json
import os
import re
import socket
import socketserver
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np

from commands import answers
from commands.batcher import Batcher, QueueFull, Stopped
from minllama import lone_surrogate
from training import logs

MOST_CONNECTIONS = 512  # at once; where one more comes, the one that has been idle for longest is closed
MOST_BYTES = 1 << 20  # of a request's body
MOST_TEXTS = 256  # in a request
MOST_CHARACTERS = 20_000  # of a text
MOST_TOGETHER = 100_000  # characters of a request
IDLE_SECONDS = 30.0  # between two requests of a connection
REQUEST_SECONDS = 10.0  # from a request's first byte to its last, and for an answer to be taken
LINGER_SECONDS = 2.0  # for what a refused client still sends, so that it reads why
STOP_SECONDS = 20.0  # for the requests in flight when the service stops
LOOK_SECONDS = 0.5  # between two looks whether a client that waits is still there

PAGE = Path(__file__).with_name("serve.html")


@dataclass(frozen=True)
class About:
    """What GET /health says of the run. `version`: the sha256 of best/manifest.json, which has those of the weights."""

    run: str
    names: list[str]
    version: str | None


class Refused(Exception):
    """A request that is answered with an error: the HTTP status, and what to do."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


def read_request(body: bytes) -> tuple[list[str], int | None]:
    """The texts and top_k of a request's JSON. Raises Refused: 400 for another shape, 413 for too much."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON ({str(error)[:100]})") from None
    if not isinstance(asked, dict) or ("text" in asked) == ("texts" in asked):
        raise Refused(400, 'expected {"texts": ["...", ...]} or {"text": "..."}')
    unknown = asked.keys() - {"text", "texts", "top_k"}
    if unknown:
        raise Refused(400, f"unknown: {sorted(unknown)[0][:50]!r}; known are texts, text and top_k")
    texts, top_k = asked.get("texts", [asked.get("text")]), asked.get("top_k")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refused(400, "texts must be a list of strings, and text a string")
    if len(texts) > MOST_TEXTS:
        raise Refused(413, f"{len(texts)} texts; a request can have {MOST_TEXTS}: send them in several")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise Refused(400, "top_k must be a whole number of 1 or more")
    if sum(map(len, texts)) > MOST_TOGETHER:
        raise Refused(413, f"the texts have {sum(map(len, texts))} characters together; {MOST_TOGETHER} at most: send "
                           "them in several requests")
    for i, text in enumerate(texts):
        if len(text) > MOST_CHARACTERS:
            raise Refused(413, f"text {i} has {len(text)} characters; {MOST_CHARACTERS} at most")
        if lone_surrogate(text) is not None:
            raise Refused(400, f"text {i} has half of a surrogate pair, which is not a character")
    return texts, top_k


def security_policy(page: str) -> str:
    """A Content-Security-Policy that lets the page's own script and style run, and nothing else."""
    def allowed(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


# --------------------------------------------------------------------------- a connection


class _Reader(io.RawIOBase):
    """What a client sends, until a deadline that no trickle of bytes moves. Raises TimeoutError."""

    def __init__(self, connection: socket.socket):
        self.connection, self.deadline = connection, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection, one after another."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "minllama", ""
    server: "Server"
    is_lingering = True
    is_idle = True  # until a request is there as a whole: what is still being sent may be closed for others

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.reader = _Reader(self.connection)
        self.rfile: io.BufferedReader = io.BufferedReader(self.reader)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client has left
            pass
        finally:
            self.server.forget(self)

    def handle_one_request(self) -> None:
        self.close_connection = True
        self.reader.deadline = time.monotonic() + IDLE_SECONDS
        if not self.server.wait(self):
            self.command = self.requestline = ""
            self.request_version = self.protocol_version
            return self.refuse_connection()
        with suppress(TimeoutError):
            if not (first := self.rfile.peek(1)[:1]):
                return
            self.reader.deadline = time.monotonic() + REQUEST_SECONDS
            if first in b"\r\n":  # an empty line before a request
                self.rfile.readline(2)
            super().handle_one_request()

    def refuse_connection(self) -> None:
        """Without lingering: where so many come, that would hold a thread for each. What is there already is taken."""
        self.is_lingering = False
        self.close_connection = True
        self.say_busy("too many connections; try again in a second")
        with suppress(OSError):
            self.connection.settimeout(0)
            self.connection.recv(1 << 16)

    # ----------------------------------------------------------------------- what is asked

    def do_GET(self) -> None:
        if not self.is_for_us() or not self.has_no_body() or not self.server.begin(self):
            return
        path = self.path.partition("?")[0]
        about = self.server.about
        if path == "/health":
            self.send_json(200, {"status": "ok", "run": about.run, "classes": about.names, "version": about.version})
        elif path == "/":
            self.send(200, self.server.page.encode(), "text/html; charset=utf-8",
                      {"Content-Security-Policy": self.server.policy})
        elif path == "/predict":
            self.say_error(405, "POST the texts to /predict", {"Allow": "POST"})
        else:
            self.say_error(404, "there are GET /, GET /health and POST /predict")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        if not self.is_for_us():
            return
        try:
            body = self.read_body()
            if not self.server.begin(self):
                return
            path = self.path.partition("?")[0]
            if path in ("/", "/health"):
                return self.say_error(405, "GET this", {"Allow": "GET, HEAD"})
            if path != "/predict":
                return self.say_error(404, "there are GET /, GET /health and POST /predict")
            # A page of another site can send other types without asking; this one not.
            if self.headers.get_content_type() != "application/json":
                return self.say_error(415, "expected Content-Type: application/json")
            texts, top_k = read_request(body)
            rows = self.wait_for(self.server.batcher.submit(texts)).tolist() if texts else []
        except Refused as refused:
            return self.say_error(refused.status, refused.message)
        except (QueueFull, Stopped):
            return self.say_busy("too many texts are waiting; try again in a second")
        except OSError:
            raise
        except Exception:  # of the model; the batcher has said it
            return self.say_error(500, "the model could not answer; the service's log says why")
        found = [answers.answer(row, self.server.about.names, top_k).values() for row in rows]
        self.send_json(200, {"answers": found})

    def wait_for(self, future: "Future[np.ndarray]") -> np.ndarray:
        """Raises ConnectionAbortedError where the client has left: what it asked needs no answer."""
        while True:
            try:
                return future.result(LOOK_SECONDS)
            except TimeoutError:
                if future.done():
                    return future.result()
            if self.has_left():
                future.cancel()
                self.close_connection = True
                raise ConnectionAbortedError

    def has_left(self) -> bool:
        try:
            self.connection.settimeout(0)
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    # ----------------------------------------------------------------------- what is read

    def is_for_us(self) -> bool:
        """Does the Host name this machine, where only this machine is listened to? Another name may be that of a site
        that has let it point here (DNS rebinding). A malformed header would hide those behind it."""
        if self.headers.defects or len(self.headers.get_all("Host", [])) > 1:
            self.send_error(400, "a header is malformed, or there are two Hosts")
            return False
        host = self.headers.get("Host", "")
        if absolute := re.fullmatch("https?://([^/?#]*)(.*)", self.path, re.IGNORECASE):  # it counts before the Host
            host, self.path = absolute[1], "/" + absolute[2].lstrip("/")
        host = re.sub(r":\d*$", "", host).strip("[]").lower()
        if self.server.is_local and host not in ("localhost", "127.0.0.1", "::1", "", self.server.host.lower()):
            self.send_error(421, f"the service is not called {host[:60]}; ask it at localhost, or start it with --host")
            return False
        return True

    def body_length(self) -> int:
        """Raises Refused for a body that does not say how long it is, or is too long."""
        if "Transfer-Encoding" in self.headers:
            raise Refused(411, "send a Content-Length; chunked bodies are not read")
        lengths = self.headers.get_all("Content-Length", [])
        if not lengths and self.command != "POST":
            return 0
        if not lengths:
            raise Refused(411, "send a Content-Length")
        if len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", lengths[0].strip()):
            raise Refused(400, "the Content-Length is not a number")
        if int(lengths[0]) > MOST_BYTES:
            raise Refused(413, f"the body has {int(lengths[0])} bytes; {MOST_BYTES} at most: send fewer texts")
        return int(lengths[0])

    def read_body(self) -> bytes:
        """The body of a POST. Where it raises Refused, the connection ends: what follows is not known."""
        self.close_connection, keep = True, not self.close_connection
        length = self.body_length()
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise Refused(408, f"the request took longer than {REQUEST_SECONDS:g} seconds") from None
        if len(body) < length:
            raise Refused(400, f"the body ends after {len(body)} of {length} bytes")
        self.close_connection = not keep
        return body

    def has_no_body(self) -> bool:
        try:
            if self.body_length() == 0:
                return True
            raise Refused(400, f"a {self.command} has no body here")
        except Refused as refused:
            self.send_error(refused.status, refused.message)
            return False

    def handle_expect_100(self) -> bool:
        """A client that asks first is refused before it sends too much."""
        try:
            self.body_length()
        except Refused as refused:
            self.send_error(refused.status, refused.message)
            return False
        return super().handle_expect_100()

    # ----------------------------------------------------------------------- what is sent

    def send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.connection.settimeout(REQUEST_SECONDS)
        if self.request_version == "HTTP/0.9":  # also of what is no HTTP at all: it is answered in words
            self.request_version = "HTTP/1.0"
        self.close_connection |= self.server.is_stopping
        self.send_response(status)
        more = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                "Cross-Origin-Resource-Policy": "same-origin", **headers}
        if self.close_connection:
            more["Connection"] = "close"
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if self.close_connection and self.is_lingering:
            self.is_idle = True  # it may be closed for others
            self.linger()

    def send_json(self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), "application/json", headers or {})

    def say_error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.send_json(status, {"error": message}, headers)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """An error after which nothing that the client sends on this connection can be trusted. The library calls it
        for what is no HTTP."""
        self.close_connection = True
        if code == 501:  # the library's word for a method that has no do_ here
            return self.say_error(405, "there are GET /, GET /health and POST /predict", {"Allow": "GET, HEAD, POST"})
        self.say_error(code, message or self.responses[HTTPStatus(code)][0])

    def say_busy(self, message: str) -> None:
        self.say_error(503, "the service is stopping" if self.server.is_stopping else message, {"Retry-After": "1"})

    def linger(self) -> None:
        """Take what the client still sends for a moment: where it is closed with unread bytes, the system resets the
        connection, and the client may never see the answer."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.reader.deadline = time.monotonic() + LINGER_SECONDS
            buffer = bytearray(1 << 16)
            while self.reader.readinto(buffer):
                pass

    def log_message(self, format: str, *arguments: Any) -> None:
        """There is no access log."""


# --------------------------------------------------------------------------- the server


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens from the beginning, and answers after `start`. Raises OSError for an address that cannot be had."""

    daemon_threads, block_on_close = True, False
    allow_reuse_address = os.name == "posix"  # on Windows it would let two services have one port
    request_queue_size = 1024

    def __init__(self, host: str, port: int, batcher: Batcher, about: About, most_connections: int | None = None):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = found[0]
        self.host, self.batcher, self.about = host, batcher, about
        self.page = PAGE.read_text(encoding="utf-8")
        self.policy = security_policy(self.page)
        self.is_local = str(found[4][0]).startswith("127.") or found[4][0] == "::1"
        self.is_stopping = False
        self.most_connections = most_connections or MOST_CONNECTIONS
        self._lock = threading.Lock()
        self._connections: dict[Handler, None] = {}  # in the order in which they became idle
        super().__init__((str(found[4][0]), port), Handler)
        self.server_port: int = self.server_address[1]  # type: ignore[assignment]

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def stop(self) -> tuple[int, int]:
        """Take nothing new and answer what is in flight, for STOP_SECONDS at most. Returns how many requests were
        answered, and how many were not."""
        self.shutdown()
        self.server_close()
        with self._lock:
            self.is_stopping = True
            in_flight = [handler for handler in self._connections if not handler.is_idle]
            for handler in self._connections:
                if handler.is_idle:
                    _close(handler)
        left = self._wait_for_answers(STOP_SECONDS)
        if left:
            self.batcher.stop(0.0)
            self._wait_for_answers(1.0)  # those that had to wait are told
        return len(in_flight) - left, left

    def _wait_for_answers(self, seconds: float) -> int:
        """How many requests are in flight after so many seconds, or 0 as soon as there is none."""
        end = time.monotonic() + seconds
        while True:
            with self._lock:
                left = sum(not handler.is_idle for handler in self._connections)
            if not left or time.monotonic() >= end:
                return left
            time.sleep(0.02)

    # ----------------------------------------------------------------------- the connections

    def wait(self, handler: Handler) -> bool:
        """The connection waits for a request from now on. May it?"""
        with self._lock:
            self._connections.pop(handler, None)
            if self.is_stopping:
                return False
            handler.is_idle = True
            self._connections[handler] = None
            if len(self._connections) > self.most_connections:
                oldest = next(one for one in self._connections if one.is_idle)
                del self._connections[oldest]
                if oldest is handler:  # all the others are busy
                    return False
                _close(oldest)
            return True

    def begin(self, handler: Handler) -> bool:
        """A request is there as a whole. False where its connection has just been closed."""
        with self._lock:
            if handler not in self._connections or self.is_stopping:
                handler.close_connection = True
                return False
            handler.is_idle = False
            return True

    def forget(self, handler: Handler) -> None:
        with self._lock:
            self._connections.pop(handler, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A handler has raised what nobody foresaw: a line on stderr, and the service goes on."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logs.notice(f"error: {type(error).__name__}: {error}")


def _close(handler: Handler) -> None:
    with suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)
