"""How a session reads with a kind of model: stacked models learn by loss writes, Hope models in their forward pass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from nestlearn.models import HopeCache
from nestlearn.models.stacking import KeyValues, LevelState, read_segment, reading, stacked_model
from nestlearn.models.stacking.plan import SETTINGS
from nestlearn.models.stacking.practice import PracticeRows, end_practice, practise
from nestlearn.nn.state import Tree

from .levels import LevelRow, compare_layers, compare_states
from .precision import round_levels, shorten, widen


class PieceRead(NamedTuple):
    """The result of reading up to one segment.

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

    def read(self, memory: Any, ids: list[int], writes: bool, *, start: bool) -> PieceRead:
        """Read up to one segment; ``start`` where a document starts."""
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
        self.model, self.plan, self.protect = model, stacked_model(model).stack_plan, protect
        self.settings = self.plan.with_settings(**settings)
        self.segment, self.levels = self.plan.segment, tuple(self.plan.learning())
        self.start_tokens = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
        self.positions = getattr(model.config, "max_position_embeddings", None)
        self.context_length: int | None = context_length
        self.block = _block_length(context_length, self.positions, self.segment, len(self.start_tokens))

    def fresh(self) -> StackedMemory:
        return StackedMemory()

    def read(self, memory: StackedMemory, ids: list[int], writes: bool, *, start: bool) -> PieceRead:
        if start:
            memory = replace(memory, keys=(), used=0, last=None)
        if memory.used + len(ids) > self.block:
            memory = replace(memory, keys=(), used=0)
        if not memory.keys and self.start_tokens:
            first = read_segment(self.model, self._row(list(self.start_tokens)), memory.levels, writes=False)
            memory = replace(memory, keys=first.keys, last=_log_probabilities(first.logits)[-1])
        row = self._row(ids)
        found = read_segment(
            self.model, row, memory.levels, memory.keys, writes=writes, levels=self.settings, protect=self.protect
        )
        logs = _log_probabilities(found.logits)
        after = replace(
            memory, levels=found.state, keys=found.keys, used=memory.used + len(ids), last=logs[-1],
            seen=memory.seen + len(ids),
        )  # fmt: skip
        return PieceRead(_nats(memory.last, logs, row[0]), after)

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

    def _row(self, ids: list[int]) -> Int[Tensor, "1 t"]:
        return torch.tensor([ids], device=self.model.device)

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

    @torch.inference_mode()
    def read(self, memory: HopeMemory, ids: list[int], writes: bool, *, start: bool) -> PieceRead:
        del start  # the first token of a document is predicted from what was read before it
        cache, row = memory.cache.detach(), torch.tensor([ids], device=self.model.device)
        allowed = [level for level in self.levels if level not in memory.still] if memory.still else writes
        logs = _log_probabilities(self.model(row, past_key_values=cache, writes=allowed).logits)
        return PieceRead(_nats(memory.last, logs, row[0]), replace(memory, cache=cache, last=logs[-1]))

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


def _log_probabilities(logits: Float[Tensor, "1 t v"]) -> Float[Tensor, "t v"]:
    return F.log_softmax(logits[0].to(torch.promote_types(logits.dtype, torch.float32)), -1)


def _nats(last: Float[Tensor, "v"] | None, logs: Float[Tensor, "t v"], ids: Int[Tensor, "t"]) -> list[float | None]:
    """``-ln p`` of every token, each by the log probabilities before it; None for the first without ``last``."""
    predicted = logs[:-1] if last is None else torch.cat([last[None], logs[:-1]])
    skipped = len(ids) - len(predicted)
    first: list[float | None] = [None] * skipped
    return first + (-predicted.gather(1, ids[skipped:, None])[:, 0]).tolist()


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
