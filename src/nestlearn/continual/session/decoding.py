"""Answers of many sessions, token by token: each row reads with the memory of its own session.

A scheduler begins rows (`Decoder.begin`), reads their prompts (`read`), and lets each `join` the rows that are decoded
together. `step` gives all of them their next token in one forward pass, and `keep` drops rows that have ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from nestlearn.models.blocked import block_products
from nestlearn.models.stacking import KeyValues, LevelState, reading, stacked_model
from nestlearn.models.stacking.rows import LevelRows, join_rows

from .backends import StackedBackend
from .key_values import RowKeyValues
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

    def read(self, rows: Sequence[Row], ids: Sequence[Sequence[int]]) -> Float[Tensor, "n v"]:
        """Read a piece of the prompt of a row that has not joined yet, or the first pieces of several rows."""
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
    """The decoder for sessions over this model, whose products of few tokens change to `BlockedLinear`.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, max_position_embeddings=128)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=16)]).eval()
        >>> session = MemorySession(model, byte_tokenizer())
        >>> decoder = decoder_of(session)
        >>> rows = [decoder.begin(session) for _ in range(2)]
        >>> logits = decoder.read(rows, [list(b"one"), list(b"another")])
        >>> for row in rows:
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

    def read(self, rows: Sequence[Row], ids: Sequence[Sequence[int]]) -> Float[Tensor, "n v"]:
        return torch.stack([self._read(row, part) for row, part in zip(rows, ids, strict=True)])

    @torch.inference_mode()
    def _read(self, row: Row, ids: Sequence[int]) -> Float[Tensor, "v"]:
        tokens = torch.tensor([list(ids)], device=self.model.device)
        return self.model(tokens, past_key_values=row.cache, logits_to_keep=1).logits[0, -1]

    def join(self, row: Row) -> None:
        self._rows.append(row)

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[i] for i in rows]

    def step(self, tokens: Sequence[int]) -> Float[Tensor, "n v"]:
        return self.read(self._rows, [[token] for token in tokens])


class StackedDecoder:
    """Rows of a stacked model in one forward pass, each with its own fast weights.

    Keys and values of shorter rows are padded on the left, and the padding is masked.
    """

    positions: int | None = None
    never: tuple[int, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model, self.stacked = model, stacked_model(model)
        block_products(model)
        self._positions = "position_ids" in inspect.signature(self.stacked.forward).parameters
        self._levels = LevelRows(self.stacked)
        self._state = LevelState()
        self._lengths: list[int] = []
        self._cache: Any = DynamicCache()

    def begin(self, session: MemorySession) -> Row:
        return Row(session._cursor.memory.levels, DynamicCache())

    @torch.inference_mode()
    def read(self, rows: Sequence[Row], ids: Sequence[Sequence[int]]) -> Float[Tensor, "n v"]:
        # Padding on the right needs no mask: no token sees those behind it.
        lengths = [len(part) for part in ids]
        tokens = torch.tensor([[*part, *[0] * (max(lengths) - len(part))] for part in ids], device=self.model.device)
        last = sorted({length - 1 for length in lengths})
        one = len(rows) == 1
        cache = rows[0].cache if one else DynamicCache()
        state = join_rows(self.stacked, [row.levels or LevelState() for row in rows])
        with reading(self.stacked.stack_plan, state):
            options: dict[str, Any] = {"logits_to_keep": 1 if one else torch.tensor(last, device=self.model.device)}
            logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **options).logits
        if not one:
            for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                mine = tuple((k[i : i + 1, :, :length], v[i : i + 1, :, :length]) for k, v in _keys(cache))
                row.cache = DynamicCache(mine)
        return torch.stack([logits[i, last.index(length - 1)] for i, length in enumerate(lengths)])

    @torch.inference_mode()
    def join(self, row: Row) -> None:
        self._levels.append(row.levels or LevelState())
        if not self._lengths:
            self._cache.layers = [RowKeyValues() for _ in row.cache.layers]
        for layer, (keys, values) in zip(self._cache.layers, _keys(row.cache), strict=True):
            layer.join(keys, values)
        self._lengths.append(row.cache.get_seq_length())
        self._state = self._levels.state()

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        if list(rows) == list(range(len(self._lengths))):
            return
        self._lengths = [self._lengths[i] for i in rows]
        if rows:
            for layer in self._cache.layers:
                layer.keep(rows, max(self._lengths))
        else:
            self._cache = DynamicCache()
        self._levels.keep(rows)
        self._state = self._levels.state()

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
