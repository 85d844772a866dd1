"""A level of a Continuum Memory System: its settings, the memory that it is, and its weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.fields import Between, Fraction, Positive, Size, check_fields
from nestlearn.memory import (
    AssociativeMemory,
    Decay,
    Delta,
    Descent,
    DotProduct,
    Gates,
    Momentum,
    OrthogonalizedMomentum,
    State,
)
from nestlearn.memory.architectures import Architecture
from nestlearn.memory.objectives import Objective
from nestlearn.memory.types import Weights
from nestlearn.nn.common import GateProjection, InitialWeights
from nestlearn.nn.ffn import FFNActivation, hidden_size

from .network import LowRank, Network

LevelRule = Literal["descent", "momentum", "delta", "orthogonalized"]

KEPT_PER_PERIOD = 4.0
"""Initial logit of the fraction that a level keeps over one period: sigmoid(4) = 0.98."""


@dataclass(frozen=True)
class Level:
    """Settings of one level, of a `ContinuumMemory` or of a stacked pretrained model.

    Args:
        period: tokens between two changes of the level's weights. None: the weights never change (a plain FFN).
        expansion: hidden width over ``d_model``, for a GELU network with as many parameters.
        rule: the update rule. ``"descent"``: gradient descent. ``"momentum"``: gradient descent with momentum.
            ``"delta"``: delta retention with proximal steps, the DGD of NL Eq. 57. ``"orthogonalized"``: the
            orthogonalized momentum is written at the end of each period (NL Eq. 44).
        lr: scale of the step size. It is at most 1 for a level with an objective of its own, whose steps are bounded.
        retain: fraction of what was written that is kept over one period; the rest decays to the initial weights.
            None: `ContinuumMemory` learns the fraction (0.98 at first), a stacked model keeps 0.97.
        clip: bound of the Frobenius norm of the gradient of one segment, over all maps of the level, for each row.
            It is for levels that learn from the next-token loss. None: no bound.
        hidden: hidden units, in place of ``expansion``.
        rank: None: whole matrices learn. A number r: the maps are ``W_0 + B A`` with ``B: [out, r]``, ``A: [r, in]``,
            and only A and B learn, so that a row holds ``r (out + in)`` numbers per map.
        momentum: fraction of the momentum that is kept over one period (rules with momentum only).
        reset: whether a new document sets the level back to its initial weights. It has no effect on a stacked model,
            whose levels keep what they learned until `nestlearn.MemorySession.forget`.

    Raises:
        ValueError: a value that cannot work.

    Example:
        >>> Level(period=64, rank=4, rule="delta").shapes(d_model=16, activation="gelu")
        {'up_A': (4, 16), 'up_B': (64, 4), 'down_A': (4, 64), 'down_B': (16, 4)}
    """

    period: Size | None = None
    expansion: Annotated[float, Between(0, 2**20, open="low")] = 4
    rule: LevelRule = "descent"
    lr: Positive = 1.0
    retain: Fraction | None = None
    clip: Positive | None = None
    hidden: Size | None = None
    rank: Size | None = None
    momentum: Annotated[float, Between(0, 1, open="high")] = 0.9
    reset: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.period is None and self.rank is not None:
            raise ValueError(f"rank={self.rank} bounds what a level learns, but period=None never learns. Drop one.")

    @property
    def has_momentum(self) -> bool:
        """Whether the rule keeps a momentum."""
        return self.rule in ("momentum", "orthogonalized")

    def units(self, d_model: int, activation: FFNActivation) -> int:
        """Hidden units of the level's network."""
        return hidden_size(d_model, self.expansion, activation) if self.hidden is None else self.hidden

    def architecture(self, units: int, activation: FFNActivation) -> Network | LowRank:
        """The network of the weights that change."""
        network = Network(units, activation)
        return network if self.rank is None else LowRank(network, self.rank)

    def shapes(self, d_model: int, activation: FFNActivation) -> dict[str, tuple[int, int]]:
        """``{map: (out, in)}`` of the weights that change; a state holds ``[B, out, in]`` for B rows."""
        return self.architecture(self.units(d_model, activation), activation).shapes(d_model, d_model)


