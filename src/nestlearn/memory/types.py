"""The records that pass between the parts of an associative memory: factors, gates, state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


PENDING = "pending"
"""Key in ``State.extra`` of the step sizes that `OrthogonalizedMomentum` has yet to write."""


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

    ``params`` are the current weights W (accumulators, where the retention is a mirror map), ``anchor`` the same at
    the start of the current chunk (where errors are taken), ``initial`` what a reset or ``retain_to="initial"`` goes
    back to, ``momentum`` the momentum S (None without it), ``position`` the number of tokens read in the current
    chunk, in ``[0, chunk_size)``. ``extra`` holds further tensors ``[*b]`` by name: ``pending``, the step sizes of a
    chunk under `OrthogonalizedMomentum`, summed up to now. ``aligned`` is a plain bool: True only where every row is
    known, without looking at the tensors, to stand at the start of a chunk; it selects the faster path.
    """

    params: Weights
    momentum: Weights | None
    anchor: Weights
    initial: Weights
    position: Int[Tensor, "*b"]
    extra: dict[str, Any]
    aligned: bool = False

    def detach(self) -> State:
        """The same state cut from the autograd graph (truncated backpropagation through time)."""

        def cut(weights: Weights) -> Weights:
            return {name: w.detach() for name, w in weights.items()}

        return self._replace(
            params=cut(self.params),
            momentum=None if self.momentum is None else cut(self.momentum),
            anchor=cut(self.anchor),
            initial=cut(self.initial),
            extra={name: x.detach() if isinstance(x, Tensor) else x for name, x in self.extra.items()},
        )
