"""Level states of several sessions as one state, so that one forward pass serves them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory.types import Weights

from .edits import Edit, LowRank, MapEdit
from .model import StackedModel
from .network import LevelFast, LevelState, StackedLevel


def join_rows(model: StackedModel, states: Sequence[LevelState], protect: float | None = None) -> LevelState:
    """A state whose row i reads as ``states[i]``; it is for reading, not for writing.

    Where some rows have learned nothing in a level, they get its initial weights. Equal states share one row, which
    serves a batch of any size.

    Args:
        model: the stacked model.
        states: of one row each, or empty.
        protect: ``c_0``, by which a low-rank level starts; without a tape it makes no difference.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from nestlearn.models.stacking import read_segment, stack_levels
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=8)], mode="split").eval()
        >>> read = read_segment(model, torch.arange(8)[None])
        >>> join_rows(model, [LevelState(), read.state]).rows, join_rows(model, [read.state, read.state]).rows
        (2, 1)
    """
    if all(state is states[0] for state in states):
        return states[0] if states else LevelState()
    edits = _join_edits(states)
    if not any(state.rows for state in states):
        return LevelState(edits=edits)
    nothing = (None,) * len(model.stack_plan.levels)
    networks = {}
    for path, module in model.stacked_mlps().items():
        columns = zip(*(state.networks.get(path, nothing) for state in states), strict=True)
        networks[path] = tuple(_join(module.level(i), column, protect) for i, column in enumerate(columns))
    return LevelState(networks, edits=edits)


def _join_edits(states: Sequence[LevelState]) -> tuple[Edit, ...]:
    """One edit with the changes of each row, ``[rows, n, width]``; rows with fewer facts are filled up with zeros."""
    if all([id(edit) for edit in state.edits] == [id(edit) for edit in states[0].edits] for state in states):
        return states[0].edits
    maps = {}
    for path in dict.fromkeys(path for state in states for path in state.changes):
        parts = [state.changes.get(path) for state in states]
        held = [part for part in parts if part is not None]
        count = max(len(part.right) for part in held)
        nothing = LowRank(*(x[:0] for x in held[0]))
        filled = [[F.pad(x, (0, 0, 0, count - len(x))) for x in part or nothing] for part in parts]
        right, left = (torch.stack([x.to(filled[0][0].device) for x in column]) for column in zip(*filled, strict=True))
        maps[path] = MapEdit(right[:, :0], right, left)
    return (Edit((), "rows", 0.0, maps),)


def _join(level: StackedLevel, rows: tuple[LevelFast | None, ...], protect: float | None) -> LevelFast | None:
    held = next((row for row in rows if row is not None), None)
    if held is None:
        return None
    like = next(iter(held.weights.anchor.values()))
    start = {name: w.to(like)[None] for name, w in level.initial(like, protect).items()}
    read: list[Weights] = [start if row is None else row.weights.anchor for row in rows]
    joined = {name: _rows([weights[name] for weights in read]) for name in start}
    weights = held.weights._replace(params=joined, anchor=joined, momentum=None)
    return LevelFast(weights, held.energy.new_zeros(len(rows)), held.writes)


def _rows(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.to(parts[0].device) for part in parts])


class LevelRows:
    """Level states of rows that come and go, for reading. A row is copied once, when it comes.

    The weights of all rows are in buffers with room for more. So a state of the rows is views of them, and what was
    read before a row comes or goes must not be used after it.

    Args:
        model: the stacked model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from nestlearn.models.stacking import read_segment, stack_levels
        >>> config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = stack_levels(LlamaForCausalLM(config), [Level(period=8)], mode="split").eval()
        >>> rows = LevelRows(model)
        >>> for state in (read_segment(model, torch.arange(8)[None]).state, LevelState()):
        ...     rows.append(state)
        >>> rows.state().rows
        2
    """

    def __init__(self, model: StackedModel) -> None:
        self._mlps, self._levels = model.stacked_mlps(), len(model.stack_plan.levels)
        self._states: list[LevelState] = []
        self._buffers: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._likes: dict[tuple[str, int], LevelFast] = {}
        self._copied = 0  # the first rows, which are in the buffers

    def __len__(self) -> int:
        return len(self._states)

    def append(self, state: LevelState) -> None:
        """A new last row that reads as this state, of one row or empty.

        Raises:
            ValueError: its weights have other shapes than those of the model; nothing has changed.
        """
        for path, levels in state.networks.items():
            for i, fast in enumerate(levels):
                found = {} if fast is None else {name: tuple(w.shape[1:]) for name, w in fast.weights.anchor.items()}
                if fast is not None and found != self._mlps[path].level(i).shapes:
                    raise ValueError(f"level {i} of {path} has weights of the shapes {found}: those of another model.")
        self._states.append(state)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in this order."""
        copied = next((i for i, row in enumerate(rows) if row >= self._copied), len(rows))
        for buffers in self._buffers.values():
            for buffer in buffers.values():
                move_rows(buffer, rows[:copied])
        self._states, self._copied = [self._states[row] for row in rows], copied
        if not rows:
            self._buffers, self._likes = {}, {}

    def state(self) -> LevelState:
        """The state of all rows; equal states share one row, as in `join_rows`."""
        states = self._states
        if all(state is states[0] for state in states):
            return states[0] if states else LevelState()
        for row in range(self._copied, len(states)):
            self._copy(row, states[row].networks)
        self._copied, count = len(states), len(states)
        networks = {}
        for path in dict.fromkeys(path for path, _ in self._buffers):
            found = [(self._likes.get((path, i)), self._buffers.get((path, i))) for i in range(self._levels)]
            networks[path] = tuple(
                None if like is None or buffers is None else _rows_of(like, buffers, count) for like, buffers in found
            )
        return LevelState(networks, edits=_join_edits(states))

    def _copy(self, row: int, networks: Mapping[str, tuple[LevelFast | None, ...]]) -> None:
        """Copy the weights of a row to the buffers. Where it has learned nothing it gets the initial weights."""
        held = {(path, i): fast for path, levels in networks.items() for i, fast in enumerate(levels) if fast}
        for key in dict.fromkeys([*self._buffers, *held]):
            fast = held.get(key)
            if key not in self._buffers:
                assert fast is not None
                self._likes[key] = fast
                start = self._initial(key)
                self._buffers[key] = {name: _longer_inside(row + 1, w) for name, w in start.items()}
                for name, w in start.items():
                    self._buffers[key][name][:row] = w
            weights = self._initial(key) if fast is None else {n: w[0] for n, w in fast.weights.anchor.items()}
            for name, buffer in self._buffers[key].items():
                if row >= buffer.shape[0]:
                    room = _longer_inside(2 * row, buffer[0])
                    room[:row] = buffer
                    self._buffers[key][name] = buffer = room
                buffer[row] = weights[name]

    def _initial(self, key: tuple[str, int]) -> Weights:
        like = next(iter(self._likes[key].weights.anchor.values()))
        return self._mlps[key[0]].level(key[1]).initial(like)


def move_rows(buffer: Tensor, rows: Sequence[int]) -> None:
    """Make row ``rows[i]`` of a buffer row i, without copying the first ones that stay where they are."""
    first = next((i for i, row in enumerate(rows) if i != row), len(rows))
    if first < len(rows):
        buffer[first : len(rows)] = buffer[list(rows[first:])]


def _longer_inside(rows: int, like: Float[Tensor, "out in"]) -> Float[Tensor, "rows out in"]:
    """Room for so many matrices, the longer dimension contiguous: products with one vector are then faster."""
    out, width = like.shape
    return like.new_empty(rows, width, out).mT if out > width else like.new_empty(rows, out, width)


def _rows_of(like: LevelFast, buffers: Mapping[str, Tensor], count: int) -> LevelFast:
    views = {name: buffer[:count] for name, buffer in buffers.items()}
    weights = like.weights._replace(params=views, anchor=views, momentum=None)
    return LevelFast(weights, like.energy.new_zeros(count), like.writes)
