"""How a session reads with a kind of model: stacked models learn by loss writes, Hope models in their forward pass."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from nestlearn.fields import Positive, check_value
from nestlearn.models import HopeCache
from nestlearn.models.segments import next_token_nats
from nestlearn.models.stacking import (
    KeyValues,
    LevelState,
    SegmentRead,
    SegmentRow,
    read_segments,
    reading,
    stacked_model,
)
from nestlearn.models.stacking.plan import SETTINGS
from nestlearn.models.stacking.practice import PracticeRows, end_practice, practise
from nestlearn.nn.state import Tree

from .levels import LevelRow, compare_layers, compare_states
from .precision import round_levels, shorten, widen

T = TypeVar("T")
Result = TypeVar("Result")

COMPARED = 256
"""Tokens of a text that are read at once, without writes, for comparison: large products take less time a token."""


class ReadCall(NamedTuple):
    """Tokens to be read with a memory, up to one segment; without writes up to `Backend.room`.

    ``start`` where a document starts.
    """

    memory: Any
    ids: list[int]
    writes: bool
    start: bool


class PieceRead(NamedTuple):
    """The result of a `ReadCall`.

    ``nats`` holds ``-ln p`` of every token, None for a token that nothing predicts; ``memory`` is the memory after it.
    """

    nats: list[float | None]
    memory: Any


class Backend(Protocol):
    """What a session needs from a kind of model.

    A memory is everything that reading changes. It is immutable: reading gives a new one. ``segment`` is the number of
    tokens that are read at once, ``levels`` are the numbers of the levels that learn, ``start_tokens`` come before a
    prompt, and ``positions`` limits prompt and answer together (None: no limit).
    """

    segment: int
    levels: tuple[int, ...]
    start_tokens: tuple[int, ...]
    context_length: int | None
    positions: int | None

    def fresh(self) -> Any:
        """The memory of a session that has read nothing."""

    def room(self, memory: Any) -> int:
        """Tokens that the next call may read without writes."""
        ...

    def how(self, call: ReadCall) -> Any:
        """Calls with equal values can be read in one pass, by the backend of any of them."""

    def read(self, calls: Sequence[ReadCall]) -> list[PieceRead]:
        """Read calls of equal `how`, each a row of its own."""
        ...

    def end_document(self, memory: Any) -> Any:
        """The memory after the end of a document."""

    def generating(self, memory: Any, prompt_length: int) -> AbstractContextManager[dict[str, Any]]:
        """A context in which ``model.generate`` uses the memory; its value holds further arguments of it."""
        ...

    def active(self, memory: Any) -> AbstractContextManager[None]:
        """A context in which forward passes of the model use the memory, whatever they read."""
        ...

    def forgetting_tokens(self) -> tuple[int, ...]:
        """Tokens that would erase the memory; no prompt and no answer may hold one."""
        ...

    def settings_of_file(self) -> dict[str, Any]:
        """Arguments of `MemorySession` by which another session reads in the same way."""
        ...

    def rows(self, memory: Any, other: Any) -> list[LevelRow]:
        """How far apart two memories are, level by level."""
        ...

    def to_tree(self, memory: Any) -> Tree:
        """A state tree (see `nestlearn.nn.state`) with all of the memory, for a file."""

    def from_tree(self, tree: Tree) -> Any:
        """Inverse of `to_tree`."""


@dataclass(frozen=True)
class StackedMemory:
    """What a session over a stacked model has learned, and the context of the current block.

    ``last`` holds the log probabilities of the next token; ``used`` counts the tokens of the block, ``seen`` all tokens
    read. ``began`` gives, for levels that were forgotten, the token at which they began again.
    """

    levels: LevelState = field(default_factory=LevelState)
    keys: KeyValues = ()
    used: int = 0
    last: Float[Tensor, "v"] | None = None
    seen: int = 0
    began: Mapping[int, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of what was learned."""
        return self.levels.nbytes

    def forget(self, levels: Iterable[int]) -> StackedMemory:
        """The memory with some levels at their initial weights."""
        chosen = list(levels)
        began = {**self.began, **dict.fromkeys(chosen, self.seen)}
        return replace(self, levels=self.levels.forget(chosen), began=began)

    def ignoring(self, levels: tuple[int, ...] | None, now: StackedMemory, before: StackedMemory) -> StackedMemory:
        """This memory as if levels (None: any) had written nothing since ``before``; ``now`` has all their writes.

        It is read with ``writes=False``.
        """
        return replace(self, levels=before.levels if levels is None else now.levels.with_levels(levels, before.levels))


