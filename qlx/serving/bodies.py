"""Request bodies: what is accepted, by name and type; everything else is refused in one sentence.

OpenAI's field names where OpenAI has one. A field that would change the answer but is not supported
is refused rather than ignored.
"""

import base64
import binascii
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlx.checkpoint import parse_json
from qlx.errors import CorruptCheckpoint, UsageError
from qlx.runtime import SamplingOptions

__all__ = [
    "ChatBody",
    "ClassifyBody",
    "CompletionBody",
    "GenerationBody",
    "LocateBody",
    "parse_body",
]

Zero = Annotated[float, Field(ge=0, le=0)]
Text = Annotated[str, Field(max_length=2**22)]
B = TypeVar("B", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(max_length=200)] | None = None
    user: Annotated[str, Field(max_length=200)] | None = None


class ClassifyBody(_Body):
    """`POST /v1/classify`: one image file, base64 encoded."""

    image: str

    def image_bytes(self) -> bytes:
        """The image file.

        Raises:
            UsageError: not base64.
        """
        return _file(self.image, "image")


class LocateBody(_Body):
    """`POST /v1/locate`: one frame, or as many consecutive ones as the model sees, the latest last; base64 encoded."""

    image: str | Annotated[list[str], Field(min_length=1, max_length=16)]

    def image_bytes(self) -> list[bytes]:
        """The image files.

        Raises:
            UsageError: not base64.
        """
        given = [self.image] if isinstance(self.image, str) else self.image
        return [_file(text, "image") for text in given]


def _file(text: str, field: str) -> bytes:
    """What a base64 field (or data URL) holds."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"field {field} is not base64") from error


class GenerationBody(_Body):
    """What completions and chat have in common.

    Without `temperature` (or with 0) decoding is greedy; `top_k` and `repetition_penalty` are additions to
    OpenAI's fields.
    """

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None

    def options(self, most: int) -> SamplingOptions:
        """Sampling options; `most` bounds the number of tokens.

        Raises:
            UsageError: a value out of range.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        wanted = self.max_tokens or self.max_completion_tokens
        chosen = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "max_tokens": None if wanted is None else min(wanted, most),
        }
        given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        return SamplingOptions(stop=stop, **given)


class CompletionBody(GenerationBody):
    """`POST /v1/completions`: text, or token ids, to continue."""

    prompt: Text | Annotated[list[int], Field(max_length=2**20)]


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: Text


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`: a conversation to answer."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]


def parse_body(data: bytes, shape: type[B]) -> B:
    """Parse and check a JSON body.

    Raises:
        UsageError: not JSON, or a field is missing, unknown or wrong; the message names it.
    """
    try:
        body = parse_json(data, "request body")
    except CorruptCheckpoint as error:
        raise UsageError(str(error)) from error
    if not isinstance(body, dict):
        raise UsageError("request body: must be a JSON object")
    try:
        return shape.model_validate(body, strict=True)
    except ValidationError as error:
        field, what = _complaint(body, error)
        raise UsageError(f"request body: field {field}: {what}") from error


def _complaint(body: Any, error: ValidationError) -> tuple[str, str]:
    """The field a client wrote (or left out) and what is wrong with it.

    A field of several types has an error for each; the one that came furthest into the value counts.
    """
    found = error.errors(include_url=False, include_input=False, include_context=False)
    fields = [_written(body, each["loc"], each["type"] == "missing") for each in found]
    deepest = max((field for field in fields if field[:1] == fields[0][:1]), key=len)
    said = [each["msg"] for each, field in zip(found, fields, strict=True) if field == deepest]
    return ".".join(map(str, deepest)) or "body", ", or: ".join(dict.fromkeys(said))


def _written(value: Any, location: tuple[int | str, ...], missing: bool) -> tuple[int | str, ...]:
    """The parts of pydantic's location that lead through the body; the rest are names of types."""
    field: list[int | str] = []
    for at, part in enumerate(location):
        last = at == len(location) - 1
        if isinstance(value, dict) and (part in value or (missing and last)):
            value = value.get(str(part))
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            continue
        field.append(part)
    return tuple(field)
