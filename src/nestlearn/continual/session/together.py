"""Several sessions over one model read at once: a row for each in every forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

from .backends import PieceRead, ReadCall, read_rows
from .report import ReadInterrupted, ReadReport
from .session import Asked, MemorySession, Source
from .turns import has_changing_table


def read_together(
    sessions: Sequence[MemorySession],
    sources: Sequence[Source],
    *,
    end: bool = True,
    progress: Callable[[list[ReadReport]], None] | None = None,
) -> list[ReadReport]:
    """`MemorySession.read` of several sessions over one model, each its own source, in one pass for all.

    Every session learns what it would learn alone, but for the rounding of larger products. Sessions over a Hope model,
    over a model whose rotary frequencies depend on the longest input, or with other settings of their levels share no
    pass.

    Args:
        sessions: different ones.
        sources: what each of them reads.
        end: whether the documents end here.
        progress: called after every pass with the reports so far.

    Raises:
        ValueError, TypeError: see `MemorySession.read`; also sessions over different models, one that is named twice,
            or more or fewer sources. Nothing was learned.
        ReadInterrupted: a source failed later; the other sessions have read theirs.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, max_position_embeddings=128)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=16)]).eval()
        >>> mine, yours = (MemorySession(model, byte_tokenizer()) for _ in range(2))
        >>> [report.tokens for report in read_together([mine, yours], ["What I have read. ", "A longer text. " * 9])]
        [18, 135]
    """
    _check(sessions, sources)
    if has_changing_table(sessions[0].model):
        return [session.read(source, end=end) for session, source in zip(sessions, sources, strict=True)]
    with ExitStack() as stack:
        # In one order, so that two calls with common sessions never wait for each other.
        for session in sorted(sessions, key=id):
            stack.enter_context(session._lock)
        readings = [Reading(session, source, end) for session, source in zip(sessions, sources, strict=True)]
        for reading in readings:
            stack.enter_context(closing(reading))
        _begin(readings)
        while active := [reading for reading in readings if reading.asked]:
            read = iter(read_rows([(r.session._backend, call) for r in active for call in r.asked]))
            for reading in active:
                reading.go_on([next(read) for _ in reading.asked])
            if progress is not None:
                progress([reading.report for reading in readings])
    if failed := next((reading.error for reading in readings if reading.error is not None), None):
        raise failed
    return [reading.report for reading in readings]


class Reading:
    """One of the readings: the calls that it waits for, and its report so far."""

    def __init__(self, session: MemorySession, source: Source, end: bool) -> None:
        self.session = session
        self.asked: list[ReadCall] = []
        self.report = ReadReport()
        self.error: ReadInterrupted | None = None
        self._steps = session.asking(source, end=end)

    def begin(self) -> None:
        """Go to the first calls."""
        self._take(lambda: next(self._steps))

    def go_on(self, read: list[PieceRead]) -> None:
        """Take what was read, and go to the next calls."""
        self._take(lambda: self._steps.send(read))

    def _take(self, step: Callable[[], Asked]) -> None:
        """A source that fails ends the reading, and its error is kept."""
        self.asked = []
        try:
            given = step()
            while isinstance(given, ReadReport):
                self.report = given
                given = next(self._steps)
            self.asked = given
        except StopIteration as end:
            self.report = end.value
        except ReadInterrupted as error:
            self.error = error

    def close(self) -> None:
        """End the document if it is not read to its end."""
        self._steps.close()


def _begin(readings: list[Reading]) -> None:
    """Begin all; if one cannot, none has."""
    before = [reading.session.fork() for reading in readings]
    try:
        for reading in readings:
            reading.begin()
    except BaseException:
        for reading, kept in zip(readings, before, strict=True):
            reading.close()
            reading.session._cursor, reading.session.log = kept._cursor, kept.log
        raise


def _check(sessions: Sequence[MemorySession], sources: Sequence[Source]) -> None:
    if len(sessions) != len(sources) or not sessions:
        raise ValueError(f"{len(sessions)} sessions cannot read {len(sources)} sources; give one for each session.")
    if len({id(session) for session in sessions}) < len(sessions):
        raise ValueError("a session is named twice, but its sources follow one another: let it read one at a time.")
    if any(session.model is not sessions[0].model for session in sessions):
        raise ValueError("the sessions are over different models; read_together needs one that all of them share.")
