"""How the two kinds of models read for a session: stacked models by loss writes, Hope by its own cache."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nestlearn.models import HopeCache
from nestlearn.models.stacking import KeyValues, LevelFast, LevelState, read_segment, reading, stacked_model
from nestlearn.nn.state import Tree

from .session_levels import LevelRow, compare_layers, compare_states


class Read(NamedTuple):
    """``-ln p`` in nats of every token (None for one that nothing predicts), and the mind after them."""

    nats: list[float | None]
    mind: Any


class Engine(Protocol):
    """What a session asks of a kind of model; a mind is everything that reading changes, and immutable."""

    kind: str
    segment: int
    levels: tuple[int, ...]
    context_length: int | None
    positions: int | None

    def fresh(self) -> Any:
        """Nothing learned."""
        ...

    def read(self, mind: Any, ids: list[int], writes: bool, *, start: bool) -> Read:
        """Read up to one segment; ``start`` where a document starts."""
        ...

    def ignoring(self, mind: Any, before: Any, levels: Iterable[int] | None, view: Any) -> Any:
        """What ``view`` would read now, had these levels written nothing since ``before``; ``mind`` has learned on.

        None: had nothing been written at all. The result is read with ``writes=False``.
        """
        ...

    def end_document(self, mind: Any) -> Any:
        """What remains when a document has ended: its context does not."""
        ...

    def generating(self, mind: Any) -> Any:
        """A context in which ``model.generate(**its value)`` uses what was learned."""
        ...

    def start_tokens(self) -> tuple[int, ...]:
        """What a prompt begins with."""
        ...

    def forgetting_tokens(self) -> tuple[int, ...]:
        """Tokens that would erase what was learned; no prompt and no answer may hold one."""
        ...

    def columns(self, mind: Any) -> int:
        """Tokens that `generating` puts before the prompt."""
        ...

    def forget(self, mind: Any, levels: Iterable[int]) -> Any:
        """The mind with some levels back at their initial weights."""
        ...

    def rows(self, mind: Any, other: Any) -> list[LevelRow]:
        """How far apart two minds are, level by level."""
        ...

    def nbytes(self, mind: Any) -> int:
        """Bytes of what was learned."""
        ...

    def to_tree(self, mind: Any) -> Tree:
        """A state tree (see `nestlearn.nn.state`) with all of it."""
        ...

    def from_tree(self, tree: Tree) -> Any:
        """Inverse of `to_tree`."""
        ...


@dataclass(frozen=True)
class StackedMind:
    """What a session over a stacked model has learned, and its place in the current block.

    ``last`` are the log probabilities of the next token; ``used`` counts the block's tokens.
    """

    levels: LevelState = field(default_factory=LevelState)
    keys: KeyValues = ()
    used: int = 0
    last: Float[Tensor, "v"] | None = None


class StackedEngine:
    """Reads with `read_segment`, in blocks of ``context_length`` tokens after which keys and values are dropped."""

    kind = "stacked"

    def __init__(self, model: Any, tokenizer: Any, context_length: int | None) -> None:
        self.model, plan = model, stacked_model(model).stack_plan
        self.segment = plan.segment
        self.levels = tuple(plan.learning())
        self.start_id: int | None = tokenizer.bos_token_id
        self.positions = getattr(model.config, "max_position_embeddings", None)
        has_start = self.start_id is not None
        self.context_length: int | None = context_length
        self.block = _block_length(context_length, self.positions, self.segment, has_start)

    def fresh(self) -> StackedMind:
        return StackedMind()

    def read(self, mind: StackedMind, ids: list[int], writes: bool, *, start: bool) -> Read:
        if start:
            mind = replace(mind, keys=(), used=0, last=None)
        if mind.used + len(ids) > self.block:
            mind = replace(mind, keys=(), used=0)
        if not mind.keys and self.start_id is not None:
            first = read_segment(self.model, self._tensor([self.start_id]), mind.levels, writes=False)
            mind = replace(mind, keys=first.keys, last=_log_probabilities(first.logits)[0, -1])
        found = read_segment(self.model, self._tensor(ids), mind.levels, mind.keys, writes=writes)
        logs = _log_probabilities(found.logits)[0]
        given = [] if mind.last is None else [mind.last]
        predicted = torch.stack([*given, *logs[:-1]])
        targets = self._tensor(ids)[0, len(ids) - len(predicted) :]
        nats: list[float | None] = [-x for x in predicted.gather(1, targets[:, None])[:, 0].tolist()]
        nats = [None] * (len(ids) - len(nats)) + nats
        return Read(nats, StackedMind(found.state, found.keys, mind.used + len(ids), logs[-1]))

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)

    def ignoring(
        self, mind: StackedMind, before: StackedMind, levels: Iterable[int] | None, view: StackedMind
    ) -> StackedMind:
        chosen = self.levels if levels is None else levels
        return replace(view, levels=mind.levels.with_levels(chosen, before.levels))

    def end_document(self, mind: StackedMind) -> StackedMind:
        return StackedMind(mind.levels)

    def start_tokens(self) -> tuple[int, ...]:
        return () if self.start_id is None else (self.start_id,)

    def forgetting_tokens(self) -> tuple[int, ...]:
        return ()

    def columns(self, mind: StackedMind) -> int:
        del mind
        return 0

    def forget(self, mind: StackedMind, levels: Iterable[int]) -> StackedMind:
        return replace(mind, levels=mind.levels.forget(levels))

    def rows(self, mind: StackedMind, other: StackedMind) -> list[LevelRow]:
        return compare_states(self.model, mind.levels, other.levels)

    def nbytes(self, mind: StackedMind) -> int:
        return mind.levels.nbytes

    @contextmanager
    def generating(self, mind: StackedMind) -> Iterator[dict[str, Any]]:
        with reading(stacked_model(self.model).stack_plan, mind.levels):
            yield {}

    def to_tree(self, mind: StackedMind) -> Tree:
        networks = {
            path: tuple(
                level if level is None or not level.weights.aligned else _without_anchor(level) for level in held
            )
            for path, held in mind.levels.networks.items()
        }
        return [networks, mind.levels.tokens, mind.keys, mind.used, mind.last]

    def from_tree(self, tree: Tree) -> StackedMind:
        networks, tokens, keys, used, last = tree
        networks = {
            path: tuple(level if level is None or not level.weights.aligned else _with_anchor(level) for level in held)
            for path, held in networks.items()
        }
        state = LevelState(networks, tokens)
        state.check(stacked_model(self.model).stack_plan)
        return map_mind(StackedMind(state, tuple(map(tuple, keys)), used, last), self.model.device)


@dataclass(frozen=True)
class HopeMind:
    """The cache of a Hope model, never changed in place, and the log probabilities of the next token.

    ``began`` is the token at which a level began anew, of levels that were forgotten. ``still`` are levels that do not
    write although the others do, where this is a view that a reading is compared with.
    """

    cache: HopeCache
    last: Float[Tensor, "v"] | None = None
    began: Mapping[int, int] = field(default_factory=dict)
    still: tuple[int, ...] = ()


class HopeEngine:
    """Reads by the model's own forward pass, in which its mixers learn and the levels of its continuum memories."""

    kind = "hope"
    segment = 128
    context_length: int | None = None
    positions: int | None = None

    def __init__(self, model: Any, tokenizer: Any, context_length: int | None) -> None:
        del tokenizer
        if context_length is not None:
            raise ValueError(
                f"context_length={context_length} is for stacked models; a Hope model has no context to drop. "
                "Leave it out."
            )
        self.model = model
        self.levels = tuple(i for i, level in enumerate(model.config.cms) if level.get("period") is not None)

    def fresh(self) -> HopeMind:
        return HopeMind(HopeCache())

    @torch.inference_mode()
    def read(self, mind: HopeMind, ids: list[int], writes: bool, *, start: bool) -> Read:
        del start  # a document's first token is predicted from what was read before it
        cache = mind.cache.detach()
        inputs = torch.tensor([ids], device=self.model.device)
        allowed = [level for level in self.levels if level not in mind.still] if mind.still else writes
        logs = _log_probabilities(self.model(inputs, past_key_values=cache, writes=allowed).logits)[0]
        given = [] if mind.last is None else [mind.last]
        predicted = torch.stack([*given, *logs[:-1]]) if given or len(ids) > 1 else logs[:0]
        found: list[float | None] = [
            -x for x in predicted.gather(1, inputs[0, len(ids) - len(predicted) :, None])[:, 0].tolist()
        ]
        return Read([None] * (len(ids) - len(found)) + found, replace(mind, cache=cache, last=logs[-1]))

    def ignoring(self, mind: HopeMind, before: HopeMind, levels: Iterable[int] | None, view: HopeMind) -> HopeMind:
        # What a mixer has learned depends on the levels below: the view is a reading of its own, without these writes.
        del mind, before
        return view if levels is None else replace(view, still=tuple(levels))

    def end_document(self, mind: HopeMind) -> HopeMind:
        return mind

    def start_tokens(self) -> tuple[int, ...]:
        # The token that starts a document would reset the cache.
        return ()

    def forgetting_tokens(self) -> tuple[int, ...]:
        reset = self.model.config.reset_token_id
        return () if reset is None else (reset,)

    def columns(self, mind: HopeMind) -> int:
        return mind.cache.seen

    def forget(self, mind: HopeMind, levels: Iterable[int]) -> HopeMind:
        chosen = list(levels)
        began = {**mind.began, **dict.fromkeys(chosen, mind.cache.seen)}
        # What the next token will be was said with what is forgotten now.
        return HopeMind(mind.cache.forget(chosen), None, began)

    def rows(self, mind: HopeMind, other: HopeMind) -> list[LevelRow]:
        return compare_layers(self.model, mind.cache, other.cache, mind.began)

    def nbytes(self, mind: HopeMind) -> int:
        return mind.cache.nbytes()

    @contextmanager
    def generating(self, mind: HopeMind) -> Iterator[dict[str, Any]]:
        yield {"past_key_values": mind.cache.fork()}

    def to_tree(self, mind: HopeMind) -> Tree:
        tensors, header = mind.cache.to_tree()
        began = [list(pair) for pair in mind.began.items()]
        return {"tensors": tensors, "header": json.dumps(header), "last": mind.last, "began": began}

    def from_tree(self, tree: Tree) -> HopeMind:
        cache = HopeCache.from_tree(tree["tensors"], json.loads(tree["header"])).to(self.model.device)
        last: Tensor | None = tree["last"]
        # Sessions saved before levels could be forgotten say nothing about it.
        began = dict(tree.get("began", []))
        return HopeMind(cache, None if last is None else last.to(self.model.device), began)


