"""The records that pass between the parts of an associative memory: factors, gates, state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Weights = dict[str, Tensor]
"""Named linear maps of a memory: ``{name: Float[*b, out, in]}``."""


class Factor(NamedTuple):
    """The gradient of one linear map, kept factored: ``dL/dW_t = error_t input_t^T`` (NL Eq. 29).

    The outer product is never formed per token.
    """

    input: Float[Tensor, "*b t in"]
    error: Float[Tensor, "*b t out"]


class Gates(NamedTuple):
    """Per-token scalars of the inner update, each ``[*b, t]``.

    ``lr`` is the step size eta, ``retain`` the kept fraction alpha (1 forgets nothing; ``[*b, t, d_key]`` for
    ``Decay(per_channel=True)``), ``momentum`` the kept fraction beta of the momentum (required by algorithms with
    momentum, refused by ``Descent()``), ``threshold`` that of the objective (required by `Huber` and
    `ValueShiftRobust` without a constant one, refused by every other objective).
    Exact zeros and ones are legal.
    """

    lr: Float[Tensor, "*b t"]
    retain: Float[Tensor, "*b t"] | Float[Tensor, "*b t d_key"]
    momentum: Float[Tensor, "*b t"] | None = None
    threshold: Float[Tensor, "*b t"] | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Gates:
        """``change`` applied to every gate that is there."""
        return Gates(*(None if gate is None else change(gate) for gate in self))  # type: ignore[arg-type]

    def at(self, t: int, valid: Bool[Tensor, "*b"]) -> Gates:
        """The gates of token ``t``; 0 in rows where it is not ``valid``."""

        def now(gate: Tensor) -> Tensor:
            gate = gate.select(valid.dim(), t)
            return torch.where(valid if gate.dim() == valid.dim() else valid.unsqueeze(-1), gate, 0)

        return self.map(now)


class State(NamedTuple):
    """Everything a memory needs to go on after any token; a pytree of tensors.

    The initial weights are not part of it: they are parameters, and an argument of `nestlearn.memory.scan`.

    Args:
        params: the current weights W, ``{map: [*b, out, in]}`` (accumulators, where the retention is a mirror map).
        momentum: the momentum S of every map (None without it).
        anchor: the weights at the start of the current chunk, where errors are taken.
        position: tokens read in the current chunk, in ``[0, chunk_size)``.
        pending: step sizes of the current chunk, summed up to now, under `OrthogonalizedMomentum` (else None).
        aligned: a plain bool, True only where every row is known, without looking at the tensors, to stand at the
            start of a chunk; it selects the faster path.
    """

    params: Weights
    momentum: Weights | None
    anchor: Weights
    position: Int[Tensor, "*b"]
    pending: Float[Tensor, "*b"] | None = None
    aligned: bool = False

    def detach(self) -> State:
        """The same state cut from the autograd graph (truncated backpropagation through time)."""
        return self.map(Tensor.detach)

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """``change`` applied to every tensor."""
        return State(
            _each(self.params, change),
            None if self.momentum is None else _each(self.momentum, change),
            _each(self.anchor, change),
            change(self.position),
            None if self.pending is None else change(self.pending),
            self.aligned,
        )


class Running(NamedTuple):
    """A `State` while tokens are read, with the ``initial`` weights that resets and retention go back to.

    ``displacement`` is params - initial, where one span hands it to the next.
    """

    params: Weights
    momentum: Weights | None
    anchor: Weights
    initial: Weights
    position: Int[Tensor, "*b"]
    pending: Float[Tensor, "*b"] | None = None
    displacement: Weights | None = None
    aligned: bool = False

    @classmethod
    def of(cls, state: State, initial: Weights) -> Running:
        """A state that goes on from here."""
        params, momentum, anchor, position, pending, aligned = state
        return cls(params, momentum, anchor, initial, position, pending, None, aligned)

    def state(self) -> State:
        """What the next call needs."""
        return State(self.params, self.momentum, self.anchor, self.position, self.pending, self.aligned)


def _each(weights: Weights, change: Callable[[Tensor], Tensor]) -> Weights:
    return {name: change(w) for name, w in weights.items()}
