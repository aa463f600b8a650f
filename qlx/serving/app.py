"""The HTTP application: routes, and nothing that knows how a model works.

Paths: `GET /healthz`, `GET /v1/models`, `POST /v1/classify`, `POST /v1/locate`,
`POST /v1/completions`, `POST /v1/chat/completions`, and a page at `/`.
"""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qlx.errors import InputRefused, QlxError, UsageError
from qlx.inputs import open_image
from qlx.inputs.images import too_many_pixels
from qlx.runtime import ImageModel, KeypointModel, TextModel, TextPiece
from qlx.serving.bodies import (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    GenerationBody,
    LocateBody,
    parse_body,
)
from qlx.serving.engine import Engine, summary
from qlx.serving.guard import Guard, error_response
from qlx.serving.limits import ServingLimits
from qlx.serving.openai import DONE, Answer, event
from qlx.serving.page import PAGE_POLICY, page
from qlx.serving.work import Busy, Stream, Workers

__all__ = ["create_app"]

T = TypeVar("T")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Image formats that are decoded; Pillow knows more, some of which start other programs."""


def create_app(
    engines: Engine | Sequence[Engine],
    *,
    api_key: str | None = None,
    hosts: Sequence[str] | None = None,
    limits: ServingLimits | None = None,
) -> Starlette:
    """The application over one or more engines; the first answers requests that name no model.

    Args:
        engines: what may be asked; their names must differ.
        api_key: required from every client as `Authorization: Bearer`, except for `/healthz`.
        hosts: host names to answer for; None for any.
        limits: what a client may cost.

    Raises:
        UsageError: no engine, or two of one name.
    """
    listed = list(engines) if isinstance(engines, Sequence) else [engines]
    named = {engine.name: engine for engine in listed}
    names = [engine.name for engine in listed]
    double = next((name for name in names if names.count(name) > 1), None)
    if not names or double is not None:
        what = "no model" if double is None else f"two models of the same name, {double!r}"
        raise UsageError(f"{what}: serving needs one or more, each under a name of its own")
    limits = limits or ServingLimits()
    service = Service(named, limits)
    guard = Middleware(
        Guard,
        hosts=hosts,
        api_key=api_key,
        body_bytes=limits.body_bytes,
        header_bytes=limits.header_bytes,
    )
    return Starlette(
        routes=[
            Route("/", service.front_page),
            Route("/healthz", service.health),
            Route("/v1/models", service.models),
            Route("/v1/classify", service.classify, methods=["POST"]),
            Route("/v1/locate", service.locate, methods=["POST"]),
            Route("/v1/completions", service.complete, methods=["POST"]),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
        ],
        middleware=[guard],
        exception_handlers={
            HTTPException: _http_error,
            QlxError: _qlx_error,
            Busy: service.busy,
            Exception: _unexpected,
        },
        lifespan=service.lifespan,
    )


async def _unexpected(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this answer, so the server's log has the traceback."""
    return error_response(500, "an internal error; the server's log has the details")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, str(error.detail), dict(error.headers or {}))


async def _qlx_error(request: Request, error: Exception) -> Response:
    status = 400 if isinstance(error, UsageError | InputRefused) else 500
    return error_response(status, str(error))


