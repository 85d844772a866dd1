"""The feed-forward network of a block as the architecture of a memory, with whole or low-rank maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import Factor
from nestlearn.memory.architectures import Linear
from nestlearn.memory.kernels.products import activate, activate_with_error
from nestlearn.memory.objectives import Objective
from nestlearn.memory.types import Weights
from nestlearn.nn.ffn import FFNActivation, feed_forward


@dataclass(frozen=True)
class Network:
    """``M(x) = W_down (silu(W_gate x) * W_up x)`` or ``W_down gelu(W_up x)``: `FeedForward` with fast weights.

    Unlike `nestlearn.memory.MLP` it has no residual connection and may have any hidden width, like the network of a
    Transformer block.

    Args:
        hidden: hidden units.
        activation: ``"swiglu"`` (three maps) or ``"gelu"`` (two).
    """

    hidden: int
    activation: FFNActivation = "swiglu"

    gain: ClassVar[float] = 1 / 3
    """Variance of an initial weight times its fan-in."""

    @property
    def query_map(self) -> str:
        return "up"

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        """``{map name: (out, in)}``."""
        wide = {"gate": (self.hidden, d_key)} if self.activation == "swiglu" else {}
        return {**wide, "up": (self.hidden, d_key), "down": (d_value, self.hidden)}

    def init(self, name: str, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Uniform in ±1/sqrt(in), as the linear maps of `FeedForward`."""
        return _uniform(shape, generator)

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        gated = self.activation == "swiglu"
        return feed_forward(linear, partial(activate, "silu" if gated else "gelu"), x, gated)

    def factors(self, linear: Linear, adjoint: Linear, k: Tensor, v: Tensor, objective: Objective) -> dict[str, Factor]:
        """Input and error of every map for the loss of ``(k, v)``, in closed form."""
        up, wide = linear("up", k), self.activation == "swiglu"
        z = linear("gate", k) if wide else up
        name = "silu" if wide else "gelu"
        held: list[Tensor] = []  # the activation, if the objective needs the prediction

        def predict() -> Tensor:
            held.append(activate(name, z))
            return linear("down", held[0] * up if wide else held[0])

        error = objective.error(predict, v)
        back = adjoint("down", error)
        h, opening = activate_with_error(name, z, back * up if wide else back, *held)
        if not wide:
            return {"up": Factor(k, opening), "down": Factor(h, error)}
        return {"gate": Factor(k, opening), "up": Factor(k, back * h), "down": Factor(h * up, error)}


def low_rank_shapes(shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, tuple[int, int]]:
    """Shapes of ``A`` and ``B`` of every map of shape (out, in), when it is ``W_0 + B A`` with ``rank`` rows in A.

    Example:
        >>> low_rank_shapes({"up": (64, 16)}, rank=4)
        {'up_A': (4, 16), 'up_B': (64, 4)}
    """
    return {
        f"{name}_{part}": shape
        for name, (out, width) in shapes.items()
        for part, shape in (("A", (rank, width)), ("B", (out, rank)))
    }


def low_rank_start(name: str, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Initial values in float64: A uniform in ±1/sqrt(in), B zero, so that ``W_0 + B A`` starts as W_0."""
    return torch.zeros(shape, dtype=torch.float64) if name.endswith("_B") else _uniform(shape, generator)


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * shape[-1] ** -0.5


def low_rank_linear(linear: Linear) -> Linear:
    """The maps ``x -> B A x``, from ``linear`` of their parts.

    Example:
        >>> parts = {"up_A": torch.randn(1, 3), "up_B": torch.randn(5, 1)}
        >>> change = low_rank_linear(lambda name, x: x @ parts[name].mT)
        >>> x = torch.randn(2, 3)
        >>> torch.allclose(change("up", x), x @ (parts["up_B"] @ parts["up_A"]).mT, atol=1e-5)
        True
    """
    return lambda name, x: linear(f"{name}_B", linear(f"{name}_A", x))


@dataclass(frozen=True, eq=False)
class LowRank:
    """A network whose maps are ``W_0 + B A``. The memory holds A and B; W_0 belongs to the layer and is constant.

    Args:
        network: that the maps belong to.
        rank: rows of A.
        fixed: ``{map: W_0}``, set by `on` before the network runs.
    """

    network: Network
    rank: int
    fixed: Weights = field(default_factory=dict)

    def on(self, fixed: Weights) -> LowRank:
        """The same architecture with its constant weights."""
        return replace(self, fixed=fixed)

    @property
    def query_map(self) -> str:
        return f"{self.network.query_map}_A"

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        """``{map name: (out, in)}``."""
        return low_rank_shapes(self.network.shapes(d_key, d_value), self.rank)

    def init(self, name: str, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """See `low_rank_start`."""
        return low_rank_start(name, shape, generator)

    def _maps(self, linear: Linear) -> Linear:
        """``W_0 + B A``, from ``linear`` of A and B."""
        change = low_rank_linear(linear)
        return lambda name, x: F.linear(x, self.fixed[name]) + change(name, x)

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        return self.network(self._maps(linear), x)

    def factors(self, linear: Linear, adjoint: Linear, k: Tensor, v: Tensor, objective: Objective) -> dict[str, Factor]:
        """Input and error of every part: of a map with input x and error e, A has (x, Bᵀ e) and B has (A x, e)."""

        def back(name: str, e: Tensor) -> Tensor:
            return e @ self.fixed[name] + adjoint(f"{name}_A", adjoint(f"{name}_B", e))

        whole = self.network.factors(self._maps(linear), back, k, v, objective)
        parts: dict[str, Factor] = {}
        for name, (x, error) in whole.items():
            parts[f"{name}_A"] = Factor(x, adjoint(f"{name}_B", error))
            parts[f"{name}_B"] = Factor(linear(f"{name}_A", x), error)
        return parts