def _without_anchor(level: LevelFast) -> LevelFast:
    """At the end of a period the anchor is the weights: one copy will do in a file."""
    return level._replace(weights=level.weights._replace(anchor={}))


def _with_anchor(level: LevelFast) -> LevelFast:
    return level._replace(weights=level.weights._replace(anchor=level.weights.params))


def map_mind(mind: StackedMind, device: torch.device) -> StackedMind:
    """The mind on a device."""
    keys = tuple((k.to(device), v.to(device)) for k, v in mind.keys)
    last = None if mind.last is None else mind.last.to(device)
    return replace(mind, levels=mind.levels.to(device), keys=keys, last=last)


def _log_probabilities(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def _block_length(asked: int | None, room: int | None, segment: int, has_start: bool) -> int:
    """Tokens of a block, a multiple of the segment that leaves room for the start token."""
    wanted = min(room or 1024, 1024) if asked is None else asked
    limit = wanted if room is None else min(wanted, room - has_start)
    if asked is not None and room is not None and asked > room:
        raise ValueError(f"context_length={asked} exceeds the {room} positions of the model.")
    if limit < segment:
        raise ValueError(
            f"a block of {limit} tokens (context_length={asked}, the model has {room} positions"
            f"{' and a start token' if has_start else ''}) holds no segment of {segment} tokens, the smallest period. "
            "Use a larger context_length, or levels with smaller periods."
        )
    return limit // segment * segment
