"""Levels on a pretrained model, which learn only while it reads segments: what they write, and reading without them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nestlearn.models.stacking import LevelState, read_segment
from nestlearn.models.stacking.model import StackedModel
from nestlearn.models.stacking.network import LevelFast, StackedLevel

from .system import Component
from .writes import Written, written_over


class Reading(NamedTuple):
    """Of a text in segments: the mean loss of its tokens in nats, all logits, and the state after each segment."""

    loss: Tensor
    logits: Tensor
    states: list[LevelState]


def learns_by_reading(model: nn.Module) -> bool:
    """Whether the model is a stacked one."""
    return isinstance(model, StackedModel)


def read_text(model: Any, ids: Tensor, off: Collection[int] = ()) -> Reading:
    """Read token ids ``[rows, tokens]`` from no state on; the levels with numbers in ``off`` learn nothing."""
    segment, state, keys = model.stack_plan.segment, LevelState(), ()
    nats, logits, states = [], [], []
    for piece in ids.split(segment, 1):
        read = read_segment(model, piece, state, keys)
        state, keys = read.state.forget(off) if off else read.state, read.keys
        nats.append(read.nats.flatten())
        logits.append(read.logits)
        states.append(state)
    return Reading(torch.cat(nats).mean(), torch.cat(logits, 1), states)


def level_numbers(component: Component) -> set[int]:
    """Which levels a component stands for, from the names ``PATH.levels.NUMBER`` of its modules."""
    parts = [name.rsplit(".", 2) for name in component.members]
    return {int(number) for _, kind, number in parts if kind == "levels" and number.isdecimal()}


def observe_levels(model: Any, ids: Tensor, components: Iterable[Component]) -> dict[str, Written]:
    """What each level writes in the first row, by the label of its component; see `nestlearn.levels.writes`."""
    modules, found = dict(model.named_modules()), {}
    row = ids[:1]
    reading = read_text(model, row)
    for component in components:
        level = modules.get(component.members[0]) if component.members else None
        if not isinstance(level, StackedLevel):
            continue
        path, number = component.members[0].rsplit(".levels.", 1)
        held = [found_level(state, path, int(number)) for state in reading.states]
        anchors = [None if one is None else one.weights.anchor for one in held]
        updates = sum(_differ(a, b) for a, b in zip([None, *anchors], anchors, strict=False))
        off = read_text(model, row, level_numbers(component)).logits
        last = held[-1]
        if last is not None:
            start = {n: w.expand_as(last.weights.params[n]) for n, w in level.initial(reading.logits).items()}
            end = last.weights.params
            found[component.label] = written_over(row.shape[1], updates, start, end, reading.logits, off)
    return found


def found_level(state: LevelState, path: str, number: int) -> LevelFast | None:
    """The level of an MLP in a state; None before it has learned anything."""
    levels = state.networks.get(path)
    return None if levels is None else levels[number]


def _differ(before: Any, after: Any) -> bool:
    """Whether the weights that are read have changed; the first ones of a level are its initial weights."""
    if after is None:
        return False
    if before is None:
        # Whole maps and B of low-rank ones start at 0.
        return any(bool(w.any()) for name, w in after.items() if not name.endswith("_A"))
    return not all(torch.equal(after[name], before[name]) for name in after)