def check_order(levels: Sequence[Level]) -> None:
    """Raise ValueError unless levels go from the fastest to the slowest, with a frozen one last."""
    if not levels or not all(isinstance(level, Level) for level in levels):
        raise ValueError(f"levels must be a non-empty sequence of Level, got {levels!r}; for a mapping use Level(**m).")
    periods = [level.period for level in levels]
    if any(a is None or (b is not None and a >= b) for a, b in itertools.pairwise(periods)):
        raise ValueError(
            f"levels go from fastest to slowest, with strictly increasing periods; at most one is frozen "
            f"(period=None), and it comes last; got {periods}."
        )


def check_segments(levels: Sequence[Level]) -> None:
    """Raise ValueError unless segments of the smallest period fit into every other period and hold a target."""
    periods = [level.period for level in levels if level.period is not None]
    if periods and periods[0] < 2:
        raise ValueError(
            "the smallest period must be at least 2: a level learns from a loss in segments of that many tokens, and a "
            "segment of one token holds no next token."
        )
    wrong = [period for period in periods if period % periods[0]]
    if wrong:
        fixed = [max(1, round(period / periods[0])) * periods[0] for period in periods]
        raise ValueError(
            f"periods {wrong} must be a multiple of the smallest, {periods[0]}: levels that learn from a loss are "
            f"written segment by segment. Use {fixed}, for example."
        )


def level_memory(level: Level, architecture: Architecture, objective: Objective | None = None) -> AssociativeMemory:
    """The associative memory of a level: its rule, retention toward the initial weights, and chunks of one period.

    Args:
        level: a level with a period.
        architecture: of the weights that change.
        objective: of a level with an objective of its own. Levels that learn from a loss have none.

    Example:
        >>> level = Level(period=16, rule="delta", hidden=8)
        >>> memory = level_memory(level, level.architecture(8, "gelu"))
        >>> memory.init_state((3,), 2, 2).params["up"].shape
        torch.Size([3, 8, 2])
    """
    if level.period is None:
        raise ValueError("a level without a period never learns; give it one, or use a plain FFN.")
    delta = level.rule == "delta"
    algorithm = {"momentum": Momentum(), "orthogonalized": OrthogonalizedMomentum()}.get(level.rule, Descent())
    return AssociativeMemory(
        architecture,
        objective=DotProduct() if objective is None else objective,
        retention=Delta() if delta else Decay(),
        algorithm=algorithm,
        step_size="proximal" if delta else "raw",
        retain_to="initial",
        chunk_size=level.period,
        read="chunk",
    )


def loss_gates(level: Level, scale: Float[Tensor, "b t"], kept: Float[Tensor, ""] | None = None) -> Gates:
    """Gates of a level that learns from a loss: the step of a token is ``lr * scale``.

    Under ``momentum`` the total effect of a gradient is that of ``descent``, spread over later tokens: the steps are
    ``lr (1 - beta_t)`` with ``beta_t = momentum^(1/period)``. Under ``orthogonalized`` the write of a period has
    spectral norm lr: each token adds ``lr / period``.

    Args:
        level: a level with a period.
        scale: factor of each token's step.
        kept: fraction kept over one period. Default: the level's ``retain``, or 1 if it has none.

    Example:
        >>> loss_gates(Level(period=4, lr=0.5, retain=0.0625), torch.ones(1, 2))[:2]
        (tensor([[0.5000, 0.5000]]), tensor([[0.5000, 0.5000]]))
    """
    if level.period is None:
        raise ValueError("a level without a period never learns and has no gates.")
    step, carried = level.lr * scale, None
    if level.has_momentum:
        beta = level.momentum ** (1 / level.period)
        step = step * (1 - beta) if level.rule == "momentum" else step / level.period
        carried = torch.full_like(step, beta)
    share = step.new_tensor(1.0 if level.retain is None else level.retain) if kept is None else kept
    return Gates(step, (share ** (1 / level.period)).expand_as(step), carried)


