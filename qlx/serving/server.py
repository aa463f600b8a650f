"""Running the application: the socket, the deadlines below HTTP, word of the address once it answers."""

import asyncio
import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qlx.errors import UsageError
from qlx.runtime import Device
from qlx.serving.app import create_app
from qlx.serving.engine import Engine, load_engines
from qlx.serving.guard import LOOPBACK_HOSTS
from qlx.serving.limits import ServingLimits

__all__ = ["Server", "listen", "serve"]


def serve(
    path: Path | str,
    *,
    base: Any = None,
    adapters: Iterable[tuple[str, Path | str]] = (),
    host: str = "127.0.0.1",
    port: int = 8080,
    threads: int | None = None,
    device: Device = "cpu",
    api_key_variable: str | None = None,
    limits: ServingLimits | None = None,
    listening: Callable[[str, Sequence[str]], None] | None = None,
) -> None:
    """Serve a checkpoint over HTTP until SIGINT or SIGTERM; running answers are finished first.

    The swappable adapters of an ONNX checkpoint are models of their own, under their names.

    Args:
        path: a checkpoint of any kind; an ONNX one is served without torch.
        base: the base model of a run or adapter.
        adapters: (name, directory) of further checkpoints to serve under those names.
        host: address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one.
        threads: threads inside one operator.
        device: where ONNX checkpoints run.
        api_key_variable: name of the environment variable that holds the key clients must send.
        limits: what a client may cost.
        listening: called with the address and the models' names once it answers; by default they are
            printed on standard error.

    Raises:
        UsageError: the address cannot be used, two models have one name, or the key variable is empty.
    """
    limits = limits or ServingLimits()
    key = _api_key(api_key_variable)
    rest: Any = {"base": base, "threads": threads, "device": device}
    engines: list[Engine] = [*load_engines(path, **rest)]
    for name, item in adapters:
        engines += load_engines(item, name=name, **rest)
    hosts = sorted(LOOPBACK_HOSTS | {host}) if _is_loopback(host) and key is None else None
    app = create_app(engines, api_key=key, hosts=hosts, limits=limits)
    if key is None and not _is_loopback(host):
        sys.stderr.write(
            f"warning: {host} may be reached from other machines, and no key is asked for\n"
        )
    with listen(host, port) as bound:
        names = [engine.name for engine in engines]
        told = listening or _say_address
        Server(app, limits, lambda address: told(address, names)).run(sockets=[bound])


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key.isascii() or len(key) < 16:
        raise UsageError(
            f"the environment variable {variable} must hold a key of at least 16 ASCII characters"
        )
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UsageError: the address is not usable here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(128)
    except OSError as error:
        bound.close()
        raise UsageError(
            f"cannot listen on {host} port {port} ({error.strerror or error}); choose another"
        ) from error
    return bound


def _say_address(address: str, names: Sequence[str]) -> None:
    sys.stderr.write(f"serving {', '.join(names)} at {address} (Ctrl-C stops)\n")
    sys.stderr.flush()


class Server(uvicorn.Server):
    """uvicorn with qlx's limits; says where it listens once it does, and ends quietly on a signal."""

    def __init__(
        self, app: Any, limits: ServingLimits, listening: Callable[[str], None] = lambda at: None
    ) -> None:
        self._listening = listening
        super().__init__(
            uvicorn.Config(
                app,
                http=_protocol(limits.header_seconds),
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=limits.connections,
                h11_max_incomplete_event_size=limits.header_bytes,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=limits.shutdown_seconds,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell the address."""
        await super().startup(sockets)
        for bound in sockets or ():
            host, port = bound.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._listening(f"http://{shown}:{port}")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGINT and SIGTERM without raising them again: stopping is how serving ends well."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def _protocol(seconds: float) -> type[asyncio.Protocol]:
    """Uvicorn's HTTP protocol with a deadline for a request's headers, which it lacks."""

    class Deadline(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def _watch(self) -> None:
            """A timer runs exactly while headers are awaited; data that completes none does not restart it."""
            if self.conn.their_state is not h11.IDLE:
                self._stop()
            elif self._timer is None:
                self._timer = self.loop.call_later(seconds, self._too_slow)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

    return Deadline
