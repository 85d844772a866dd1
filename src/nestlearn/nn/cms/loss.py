"""Levels that learn from the next-token loss of the model (signal "loss")."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nestlearn.memory import Factor, State
from nestlearn.memory.clock import choose
from nestlearn.memory.types import Weights
from nestlearn.nn.common import full_precision, wide_dtype

from .level import LevelWeights, loss_gates
from .nested import NestedState, restart, transfer
from .tape import Factors, Tape, fast_linear, write


class LossLevel(LevelWeights):
    """A feed-forward network per batch row that learns from the losses of the tokens just read.

        y_t = M(x_t) at the weights of the end of the last period
        theta <- theta - sum_{t in the last C tokens} eta_t f(theta; x_t),  f = d losses / d theta     (NL Eq. 71)

    A call only reads. The model reads a segment and takes the gradient of its losses (`nestlearn.nn.cms.tape`); then
    `absorb` writes it. The step ``lr * 2 sigmoid(w . x_t + b)`` starts at lr. The kept fraction of a period is learned
    too. Both get outer gradients, of first and of second order.

    Args: see `LevelWeights`.
    """

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: State | NestedState | None,
        reset: Bool[Tensor, "b t"] | None,
        return_state: bool,
        tape: Tape | None = None,
        key: Hashable = None,
    ) -> tuple[Float[Tensor, "b t d"], State | NestedState | None]:
        """The level's output, and its state. Rows with ``reset`` at the first token go back to the initial weights."""
        dtype = x.dtype
        with full_precision(x):
            x = x.to(wide_dtype(x))
            now, initial, position = self._unpack(state, x)
            if reset is not None and self.level.reset:
                start = self.initial(x.dtype)
                now, initial = restart(now, start, reset[:, 0]), choose(reset[:, 0], start, initial)
                position = torch.where(reset[:, 0], 0, position)
            y = self.bound(x.dtype).architecture(fast_linear(now.anchor, tape, key), x)
        return y.to(dtype), self._pack(now, initial, position) if return_state else None

    def _unpack(self, state: State | NestedState | None, x: Tensor) -> tuple[State, Weights, Tensor]:
        """The memory's state, its initial weights, and the number of tokens since these moved."""
        if isinstance(state, NestedState):
            return state.fast, state.initial, state.position
        initial = self.initial(x.dtype)
        now = self.start(state, initial, x)
        return now, {n: w.expand_as(now.params[n]) for n, w in initial.items()}, torch.zeros_like(now.position)

    def _pack(self, now: State, initial: Weights, position: Tensor) -> State | NestedState:
        # Rows are written at different times, so the phase of all rows is not known without reading the tensor.
        now = now._replace(aligned=False)
        return now if self.outer is None else NestedState(now, initial, position, False)

    def absorb(
        self, state: State | NestedState, factors: Factors, learns: Bool[Tensor, "b t"] | None = None
    ) -> State | NestedState:
        """The state after a segment with these factors. The step is 0 at tokens where ``learns`` is False."""
        x = factors[self.memory.architecture.query_map].input
        with full_precision(x):
            x = x.to(wide_dtype(x))
            now, initial, position = self._unpack(state, x)
            scale = 2 * torch.sigmoid(self.gate(x)["lr"].squeeze(1))
            if learns is not None:
                scale = torch.where(learns, scale, 0)
            gates = loss_gates(self.level, scale, self.keep(x).exp())
            now = write(self.memory, now, factors, gates, self.level.clip, initial)
            if self.outer is not None:
                position = (position + x.shape[1]) % self.outer
                now, initial = transfer(now, initial, self.transfer, position == 0)
        return self._pack(now, initial, position)

    def advance_clock(self, state: State | NestedState, tokens: int) -> State | NestedState:
        """The state after tokens with step 0: what was learned decays as after any other tokens."""
        weights = (state.fast if isinstance(state, NestedState) else state).params
        nothing = {
            name: Factor(w.new_zeros(w.shape[0], tokens, w.shape[2]), w.new_zeros(w.shape[0], tokens, w.shape[1]))
            for name, w in weights.items()
        }
        some = next(iter(weights.values()))
        return self.absorb(state, nothing, some.new_zeros(some.shape[0], tokens, dtype=torch.bool))

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token (multiply-add = 2): the read, and the writes of all periods that are read later.

        The backward pass of a segment runs through the whole model and is not counted here."""
        slow = 0 if self.fixed is None else sum(w.numel() for w in self.fixed.values())
        fast = sum(w.numel() for w in self.initial.values())
        written = (context_length - 1) // self.period * self.period
        return 2 * (slow + fast) + 2 * fast * written // context_length
