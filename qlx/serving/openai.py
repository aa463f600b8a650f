"""Answers in the shape of OpenAI's API: completions, chats, and their streams of events."""

import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from qlx.runtime import TextPiece

__all__ = ["DONE", "Answer"]

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Answer:
    """The identity of one answer, shared by all its events; `chat` chooses the shape."""

    model: str
    chat: bool
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Iterable[TextPiece], prompt_tokens: int) -> dict[str, Any]:
        """The answer as one object, with usage."""
        pieces = list(pieces)
        text = "".join(piece.text for piece in pieces)
        reason = _reason(pieces[-1]) if pieces else None
        content = (
            {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        )
        produced = sum(piece.token is not None for piece in pieces)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": produced,
            "total_tokens": prompt_tokens + produced,
        }
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, content, reason) | {"usage": usage}

    def event(self, piece: TextPiece, first: bool) -> bytes:
        """One server-sent event; the first of a chat names the role."""
        if self.chat:
            role = {"role": "assistant"} if first else {}
            content: dict[str, Any] = {"delta": {**role, "content": piece.text}}
        else:
            content = {"text": piece.text}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event(self._object(kind, content, _reason(piece)))

    def _object(self, kind: str, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        choice = {"index": 0, **content, "finish_reason": reason, "logprobs": None}
        return {
            "id": f"{prefix}-{self.identity}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }


def _reason(piece: TextPiece) -> str | None:
    return "length" if piece.finish_reason == "cancelled" else piece.finish_reason


def event(value: dict[str, Any]) -> bytes:
    """A value as one server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
