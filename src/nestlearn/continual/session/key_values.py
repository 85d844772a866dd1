"""Keys and values of rows that are decoded together, in buffers that a new token does not copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from nestlearn.models.stacking.rows import move_rows

ROOM = 64
"""Tokens for which there is room in a new buffer, besides half as many as its rows have."""


class RowKeyValues(DynamicLayer):
    """One layer of a cache. Every row ends at the same column, and zeros are to the left of the shorter ones.

    ``keys`` and ``values``, ``[rows, heads, tokens, width]``, are views of the columns in use.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []
        self._rows, self._start, self._end = 0, 0, 0

    def join(self, keys: Float[Tensor, "1 h t d"], values: Float[Tensor, "1 h t e"]) -> None:
        """Add a row."""
        if not self._buffers:
            self.lazy_initialization(keys, values)
            self._buffers = [keys[:0], values[:0]]
        length = keys.shape[2]
        self._make_room(self._rows + 1, max(length, self._end - self._start))
        start = min(self._start, self._end - length)
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[: self._rows, :, start : self._start] = 0
            buffer[self._rows, :, start : self._end - length] = 0
            buffer[self._rows, :, self._end - length : self._end] = new[0]
        self._view(self._rows + 1, start, self._end)

    def keep(self, rows: Sequence[int], width: int) -> None:
        """Drop all rows but these, in this order; the longest of them has ``width`` tokens."""
        start = self._end - width
        for buffer in self._buffers:
            move_rows(buffer[:, :, start : self._end], rows)
        self._view(len(rows), start, self._end)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens to every row."""
        count, width = key_states.shape[2], self._end - self._start
        if self._end + count > self._buffers[0].shape[2]:
            self._make_room(self._rows, width, count)
        end = self._end + count
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: self._rows, :, self._end : end] = new
        self._view(self._rows, self._start, end)
        return cast(Tensor, self.keys), cast(Tensor, self.values)

    def _make_room(self, rows: int, width: int, more: int = 0) -> None:
        """Buffers for at least so many rows, and so many columns up to the end and ``more`` behind it."""
        held, _, columns, _ = self._buffers[0].shape
        if rows <= held and width <= self._end and self._end + more <= columns:
            return
        rows, end = held if rows <= held else max(rows, 2 * held), width + ROOM + width // 2
        for i, old in enumerate(self._buffers):
            new = old.new_empty(rows, old.shape[1], end + max(more, ROOM + width // 2), old.shape[3])
            shown = old[: self._rows, :, self._start : self._end]
            new[: self._rows, :, end - shown.shape[2] : end] = shown
            self._buffers[i] = new
        self._view(self._rows, end - (self._end - self._start), end)

    def _view(self, rows: int, start: int, end: int) -> None:
        self._rows, self._start, self._end = rows, start, end
        self.keys, self.values = (buffer[:rows, :, start:end] for buffer in self._buffers)