class StackedBackend:
    """Reads with `read_segment`, in blocks of ``context_length`` tokens; a new block starts without keys and values."""

    def __init__(
        self, model: Any, tokenizer: Any, context_length: int | None, protect: float | None, settings: Mapping[str, Any]
    ) -> None:
        for name, value, kind in (("context_length", context_length, int), ("protect", protect, Positive)):
            if value is not None:
                check_value(name, value, kind)
        self.model, self.plan, self.protect = model, stacked_model(model).stack_plan, protect
        self.settings = self.plan.with_settings(**settings)
        self.segment, self.levels = self.plan.segment, tuple(self.plan.learning())
        self.start_tokens = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
        self.positions = getattr(model.config, "max_position_embeddings", None)
        self.context_length: int | None = context_length
        self.block = _block_length(context_length, self.positions, self.segment, len(self.start_tokens))

    def fresh(self) -> StackedMemory:
        return StackedMemory()

    def room(self, memory: StackedMemory) -> int:
        left = self.block - memory.used
        return min(COMPARED, self.block if left < self.segment else left)

    def how(self, call: ReadCall) -> Any:
        return self.settings, self.protect, call.writes

    def read(self, calls: Sequence[ReadCall]) -> list[PieceRead]:
        memories = [self._context(call) for call in calls]
        new = [i for i, memory in enumerate(memories) if not memory.keys] if self.start_tokens else []
        start = [SegmentRow(self._row(self.start_tokens), memories[i].levels) for i in new]
        for i, first in zip(new, read_segments(self.model, start, writes=False), strict=True):
            memories[i] = replace(memories[i], keys=first.keys, last=_last_log_probabilities(first.logits))
        rows = [
            SegmentRow(self._row(call.ids), memory.levels, memory.keys)
            for call, memory in zip(calls, memories, strict=True)
        ]
        writes = calls[0].writes
        found = read_segments(self.model, rows, writes=writes, levels=self.settings, protect=self.protect)
        return [_piece(memory, row, read) for memory, row, read in zip(memories, rows, found, strict=True)]

    def _context(self, call: ReadCall) -> StackedMemory:
        """The memory of a call, without context where one begins."""
        memory: StackedMemory = call.memory
        if call.start:
            memory = replace(memory, keys=(), used=0, last=None)
        return replace(memory, keys=(), used=0) if memory.used + len(call.ids) > self.block else memory

    def end_document(self, memory: StackedMemory) -> StackedMemory:
        """The memory without its context, rounded to the precision of a file.

        So files between documents are small, and a session that is saved and loaded there goes on as one that is not.
        """
        return replace(memory, levels=round_levels(memory.levels), keys=(), used=0, last=None)

    def practise(self, memory: StackedMemory, rows: list[PracticeRows], lr: float) -> tuple[StackedMemory, list[float]]:
        """The memory after one step on the rows, and the loss of each batch."""
        levels, losses = practise(self.model, rows, memory.levels, lr=lr, levels=self.settings, protect=self.protect)
        return replace(memory, levels=levels), losses

    def end_practice(self, memory: StackedMemory) -> StackedMemory:
        """The memory if this step is the last one, rounded as by `end_document`."""
        return replace(memory, levels=round_levels(end_practice(memory.levels, self.settings)))

    def _row(self, ids: Sequence[int]) -> Int[Tensor, "1 t"]:
        return torch.tensor([list(ids)], device=self.model.device)

    def forgetting_tokens(self) -> tuple[int, ...]:
        return ()

    def settings_of_file(self) -> dict[str, Any]:
        learning = [self.settings[index] for index in self.levels]
        levels = {name: [getattr(level, name) for level in learning] for name in SETTINGS}
        return {"protect": self.protect, **levels}

    def rows(self, memory: StackedMemory, other: StackedMemory) -> list[LevelRow]:
        return compare_states(self.model, memory.levels, other.levels, memory.seen, memory.began, self.settings)

    @contextmanager
    def generating(self, memory: StackedMemory, prompt_length: int) -> Iterator[dict[str, Any]]:
        del prompt_length
        with self.active(memory):
            yield {}

    def active(self, memory: StackedMemory) -> AbstractContextManager[None]:
        return reading(self.plan, memory.levels)

    def to_tree(self, memory: StackedMemory) -> Tree:
        networks = dict(memory.levels.map_levels(lambda _, level: shorten(level)).networks)
        began = [list(pair) for pair in memory.began.items()]
        levels = memory.levels
        return [networks, levels.tokens, levels.edits, memory.keys, memory.used, memory.last, memory.seen, began]

    def from_tree(self, tree: Tree) -> StackedMemory:
        networks, tokens, edits, keys, used, last, seen, began = tree
        state = LevelState(networks, tokens, edits).map_levels(lambda _, level: widen(level))
        state.check(self.plan)
        device = self.model.device
        keys = tuple((k.to(device), v.to(device)) for k, v in keys)
        last = None if last is None else last.to(device)
        return StackedMemory(state.to(device), keys, used, last, seen, dict(began))


