"""Levels with an associative objective of their own (signal "local")."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory import L2, DotProduct, Gates, State, scan
from nestlearn.memory.types import Weights
from nestlearn.nn.bounds import outgrown
from nestlearn.nn.common import full_precision, wide_dtype
from nestlearn.nn.ffn import FFNActivation
from nestlearn.nn.flops import scan_flops

from .level import Level, LevelWeights
from .nested import Nest, NestedState, TransferBy, scan_nested
from .network import Network
from .tape import fast_linear

CLOSED = -4.0
"""Initial logit of the step under ``orthogonalized``, whose writes are not small where gradients are."""


class LocalLevel(LevelWeights):
    r"""A feed-forward network per batch row that changes every ``period`` tokens.

        y_t = M(x_t) at the weights of the end of the last period,    M = down(act(up x)) or its SwiGLU form
        theta <- theta - sum_{t in the last C tokens} eta_t f(theta; x_t)                              (NL Eq. 71)

    The error signal f comes from an associative objective with the key x_t and the value ``u_t = V x_t``, softly
    bounded to ``u / sqrt(1 + mean u^2)``. V starts at zero. So nothing is written at first, and the level starts as a
    plain network. Retention decays to the initial weights M_0, which the outer loop trains.

    - ``descent``: objective ``1/2 ||M(x) - (M_0(x) + u)||^2``: the level learns to add u to the output of M_0.
    - ``momentum``: the same objective, with momentum.
    - ``orthogonalized``: the same objective. The size of a write does not depend on the size of the gradient. So V
      starts small and the steps start nearly closed: at V = 0 they would get no outer gradient.
    - ``delta``: objective ``-<M(x), u>`` with delta retention and the proximal step of each map.

    **Bounds.** No gate that the level can emit makes the recurrence expand. Let sigma_t be a sigmoid of x_t, C the
    period, and g the growth of the curvature since the random start.

    - ``descent``: ``eta_t = lr sigma_t / (4 g C max(d, ||x_t||^2))``. A period of one repeated token takes a quarter
      of the step that would reach the target of a linear map.
    - ``momentum``, with b kept per token: the same times ``(1 - b) min(1, C (1 - b))``, the critical damping of a heavy
      ball.
    - ``orthogonalized``: ``eta_t = lr sigma_t (1 - retain_t)``. Writes have spectral norm about 1 and never add up to
      more than lr.
    - ``delta``: ``eta_t = lr sigma_t / max(d, ||x_t||^2)`` before the proximal step, whose eigenvalue along the input
      of each map is in [-1, 1]. The dot product has no minimum, and with three or more maps no step is stable. So
      SwiGLU and low rank are refused.

    Args: see `LevelWeights`; ``transfer_by`` as in `nestlearn.nn.cms.nested`.
    """

    def __init__(
        self,
        d_model: int,
        level: Level,
        activation: FFNActivation,
        outer: int | None = None,
        transfer: float = 0.5,
        transfer_by: TransferBy = "difference",
    ) -> None:
        _check_local(level, activation, outer, transfer_by)
        objective = DotProduct() if level.rule == "delta" else L2()
        step = CLOSED if level.rule == "orthogonalized" else 0.0
        super().__init__(d_model, level, activation, objective, outer, transfer, step)
        self.transfer_by: TransferBy = transfer_by
        self.value = nn.Parameter(torch.empty(d_model, d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A random network with value map 0, which writes nothing (nearly nothing under ``orthogonalized``)."""
        super().reset_parameters()
        if self.level.rule == "orthogonalized":
            self.value.normal_(0, 0.1 * self.d_model**-0.5)
        else:
            self.value.zero_()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: State | NestedState | None,
        mask: Bool[Tensor, "b t"] | None,
        reset: Bool[Tensor, "b t"] | None,
        writes: bool,
        return_state: bool,
    ) -> tuple[Float[Tensor, "b t d"], State | NestedState | None]:
        """What the level adds to the stream at every token, and its state."""
        dtype = x.dtype
        reset = reset if self.level.reset else None
        with full_precision(x):
            x = x.to(wide_dtype(x))
            initial, memory = self.initial(x.dtype), self.bound(x.dtype)
            alone = state is None and mask is None and reset is None and not return_state
            if alone and x.shape[1] <= self.period:
                # No period ends before the last token, so no write would be read.
                start = self.start(None, initial, x)
                return memory.architecture(fast_linear(start.anchor), x).to(dtype), None
            value, gates = self._value(x, initial), self._gates(x, initial, writes)
            if self.outer is not None:
                nest = Nest(self.outer, self.transfer, initial, self.transfer_by)
                nested = cast("NestedState | None", state)
                y, nested = scan_nested(memory, nest, nested, x, value, gates, mask, reset)
                return y.to(dtype), nested if return_state else None
            start = self.start(cast("State | None", state), initial, x)
            y, end = scan(
                memory, start, x, x, value, gates, initial=initial, mask=mask, reset=reset, return_state=return_state
            )
        return y.to(dtype), end if return_state else None

    def _value(self, x: Tensor, initial: Weights) -> Tensor:
        value = F.linear(x, self.value.to(x.dtype))
        value = value * torch.rsqrt(1 + value.square().mean(-1, keepdim=True))
        if self.level.rule == "delta":
            return value
        return value + self.bound(x.dtype).architecture(lambda name, u: F.linear(u, initial[name]), x)

    def _gates(self, x: Tensor, initial: Weights, writes: bool) -> Gates:
        """Step size, kept fraction and momentum of every token; see the class docstring for their bounds."""
        step = self.level.lr * torch.sigmoid(self.gate(x)["lr"].squeeze(1))
        log_kept = self.keep(x) / self.period
        carried = None
        if self.level.has_momentum:
            beta = self.level.momentum ** (1 / self.period)
            carried = torch.full_like(step, beta)
        if self.level.rule == "orthogonalized":
            step = step * -torch.expm1(log_kept)
        else:
            step = step / x.square().sum(-1).clamp(min=self.d_model)
        if self.level.rule in ("descent", "momentum"):
            step = step / (4 * self.period * self._growth(initial))
        if self.level.rule == "momentum":
            damping = 1 - self.level.momentum ** (1 / self.period)
            step = step * (damping * min(1.0, self.period * damping))
        retain = torch.exp(log_kept).expand_as(step)
        return Gates(step if writes else torch.zeros_like(step), retain, carried)

    def _growth(self, initial: Weights) -> Tensor:
        """Growth of the curvature since the random start: the squared norms of all maps but one."""
        if self.fixed is None:
            return outgrown(initial, Network.gain) ** (len(initial) - 1)
        whole, parts = {}, []
        for name, slow in self.fixed(next(iter(initial.values())).dtype).items():
            a, b = initial[f"{name}_A"], initial[f"{name}_B"]
            whole[name] = slow + b @ a
            # A step of A moves the product B A in proportion to |B|², and a step of B in proportion to |A|².
            parts.append(3 * a.square().sum() / a.shape[0] + b.square().sum())
        return outgrown(whole, Network.gain) ** (len(whole) - 1) * torch.stack(parts).amax().clamp(min=1)

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token (multiply-add = 2): all reads, and the writes of periods that are read later."""
        width = self.d_model
        read = scan_flops(self.memory, width, width, context_length, writes=False)
        write = scan_flops(self.memory, width, width, context_length) - read
        if self.fixed is not None:
            slow = 2 * sum(w.numel() for w in self.fixed.values())
            # Errors take the constant maps forward (all but the last) and backward.
            read, write = read + slow, write + 2 * slow
        outer = 2 * width * (width + 1) + (0 if self.level.rule == "delta" else read)
        written = (context_length - 1) // self.period * self.period
        total = read + outer + write * written // context_length
        if self.outer is not None and self.transfer_by == "gradient":
            # Complete windows run once more, forward and backward.
            total += 2 * (read + write) * (context_length // self.outer * self.outer) // context_length
        return total


def _check_local(level: Level, activation: FFNActivation, outer: int | None, transfer_by: TransferBy) -> None:
    """Raise ValueError for settings that no bound keeps stable."""
    if level.lr > 1:
        raise ValueError(
            f"lr={level.lr!r} must be at most 1: larger steps let some sequence of tokens make the level's weights "
            "or its gradients grow without bound."
        )
    if level.clip is not None:
        raise ValueError(
            "clip bounds the gradient of a segment's loss; with signal='local' steps are bounded. Drop it."
        )
    if level.rule == "orthogonalized" and level.retain == 1:
        raise ValueError(
            "rule='orthogonalized' with retain=1 adds up writes of equal size without end. Use retain below 1."
        )
    if level.rule == "orthogonalized" and outer is not None and transfer_by == "gradient":
        raise ValueError(
            "rule='orthogonalized' writes matrices whose size does not depend on the size of the gradient, so it has "
            "no meta-gradient. Use transfer_by='difference', or rule='descent' or 'momentum'."
        )
    if level.rule != "delta":
        return
    if activation == "swiglu":
        raise ValueError(
            "rule='delta' is unstable with activation='swiglu': its three maps multiply each other. "
            "Use rule='descent', or activation='gelu'."
        )
    if level.rank is not None:
        raise ValueError(
            "rule='delta' is unstable with rank: the parts of the maps multiply each other, and the dot-product "
            "objective has no minimum. Use rule='descent', hidden= instead of rank=, or signal='loss'."
        )
    if outer is not None:
        raise ValueError(
            "rule='delta' with variant='nested' has no bound: the dot-product objective has no minimum, and nothing "
            "pulls moving initial weights back. Use rule='descent', or signal='loss'."
        )
