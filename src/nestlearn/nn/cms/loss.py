"""Levels that the next-token loss teaches while they read (signal "loss")."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nestlearn.memory import Factor, Gates, State
from nestlearn.nn.common import GateProjection, full_precision, wide_dtype
from nestlearn.nn.ffn import Activation

from .level import Level, loss_gates
from .local import LevelWeights
from .nested import NestedState, Running, restart, transfer, unpack_nested
from .tape import Factors, Tape, read, write


class LossLevel(LevelWeights):
    """A feed-forward network per batch row that the loss of the tokens just read teaches.

        y_t = M(x_t) at the weights of the last period's end
        theta <- theta - sum_{t in the last C tokens} eta_t f(theta; x_t),  f = d losses / d theta     (NL Eq. 71)

    A read changes nothing: the model reads a segment, takes the gradient of its losses (`nestlearn.nn.cms.tape`), and
    `absorb` writes it. The step is ``lr * 2 sigmoid(w . x_t + b)``, lr at first; the kept fraction of a period is
    learned too. Both get outer gradients however factors are differentiated.

    Args:
        d_model: width of input and output.
        level: its `Level`.
        activation: ``"swiglu"`` or ``"gelu"``.
        outer: tokens after which the initial weights move by ``rho`` of what was learned; None never moves them.
        rho: see `nestlearn.nn.cms.nested`.
    """

    def __init__(
        self, d_model: int, level: Level, activation: Activation, outer: int | None = None, rho: float = 0.5
    ) -> None:
        super().__init__(d_model, level, activation)
        self.outer, self.rho = outer, rho
        self.keep = self.learned_keep()
        self.gate = GateProjection(d_model, {"lr": (0.0,)})
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A random network, and steps of about lr."""
        super().reset_parameters()
        self.gate.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: State | NestedState | None,
        reset: Bool[Tensor, "b t"] | None,
        return_state: bool,
        tape: Tape | None = None,
        key: Hashable = None,
    ) -> tuple[Float[Tensor, "b t d"], State | NestedState | None]:
        """What the level adds to the stream, and its state, in which a row that ``reset`` names starts anew."""
        dtype = x.dtype
        with full_precision(x):
            x = x.to(wide_dtype(x))
            now, position = self._unpack(state, x)
            if reset is not None and self.level.reset:
                now = restart(now, self.initial_weights(x.dtype), reset[:, 0])
                position = torch.where(reset[:, 0], 0, position)
            y = read(self.bound(x.dtype).architecture, now.anchor, x, tape, key)
        return y.to(dtype), self._pack(now, position) if return_state else None

    def _unpack(self, state: State | NestedState | None, x: Tensor) -> tuple[Running, Tensor]:
        """The memory's state, and tokens since its initial weights moved."""
        initial = self.initial_weights(x.dtype)
        if isinstance(state, NestedState):
            return unpack_nested(state), state.position
        now = self.start(state, initial, x.shape[0], x.dtype, x.device)
        full = {name: w.expand_as(now.params[name]) for name, w in initial.items()}
        return Running.of(now, full), torch.zeros_like(now.position)

    def _pack(self, now: Running, position: Tensor) -> State | NestedState:
        # Segments are written to rows one by one: no call can know their phase without looking.
        now = now._replace(aligned=False)
        return now.state() if self.outer is None else NestedState(now.state(), now.initial, position, False)

    def absorb(
        self, state: State | NestedState, factors: Factors, learns: Bool[Tensor, "b t"] | None = None
    ) -> State | NestedState:
        """The state after a segment whose factors are given; ``learns`` False has step 0."""
        x = factors[self.memory.architecture.query_map].input
        with full_precision(x):
            x = x.to(wide_dtype(x))
            now, position = self._unpack(state, x)
            gates = self._gates(x, learns)
            end = write(self.memory, now.state(), factors, gates, self.level.clip, initial=now.initial)
            now = Running.of(end, now.initial)
            if self.outer is not None:
                position = (position + x.shape[1]) % self.outer
                now = transfer(now, self.rho, position == 0)
        return self._pack(now, position)

    def advance_clock(self, state: State | NestedState, tokens: int) -> State | NestedState:
        """The state after tokens whose step is 0: what was learned is kept as after any others."""
        weights = (state.fast if isinstance(state, NestedState) else state).params
        nothing = {
            name: Factor(w.new_zeros(w.shape[0], tokens, w.shape[2]), w.new_zeros(w.shape[0], tokens, w.shape[1]))
            for name, w in weights.items()
        }
        some = next(iter(weights.values()))
        return self.absorb(state, nothing, some.new_zeros(some.shape[0], tokens, dtype=torch.bool))

    def _gates(self, x: Tensor, learns: Tensor | None) -> Gates:
        scale = 2 * torch.sigmoid(self.gate(x)["lr"].squeeze(1))
        if learns is not None:
            scale = torch.where(learns, scale, 0)
        return loss_gates(self.level, scale, self.log_kept(x.dtype).exp())

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token (multiply-add = 2): the read, and writes in the periods that are read again.

        The backward pass of a segment, through the whole model, is not the level's."""
        slow = 0 if self.fixed is None else sum(w.numel() for w in self.fixed.values())
        fast = sum(w.numel() for w in self.initial.values())
        written = (context_length - 1) // self.period * self.period
        return 2 * (slow + fast) + 2 * fast * written // context_length

    def extra_repr(self) -> str:
        return f"period={self.period}, rule={self.level.rule}, lr={self.level.lr}, clip={self.level.clip}"
