"""Levels whose own objective teaches them while they read (signal "local")."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory import L2, AssociativeMemory, DotProduct, Gates, State, scan
from nestlearn.memory.types import Weights
from nestlearn.nn.bounds import outgrown
from nestlearn.nn.common import GateProjection, InitialWeights, full_precision, wide_dtype
from nestlearn.nn.ffn import Activation
from nestlearn.nn.flops import scan_flops

from .level import Level, level_memory
from .nested import Nest, NestedState, TransferBy, scan_nested
from .network import LowRank, Network
from .tape import read

KEPT_PER_PERIOD = 4.0
"""Initial logit of what a level keeps over one period: sigmoid(4) = 0.98."""

CLOSED = -4.0
"""Initial logit of the step under a rule that has no small gradients."""


class SlowWeights(nn.ParameterDict):
    """The part of a low-rank level's maps that does not change while it reads, ``self[map]: [out, in]``."""

    def __init__(self, network: Network, d_model: int) -> None:
        self.network = network
        shapes = network.shapes(d_model, d_model)
        super().__init__({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The network's own initial values."""
        for name, weight in self.items():
            weight.copy_(self.network.init(name, tuple(weight.shape), None))


class LevelWeights(nn.Module):
    """What every level with a period has: a memory, its initial weights, and what it keeps over a period.

    ``initial`` are the weights that each row starts from, ``fixed`` the slow ones of low-rank maps (else None),
    ``keep`` the logit of the kept fraction, where the level does not give it as a number.
    """

    def __init__(
        self, d_model: int, level: Level, activation: Activation, objective: L2 | DotProduct | None = None
    ) -> None:
        super().__init__()
        if level.period is None:
            raise ValueError("a level without a period never changes; use FeedForward")
        self.level, self.period, self.d_model = level, level.period, d_model
        self.network = Network(level.units(d_model, activation), activation)
        architecture = self.network if level.rank is None else LowRank(self.network, level.rank)
        self.memory = level_memory(level, architecture, objective)
        self.initial = InitialWeights(self.memory, (), d_model, d_model)
        self.fixed = None if level.rank is None else SlowWeights(self.network, d_model)
        self.keep: nn.Parameter | None = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A random network, and a level that keeps 98 % of what it wrote over one period."""
        self.initial.reset_parameters()
        if self.fixed is not None:
            self.fixed.reset_parameters()
        if self.keep is not None:
            self.keep.fill_(KEPT_PER_PERIOD)

    def learned_keep(self) -> nn.Parameter | None:
        """A parameter for the logit of the kept fraction, where the level does not give it as a number."""
        return nn.Parameter(torch.empty(())) if self.level.retain is None else None

    def initial_weights(self, dtype: torch.dtype) -> Weights:
        """The weights each row starts from."""
        return self.initial(dtype)

    def bound(self, dtype: torch.dtype) -> AssociativeMemory:
        """The memory, with the slow weights of its architecture."""
        if self.fixed is None:
            return self.memory
        architecture = cast(LowRank, self.memory.architecture)
        fixed = {name: weight.to(dtype) for name, weight in self.fixed.items()}
        return replace(self.memory, architecture=architecture.on(fixed))

    def log_kept(self, dtype: torch.dtype) -> Float[Tensor, ""]:
        """Logarithm of the fraction kept over one period."""
        if self.keep is not None:
            return F.logsigmoid(self.keep.to(dtype))
        kept = cast(float, self.level.retain)
        device = next(iter(self.initial.values())).device
        return torch.tensor(math.log(kept) if kept > 0 else -math.inf, dtype=dtype, device=device)

    def start(
        self, state: State | None, initial: Weights, rows: int, dtype: torch.dtype, device: torch.device
    ) -> State:
        """The given state, or a fresh one."""
        if state is None:
            return self.memory.init_state((rows,), self.d_model, self.d_model, initial, dtype=dtype, device=device)
        return state


class LocalLevel(LevelWeights):
    r"""A feed-forward network per batch row that changes every ``period`` tokens.

        y_t = M(x_t) at the weights of the last period's end,        M = down(act(up x)) or its SwiGLU form
        theta <- theta - sum_{t in the last C tokens} eta_t f(theta; x_t)                              (NL Eq. 71)

    The error signal f is local: an associative objective with the key x_t and the value ``u_t = V x_t``, softly
    bounded to ``u / sqrt(1 + mean u^2)``. V starts at zero, so that nothing is written at first and the level starts
    as a plain network. Weights are kept toward their initial, meta-learned state.

    - ``descent``: objective ``1/2 ||M(x) - (M_0(x) + u)||^2``: the level learns to add u to its initial network M_0.
    - ``momentum``: the same, with momentum.
    - ``orthogonalized``: the same; what is written has the same size however small the gradient is, so V starts small
      and the steps nearly closed instead of V at zero, where they would have no gradient.
    - ``delta``: objective ``-<M(x), u>`` with delta retention and the proximal step of each map.

    **Bounds** (no gate the level can emit makes it expand), with sigma_t a sigmoid of x_t: over a period a level keeps
    a fraction of what it has written. ``descent``: ``eta_t = lr sigma_t / (4 g C max(d, ||x_t||^2))``: a
    period of one repeated token takes a quarter of the step that would reach the target of a linear map. ``momentum``
    with b kept per token: the same times ``(1 - b) min(1, C (1 - b))``, the critical damping of a heavy ball.
    ``orthogonalized``: ``eta_t = lr sigma_t (1 - retain_t)``: writes of spectral norm about 1 that never add up to more
    than lr. ``delta``:
    ``eta_t = lr sigma_t / max(d, ||x_t||^2)`` before the proximal step, whose eigenvalue along each map's input is in
    [-1, 1]. The dot product has no minimum, and three maps or more push each other beyond any step: SwiGLU and low
    rank are refused.

    Args:
        d_model: width of input and output.
        level: its `Level`.
        activation: ``"swiglu"`` or ``"gelu"``.
        outer: tokens after which the initial weights move by ``transfer`` of what was learned; None never moves them.
        transfer, transfer_by: see `nestlearn.nn.cms.nested`.
    """

    def __init__(
        self,
        d_model: int,
        level: Level,
        activation: Activation,
        outer: int | None = None,
        transfer: float = 0.5,
        transfer_by: TransferBy = "difference",
    ) -> None:
        _check_local(level, activation, outer, transfer_by)
        super().__init__(d_model, level, activation, DotProduct() if level.rule == "delta" else L2())
        self.outer, self.transfer = outer, transfer
        self.transfer_by: TransferBy = transfer_by
        self.value = nn.Parameter(torch.empty(d_model, d_model))
        self.keep = self.learned_keep()
        self.gate = GateProjection(d_model, {"lr": (CLOSED if level.rule == "orthogonalized" else 0.0,)})
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A random network that writes nothing yet: its value map is zero (nearly nothing under orthogonalized)."""
        super().reset_parameters()
        self.gate.reset_parameters()
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
            initial, memory = self.initial_weights(x.dtype), self.bound(x.dtype)
            alone = state is None and mask is None and reset is None and not return_state
            if alone and x.shape[1] <= self.period:
                # No period ends before the last token: nothing that is written would be read.
                start = self.start(None, initial, x.shape[0], x.dtype, x.device)
                return read(memory.architecture, start.anchor, x).to(dtype), None
            if self.outer is not None:
                nest = Nest(self.outer, self.transfer, initial, self.transfer_by)
                nested = cast("NestedState | None", state)
                value, gates = self._value(x, initial), self._gates(x, initial, writes)
                y, nested = scan_nested(memory, nest, nested, x, value, gates, mask, reset)
                return y.to(dtype), nested if return_state else None
            start = self.start(cast("State | None", state), initial, x.shape[0], x.dtype, x.device)
            value, gates = self._value(x, initial), self._gates(x, initial, writes)
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
        log_kept = self.log_kept(x.dtype) / self.period
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
        """How far training has let a curvature outgrow its random start: squared norms of all maps but one."""
        if self.fixed is None:
            return outgrown(initial, Network.gain) ** (len(initial) - 1)
        whole, parts = {}, []
        for name, slow in self.fixed.items():
            a, b = initial[f"{name}_A"], initial[f"{name}_B"]
            whole[name] = slow.to(a.dtype) + b @ a
            # A step of both parts moves their product by as much as the squared norms of the other.
            parts.append(3 * a.square().sum() / a.shape[0] + b.square().sum())
        return outgrown(whole, Network.gain) ** (len(whole) - 1) * torch.stack(parts).amax().clamp(min=1)

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token (multiply-add = 2): reads everywhere, writes in the periods that are read again."""
        width = self.d_model
        read = scan_flops(self.memory, width, width, context_length, writes=False)
        write = scan_flops(self.memory, width, width, context_length) - read
        if self.fixed is not None:
            slow = 2 * sum(w.numel() for w in self.fixed.values())
            # Errors run all slow maps forward but the last, and back.
            read, write = read + slow, write + 2 * slow
        outer = 2 * width * (width + 1) + (0 if self.level.rule == "delta" else read)
        written = (context_length - 1) // self.period * self.period
        total = read + outer + write * written // context_length
        if self.outer is not None and self.transfer_by == "gradient":
            # Whole windows run once more, forward and back to the initial weights.
            total += 2 * (read + write) * (context_length // self.outer * self.outer) // context_length
        return total

    def extra_repr(self) -> str:
        return f"period={self.period}, rule={self.level.rule}, lr={self.level.lr}"


def _check_local(level: Level, activation: Activation, outer: int | None, transfer_by: TransferBy) -> None:
    """Refuse what no bound keeps stable."""
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
            "rule='orthogonalized' with retain=1 would add up writes of equal size for ever. Use retain below 1."
        )
    if level.rule == "orthogonalized" and outer is not None and transfer_by == "gradient":
        raise ValueError(
            "rule='orthogonalized' writes matrices whose size says nothing of the gradient's, so that no meta-gradient "
            "belongs to them. Use transfer_by='difference', or rule='descent' or 'momentum'."
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
            "rule='delta' with variant='nested' has no bound: the dot-product objective has no minimum, and an initial "
            "state that moves is never pulled back. Use rule='descent', or signal='loss'."
        )
