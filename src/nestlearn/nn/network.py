"""The feed-forward network of a block as the architecture of a memory, so that it can learn while it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestlearn.memory import Factor
from nestlearn.memory.architectures import Linear
from nestlearn.memory.functions import activate, activate_with_error
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
        up, wide = linear("up", k), self.activation == "swiglu"
        z = linear("gate", k) if wide else up
        name = "silu" if wide else "gelu"
        held: list[Tensor] = []  # the activation, if the objective looks at the prediction

        def predict() -> Tensor:
            held.append(activate(name, z))
            return linear("down", held[0] * up if wide else held[0])

        error = objective.error(predict, v)
        back = adjoint("down", error)
        h, opening = activate_with_error(name, z, back * up if wide else back, *held)
        if not wide:
            return {"up": Factor(k, opening), "down": Factor(h, error)}
        return {"gate": Factor(k, opening), "up": Factor(k, back * h), "down": Factor(h * up, error)}
