"""The fast state of self-modifying Titans, and what happens to groups of memories between chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nestlearn.memory import Gates, State
from nestlearn.memory.chunked import split_tokens
from nestlearn.memory.clock import known_empty, poisoned_from
from nestlearn.memory.types import Running, Weights
from nestlearn.nn.state import record

STREAMS = ("q", "k", "v", "eta", "alpha")
"""What a token is projected to; all but q adapt by default."""

MOST_LEARNED = 64
"""Tokens that projection memories learn at once: more would spend longer on the triangular systems than they save."""


@record("self_modifying")
class SelfModifyingState(NamedTuple):
    """Fast state of the layer: its projection memories, its main memory, and the tail of the convolution.

    Rows of both groups are ``[B, heads, memories]``: the adaptive streams (None without any), and one.
    """

    projections: State | None
    memory: State
    conv: Float[Tensor, "b w ch"] | None

    @property
    def clock(self) -> State:
        """The group whose chunks are the longest."""
        return self.memory if self.projections is None else self.projections


class Projected(NamedTuple):
    """What the projection memories make of a span of tokens; rows are ``batch * heads``."""

    q: Tensor  # [r, c, d]
    k: Tensor
    v: Tensor
    gates: Gates  # [r, c]


def quarantine(x: Tensor, mask: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zero the tokens that are masked or not finite, and say which outputs non-finite tokens poison.

    Matrix products over tokens would carry a NaN into the past (0 * NaN); a token loop would not.
    """
    bad = ~torch.isfinite(x).all(-1)
    if mask is not None:
        bad = bad & mask
    drop = bad if mask is None else bad | ~mask
    if not known_empty(drop):
        x = torch.where(drop.unsqueeze(-1), 0, x)
    return x, poisoned_from(bad, mask, reset)


def poison_state(state: SelfModifyingState, rows: Tensor) -> SelfModifyingState:
    """NaN in the main memory of the rows that ended poisoned."""
    lost = rows.view(-1, 1, 1, 1, 1)
    params = {m: torch.where(lost, float("nan"), w) for m, w in state.memory.params.items()}
    return state._replace(memory=state.memory._replace(params=params))


def single(group: Running) -> Running:
    """Drop the memories dimension of a group of one."""
    return each_weight(group, lambda w: w.squeeze(1))


def stacked(group: Running) -> Running:
    """One memory as a group of one."""
    return each_weight(group, lambda w: w.unsqueeze(1))


def each_weight(group: Running, fn: Callable[[Tensor], Tensor]) -> Running:
    """The group with ``fn`` applied to every weight."""
    done: dict[int, Weights] = {}

    def change(weights: Weights) -> Weights:
        # Keep "these are the same weights" visible: a fresh memory is recognized by identity.
        if id(weights) not in done:
            done[id(weights)] = {m: fn(w) for m, w in weights.items()}
        return done[id(weights)]

    momentum = None if group.momentum is None else change(group.momentum)
    return group._replace(
        params=change(group.params), anchor=change(group.anchor), initial=change(group.initial), momentum=momentum
    )


def handed_on(group: Running, position: Int[Tensor, "b"], aligned: bool) -> State:
    """The state of a group of rows ``[batch * heads, memories]``, as the layer hands it on."""

    def heads(weights: Weights) -> Weights:
        return {m: w.unflatten(0, (len(position), -1)) for m, w in weights.items()}

    momentum, params = None if group.momentum is None else heads(group.momentum), heads(group.params)
    rows = next(iter(params.values())).shape[:3]
    return State(params, momentum, heads(group.anchor), position[:, None, None].expand(rows), aligned=aligned)


def _rows_like(rows: Tensor, w: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (w.dim() - 1))


def refresh(group: Running, begins: Tensor) -> Running:
    """Rows where ``begins``: a new chunk takes its errors at the current weights."""
    anchor = {m: torch.where(_rows_like(begins, w), w, group.anchor[m]) for m, w in group.params.items()}
    return group._replace(anchor=anchor)


def back_to_initial(group: Running, rows: Tensor) -> Running:
    """Rows that were reset inside the span: what follows in that chunk takes its errors at the initial weights."""
    anchor = {m: torch.where(_rows_like(rows, w), group.initial[m], w) for m, w in group.anchor.items()}
    return group._replace(anchor=anchor)


def split_projected(made: Projected, size: int) -> list[Projected]:
    """Pieces of ``size`` tokens."""
    cut = split_tokens((made.q, made.k, made.v, *made.gates), size)
    return [Projected(q, k, v, Gates(*gates)) for q, k, v, *gates in cut]


def check_settings(
    d_model: int, num_heads: int, adaptive: Sequence[str], objective: str, delta: bool, retention: bool
) -> None:
    """Raise ValueError for settings of `SelfModifyingTitans` that contradict each other."""
    if d_model < 1 or num_heads < 1 or d_model % num_heads:
        raise ValueError(f"d_model must be divisible by num_heads, got d_model={d_model}, num_heads={num_heads}")
    if not set(adaptive) <= set(STREAMS) or len(set(adaptive)) != len(adaptive):
        raise ValueError(f"adaptive must be distinct names out of {', '.join(STREAMS)}; got {tuple(adaptive)}")
    if objective not in ("dot", "l2"):
        raise ValueError(f"objective must be 'dot' or 'l2', got {objective!r}")
    if not retention and not delta:
        raise ValueError(
            "delta=False with retention=False leaves nothing that bounds the memory. "
            "Ablate one at a time: delta=False needs the retention gate."
        )
