"""Feed-forward network. Its weights do not change while a model reads (frequency 0 in NL's terms)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

FFNActivation = Literal["swiglu", "gelu"]


def hidden_size(d_model: int, expansion: float, activation: FFNActivation = "swiglu") -> int:
    """Hidden units of a network with about ``2 expansion d_model^2`` parameters.

    SwiGLU has three matrices and GELU two, so the hidden layer of SwiGLU is 2/3 as wide. Widths above 64 are rounded to
    multiples of 8: matrix units of GPUs need them for full speed.

    Raises:
        ValueError: the activation is unknown, or the result is below 1.
    """
    if activation not in ("swiglu", "gelu"):
        raise ValueError(f"unknown ffn activation {activation!r}; use 'swiglu' or 'gelu'.")
    wanted = expansion * d_model * (2 / 3 if activation == "swiglu" else 1)
    hidden = 8 * round(wanted / 8) if wanted > 64 else round(wanted)
    if hidden < 1:
        raise ValueError(f"{expansion=} gives {hidden} hidden units at {d_model=}; it must give at least 1.")
    return hidden


def feed_forward(
    linear: Callable[[str, Tensor], Tensor], act: Callable[[Tensor], Tensor], x: Tensor, gated: bool
) -> Tensor:
    """``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gate.

    Args:
        linear: ``linear(name, u)`` applies the map ``"gate"``, ``"up"`` or ``"down"``.
        act: the activation.
        x: the input.
        gated: use a gate.

    Example:
        >>> import torch
        >>> feed_forward(lambda name, u: 2 * u, torch.relu, torch.tensor([1.0]), gated=True)
        tensor([8.])
    """
    if gated:
        return linear("down", act(linear("gate", x)) * linear("up", x))
    return linear("down", act(linear("up", x)))


class FeedForward(nn.Module):
    """``y = W_out (silu(W_gate x) * W_in x)`` (swiglu) or ``y = W_out gelu(W_in x)`` (gelu), token by token.

    Args:
        d_model: width of the input and the output.
        expansion: hidden width over ``d_model`` of a GELU network with the same number of parameters.
        activation: ``"swiglu"`` or ``"gelu"`` (exact).
        hidden: number of hidden units; replaces ``expansion``.

    Example:
        >>> y, state = FeedForward(8)(torch.zeros(1, 2, 8))
        >>> tuple(y.shape), state
        ((1, 2, 8), None)
    """

    def __init__(
        self, d_model: int, expansion: float = 4, activation: FFNActivation = "swiglu", hidden: int | None = None
    ) -> None:
        super().__init__()
        hidden = hidden_size(d_model, expansion, activation) if hidden is None else hidden
        self.activation = activation
        self.gate = nn.Linear(d_model, hidden, bias=False) if activation == "swiglu" else None
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        *,
        writes: bool = True,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "b t d"], None]:
        """The protocol of `nestlearn.nn`. There is no state, and masked tokens give whatever they hold."""
        del state, mask, reset, writes, return_state
        gated = self.gate is not None
        return feed_forward(lambda name, u: getattr(self, name)(u), F.silu if gated else F.gelu, x, gated), None

    def flops_per_token(self, context_length: int = 1) -> int:
        """Forward FLOPs per token, whatever the context; a multiply-add counts 2."""
        del context_length
        return 2 * sum(w.numel() for w in self.parameters())

    def reset_parameters(self) -> None:
        """PyTorch's default initial values."""
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
