"""Products of few tokens with large weights on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOKENS = range(4, 129)
"""With fewer tokens the usual product reads the weights once, and with more it is as fast."""


class TransposedLinear(nn.Linear):
    """`torch.nn.Linear` that computes ``(W xᵀ)ᵀ`` for a few tokens without gradients in float32.

    MKL takes three fifths to four fifths of the time for it: it then copies the tokens, and not W, to the order that it
    needs.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as the base names it
        tokens = input.numel() // self.in_features
        if torch.is_grad_enabled() or tokens not in TOKENS or input.dtype is not torch.float32:
            return super().forward(input)
        z = (self.weight @ input.reshape(tokens, -1).mT).mT.contiguous().view(*input.shape[:-1], -1)
        return z if self.bias is None else z + self.bias


def transpose_products(model: nn.Module) -> None:
    """Make every plain linear map of a model in float32 on a CPU a `TransposedLinear`, in place.

    Results change by rounding only.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> transpose_products(model)
        >>> type(model[0]).__name__
        'TransposedLinear'
    """
    for module in model.modules():
        plain = type(module) is nn.Linear and "forward" not in vars(module)
        if plain and module.weight.device.type == "cpu" and module.weight.dtype is torch.float32:
            module.__class__ = TransposedLinear