@dataclass
class Service:
    """The handlers, and what they share."""

    engines: dict[str, Engine]
    limits: ServingLimits

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Start the workers with the event loop and stop them with it."""
        self.workers = Workers(self.limits.running, self.limits.waiting)
        try:
            yield
        finally:
            self.workers.stop()

    async def busy(self, request: Request, error: Exception) -> Response:
        """The answer when the queue is full."""
        wait = {"retry-after": str(self.limits.retry_after)}
        return error_response(429, "the server is busy and its queue is full; try again", wait)

    async def front_page(self, request: Request) -> Response:
        """A page with a form for the first model."""
        html = page(next(iter(self.engines.values())))
        return HTMLResponse(html, headers={"content-security-policy": PAGE_POLICY})

    async def health(self, request: Request) -> Response:
        """Whether the server answers, and how many requests run or wait."""
        return JSONResponse({"status": "ok", "requests": self.workers.taken})

    async def models(self, request: Request) -> Response:
        """All models."""
        data = [summary(engine) for engine in self.engines.values()]
        return JSONResponse({"object": "list", "data": data})

    async def classify(self, request: Request) -> Response:
        """Classify one image, sent as base64 in JSON or as the raw file."""
        if _content_type(request) == "application/json":
            asked = parse_body(await self._body(request), ClassifyBody)
            name, data = asked.model, asked.image_bytes()
        else:
            name, data = await self._image_file(request)
        engine = self._engine(name)
        model = _able(engine, engine.images, "classify images")
        found = await self._attended(request, self.workers.run(lambda: _classify(model, data)))
        return JSONResponse({"model": engine.name, **found})

    async def locate(self, request: Request) -> Response:
        """Find the keypoints in one frame, or in the last of several, sent as `classify` takes images."""
        if _content_type(request) == "application/json":
            asked = parse_body(await self._body(request), LocateBody)
            name, files = asked.model, asked.image_bytes()
        else:
            name, file = await self._image_file(request)
            files = [file]
        engine = self._engine(name)
        model = _able(engine, engine.keypoints, "find places")
        found = await self._attended(request, self.workers.run(lambda: _locate(model, files)))
        return JSONResponse({"model": engine.name, "keypoints": found})

    async def _image_file(self, request: Request) -> tuple[str | None, bytes]:
        """The model asked for and an image sent as it is."""
        kind = _content_type(request)
        if not kind.startswith("image/") and kind != "application/octet-stream":
            raise HTTPException(
                415, "the body must be application/json, image/* or application/octet-stream"
            )
        return request.query_params.get("model"), await self._body(request)

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        body = parse_body(await self._json(request), CompletionBody)
        return await self._generate(
            request, body, lambda model: _ids(model, body.prompt), chat=False
        )

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        body = parse_body(await self._json(request), ChatBody)
        turns = [message.model_dump() for message in body.messages]
        return await self._generate(
            request, body, lambda model: model.encode_chat(turns), chat=True
        )

    async def _generate(
        self,
        request: Request,
        body: GenerationBody,
        encode: Callable[[TextModel], list[int]],
        *,
        chat: bool,
    ) -> Response:
        engine = self._engine(body.model)
        model = _able(engine, engine.text, "generate text")
        options, answer = body.options(self.limits.max_tokens), Answer(engine.name, chat)
        prompt: list[int] = []

        def start(stop: Callable[[], bool]) -> Iterator[TextPiece]:
            prompt.extend(encode(model))
            return model.stream(prompt, options, stop)

        run = Run(self.workers, start)
        seconds = self.limits.request_seconds
        end = asyncio.get_running_loop().time() + seconds
        try:
            if body.stream:
                await self._attended(request, run.begin())
                return EventStream(run, answer, seconds, end)
            pieces = await self._attended(request, run.all())
        except BaseException:
            run.cancel()
            raise
        return JSONResponse(answer.whole(pieces, len(prompt)))

    def _engine(self, name: str | None) -> Engine:
        if name is None:
            return next(iter(self.engines.values()))
        if name not in self.engines:
            raise HTTPException(404, f"there is no model {name!r}; GET /v1/models lists them")
        return self.engines[name]

    async def _json(self, request: Request) -> bytes:
        if _content_type(request) != "application/json":
            raise HTTPException(415, "the body must be application/json")
        return await self._body(request)

    async def _body(self, request: Request) -> bytes:
        """The body, within its limits of size and time."""
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for piece in request.stream():
                    size += len(piece)
                    if size > self.limits.body_bytes:
                        limit = self.limits.body_bytes
                        raise HTTPException(413, f"the body is larger than {limit} bytes")
                    pieces.append(piece)
        except TimeoutError as error:
            seconds = self.limits.body_seconds
            raise HTTPException(
                408, f"the body did not arrive within {seconds:g} seconds"
            ) from error
        return b"".join(pieces)

    async def _attended(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """Wait for work as long as the client stays and the time allows."""
        task, gone = (
            asyncio.ensure_future(work),
            asyncio.ensure_future(_disconnected(request.receive)),
        )
        try:
            seconds = self.limits.request_seconds
            await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise HTTPException(499, "the client has gone")
            raise HTTPException(504, f"no answer within {seconds:g} seconds")
        finally:
            for other in (task, gone):
                other.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


class Run:
    """One generation: started when a slot is free, consumed once, cancelled at any time."""

    def __init__(
        self, workers: Workers, make: Callable[[Callable[[], bool]], Iterator[TextPiece]]
    ) -> None:
        self._workers, self._make = workers, make
        self._stream: Stream[TextPiece] | None = None
        self._items: AsyncIterator[TextPiece] | None = None
        self._first: TextPiece | None = None

    async def begin(self) -> None:
        """Wait for a slot and for the first piece, so that errors come before the answer starts."""
        self._stream = await self._workers.stream(self._make)
        self._items = aiter(self._stream)
        self._first = await anext(self._items, None)

    async def pieces(self) -> AsyncIterator[TextPiece]:
        """All pieces, the first included."""
        assert self._items is not None
        if self._first is not None:
            yield self._first
        async for piece in self._items:
            yield piece

    async def all(self) -> list[TextPiece]:
        """Run to the end."""
        await self.begin()
        return [piece async for piece in self.pieces()]

    def cancel(self) -> None:
        """Stop before the next token."""
        if self._stream is not None:
            self._stream.cancel()


class EventStream(Response):
    """Server-sent events of a generation that has begun; ends, and frees its slot, when the client leaves.

    The answer is cut off at `end`, a time of the event loop; `seconds` is what it had from the start.
    """

    media_type = "text/event-stream"

    def __init__(self, run: Run, answer: Answer, seconds: float, end: float) -> None:
        super().__init__(None, headers={"x-accel-buffering": "no"})
        self._run, self._answer, self._seconds, self._end = run, answer, seconds, end
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(lambda _: self._run.cancel())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with asyncio.timeout_at(self._end):
                await self._send_all(send)
        except TimeoutError:
            message = f"the answer took longer than {self._seconds:g} seconds and was cut off"
            await self._close(send, event({"error": {"message": message, "code": 504}}))
        finally:
            self._run.cancel()
            gone.cancel()

    async def _send_all(self, send: Send) -> None:
        first = True
        try:
            async for piece in self._run.pieces():
                data = self._answer.event(piece, first)
                await send({"type": "http.response.body", "body": data, "more_body": True})
                first = False
        except QlxError as error:
            await self._close(send, event({"error": {"message": str(error), "code": 500}}))
            return
        await self._close(send, DONE)

    async def _close(self, send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": False})


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _able(engine: Engine, model: T | None, what: str) -> T:
    if model is None:
        raise HTTPException(
            400, f"model {engine.name!r} is for {engine.manifest.task}; it does not {what}"
        )
    return model


def _ids(model: TextModel, prompt: str | list[int]) -> list[int]:
    return model.encode(prompt) if isinstance(prompt, str) else prompt


def _classify(model: ImageModel, data: bytes) -> dict[str, Any]:
    """Decode and classify one image file; label, probability and all probabilities."""
    result = model.classify([open_image(_known_format(data))])[0]
    return {
        "label": result.label,
        "probability": result.probability,
        "probabilities": result.probabilities,
    }


def _locate(model: KeypointModel, files: Sequence[bytes]) -> list[dict[str, Any]]:
    """Decode the frames of one clip and find its keypoints; places are in pixels of the last.

    Raises:
        InputRefused: another number of frames than the model sees, which is told before any is decoded.
    """
    model.preprocess.require_frames(len(files))
    (places,) = model.locate([[open_image(_known_format(data)) for data in files]])
    return [
        {"name": one.name, "x": one.x, "y": one.y, "score": one.score, "found": one.found}
        for one in places
    ]


def _known_format(data: bytes) -> io.BytesIO:
    """The file, if it begins like one of the formats that are decoded.

    Raises:
        InputRefused: it does not, or it is too large to be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    stream = io.BytesIO(data)
    try:
        with Image.open(stream, formats=IMAGE_FORMATS):
            stream.seek(0)
            return stream
    except Image.DecompressionBombError as error:
        raise too_many_pixels("image") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputRefused(f"the body is not an image ({', '.join(IMAGE_FORMATS)})") from error
