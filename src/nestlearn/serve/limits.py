"""What one server accepts: sizes, times and numbers of requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from nestlearn.fields import Between, Positive, check_fields

Number = Annotated[int, Between(1)]
"""Of bytes, tokens or requests; a number of bytes may be larger than a `nestlearn.fields.Size`."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        memory: bytes of sessions kept in memory; the least recently used ones leave it first.
        body: bytes of a request, except for session files.
        file: bytes of a session file that is uploaded.
        tokens: of one answer.
        rows: answers generated at the same time.
        waiting: further answers, readings and practices that wait; others are refused with status 429.
        seconds: of one request.
        idle: seconds until the next piece of a request's body.
        sessions: of one key.
        quota: bytes of all session files of one key; None for no limit.

    Raises:
        ValueError: a limit that is not positive, or of another type.

    Example:
        >>> Limits(rows=8).waiting
        64
    """

    memory: Number = 2 * 2**30
    body: Number = 8 * 2**20
    file: Number = 2**30
    tokens: Number = 1024
    rows: Number = 32
    waiting: Number = 64
    seconds: Positive = 600.0
    idle: Positive = 30.0
    sessions: Number = 1000
    quota: Number | None = None

    def __post_init__(self) -> None:
        check_fields(self)
