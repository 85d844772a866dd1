"""Attention of one set of vectors to another, and the learned vectors that a memory starts with."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


def check_sets(d_model: int, **sets: Tensor) -> None:
    """Raise unless every set is a floating-point ``[b, n >= 1, d_model]`` and all have the same number of rows."""
    for name, x in sets.items():
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[-1] != d_model:
            raise ValueError(
                f"{name} must have the shape [rows, vectors >= 1, {d_model}], got {tuple(x.shape)}; flatten other "
                "dimensions, and project to the width of the memory."
            )
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}; pass features, not ids.")
    if len({len(x) for x in sets.values()}) > 1:
        sizes = ", ".join(f"{name} {len(x)}" for name, x in sets.items())
        raise ValueError(f"numbers of rows differ: {sizes}. Use the state of the same batch.")


class CrossAttention(nn.Module):
    """``softmax(q kᵀ / √e) v`` per head of width e: q of those that ask, k and v of those that answer.

    Args:
        d_model: width of both sets, and of the answers.
        num_heads: heads; must divide ``d_model``.
        topk: answers per question and head that count, those with the highest scores; None for all. The weights of the
            winners sum to 1.

    Raises:
        ValueError: heads that do not divide the width, or sets of different rows or widths.

    Example:
        >>> attention = CrossAttention(8, num_heads=2)
        >>> attention(torch.randn(1, 3, 8), torch.randn(1, 20, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, d_model: int, num_heads: int, topk: int | None = None) -> None:
        super().__init__()
        if d_model < 1 or num_heads < 1 or d_model % num_heads:
            raise ValueError(
                f"{d_model=} is not divisible by {num_heads=}; choose a number of heads that divides the width."
            )
        self.d_model, self.num_heads, self.topk = d_model, num_heads, topk
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)

    def forward(
        self,
        asking: Float[Tensor, "b n d"],
        answering: Float[Tensor, "b m d"],
        allowed: Bool[Tensor, "#b #n m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """An answer per question; ``allowed`` says which answers a question may see (None: all; at least one)."""
        check_sets(self.d_model, asking=asking, answering=answering)
        q = self.query(asking).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.key_value(answering).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = None if allowed is None else allowed.unsqueeze(1)
        if self.topk is not None:
            seen = self._winners(q, k, seen)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)

    def _winners(self, q: Tensor, k: Tensor, allowed: Tensor | None) -> Bool[Tensor, "b h n m"]:
        """The answers with the highest scores. They differ per head; which ones win passes no gradient."""
        scores = (q @ k.mT).detach()
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        best = scores.topk(min(self.topk or 1, scores.shape[-1]), -1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        return chosen if allowed is None else chosen & allowed

    def flops(self, asking: int, answering: int) -> int:
        """Forward FLOPs of one call for one row, a multiply-add counting 2."""
        products = 2 * (2 if self.topk is None else 3) * asking * answering * self.d_model
        return 2 * self.d_model**2 * (asking + 2 * answering) + products

    def reset_parameters(self) -> None:
        """PyTorch's default initial values."""
        self.query.reset_parameters()
        self.key_value.reset_parameters()


class InitialSlots(nn.Module):
    """The slots of a memory before it has read anything, learned by the outer loop: ``self.slots: [*shape, d]``."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def vector_parameters(self) -> list[nn.Parameter]:
        """Parameters whose rows are vectors, not linear maps: an optimizer applies no matrix rule to them."""
        return [self.slots]

    def reset_parameters(self) -> None:
        """Standard normal, the scale of normalized inputs: slots that were equal would learn the same."""
        nn.init.normal_(self.slots)

    def forward(self, rows: int, dtype: torch.dtype) -> Float[Tensor, "b *slots d"]:
        """The slots of every row in a dtype. Layers call this module, so that its hooks run."""
        return self.slots.to(dtype).expand(rows, *self.slots.shape)
