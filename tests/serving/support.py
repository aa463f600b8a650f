"""A real server on a free port of this machine, in a thread, and a model that can be slowed down."""

import contextlib
import json
import socket
import threading
import time

import httpx

from qlx.runtime import TextModel
from qlx.serving import LoadedEngine, Server, ServingLimits, create_app, listen

LIMITS = ServingLimits(
    waiting=2, body_bytes=2**16, header_seconds=0.8, body_seconds=0.8, request_seconds=8.0
)


@contextlib.contextmanager
def served(engines, *, limits=LIMITS, **options):
    """Yield an httpx client for a running server."""
    app = create_app(engines, limits=limits, **options)
    bound = listen("127.0.0.1", 0)
    server = Server(app, limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with httpx.Client(base_url=address, timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
        bound.close()
        assert not thread.is_alive()


class Slow:
    """A decoder that waits before every step and counts them."""

    def __init__(self, inner, seconds, steps):
        self._inner, self._seconds, self._steps = inner, seconds, steps

    def feed(self, tokens):
        time.sleep(self._seconds)
        self._steps.append(tokens.shape[1])
        return self._inner.feed(tokens)


def slowed(engine, seconds):
    """The same engine with a pause before every token; and the list its steps are counted in."""
    steps = []
    text = engine.text
    slow = TextModel(
        text.codec,
        text.context_length,
        text.end_tokens,
        lambda: Slow(text._start(), seconds, steps),
    )
    return LoadedEngine(engine.name, engine.manifest, text=slow), steps


def raw(client, data, seconds=5.0):
    """Send bytes on a socket of their own and return what comes back until the server closes."""
    host, port = client.base_url.host, client.base_url.port
    with socket.create_connection((host, port), timeout=seconds) as connection:
        connection.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
    return answer


def events(response):
    """The data of all server-sent events of a response."""
    lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]
