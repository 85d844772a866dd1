"""What a session has learned, level by level: the change of the weights, and the bytes of the state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nestlearn.memory.types import Weights
from nestlearn.models import HopeCache
from nestlearn.models.cache import LayerState
from nestlearn.models.stacking import LevelState, StackedModel, stacked_model
from nestlearn.models.stacking.families import map_shape, squares_by_unit
from nestlearn.nn.cms import ContinuumMemory
from nestlearn.nn.cms.level import Level, LevelWeights
from nestlearn.nn.cms.nested import NestedState
from nestlearn.nn.state import Tree, state_bytes, tensors_of


@dataclass(frozen=True)
class LevelRow:
    """One level of one MLP or continuum memory; with ``level`` None the mixer of one layer of a Hope model, or a map
    that was edited (``rule`` is ``"edit"``).

    ``change`` is ``|W - W_other| / |W_0|`` (Frobenius norms over all maps). ``tokens`` counts the tokens that were
    read since it began to learn. ``bytes`` is the size of its state.
    """

    path: str
    level: int | None
    period: int | None
    rule: str | None
    tokens: int
    change: float
    bytes: int


@torch.no_grad()
def compare_states(
    model: Any,
    state: LevelState,
    other: LevelState,
    seen: int,
    began: Mapping[int, int],
    settings: Sequence[Level],
) -> list[LevelRow]:
    """The distance of two states, for every stacked MLP and learning level in order.

    ``seen`` counts the tokens read, ``began`` gives the token at which a level started to learn (0 by default), and
    ``settings`` are the levels as the session has them.
    """
    stacked = stacked_model(model)
    plan, rows = stacked.stack_plan, []
    for path, module in stacked.stacked_mlps().items():
        for index in plan.learning():
            held, before = (s.networks.get(path, (None,) * (index + 1))[index] for s in (state, other))
            mine, theirs = module.level(index).learned(held), module.level(index).learned(before)
            squares = [(mine[name].double() - theirs[name].double()).square().sum() for name in mine]
            change = torch.stack(squares).sum().sqrt()
            change = change / module.size(index, change.device).clamp(min=1e-30)
            level, tokens = settings[index], 0 if held is None else seen - began.get(index, 0)
            rows.append(LevelRow(path, index, level.period, level.rule, tokens, float(change), state_bytes(held)))
    return rows + _compare_edits(stacked, state, other)


def _compare_edits(model: StackedModel, state: LevelState, other: LevelState) -> list[LevelRow]:
    """The distance of the edits of every map that either state edits."""
    rows = []
    for path in [*state.changes, *(path for path in other.changes if path not in state.changes)]:
        part = model.get_submodule(path)
        shape = map_shape(part, path)
        mine, theirs = (
            (found.left.double().mT @ found.right.double()) if (found := held.changes.get(path)) else torch.zeros(())
            for held in (state, other)
        )
        size = squares_by_unit(part, shape, True, model.device).sum().sqrt()
        held = [edit.maps[path] for edit in state.edits if path in edit.maps]
        change = (mine - theirs.to(mine.device)).square().sum().sqrt() / size.clamp(min=1e-30)
        rows.append(LevelRow(path, None, None, "edit", 0, float(change), state_bytes(held)))
    return rows


@torch.no_grad()
def compare_layers(model: Any, cache: HopeCache, other: HopeCache, began: Mapping[int, int]) -> list[LevelRow]:
    """The distance of two caches of a Hope model: for each layer the mixer, then its levels.

    The change of a mixer is relative to its state in ``other``. It is infinite if that is empty, and NaN if the two
    have tensors of different shapes. ``began`` gives the token at which a level started to learn (0 by default).
    """
    rows: list[LevelRow] = []
    read = cache.seen - sum(segment.ids.shape[1] for segment in cache.segments)
    for number, block in enumerate(model.model.layers):
        path = f"model.layers.{number}"
        mine = cache.layers[number] if cache.layers else LayerState()
        theirs = other.layers[number] if other.layers else LayerState()
        if mine.mixer is not None:
            change, held = _mixer_change(mine.mixer, theirs.mixer), state_bytes(mine.mixer)
            rows.append(LevelRow(f"{path}.mixer", None, None, None, cache.seen, change, held))
        cms = cast(ContinuumMemory, block.cms)
        for index, network in enumerate(cms.networks):
            if isinstance(network, LevelWeights):
                fast, before = (None if layer.cms is None else layer.cms.levels[index] for layer in (mine, theirs))
                tokens = 0 if fast is None else max(read - began.get(index, 0), 0)
                change = _level_change(network, fast, before)
                rule = network.level.rule
                rows.append(LevelRow(f"{path}.cms", index, network.period, rule, tokens, change, state_bytes(fast)))
    return rows


def _mixer_change(mine: Tree, theirs: Tree) -> float:
    ours, others = ([x.double() for x in tensors_of(tree) if x.is_floating_point()] for tree in (mine, theirs))
    if not others:
        return float("inf")
    return _relative(ours, others) if [x.shape for x in ours] == [x.shape for x in others] else float("nan")


def _level_change(network: LevelWeights, state: Tree, other: Tree) -> float:
    """``|W - W_other| / |W_0|`` of a level of a continuum memory, dense weights of all its maps together."""
    start, mine, theirs = (_dense(network, held) for held in (None, state, other))
    apart = sum(float((mine[name] - theirs[name]).square().sum()) for name in start)
    return (apart / max(sum(float(w.square().sum()) for w in start.values()), 1e-30)) ** 0.5


def _dense(network: LevelWeights, state: Tree) -> Weights:
    """Dense weights of a level with all of its writes; its initial weights for a state of None."""
    held = network.initial(torch.float64) if state is None else _params(state)
    held = {name: w.double() for name, w in held.items()}
    if network.fixed is None:
        return held
    fixed = network.fixed(torch.float64)
    return {name: w + held[f"{name}_B"] @ held[f"{name}_A"] for name, w in fixed.items()}


def _params(state: Tree) -> Weights:
    return (state.fast if isinstance(state, NestedState) else state).params


def _relative(mine: list[Tensor], theirs: list[Tensor]) -> float:
    apart = sum(float((a - b).square().sum()) for a, b in zip(mine, theirs, strict=True))
    size = sum(float(b.square().sum()) for b in theirs)
    return (apart / max(size, 1e-30)) ** 0.5


def format_levels(rows: Iterable[LevelRow]) -> str:
    """A table with, for each level, the tokens it has learned from, its mean change relative to its weights, and its
    bytes."""
    grouped: dict[str, list[LevelRow]] = {}
    for row in rows:
        grouped.setdefault(row.path if row.level is None else str(row.level), []).append(row)
    if not grouped:
        return "Nothing has been learned yet."
    cells = [("level", "networks", "period", "tokens read", "change", "bytes")]
    for name, group in grouped.items():
        change = sum(row.change for row in group) / len(group)
        # A state that begins empty has no size to compare its change with.
        shown = f"{change:.4f}" if math.isfinite(change) else "-"
        figures = (f"{max(row.tokens for row in group):,}", shown, f"{sum(row.bytes for row in group):,}")
        cells.append((name, str(len(group)), str(group[0].period or "-"), *figures))
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
