"""The loop of a read: pieces of text to blocks, tokens and segments, each scored and then written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .session_engines import Engine
from .session_report import SegmentScore
from .session_text import TokenReader, check_text, cut_blocks

OFF = "off"


@dataclass(frozen=True)
class Place:
    """Where a session stands: what it has learned, and what it has taken in and not yet read. Immutable.

    ``text`` is the start of a block of text, ``waiting`` the tokens (with their bytes) of a segment that is not full.
    ``blocks`` and ``segments`` count those of the current document, ``tokens`` all tokens read.
    """

    mind: Any
    text: str = ""
    waiting: tuple[tuple[int, float], ...] = ()
    blocks: int = 0
    segments: int = 0
    tokens: int = 0

    def ended(self, engine: Engine) -> Place:
        """The place after the end of the document; what waits is dropped."""
        return Place(engine.end_document(self.mind), tokens=self.tokens)


class Step(NamedTuple):
    """A place reached, and the score of the segment that led there (None if only text was taken in)."""

    place: Place
    score: SegmentScore | None


@dataclass
class Walk:
    """Reads pieces of text, from a place on.

    Args:
        engine: of the kind of model.
        tokens_of: turns blocks into tokens.
        place: where it stands; follows every step.
        writes: whether anything is learned.
        views: levels whose writes each compared view ignores (None: all writes of the model), by name of the view.
    """

    engine: Engine
    tokens_of: TokenReader
    place: Place
    writes: bool = True
    views: dict[str | int, tuple[int, ...] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._before = self.place.mind
        self._minds = dict.fromkeys(self.views, self.place.mind)

    def take(self, piece: str) -> Iterator[Step]:
        """Read a piece of the document as far as it makes whole segments."""
        blocks, rest = cut_blocks(self.place.text + check_text(piece, "a piece of the text"))
        for block in blocks:
            yield from self._read_block(block)
        self.place = replace(self.place, text=rest)
        yield Step(self.place, None)

    def end(self) -> Iterator[Step]:
        """Read what waits, as the last segment of the document."""
        if self.place.text:
            yield from self._read_block(self.place.text)
        if self.place.waiting:
            yield self._read_segment(len(self.place.waiting))
        self.place = self.place.ended(self.engine)
        self._minds = {name: self.engine.end_document(mind) for name, mind in self._minds.items()}
        yield Step(self.place, None)

    def _read_block(self, block: str) -> Iterator[Step]:
        tokens = self.tokens_of(block, first=self.place.blocks == 0)
        waiting = (*self.place.waiting, *tokens)
        self.place = replace(self.place, text="", waiting=waiting, blocks=self.place.blocks + 1)
        while len(self.place.waiting) >= self.engine.segment:
            yield self._read_segment(self.engine.segment)

    def _read_segment(self, count: int) -> Step:
        """Score and write the first ``count`` of the waiting tokens."""
        place = self.place
        now, later = place.waiting[:count], place.waiting[count:]
        ids, start = [token for token, _ in now], place.segments == 0
        read = self.engine.read(place.mind, ids, self.writes, start=start)
        others: dict[str | int, float] = {}
        for name, levels in self.views.items():
            view = self.engine.ignoring(place.mind, self._before, levels, self._minds[name])
            seen = self.engine.read(view, ids, False, start=start)
            self._minds[name] = seen.mind
            others[name] = sum(x for x in seen.nats if x is not None)
        size = sum(size for (_, size), nats in zip(now, read.nats, strict=True) if nats is not None)
        score = SegmentScore(
            tokens=count,
            bytes=size,
            nats=sum(x for x in read.nats if x is not None),
            off=others.get(OFF),
            without={name: nats for name, nats in others.items() if isinstance(name, int)},
        )
        self.place = replace(
            place, mind=read.mind, waiting=later, segments=place.segments + 1, tokens=place.tokens + count
        )
        return Step(self.place, score)


def views_of(engine: Engine, compare: str) -> dict[str | int, tuple[int, ...] | None]:
    """What `Walk` compares with: writes off, and each level's writes ignored."""
    if compare == "none":
        return {}
    views: dict[str | int, tuple[int, ...] | None] = {OFF: None}
    if compare == "levels":
        views |= {level: (level,) for level in engine.levels}
    return views


class SourceFailed(Exception):
    """What went wrong where the text comes from (its cause), told apart from errors of the model."""


def guarded(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces; an error of the source becomes a `SourceFailed`."""
    iterator = iter(pieces)
    while True:
        try:
            piece = check_text(next(iterator), "a piece of the stream")
        except StopIteration:
            return
        except Exception as error:
            raise SourceFailed(str(error)) from error
        yield piece
