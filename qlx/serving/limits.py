"""What a client may cost: sizes, waits and counts, in one place."""

from dataclasses import dataclass

__all__ = ["ServingLimits"]


@dataclass(frozen=True)
class ServingLimits:
    """Limits of one server; times in seconds, sizes in bytes.

    A request waits among at most `waiting` others for the one that is `running`; one more is answered
    429. `request_seconds` counts from the end of its body to the end of its answer.
    """

    running: int = 1
    waiting: int = 8
    body_bytes: int = 8 * 2**20
    header_bytes: int = 16 * 2**10
    header_seconds: float = 10.0
    body_seconds: float = 20.0
    request_seconds: float = 120.0
    shutdown_seconds: int = 10
    connections: int = 128
    max_tokens: int = 4096
    retry_after: int = 1