@dataclass(frozen=True)
class HopeMemory:
    """The cache of a Hope model, which no reading changes in place, and the log probabilities of the next token.

    ``began`` gives, for levels that were forgotten, the token at which they began again. ``still`` names levels that do
    not write although others do; such a memory serves for comparison only.
    """

    cache: HopeCache
    last: Float[Tensor, "v"] | None = None
    began: Mapping[int, int] = field(default_factory=dict)
    still: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes()

    def forget(self, levels: Iterable[int]) -> HopeMemory:
        chosen = list(levels)
        began = {**self.began, **dict.fromkeys(chosen, self.cache.seen)}
        # The forgotten levels took part in the prediction of the next token, so it is dropped too.
        return HopeMemory(self.cache.forget(chosen), None, began)

    def ignoring(self, levels: tuple[int, ...] | None, now: HopeMemory, before: HopeMemory) -> HopeMemory:
        # What a mixer learns depends on the levels below it. So this memory reads the text itself, without the writes.
        del now, before
        return self if levels is None else replace(self, still=levels)


class HopeBackend:
    """Reads by the forward pass of a Hope model, in which its mixers and the levels of its continuum memories learn."""

    segment = 128
    # The token that starts a document would reset the cache.
    start_tokens: tuple[int, ...] = ()
    context_length: int | None = None
    positions: int | None = None

    def __init__(
        self, model: Any, tokenizer: Any, context_length: int | None, protect: float | None, settings: Mapping[str, Any]
    ) -> None:
        del tokenizer, protect
        if settings:
            raise ValueError(
                f"{', '.join(settings)} can be set for levels on a pretrained model (stack_levels); the levels of a "
                "Hope model were trained with theirs."
            )
        if context_length is not None:
            raise ValueError(
                f"context_length={context_length} is for stacked models; a Hope model has no context to drop. "
                "Leave it out."
            )
        self.model = model
        self.levels = tuple(i for i, level in enumerate(model.config.cms) if level.get("period") is not None)

    def fresh(self) -> HopeMemory:
        return HopeMemory(HopeCache())

    def room(self, memory: HopeMemory) -> int:
        del memory
        return self.segment

    def how(self, call: ReadCall) -> Any:
        # The clocks of its memories belong to a cache, not to a row.
        return object()

    def read(self, calls: Sequence[ReadCall]) -> list[PieceRead]:
        return [self._read(call.memory, call.ids, call.writes) for call in calls]

    @torch.inference_mode()
    def _read(self, memory: HopeMemory, ids: list[int], writes: bool) -> PieceRead:
        # The first token of a document, too, is predicted from what was read before it.
        cache, row = memory.cache.detach(), torch.tensor([ids], device=self.model.device)
        allowed = [level for level in self.levels if level not in memory.still] if memory.still else writes
        logits = self.model(row, past_key_values=cache, writes=allowed).logits
        after = replace(memory, cache=cache, last=_last_log_probabilities(logits))
        return PieceRead(_nats(memory.last, row[0], next_token_nats(logits, row)[0]), after)

    def end_document(self, memory: HopeMemory) -> HopeMemory:
        return memory

    def forgetting_tokens(self) -> tuple[int, ...]:
        reset = self.model.config.reset_token_id
        return () if reset is None else (reset,)

    def settings_of_file(self) -> dict[str, Any]:
        return {}

    def rows(self, memory: HopeMemory, other: HopeMemory) -> list[LevelRow]:
        return compare_layers(self.model, memory.cache, other.cache, memory.began)

    @contextmanager
    def generating(self, memory: HopeMemory, prompt_length: int) -> Iterator[dict[str, Any]]:
        columns = memory.cache.seen + prompt_length
        mask = torch.ones(1, columns, dtype=torch.long, device=self.model.device)
        forgetting = self.forgetting_tokens()
        suppressed = {"suppress_tokens": list(forgetting)} if forgetting else {}
        yield {"past_key_values": memory.cache.fork(), "attention_mask": mask, **suppressed}

    def active(self, memory: HopeMemory) -> AbstractContextManager[None]:
        raise ValueError(
            "what a Hope model has learned is its cache, which a forward pass from a fresh start does not use. Measure "
            "such a session with session.score(text), or give a stacked model."
        )

    def to_tree(self, memory: HopeMemory) -> Tree:
        tensors, header = memory.cache.to_tree()
        began = [list(pair) for pair in memory.began.items()]
        return {"tensors": tensors, "header": json.dumps(header), "last": memory.last, "began": began}

    def from_tree(self, tree: Tree) -> HopeMemory:
        cache = HopeCache.from_tree(tree["tensors"], json.loads(tree["header"])).to(self.model.device)
        last: Tensor | None = tree["last"]
        return HopeMemory(cache, None if last is None else last.to(self.model.device), dict(tree["began"]))


