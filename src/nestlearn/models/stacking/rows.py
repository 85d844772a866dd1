"""Level states of several sessions as one state, so that one forward pass serves them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
