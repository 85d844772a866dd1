"""The matrix products of a span, each with one gradient written by hand.

What `span` would record as a dozen small operations is one node here: its gradient adds up inside the matrix products
and keeps few intermediates. Only the delta rule without momentum and without a reset inside the span takes this way,
the one that the Hope memory, DeltaNet and Gated DeltaNet train on. Each is differentiable again.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .products import Gradients, gradient_again, product


def _add(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``total + x @ y`` in place, summed over dimensions in which total is smaller."""
    if total.dim() == 3 and x.dim() == 3 and y.dim() == 3:
        return total.baddbmm_(x, y)
    return total.add_(product(x, y).sum_to_size(total.shape))


def _dot(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """Inner products over the last dimension, in the shape of ``like``."""
    return torch.linalg.vecdot(x, y).sum_to_size(like.shape)


def _held(error: Tensor, solved: Tensor, x: Tensor, weights: Tensor, before: Tensor) -> Tensor:
    return product(solved, torch.addcmul(error, before.unsqueeze(-1), product(x, weights.mT)))


class Erase(torch.autograd.Function):
    """``change = solved (error + before * X W^T)``: what the delta rule writes, given what the memory holds."""

    @staticmethod
    def forward(ctx: Any, error: Tensor, solved: Tensor, x: Tensor, weights: Tensor, before: Tensor) -> Tensor:
        held = product(x, weights.mT)
        ctx.save_for_backward(error, solved, x, weights, before, held)
        return product(solved, torch.addcmul(error, before.unsqueeze(-1), held))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:  # type: ignore[override]
        error, solved, x, weights, before, held = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradient_again(_held, (error, solved, x, weights, before), (grad,))
        scale = before.unsqueeze(-1)
        right = torch.addcmul(error, scale, held)
        grad_solved = product(grad, right.mT).sum_to_size(solved.shape)
        grad_error = product(solved.mT, grad)
        grad_before = _dot(grad_error, held, before)
        back = torch.mul(grad_error, scale, out=right)
        grad_x = product(back, weights).sum_to_size(x.shape)
        grad_weights = product(back.mT, x).sum_to_size(weights.shape)
        return grad_error.sum_to_size(error.shape), grad_solved, grad_x, grad_weights, grad_before


def erased(
    error: Float[Tensor, "*b c out"],
    solved: Float[Tensor, "*#b c c"],
    x: Float[Tensor, "*#b c in"],
    weights: Float[Tensor, "*b out in"],
    before: Float[Tensor, "*#b c"],
) -> Float[Tensor, "*b c out"]:
    """``solved (error + before * X W^T)``."""
    return Erase.apply(error, solved, x, weights, before)  # type: ignore[return-value]


def _answered(
    q: Tensor, base: Tensor | None, weights: Tensor | None, entry: Tensor, x: Tensor, kernel: Tensor, change: Tensor
) -> Tensor:
    y = product(product(q, x.mT) * kernel, change)
    if weights is not None:
        y = torch.addcmul(y, entry.unsqueeze(-1), product(q, weights.mT))
    return y if base is None else y + product(q, base.mT)


class Answer(torch.autograd.Function):
    """``y_t = W_base q_t + entry_t W q_t + sum_{s <= t} (x_s . q_t) kernel[t, s] change_s``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        base: Tensor | None,
        weights: Tensor | None,
        entry: Tensor,
        x: Tensor,
        kernel: Tensor,
        change: Tensor,
    ) -> Tensor:
        scores = product(q, x.mT)
        weighted = scores * kernel
        y = product(weighted, change)
        held = None
        if weights is not None:
            held = product(q, weights.mT)
            y.addcmul_(entry.unsqueeze(-1), held)
        if base is not None:
            y = _add(y, q, base.mT)
        ctx.save_for_backward(q, base, weights, entry, x, kernel, change, scores, weighted, held)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:  # type: ignore[override]
        q, base, weights, entry, x, kernel, change, scores, weighted, held = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradient_again(_answered, (q, base, weights, entry, x, kernel, change), (grad,))
        grad_change = product(weighted.mT, grad).sum_to_size(change.shape)
        grad_scores = product(grad, change.mT)
        grad_kernel = (grad_scores * scores).sum_to_size(kernel.shape)
        grad_scores.mul_(kernel)
        grad_q = product(grad_scores, x)
        grad_x = product(grad_scores.mT, q).sum_to_size(x.shape)
        grad_base = grad_weights = grad_entry = None
        if base is not None:
            grad_q, grad_base = _add(grad_q, grad, base), product(grad.mT, q).sum_to_size(base.shape)
        if weights is not None:
            grad_entry = _dot(grad, held, entry)
            grad = grad * entry.unsqueeze(-1)
            grad_q, grad_weights = _add(grad_q, grad, weights), product(grad.mT, q).sum_to_size(weights.shape)
        return grad_q, grad_base, grad_weights, grad_entry, grad_x, grad_kernel, grad_change


def answered(
    q: Float[Tensor, "*b c in"],
    base: Float[Tensor, "*b out in"] | None,
    weights: Float[Tensor, "*b out in"] | None,
    entry: Float[Tensor, "*b c"],
    x: Float[Tensor, "*b c in"],
    kernel: Float[Tensor, "*b c c"],
    change: Float[Tensor, "*b c out"],
) -> Float[Tensor, "*b c out"]:
    """The token read of one map over a span; ``base`` are the initial weights if ``weights`` are distances."""
    return Answer.apply(q, base, weights, entry, x, kernel, change)  # type: ignore[return-value]


def _advanced(weights: Tensor | None, through: Tensor, change: Tensor, last: Tensor, x: Tensor) -> Tensor:
    end = product((change * last.unsqueeze(-1)).mT, x)
    return end if weights is None else torch.addcmul(end, through[..., None, None], weights)


class Advance(torch.autograd.Function):
    """``W_C = through W + sum_s last_s change_s x_s^T``: the weights after a span."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor | None, through: Tensor, change: Tensor, last: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weights, through, change, last, x)
        return _advanced(weights, through, change, last, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:  # type: ignore[override]
        weights, through, change, last, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradient_again(_advanced, (weights, through, change, last, x), (grad,))
        scale = last.unsqueeze(-1)
        grad_change = product(x, grad.mT)
        grad_last = _dot(grad_change, change, last)
        grad_x = product(change * scale, grad).sum_to_size(x.shape)
        grad_change.mul_(scale)
        if weights is None:
            return None, None, grad_change, grad_last, grad_x
        grad_through = (grad * weights).sum((-2, -1)).sum_to_size(through.shape)
        return grad * through[..., None, None], grad_through, grad_change, grad_last, grad_x


def advanced(
    weights: Float[Tensor, "*b out in"] | None,
    through: Float[Tensor, "*#b"],
    change: Float[Tensor, "*b c out"],
    last: Float[Tensor, "*#b c"],
    x: Float[Tensor, "*#b c in"],
) -> Float[Tensor, "*b out in"]:
    """``through W + sum_s last_s change_s x_s^T``."""
    return Advance.apply(weights, through, change, last, x)  # type: ignore[return-value]
