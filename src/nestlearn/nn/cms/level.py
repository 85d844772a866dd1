"""A level of a Continuum Memory System: how often it learns, by which rule, and how much it may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.fields import Between, Fraction, Positive, Size, check_fields
from nestlearn.memory import (
    AssociativeMemory,
    Decay,
    Delta,
    Descent,
    DotProduct,
    Factor,
    Gates,
    Momentum,
    OrthogonalizedMomentum,
)
from nestlearn.memory.architectures import Architecture, Linear
from nestlearn.memory.objectives import Objective
from nestlearn.nn.ffn import Activation, hidden_size

from .network import Network, low_rank_shapes

Rule = Literal["descent", "momentum", "delta", "orthogonalized"]


@dataclass(frozen=True)
class Level:
    """One level of a `ContinuumMemory`, or one stacked on a pretrained model.

    Args:
        period: tokens between two changes of the level's weights; None never changes them (a plain FFN).
        expansion: hidden width over ``d_model``, as of a GELU network with as many parameters.
        rule: how a level with a period learns: ``"descent"``, plain gradient descent; ``"momentum"``, past gradients
            carry on; ``"delta"``, delta retention with proximal steps, the DGD of NL Eq. 57; ``"orthogonalized"``,
            the orthogonalized momentum is written when a period ends (NL Eq. 44).
        lr: scale of the step size. At most 1 where the level's own objective teaches it, since steps are then bounded.
        retain: fraction of what was written that is kept over one period; what is lost goes back to the initial
            weights. None is learned where a layer learns it (it starts at 0.98), and 0.97 on a stacked model.
        clip: bound of the Frobenius norm of the gradient of one segment, all maps of the level together, for each row
            (levels taught by a loss only); None for no bound.
        hidden: hidden units, in place of ``expansion``.
        rank: None learns whole matrices; a number r learns ``W_0 + B A`` with ``B: [out, r]``, ``A: [r, in]``, so
            that a row holds ``r (out + in)`` numbers per map.
        momentum: fraction of the momentum that is kept over one period (rules with momentum only).
        reset: whether the start of a document returns the level to its initial weights; False keeps what it learned.
            Levels stacked on a pretrained model always keep it: a session returns them by ``forget``.

    Raises:
        ValueError: a value that cannot work.

    Example:
        >>> Level(period=64, rank=4, rule="delta").shapes(d_model=16, activation="gelu")
        {'up_A': (4, 16), 'up_B': (64, 4), 'down_A': (4, 64), 'down_B': (16, 4)}
    """

    period: Size | None = None
    expansion: Annotated[float, Between(0, 2**20, open="low")] = 4
    rule: Rule = "descent"
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

    def units(self, d_model: int, activation: Activation) -> int:
        """Hidden units of the level's network."""
        return hidden_size(d_model, self.expansion, activation) if self.hidden is None else self.hidden

    def shapes(self, d_model: int, activation: Activation) -> dict[str, tuple[int, int]]:
        """``{map: (out, in)}`` of the weights that change, ``[B, out, in]`` for B rows."""
        full = Network(self.units(d_model, activation), activation).shapes(d_model, d_model)
        return full if self.rank is None else low_rank_shapes(full, self.rank)


@dataclass(frozen=True)
class MapShapes:
    """The maps of any network, by name and shape: all that `nestlearn.memory.absorb` asks of an architecture.

    For levels that a loss teaches: their network runs elsewhere (in `nestlearn.nn.cms.tape.read`), and its errors come
    from the loss.

    Args:
        sizes: ``((map, (out, in)), ...)``.

    Example:
        >>> MapShapes.of({"up": (8, 2), "down": (2, 8)}).shapes(2, 2)
        {'up': (8, 2), 'down': (2, 8)}
    """

    sizes: tuple[tuple[str, tuple[int, int]], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, int]]) -> MapShapes:
        """From ``{map: (out, in)}``."""
        return cls(tuple((name, (out, width)) for name, (out, width) in shapes.items()))

    @property
    def query_map(self) -> str:
        return self.sizes[0][0]

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        """``{map: (out, in)}``, whatever the widths of keys and values."""
        del d_key, d_value
        return dict(self.sizes)

    def init(self, name: str, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        raise _no_network()

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        raise _no_network()

    def factors(self, linear: Linear, adjoint: Linear, k: Tensor, v: Tensor, objective: Objective) -> dict[str, Factor]:
        raise _no_network()


def _no_network() -> TypeError:
    return TypeError(
        "this memory knows the shapes of its maps only: give it initial weights (init_state(params=...)), run its "
        "network with nestlearn.nn.cms.tape.read, and write factors of a loss with nestlearn.nn.cms.tape.write."
    )


def level_memory(level: Level, architecture: Architecture, objective: Objective | None = None) -> AssociativeMemory:
    """The associative memory that a level with a period is: its rule, kept toward its initial weights, its clock.

    Args:
        level: a level with a period.
        architecture: of its network; `MapShapes` where a loss teaches it.
        objective: of the level itself, if it has one.

    Example:
        >>> import torch
        >>> maps = MapShapes.of({"up": (8, 2), "down": (2, 8)})
        >>> memory = level_memory(Level(period=16, rule="delta"), maps)
        >>> state = memory.init_state((3,), 2, 2, {"up": torch.randn(8, 2), "down": torch.randn(2, 8)})
        >>> state.params["up"].shape
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
    """Gates of tokens that a loss teaches: the step is ``lr * scale``, constant but for ``scale``.

    The total effect of a gradient under ``momentum`` is that of ``descent``, spread over later tokens: its steps are
    ``lr (1 - beta_t)`` with ``beta_t = momentum^(1/period)``. Under ``orthogonalized`` the write of a period has
    spectral norm lr: each token adds ``lr / period``.

    Args:
        level: a level with a period.
        scale: factor of each token's step; ones for a constant one.
        kept: fraction kept over one period; the level's own ``retain`` (1 if it has none) by default.

    Example:
        >>> import torch
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
