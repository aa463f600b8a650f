"""Turning a stream of tokens into a stream of text that never has to be taken back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who only looks at pictures does not pay its memory
    from tokenizers import Tokenizer

__all__ = ["TextStream"]


class TextStream:
    """Decodes token after token; holds back half characters and anything that may become a stop string."""

    def __init__(self, tokenizer: "Tokenizer", stop: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._decoder: Any = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain after `token`; sets `stopped` once a stop string is complete."""
        self._held += self._decoder.step(self._tokenizer, token) or ""
        ends = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            self._held = self._held[: min(ends)]
            return self.flush()
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain

    def flush(self) -> str:
        """What was held back; call it when no token follows. Half a character at the end is dropped."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )
