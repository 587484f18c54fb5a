"""--option serve: a finished run behind HTTP, with a page to try it. See docs/serve.md."""

import ipaddress
import os
import re
import socket
import sys
import time
from contextlib import suppress

from commands import http_service
from commands.batcher import Batcher
from commands.finished import load_model
from config import InputError, RunConfig, counted
from formats import files
from training import logs
from training.signals import SIGNALS

AT_ONCE, CHARACTERS_AT_ONCE = 128, 20_000  # texts that are computed together, where so many wait
MOST_WAITING, MOST_CHARACTERS = 2048, 200_000  # texts in the queue, and their characters; beyond, it is 503
FILES_BESIDE = 64  # open files that are no connections


def run(config: RunConfig) -> int:
    model = load_model(config)
    names = model.saved.settings.label_names
    model.answer(["warm up"])  # the first one is slow
    batcher = Batcher(lambda texts: model.answer(texts).probabilities, AT_ONCE, MOST_WAITING, MOST_CHARACTERS,
                      CHARACTERS_AT_ONCE)
    about = http_service.About(str(model.saved.typed), names, files.manifest_digest(model.saved.best))
    server = listen(config, batcher, about)
    with SIGNALS.saying("stopping when what is in flight is answered"):
        server.start()
        logs.say(f"serving :: {address(server.host, server.server_port)} ({model.saved.typed}, {len(names)} classes)")
        while SIGNALS.got is None:
            time.sleep(0.1)
        code = 128 + SIGNALS.got
        n_answered, n_left = server.stop()
        has_ended = batcher.stop(0.0 if n_left else http_service.STOP_SECONDS)
    in_flight = f"; of {counted(n_answered + n_left, 'request')} in flight {n_answered} answered"
    logs.notice("stopped" + (in_flight if n_answered + n_left else "") + (f", {n_left} not in time" if n_left else ""))
    if not has_ended:  # Python's own end would stop the thread inside the model's C++, which aborts the process
        sys.stdout.flush()
        os._exit(code)
    return code


def listen(config: RunConfig, batcher: Batcher, about: http_service.About) -> http_service.Server:
    """The server at --host and --port. Raises InputError where nobody can listen there."""
    try:
        return http_service.Server(re.sub(r"^\[(.*)\]$", r"\1", config.host), config.port, batcher, about,
                                   connections_allowed())
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"--host {config.host}: there is no such address ({error}); 127.0.0.1 is this "
                         "machine alone, 0.0.0.0 all of its addresses") from None
    except OSError as error:
        raise InputError(f"--port {config.port}: nobody can listen there at {config.host} ({error.strerror}); stop the "
                         "program that uses it, or take another port (--port 0: any that is free)") from None


def connections_allowed() -> int:
    """http_service.MOST_CONNECTIONS, or what the open files allow; their soft limit is raised as far as it may be."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return http_service.MOST_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = http_service.MOST_CONNECTIONS + FILES_BESIDE
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return http_service.MOST_CONNECTIONS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(1, min(http_service.MOST_CONNECTIONS, soft - FILES_BESIDE))


def address(host: str, port: int) -> str:
    try:
        is_ipv6 = ipaddress.ip_address(host).version == 6
    except ValueError:  # a name
        is_ipv6 = False
    return f"http://{f'[{host}]' if is_ipv6 else host}:{port}"

