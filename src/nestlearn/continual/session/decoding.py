"""Answers of many sessions, token by token: each row reads with the memory of its own session.

A scheduler begins a row (`Decoder.begin`), reads its prompt in pieces (`read`), and lets it `join` the rows that are
decoded together. `step` gives all of them their next token in one forward pass, and `keep` drops rows that have ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from nestlearn.models.stacking import KeyValues, LevelState, reading, stacked_model
from nestlearn.models.stacking.rows import join_rows

from .backends import StackedBackend
from .session import MemorySession


@dataclass
class Row:
    """A prompt that is being read: the fast weights of its session (those of a Hope model are in the cache), and the
    cache of its tokens."""

    levels: LevelState | None
    cache: Any


class Decoder(Protocol):
    """The rows that are decoded together. Logits are those of the next token.

    ``positions`` limits prompt and answer together (None: no limit), and no answer may hold a token of ``never``.
    """

    positions: int | None
    never: tuple[int, ...]

    def begin(self, session: MemorySession) -> Row:
        """A row of its own, with what the session has learned up to now."""
        ...

    def read(self, row: Row, ids: Sequence[int]) -> Float[Tensor, "v"]:
        """Read a piece of the prompt of a row that has not joined yet."""
        ...

    def join(self, row: Row) -> None:
        """Make it the last of the rows that are decoded together."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in this order."""
        ...

    def step(self, tokens: Sequence[int]) -> Float[Tensor, "n v"]:
        """Read one token in every row."""
        ...


def decoder_of(session: MemorySession) -> Decoder:
    """The decoder for sessions over this model.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, max_position_embeddings=128)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=16)]).eval()
        >>> session = MemorySession(model, byte_tokenizer())
        >>> decoder, row = decoder_of(session), None
        >>> for text in ("one", "another"):
        ...     row = decoder.begin(session)
        ...     logits = decoder.read(row, list(text.encode()))
        ...     decoder.join(row)
        >>> decoder.step([32, 32]).shape
        torch.Size([2, 259])
    """
    kind = StackedDecoder if isinstance(session._backend, StackedBackend) else HopeDecoder
    decoder: Decoder = kind(session.model)
    decoder.positions, decoder.never = session._backend.positions, session._backend.forgetting_tokens()
    return decoder


class HopeDecoder:
    """Rows of a Hope model, one forward pass each: the clocks of its memories belong to a cache, not to a row."""

    positions: int | None = None
    never: tuple[int, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model = model
        self._rows: list[Row] = []

    def begin(self, session: MemorySession) -> Row:
        return Row(None, session._cursor.memory.cache.detach())

    @torch.inference_mode()
    def read(self, row: Row, ids: Sequence[int]) -> Float[Tensor, "v"]:
        tokens = torch.tensor([list(ids)], device=self.model.device)
        return self.model(tokens, past_key_values=row.cache, logits_to_keep=1).logits[0, -1]

    def join(self, row: Row) -> None:
        self._rows.append(row)

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[i] for i in rows]

    def step(self, tokens: Sequence[int]) -> Float[Tensor, "n v"]:
        return torch.stack([self.read(row, [token]) for row, token in zip(self._rows, tokens, strict=True)])


class StackedDecoder:
    """Rows of a stacked model in one forward pass, each with its own fast weights.

    Keys and values of shorter rows are padded on the left, and the padding is masked.
    """

    positions: int | None = None
    never: tuple[int, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model, self.stacked = model, stacked_model(model)
        self._positions = "position_ids" in inspect.signature(self.stacked.forward).parameters
        self._states: list[LevelState] = []
        self._state = LevelState()
        self._lengths: list[int] = []
        self._cache = DynamicCache()

    def begin(self, session: MemorySession) -> Row:
        return Row(session._cursor.memory.levels, DynamicCache())

    @torch.inference_mode()
    def read(self, row: Row, ids: Sequence[int]) -> Float[Tensor, "v"]:
        with reading(self.stacked.stack_plan, row.levels):
            tokens = torch.tensor([list(ids)], device=self.model.device)
            found = self.model(input_ids=tokens, past_key_values=row.cache, use_cache=True, logits_to_keep=1)
        return found.logits[0, -1]

    @torch.inference_mode()
    def join(self, row: Row) -> None:
        mine, new = _keys(self._cache), _keys(row.cache)
        width = max(max(self._lengths, default=0), row.cache.get_seq_length())
        joined = new if not mine else tuple(
            (_stack(k, a, width), _stack(v, b, width)) for (k, v), (a, b) in zip(mine, new, strict=True)
        )  # fmt: skip
        self._set([*self._states, row.levels or LevelState()], [*self._lengths, row.cache.get_seq_length()], joined)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        if list(rows) == list(range(len(self._states))):
            return
        lengths = [self._lengths[i] for i in rows]
        index, width = torch.tensor(list(rows), dtype=torch.long, device=self.model.device), max(lengths, default=0)
        keys = tuple((_select(k, index, width), _select(v, index, width)) for k, v in _keys(self._cache))
        self._set([self._states[i] for i in rows], lengths, keys if rows else ())

    def _set(self, states: list[LevelState], lengths: list[int], keys: KeyValues) -> None:
        self._states, self._lengths = states, lengths
        self._state = join_rows(self.stacked, states)
        self._cache = DynamicCache(keys) if keys else DynamicCache()

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Float[Tensor, "n v"]:
        device = self.model.device
        lengths = torch.tensor(self._lengths, device=device)
        options: dict[str, Any] = {"position_ids": lengths[:, None]} if self._positions else {}
        width = max(self._lengths)
        if min(self._lengths) < width:
            columns = torch.arange(width + 1, device=device)
            options["attention_mask"] = (columns >= width - lengths[:, None]).long()
        with reading(self.stacked.stack_plan, self._state):
            ids = torch.tensor([[token] for token in tokens], device=device)
            logits = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **options).logits[:, -1]
        self._lengths = [length + 1 for length in self._lengths]
        return logits


def _keys(cache: Any) -> KeyValues:
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def _stack(x: Tensor, new: Tensor, width: int) -> Tensor:
    """The rows of both, padded on the left to one width."""
    return torch.cat([F.pad(part, (0, 0, width - part.shape[2], 0)) for part in (x, new)])


def _select(x: Tensor, rows: Tensor, width: int) -> Tensor:
    """Some rows, without the padding that all of them have."""
    return x.index_select(0, rows)[:, :, x.shape[2] - width :]
