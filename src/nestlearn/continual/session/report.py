"""The report of a reading: bits per byte before each write, and what the writes of each level gain."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class SegmentScore:
    """The score of one segment before it was written.

    ``nats`` is ``-ln p`` of its bytes. ``off`` is the same if nothing of this text had been written, ``without[l]`` if
    level l had ignored what it wrote of this text. None and {} if `MemorySession` does not compare; ``off`` is known
    some segments later.
    """

    tokens: int
    bytes: float
    nats: float
    off: float | None = None
    without: dict[int, float] = field(default_factory=dict)

    @property
    def bits_per_byte(self) -> float:
        return _bits(self.nats, self.bytes)


@dataclass(frozen=True)
class LogEntry:
    """One reading of a session.

    Attributes:
        what: the name of a file, or the beginning of a text.
        when: the end of the reading, in UTC, as ISO 8601.
        bytes: of the text that was read.
    """

    what: str
    when: str
    bytes: int

    def __post_init__(self) -> None:
        texts = isinstance(self.what, str) and isinstance(self.when, str)
        if not texts or type(self.bytes) is not int or self.bytes < 0:
            raise TypeError(f"an entry of a log has two texts and a number of bytes, got {self!r}.")
        (self.what + self.when).encode()  # half a surrogate pair is no text

    @classmethod
    def now(cls, what: str, count: float) -> LogEntry:
        """A reading of so many bytes that ends now."""
        when = datetime.now(timezone.utc).isoformat(" ", "seconds").removesuffix("+00:00")
        return cls(what, when, round(count))

    def __str__(self) -> str:
        return f"{self.when}  {self.bytes:>10,} bytes  {self.what}"


@dataclass
class ReadReport:
    """What `MemorySession.read` has read so far, segment by segment.

    The first token of a document is not scored if the tokenizer has no start token.

    Args:
        segments: the score of each.
        total_bytes: bytes of the whole source, if they are known beforehand.
        seconds: wall time.

    Example:
        >>> report = ReadReport([SegmentScore(8, 8, 11.1, off=16.6, without={0: 13.9})])
        >>> round(report.bits_per_byte, 2), round(report.off, 2), round(report.by_level[0], 2)
        (2.0, 2.99, 2.51)
    """

    segments: list[SegmentScore] = field(default_factory=list)
    total_bytes: int | None = None
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def bytes(self) -> float:
        """Bytes scored."""
        return sum(segment.bytes for segment in self.segments)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the text, each segment scored before it was written; NaN if nothing was scored."""
        return _bits(sum(segment.nats for segment in self.segments), self.bytes)

    @property
    def off(self) -> float | None:
        """Bits per byte of the same text with its writes ignored, as far as it is compared; None without that."""
        return self._mean(lambda segment: segment.off)

    @property
    def by_level(self) -> dict[int, float]:
        """Bits per byte with the writes of one level ignored; the excess over `bits_per_byte` is its gain."""
        levels = self.segments[0].without if self.segments else {}
        found = {level: self._mean(lambda segment, level=level: segment.without.get(level)) for level in levels}
        return {level: mean for level, mean in found.items() if mean is not None}

    def part(self, start: float, end: float) -> ReadReport:
        """The report of a part of the text, by fractions of its segments; ``part(0.5, 1)`` is the second half."""
        first, last = (round(fraction * len(self.segments)) for fraction in (start, end))
        return ReadReport(self.segments[first:last])

    def _mean(self, value: Callable[[SegmentScore], float | None]) -> float | None:
        """Over the segments up to the first without a value."""
        pairs = ((value(segment), segment.bytes) for segment in self.segments)
        known = list(itertools.takewhile(lambda pair: pair[0] is not None, pairs))
        return _bits(sum(nats or 0 for nats, _ in known), sum(size for _, size in known)) if known else None

    def __str__(self) -> str:
        text = f"{self.tokens} tokens, {self.bytes:.0f} bytes, {self.bits_per_byte:.3f} bits per byte"
        if self.off is not None:
            text += f" (writes off {self.off:.3f})"
        for level, bits in self.by_level.items():
            text += f"; level {level} gains {bits - self.bits_per_byte:+.3f}"
        return text


class ReadInterrupted(RuntimeError):
    """The source of a text failed while it was read; ``report`` says how much of it was read.

    `MemorySession.read` keeps what it has learned up to the last whole segment; the next call starts a new document.
    """

    def __init__(self, message: str, report: ReadReport) -> None:
        super().__init__(message)
        self.report = report


def at_most_every(seconds: float, progress: Callable[[T], None]) -> Callable[[T], None]:
    """A progress function that calls another one at most every so many seconds.

    A report of `MemorySession.read` sums over all its segments, which costs more than reading one if there are many.
    """
    last = -math.inf

    def call(report: T) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            progress(report)
            last = time.monotonic()

    return call


def run_steps(steps: Generator[T, None, T], progress: Callable[[T], None] | None = None) -> T:
    """Run a generator that gives a report after every step; returns what it returns.

    Example:
        >>> def count():
        ...     yield 1
        ...     return 2
        >>> run_steps(count(), print)
        1
        2
    """
    while True:
        try:
            report = next(steps)
        except StopIteration as end:
            return end.value
        if progress is not None:
            progress(report)


def _bits(nats: float, count: float) -> float:
    return nats / math.log(2) / count if count else math.nan
