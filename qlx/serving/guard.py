"""What every request passes before any handler: host name, key, size. Deny by default.

Plain ASGI, so that nothing is buffered and no route can be reached around it.
"""

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["LOOPBACK_HOSTS", "Guard", "error_response"]

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
_OPEN_PATH = "/healthz"
_HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
}


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error in OpenAI's shape: one sentence and the status again."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "code": status}}
    return JSONResponse(body, status_code=status, headers=headers)


class Guard:
    """Refuses requests by host, key and declared size, and marks every answer as not to be stored.

    Args:
        hosts: host names that may be asked for (against DNS rebinding); None allows any.
        api_key: the key every path but `/healthz` needs, as `Authorization: Bearer`; None for no key.
        body_bytes: the largest body.
        header_bytes: the largest sum of header names and values.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Iterable[str] | None,
        api_key: str | None,
        body_bytes: int,
        header_bytes: int,
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(hosts)
        self._key = None if api_key is None else api_key.encode()
        self._body_bytes, self._header_bytes = body_bytes, header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it here."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)
        if (
            refusal is not None
        ):  # its body stays unread, so nothing more can be asked on this connection
            refusal.headers["connection"] = "close"
        await (refusal or self._app)(scope, receive, _marked(send))

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._header_bytes:
            return error_response(431, f"the headers are larger than {self._header_bytes} bytes")
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            return error_response(421, "this server does not answer for that host name")
        if not self._allowed(scope, headers):
            challenge = {"www-authenticate": "Bearer"}
            return error_response(401, "an API key is needed, as Authorization: Bearer", challenge)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._body_bytes:
            return error_response(413, f"the body is larger than {self._body_bytes} bytes")
        return None

    def _allowed(self, scope: Scope, headers: Headers) -> bool:
        if self._key is None or (scope["path"] == _OPEN_PATH and scope["method"] == "GET"):
            return True
        given = headers.getlist("authorization")
        value = given[0].encode() if len(given) == 1 else b""
        return hmac.compare_digest(value, b"Bearer " + self._key)


def _host(value: str) -> str:
    """The host name of a Host header in lower case, without its port."""
    name, _, port = value.lower().rpartition(":")
    return name if port.isdecimal() else value.lower()


def _marked(send: Send) -> Send:
    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return marked
