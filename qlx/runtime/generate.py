"""Text generation with an ONNX checkpoint: prompt in, text out, token by token."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qlx.checkpoint import load_object
from qlx.errors import CorruptCheckpoint, InputRefused, Unsupported, UsageError
from qlx.inputs import Message, TextCodec
from qlx.runtime.decoder import CausalDecoder
from qlx.runtime.devices import Device
from qlx.runtime.sampling import Sampler, SamplingOptions
from qlx.runtime.session import OnnxModel, opened
from qlx.runtime.text import TextStream

__all__ = [
    "GENERATION_FILE",
    "FinishReason",
    "Generation",
    "TextGenerator",
    "TextModel",
    "TextPiece",
    "TokenDecoder",
    "generation_limits",
]

Array = NDArray[Any]
_SLACK = 4
"""How many times its tokens' characters a text may have before it is tokenized: normalizers drop few."""

FinishReason = Literal["stop", "length", "cancelled"]

GENERATION_FILE = "genai_config.json"
_PREFILL_LOGITS = 2**24
"""Most logits one prefill step may return (64 MiB of float32)."""


@dataclass(frozen=True)
class TextPiece:
    """One step of a stream: new text (perhaps empty), its token, and why it ended on the last one.

    `token` is None on the closing piece of a generation that ended without a token of its own.
    """

    text: str
    token: int | None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Generation:
    """A finished generation; `tokens` holds the generated ones, the end token not among them."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason


class TokenDecoder(Protocol):
    """One sequence being decoded; remembers what it was fed."""

    def feed(self, tokens: Array) -> Array:
        """Append tokens int64 [1, T]; logits float32 [1, T, vocabulary] of those positions."""
        ...


class TextModel:
    """Anything that continues text: a tokenizer, the model's limits, and a way to start a sequence.

    Args:
        codec: the tokenizer with its chat template.
        context_length: most tokens of prompt and answer together.
        end_tokens: tokens that end an answer.
        start: makes a decoder with an empty sequence.
    """

    def __init__(
        self,
        codec: TextCodec,
        context_length: int,
        end_tokens: Iterable[int],
        start: Callable[[], TokenDecoder],
    ) -> None:
        self.codec = codec
        self.tokenizer = codec.tokenizer
        self.context_length = context_length
        self.end_tokens = frozenset(end_tokens)
        self._start = start

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with the special tokens the tokenizer adds itself.

        Raises:
            UsageError: the prompt is far too long for the context.
        """
        return self._tokens(prompt, special=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next answer begins.

        Raises:
            InputRefused: the chat template refuses these messages.
            UsageError: they are far too long for the context.
        """
        return self._tokens(self.codec.chat(messages, answer_next=True), special=False)

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        """As a batch of one: there the tokenizer lets other threads run, which a long text holds up for seconds."""
        if (
            len(text) > (usual := _SLACK * self.context_length)
            and len(text) > usual * self._longest
        ):
            raise UsageError(
                f"the prompt has {len(text)} characters, for which the context of {self.context_length} tokens "
                "has no room"
            )
        return list(self.tokenizer.encode_batch([text], add_special_tokens=special)[0].ids)

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    def generate(
        self, prompt: str | Sequence[int], options: SamplingOptions | None = None
    ) -> Generation:
        """Continue a prompt until it ends; the same options and seed give the same text.

        Raises:
            UsageError: the prompt is empty or does not fit into the context.
        """
        tokens = self._prompt(prompt)
        pieces = list(self.stream(tokens, options))
        ids = [p.token for p in pieces if p.token is not None and p.token not in self.end_tokens]
        reason = pieces[-1].finish_reason or "stop"
        return Generation("".join(p.text for p in pieces), tuple(ids), len(tokens), reason)

    def stream(
        self,
        prompt: str | Sequence[int],
        options: SamplingOptions | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[TextPiece]:
        """Continue a prompt token by token; the last piece, and only it, has a finish reason.

        `cancelled` is asked before every token; when it says yes the stream ends at once.

        Raises:
            UsageError: the prompt is empty or does not fit into the context.
        """
        options = options or SamplingOptions()
        tokens = self._prompt(prompt)
        return self._stream(tokens, options, cancelled)

    def _prompt(self, prompt: str | Sequence[int]) -> list[int]:
        tokens = (
            self.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        )
        if not tokens:
            raise UsageError("the prompt is empty; give at least one token")
        if len(tokens) >= self.context_length:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens; the context of {self.context_length} "
                "leaves no room for an answer"
            )
        size = self.tokenizer.get_vocab_size()
        if not all(0 <= token < size for token in tokens):
            raise UsageError(f"prompt tokens must lie between 0 and {size - 1}")
        return tokens

    def _stream(
        self, prompt: list[int], options: SamplingOptions, cancelled: Callable[[], bool]
    ) -> Iterator[TextPiece]:
        decoder, sampler = self._start(), Sampler(options, prompt)
        text = TextStream(self.tokenizer, options.stop)
        room = min(options.max_tokens, self.context_length - len(prompt))
        logits = self._prefill(decoder, prompt, cancelled)
        for step in range(1, room + 1):
            if logits is None or cancelled():
                yield TextPiece(text.flush(), None, "cancelled")
                return
            token = sampler.choose(logits)
            if token in self.end_tokens:
                yield TextPiece(text.flush(), token, "stop")
                return
            fresh = text.push(token)
            if text.stopped or step == room:
                yield TextPiece(fresh + text.flush(), token, "stop" if text.stopped else "length")
                return
            yield TextPiece(fresh, token)
            logits = decoder.feed(np.array([[token]]))[0, -1]

    def _prefill(
        self, decoder: TokenDecoder, prompt: list[int], cancelled: Callable[[], bool]
    ) -> Array | None:
        """Logits [vocabulary] after the prompt, fed in chunks that bound the memory of the logits.

        None if it was cancelled between two of them.
        """
        chunk = max(1, _PREFILL_LOGITS // self.tokenizer.get_vocab_size())
        last = np.zeros(0, np.float32)
        for start in range(0, len(prompt), chunk):
            if start and cancelled():
                return None
            last = decoder.feed(np.array([prompt[start : start + chunk]]))[0, -1]
        return last


class TextGenerator(TextModel):
    """A causal language model in ONNX that continues text.

    Args:
        directory: a checkpoint of kind `onnx` and task `causal-lm`, or an opened model.
        threads, device: see `open_model`.
        adapter: which of its swappable adapters to use, None for the base.

    Raises:
        InputRefused: a checkpoint of another kind or task.
        CorruptCheckpoint: its generation configuration is missing or wrong.
        UsageError: there is no such adapter; the message lists those there are.
    """

    def __init__(
        self,
        directory: Path | str | OnnxModel,
        threads: int | None = None,
        adapter: str | None = None,
        device: Device = "cpu",
    ) -> None:
        model = opened(directory, threads, device)
        if model.task != "causal-lm":
            raise InputRefused(f"{model.path}: a model for {model.task} does not generate text")
        length, ends = _limits(model.path)
        start = _starter(model, adapter)
        super().__init__(TextCodec.from_directory(model.path), length, ends, start)
        self.model = model

    def with_adapter(self, adapter: str | None) -> "TextGenerator":
        """The same model with another adapter; it shares the session and costs next to nothing."""
        other = copy(self)
        other._start = _starter(self.model, adapter)
        return other


def _starter(model: OnnxModel, adapter: str | None) -> Callable[[], CausalDecoder]:
    chosen = model.adapters.choose(adapter)
    return lambda: CausalDecoder(model, adapter=chosen)


def generation_limits(config: Any, generation: Any) -> tuple[int, list[int]]:
    """Context length and end tokens of a transformers model, from its two configurations.

    End tokens are those of the generation configuration, or else of the model's.

    Raises:
        Unsupported: neither names an end token, or there is no context length.
    """
    length = getattr(config, "max_position_embeddings", None)
    ends = config.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
    if ends is None or length is None:
        missing = "eos_token_id" if ends is None else "max_position_embeddings"
        raise Unsupported(
            f"the model's config.json has no {missing}, which generation needs; add it"
        )
    return int(length), [ends] if isinstance(ends, int) else list(ends)


def _limits(path: Path) -> tuple[int, frozenset[int]]:
    """Context length and end tokens from the directory's generation configuration."""
    file = path / GENERATION_FILE
    if not file.is_file():
        raise CorruptCheckpoint(
            f"{path}: there is no {GENERATION_FILE}; export the checkpoint again"
        )
    model = load_object(file).get("model")
    model = model if isinstance(model, dict) else {}
    length, ends = model.get("context_length"), model.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    if not isinstance(length, int) or length < 2 or not all(isinstance(end, int) for end in ends):
        raise CorruptCheckpoint(
            f"{file}: model.context_length or model.eos_token_id is wrong; "
            "export the checkpoint again"
        )
    return length, frozenset(ends)
