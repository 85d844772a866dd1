"""Memory architectures, each written once as ``f(linear, x)`` and run by several interpretations of ``linear``.

``linear(name, x)`` applies the linear map called ``name``: with dense weights, recording its input, or with the
weights of each token. ``adjoint(name, e)`` applies its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .kernels.products import Activation, activate, activate_with_error
from .objectives import Objective
from .types import Factor, Weights

Linear = Callable[[str, Tensor], Tensor]


@runtime_checkable
class Architecture(Protocol):
    """A memory M(x) made of named linear maps."""

    @property
    def query_map(self) -> str:
        """The map that sees the key and the query themselves."""
        ...

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        """``{map name: (out, in)}`` for keys of width ``d_key`` and values of width ``d_value``."""
        ...

    def init(self, name: str, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Initial weights of one map in float64, ``shape = (*b, out, in)``."""
        ...

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        """M(x)."""
        ...

    def factors(self, linear: Linear, adjoint: Linear, k: Tensor, v: Tensor, objective: Objective) -> dict[str, Factor]:
        """Input and error of every map for the loss of ``(k, v)``, in closed form."""
        ...


@runtime_checkable
class SteepArchitecture(Protocol):
    """An architecture that states its steepness, as the layers' bounds of the step size need it."""

    def steepness(self, weights: Weights) -> float | Float[Tensor, "h 1"]:
        """How many times more than in a matrix an update of these weights can change what is read.

        ``weights: {map: [h, out, in]}`` are those that each head starts from.
        """
        ...


@dataclass(frozen=True)
class Matrix:
    """``M(x) = W x``: the linear memory of linear attention and DeltaNet. Starts at zero."""

    @property
    def query_map(self) -> str:
        return "W"

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        return {"W": (d_value, d_key)}

    def init(self, name: str, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        return linear("W", x)

    def factors(self, linear: Linear, adjoint: Linear, k: Tensor, v: Tensor, objective: Objective) -> dict[str, Factor]:
        return {"W": Factor(k, objective.error(lambda: linear("W", k), v))}


@dataclass(frozen=True)
class MLP:
    """``M(x) = x + W_out act(W_in x)`` with ``expansion * d`` hidden units (NL Eq. 89).

    Both maps start at random: with a zero in either, the other would get no gradient.
    """

    expansion: int = 4
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        if not isinstance(self.expansion, int) or self.expansion < 1:
            raise ValueError(f"MLP needs a positive integer expansion, got {self.expansion!r}")
        if self.activation not in ("gelu", "silu"):
            raise ValueError(f"unknown activation {self.activation!r}: use 'gelu' or 'silu'")

    @property
    def query_map(self) -> str:
        return "in"

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        if d_key != d_value:
            raise ValueError(
                f"an MLP memory adds its input to its output, so keys and values must have one width; "
                f"got d_key={d_key}, d_value={d_value}. Project one of them, or use Matrix()."
            )
        hidden = self.expansion * d_key
        return {"in": (hidden, d_key), "out": (d_key, hidden)}

    def init(self, name: str, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        fan_in = shape[-1]
        return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        return x + linear("out", activate(self.activation, linear("in", x)))

    def factors(self, linear: Linear, adjoint: Linear, k: Tensor, v: Tensor, objective: Objective) -> dict[str, Factor]:
        z = linear("in", k)
        held: list[Tensor] = []  # the activation, if the objective looks at the prediction

        def predict() -> Tensor:
            held.append(activate(self.activation, z))
            return k + linear("out", held[0])

        e = objective.error(predict, v)
        h, back = activate_with_error(self.activation, z, adjoint("out", e), *held)
        return {"in": Factor(k, back), "out": Factor(h, e)}
