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
        recent: the last ``window - 1`` tokens of a memory that writes several together (`nestlearn.memory.windowed`):
            key, value, step size, threshold if there is one, and 1 if the token is there.
    """

    params: Weights
    momentum: Weights | None
    anchor: Weights
    position: Int[Tensor, "*b"]
    pending: Float[Tensor, "*b"] | None = None
    aligned: bool = False
    recent: Float[Tensor, "*b c w"] | None = None

    def detach(self) -> State:
        """The same state cut from the autograd graph (truncated backpropagation through time)."""
        return self.map(Tensor.detach)

    def flatten(self, leading: int) -> State:
        """The state with its first ``leading`` dimensions as one."""
        return self.map(lambda x: x.reshape(-1, *x.shape[leading:]))

    def unflatten(self, batch: tuple[int, ...]) -> State:
        """The inverse of `flatten`."""
        return self.map(lambda x: x.reshape((*batch, *x.shape[1:])))

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """``change`` applied to every tensor."""
        return State(
            _each(self.params, change),
            None if self.momentum is None else _each(self.momentum, change),
            _each(self.anchor, change),
            change(self.position),
            None if self.pending is None else change(self.pending),
            self.aligned,
            None if self.recent is None else change(self.recent),
        )


class Tokens(NamedTuple):
    """The tokens of one call: queries, keys, values, gates, and which of them count.

    Args:
        q, k: ``[*b, t, d_key]``.
        v: ``[*b, t, d_value]``.
        gates: each ``[*b, t]``.
        mask: False marks a token that changes nothing (None: all count).
        reset: True puts the row back to its initial weights before that token (None: never).
    """

    q: Float[Tensor, "*b t d_key"]
    k: Float[Tensor, "*b t d_key"]
    v: Float[Tensor, "*b t d_value"]
    gates: Gates
    mask: Bool[Tensor, "*b t"] | None = None
    reset: Bool[Tensor, "*b t"] | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """``change`` applied to every tensor that is there."""
        q, k, v, gates, mask, reset = self
        flags = (None if flag is None else change(flag) for flag in (mask, reset))
        return Tokens(change(q), change(k), change(v), gates.map(change), *flags)


def _each(weights: Weights, change: Callable[[Tensor], Tensor]) -> Weights:
    return {name: change(w) for name, w in weights.items()}
