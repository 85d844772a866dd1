"""Products of few tokens with large weights on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOKENS = range(4, 257)
"""With fewer tokens the usual product reads the weights once, and with more it is as fast."""
BLOCK = 64
"""Output units of a block."""


class BlockedLinear(nn.Linear):
    """`torch.nn.Linear` that multiplies by blocks of W for a few tokens without gradients in float32.

    Before a product MKL copies a matrix to the order that it needs. A copy of all of W goes through memory, and takes
    longer than the product; a copy of a block stays in the cache. For 8 tokens this takes two thirds of the time, for
    240 nine tenths.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as the base names it
        tokens = input.numel() // self.in_features
        if torch.is_grad_enabled() or tokens not in TOKENS or input.dtype is not torch.float32:
            return super().forward(input)
        x, blocks = input.reshape(tokens, -1), self.weight.view(-1, BLOCK, self.in_features)
        if tokens <= 8:
            z = torch.bmm(x.expand(len(blocks), -1, -1), blocks.mT).transpose(0, 1)
        else:
            z = torch.bmm(blocks, x.mT.expand(len(blocks), -1, -1)).flatten(0, 1).mT
        z = z.reshape(*input.shape[:-1], -1).contiguous()
        return z if self.bias is None else z + self.bias


def block_products(model: nn.Module) -> None:
    """Make every plain linear map of a model in float32 on a CPU a `BlockedLinear`, in place.

    Maps whose number of output units is no multiple of `BLOCK` stay as they are. Results change by rounding only.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 128), nn.Linear(128, 3))
        >>> block_products(model)
        >>> [type(layer).__name__ for layer in model]
        ['BlockedLinear', 'Linear']
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module) and module.out_features % BLOCK == 0:
            w = module.weight
            if w.device.type == "cpu" and w.dtype is torch.float32 and w.is_contiguous():
                module.__class__ = BlockedLinear