def read_rows(calls: Sequence[tuple[Backend, ReadCall]]) -> list[PieceRead]:
    """Read calls of several sessions over one model, in as few forward passes as their settings allow."""
    groups: dict[Any, list[int]] = {}
    for i, (backend, call) in enumerate(calls):
        groups.setdefault(backend.how(call), []).append(i)
    found: dict[int, PieceRead] = {}
    for group in groups.values():
        backend = calls[group[0]][0]
        found.update(zip(group, backend.read([calls[i][1] for i in group]), strict=True))
    return [found[i] for i in range(len(calls))]


def answer(
    backend: Backend, steps: Generator[list[ReadCall] | T, list[PieceRead], Result]
) -> Generator[T, None, Result]:
    """A generator whose lists of calls are answered here; everything else that it gives is given on."""
    with closing(steps):
        try:
            given = next(steps)
            while True:
                if isinstance(given, list):
                    given = steps.send(read_rows([(backend, call) for call in given]))
                else:
                    yield given
                    given = next(steps)
        except StopIteration as end:
            return end.value


def _piece(memory: StackedMemory, row: SegmentRow, read: SegmentRead) -> PieceRead:
    """The result of a call, from its memory with a context and what was read."""
    count = row.ids.shape[1]
    after = replace(
        memory, levels=read.state, keys=read.keys, used=memory.used + count, last=_last_log_probabilities(read.logits),
        seen=memory.seen + count,
    )  # fmt: skip
    return PieceRead(_nats(memory.last, row.ids[0], read.nats[0]), after)


def _last_log_probabilities(logits: Float[Tensor, "1 t v"]) -> Float[Tensor, "v"]:
    return F.log_softmax(logits[0, -1].to(torch.promote_types(logits.dtype, torch.float32)), -1)


def _nats(last: Float[Tensor, "v"] | None, ids: Int[Tensor, "t"], nats: Float[Tensor, "t-1"]) -> list[float | None]:
    """``-ln p`` of every token: the first by the log probabilities before it (None without them), and the others."""
    return [None if last is None else -float(last[ids[0]]), *nats.tolist()]


def _block_length(asked: int | None, room: int | None, segment: int, start: int) -> int:
    """Tokens of a block, a multiple of the segment that leaves room for the start token."""
    wanted = min(room or 1024, 1024) if asked is None else asked
    limit = wanted if room is None else min(wanted, room - start)
    if asked is not None and room is not None and asked > room:
        raise ValueError(f"context_length={asked} exceeds the {room} positions of the model. Lower it.")
    if limit < segment:
        raise ValueError(
            f"a block of {limit} tokens (context_length={asked}, the model has {room} positions"
            f"{' and a start token' if start else ''}) holds no segment of {segment} tokens, the smallest period. "
            "Use a larger context_length, or levels with smaller periods."
        )
    return limit // segment * segment
