"""What one server accepts: sizes, times and numbers of requests."""

from __future__ import annotations

from dataclasses import dataclass, fields


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
        ValueError: a limit that is not positive.

    Example:
        >>> Limits(rows=8).waiting
        64
    """

    memory: int = 2 * 2**30
    body: int = 8 * 2**20
    file: int = 2**30
    tokens: int = 1024
    rows: int = 32
    waiting: int = 64
    seconds: float = 600.0
    idle: float = 30.0
    sessions: int = 1000
    quota: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"limit {field.name}={value} must be positive.")
