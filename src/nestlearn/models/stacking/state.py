"""What the levels of a stacked model have learned, and which of it a forward pass reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.memory import State
from nestlearn.nn.cms.tape import Tape
from nestlearn.nn.state import clone, detach, index_rows, map_tensors, record, state_bytes

from .plan import StackPlan


@record("stacking.level")
class LevelFast(NamedTuple):
    """One level of one MLP, for all rows: its fast weights, and the size of its gradients so far.

    ``energy`` is the moving average of the squared gradient norm of a segment, over ``writes`` segments.
    """

    weights: State
    energy: Float[Tensor, "b"]
    writes: int


@dataclass(frozen=True)
class LevelState:
    """Fast weights of every level of every stacked MLP, for one or more rows. Immutable: reading gives a new one.

    An empty state (``LevelState()``) is the pretrained model. A row learns from its own text only; a state of one row
    serves a batch of any size.

    Args:
        networks: by path of the MLP, one entry for each level; None where it has learned nothing.
        tokens: read so far, as the clock counts them: the last segment of a document counts as a whole one.

    Example:
        >>> LevelState().rows, LevelState().nbytes
        (0, 0)
    """

    networks: Mapping[str, tuple[LevelFast | None, ...]] = field(default_factory=dict)
    tokens: int = 0

    @property
    def rows(self) -> int:
        """Rows held; 0 before the first write."""
        written = (level for levels in self.networks.values() for level in levels if level is not None)
        first = next(written, None)
        return 0 if first is None else first.energy.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return state_bytes(dict(self.networks))

    def index_rows(self, rows: Iterable[int]) -> LevelState:
        """Row i of the result is row ``rows[i]``."""
        index = torch.tensor(list(rows), dtype=torch.long)
        return replace(self, networks=index_rows(dict(self.networks), index))

    def forget(self, levels: Iterable[int] | None = None) -> LevelState:
        """The state with some levels (by number, 0 the fastest; None all) back at their initial weights."""
        if levels is None:
            return LevelState()
        gone = set(levels)
        kept = {
            path: tuple(None if i in gone else level for i, level in enumerate(held))
            for path, held in self.networks.items()
        }
        return replace(self, networks={path: held for path, held in kept.items() if any(x is not None for x in held)})

    def with_levels(self, levels: Iterable[int], other: LevelState) -> LevelState:
        """The state with some levels as they are in another one."""
        chosen, networks = set(levels), {}
        for path in [*self.networks, *(path for path in other.networks if path not in self.networks)]:
            mine, theirs = self.networks.get(path), other.networks.get(path)
            count = len(mine or theirs or ())
            mine, theirs = mine or (None,) * count, theirs or (None,) * count
            networks[path] = tuple(b if i in chosen else a for i, (a, b) in enumerate(zip(mine, theirs, strict=True)))
        return replace(self, networks=networks)

    def detach(self) -> LevelState:
        """The state cut from the autograd graph."""
        return replace(self, networks=detach(dict(self.networks)))

    def clone(self) -> LevelState:
        """A copy that shares no memory with this one."""
        return replace(self, networks=clone(dict(self.networks)))

    def to(self, device: torch.device | str) -> LevelState:
        """The state on another device."""
        return replace(self, networks=map_tensors(lambda x: x.to(device), dict(self.networks)))

    def check(self, plan: StackPlan) -> None:
        """Raise ValueError unless the state can be one of a model with this plan."""
        unknown = sorted(set(self.networks) - set(plan.paths))
        lengths = {len(levels) for levels in self.networks.values()} - {len(plan.levels)}
        if unknown or lengths:
            raise ValueError(
                f"the level state is of another model: it has MLPs {unknown} that this model does not stack, or "
                f"{sorted(lengths)} levels where it has {len(plan.levels)}. Use it with the model that learned it."
            )


class ActiveLevels(NamedTuple):
    """What a forward pass of the model with this plan reads and records."""

    plan: StackPlan
    state: LevelState | None
    tape: Tape | None


# Of the current thread (or task) alone, so that many can use one model at once, each with its own state.
_ACTIVE: ContextVar[tuple[ActiveLevels, ...]] = ContextVar("active_levels", default=())


def active_levels(plan: StackPlan) -> ActiveLevels | None:
    """The innermost `reading` of the model with this plan; None for a plain forward pass."""
    for active in reversed(_ACTIVE.get()):
        if active.plan is plan:
            return active
    return None


@contextmanager
def reading(plan: StackPlan, state: LevelState | None, tape: Tape | None = None) -> Iterator[None]:
    """Forward passes inside read this state, and record errors on the tape.

    Raises:
        ValueError: a state of another model.
    """
    if state is not None:
        state.check(plan)
    token = _ACTIVE.set((*_ACTIVE.get(), ActiveLevels(plan, state, tape)))
    try:
        yield
    finally:
        _ACTIVE.reset(token)
