"""--option serve: a finished run behind HTTP, with a page to try it. See docs/serve.md."""

import ipaddress
import socket
import time

from commands import http_service
from commands.batcher import Batcher
from commands.finished import load_model
from config import InputError, RunConfig, counted
from formats import files
from training import logs
from training.signals import SIGNALS

AT_ONCE = 128  # texts that are computed together, where so many wait
MOST_WAITING, MOST_CHARACTERS = 2048, 200_000  # texts in the queue, and their characters; beyond, it is 503


def run(config: RunConfig) -> int:
    model = load_model(config)
    names = model.saved.settings.label_names
    model.answer(["warm up"])  # the first one is slow
    batcher = Batcher(lambda texts: model.answer(texts).probabilities, AT_ONCE, MOST_WAITING, MOST_CHARACTERS)
    about = http_service.About(str(config.run), names, files.manifest_digest(model.saved.best))
    server = listen(config, batcher, about)
    with SIGNALS:
        server.start()
        logs.say(f"serving :: {address(config.host, server.server_port)} ({config.run}, {len(names)} classes)")
        while SIGNALS.got is None:
            time.sleep(0.1)
        code = 128 + SIGNALS.got
        n_answered, n_left = server.stop()
        batcher.stop(0.0 if n_left else None)
    logs.notice(f"stopped; {counted(n_answered, 'request')} in flight answered"
                + (f", {n_left} not in time" if n_left else ""))
    return code


def listen(config: RunConfig, batcher: Batcher, about: http_service.About) -> http_service.Server:
    """The server at --host and --port. Raises InputError where nobody can listen there."""
    try:
        return http_service.Server(config.host, config.port, batcher, about)
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"--host {config.host}: there is no such address ({error}); 127.0.0.1 is this "
                         "machine alone, 0.0.0.0 all of its addresses") from None
    except OSError as error:
        raise InputError(f"--port {config.port}: nobody can listen there at {config.host} ({error.strerror}); stop the "
                         "program that uses it, or take another port (--port 0: any that is free)") from None


def address(host: str, port: int) -> str:
    try:
        is_ipv6 = ipaddress.ip_address(host).version == 6
    except ValueError:  # a name
        is_ipv6 = False
    return f"http://{f'[{host}]' if is_ipv6 else host}:{port}"

