"""The feed-forward network of a block as the architecture of a memory, so that it can learn while it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestlearn.memory import Factor
from nestlearn.memory.architectures import Linear
from nestlearn.memory.functions import activate, activate_with_slope
from nestlearn.memory.objectives import Objective

from .ffn import Activation


@dataclass(frozen=True)
class Network:
    """``M(x) = W_down (silu(W_gate x) * W_up x)`` or ``W_down gelu(W_up x)``: `FeedForward` with fast weights.

    Unlike `nestlearn.memory.MLP` it adds no residual and may have any hidden width, as the network of a Transformer
    block has.

    Args:
        hidden: hidden units.
        activation: ``"swiglu"`` (three maps) or ``"gelu"`` (two).
    """

    hidden: int
    activation: Activation = "swiglu"

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
        return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * shape[-1] ** -0.5

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        if self.activation == "gelu":
            return linear("down", activate("gelu", linear("up", x)))
        return linear("down", activate("silu", linear("gate", x)) * linear("up", x))

    def factors(self, linear: Linear, adjoint: Linear, k: Tensor, v: Tensor, objective: Objective) -> dict[str, Factor]:
        """Input and error of every map for the loss of ``(k, v)``, in closed form."""
        up = linear("up", k)
        if self.activation == "gelu":
            hidden, slope = activate_with_slope("gelu", up)
            error = objective.error(lambda: linear("down", hidden), v)
            return {"up": Factor(k, adjoint("down", error) * slope), "down": Factor(hidden, error)}
        opened, slope = activate_with_slope("silu", linear("gate", k))
        hidden = opened * up
        error = objective.error(lambda: linear("down", hidden), v)
        back = adjoint("down", error)
        return {
            "gate": Factor(k, back * up * slope),
            "up": Factor(k, back * opened),
            "down": Factor(hidden, error),
        }