class Kept(nn.Module):
    """Logarithm of the fraction of what was written that a level keeps over one period.

    A layer calls the module, so that hooks run (which bring an offloaded parameter to the device, for example).

    Args:
        retain: the fraction; None learns its ``logit``.
    """

    def __init__(self, retain: float | None) -> None:
        super().__init__()
        self.retain = retain
        self.logit = nn.Parameter(torch.empty(1)) if retain is None else None  # FSDP2 divides no scalars
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A level keeps 98 % over one period at first."""
        if self.logit is not None:
            self.logit.fill_(KEPT_PER_PERIOD)

    def forward(self, like: Tensor) -> Float[Tensor, ""]:
        """The logarithm, in the dtype and on the device of a tensor."""
        if self.logit is not None:
            return F.logsigmoid(self.logit.to(like.dtype)).squeeze(0)
        kept = cast(float, self.retain)
        return like.new_tensor(math.log(kept) if kept > 0 else -math.inf)


class LevelWeights(nn.Module):
    """What the levels of a `ContinuumMemory` with a period share.

    ``initial`` are the weights that each row starts from, ``fixed`` the constant part ``W_0`` of low-rank maps (else
    None), ``keep`` gives the fraction kept over a period, ``gate`` the logit of each token's step.

    Args:
        d_model: width of input and output.
        level: its `Level`.
        activation: ``"swiglu"`` or ``"gelu"``.
        objective: of a level with an objective of its own.
        outer: tokens after which the initial weights move (nested variant); None never moves them.
        transfer: the fraction rho of `nestlearn.nn.cms.nested`.
        step: initial logit of the step.
    """

    def __init__(
        self,
        d_model: int,
        level: Level,
        activation: FFNActivation,
        objective: Objective | None = None,
        outer: int | None = None,
        transfer: float = 0.5,
        step: float = 0.0,
    ) -> None:
        super().__init__()
        if level.period is None:
            raise ValueError("a level without a period never changes; use FeedForward")
        self.level, self.period, self.d_model = level, level.period, d_model
        self.outer, self.transfer = outer, transfer
        architecture = level.architecture(level.units(d_model, activation), activation)
        self.network = architecture.network if isinstance(architecture, LowRank) else architecture
        self.memory = level_memory(level, architecture, objective)
        self.initial = InitialWeights(self.memory, (), d_model, d_model)
        low = isinstance(architecture, LowRank)
        self.fixed = InitialWeights(level_memory(level, self.network), (), d_model, d_model) if low else None
        self.keep = Kept(level.retain)
        self.gate = GateProjection(d_model, {"lr": (step,)})

    def reset_parameters(self) -> None:
        """A random network with nearly constant steps, which keeps 98 % of what it wrote over one period."""
        for module in (self.initial, self.fixed, self.keep, self.gate):
            if module is not None:
                module.reset_parameters()

    def bound(self, dtype: torch.dtype) -> AssociativeMemory:
        """The memory, with the constant weights of its architecture."""
        if self.fixed is None:
            return self.memory
        architecture = cast(LowRank, self.memory.architecture)
        return replace(self.memory, architecture=architecture.on(self.fixed(dtype)))

    def start(self, state: State | None, initial: Weights, x: Float[Tensor, "b t d"]) -> State:
        """The given state, or a fresh one for the rows of ``x``."""
        if state is not None:
            return state
        return self.memory.init_state(
            (x.shape[0],), self.d_model, self.d_model, initial, dtype=x.dtype, device=x.device
        )

    def extra_repr(self) -> str:
        clip = "" if self.level.clip is None else f", clip={self.level.clip}"
        return f"period={self.period}, rule={self.level.rule}, lr={self.level.lr}{clip}"
