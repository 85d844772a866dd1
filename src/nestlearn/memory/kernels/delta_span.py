"""One span of the delta rule on one matrix, as a single node with a gradient written by hand.

What the general path records as some forty operations is one node here. It takes what most training is made of: one
map, no momentum, and no reset or empty slot inside the span.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .products import Gradients, gradient_again, product, segment_products, unit_lower_inverse


class DeltaSpan(torch.autograd.Function):
    """See `delta_span`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        target: Tensor,
        step: Tensor,
        retain: Tensor,
        weights: Tensor | None,
        gated: bool,
    ) -> tuple[Tensor, Tensor]:
        decay, entry = segment_products(retain), retain.cumprod(-1)
        scores, gram = torch.bmm(q, k.mT), torch.bmm(k, k.mT)
        strict = torch.zeros_like(decay)
        torch.mul(gram[:, 1:], decay[:, :-1], out=strict[:, 1:]).mul_(_erasing(step, retain, gated)[:, 1:, None])
        inverse = unit_lower_inverse(strict)
        rest, held, asked = target, None, None
        if weights is not None:
            held, asked = torch.bmm(k, weights.mT), torch.bmm(q, weights.mT)
            rest = torch.addcmul(target, _before(entry, retain, gated), held, value=-1)
        change = torch.bmm(inverse, rest * step.unsqueeze(-1))
        y = torch.bmm(scores * decay, change)
        end = torch.bmm((change * decay[:, -1].unsqueeze(-1)).mT, k)
        if weights is not None and asked is not None:
            y.addcmul_(entry.unsqueeze(-1), asked)
            end.addcmul_(entry[:, -1, None, None], weights)
        ctx.gated = gated
        ctx.set_materialize_grads(False)
        kept = (scores, gram, held, asked, decay, entry, inverse, change)
        ctx.save_for_backward(q, k, target, step, retain, weights, *kept)
        return y, end

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_end: Tensor | None) -> Gradients:  # type: ignore[override]
        q, k, target, step, retain, weights, scores, gram, held, asked, decay, entry, inverse, change = (
            ctx.saved_tensors
        )
        gated = ctx.gated
        if torch.is_grad_enabled():
            inputs = (q, k, target, step, retain, weights)
            return (*gradient_again(partial(_written, gated=gated), inputs, (grad, grad_end)), None)
        grad = torch.zeros_like(target) if grad is None else grad
        # The two places where a write is used: the reads of this span, and the weights after it.
        through = torch.bmm(grad, change.mT)  # to scores * decay
        grad_decay = through * scores
        grad_change = torch.bmm((scores * decay).mT, grad)
        grad_scores = through.mul_(decay)
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.mT, q)
        if grad_end is not None:
            last = decay[:, -1].unsqueeze(-1)
            left = torch.bmm(k, grad_end.mT)
            grad_decay[:, -1] += torch.linalg.vecdot(left, change)
            grad_change.addcmul_(left, last)
            grad_k.baddbmm_(change * last, grad_end)
        # (I + strict) change = step * rest
        solved = torch.bmm(inverse.mT, grad_change)
        grad_strict = torch.bmm(solved, change.mT).neg_().tril_(-1)
        erasing = _erasing(step, retain, gated)[:, 1:, None]
        grad_gram = torch.zeros_like(gram)
        lower = torch.mul(grad_strict[:, 1:], decay[:, :-1], out=grad_gram[:, 1:])
        grad_erasing = F.pad(torch.linalg.vecdot(lower, gram[:, 1:]), (1, 0))
        lower.mul_(erasing)
        grad_k.baddbmm_(grad_gram + grad_gram.mT, k)
        grad_decay[:, :-1].addcmul_(grad_strict[:, 1:].mul_(erasing), gram[:, 1:])
        rest, before, grad_before, grad_entry, grad_weights = target, None, None, None, None
        if weights is not None:
            before = _before(entry, retain, gated)
            rest = torch.addcmul(target, before, held, value=-1)
        grad_step = torch.linalg.vecdot(solved, rest)
        grad_target = solved.mul_(step.unsqueeze(-1))
        if weights is not None and before is not None:
            grad_held, grad_asked = grad_target * -before, grad * entry.unsqueeze(-1)
            grad_k.baddbmm_(grad_held, weights)
            grad_q.baddbmm_(grad_asked, weights)
            grad_weights = torch.bmm(grad_held.mT, k).baddbmm_(grad_asked.mT, q)
            grad_before = -torch.linalg.vecdot(grad_target, held)
            grad_entry = torch.linalg.vecdot(grad, asked)
            grad_entry[:, :-1] += grad_before[:, 1:] * retain[:, 1:] if gated else grad_before[:, 1:]
            if grad_end is not None:
                grad_entry[:, -1] += (grad_end * weights).sum((-2, -1))
                grad_weights.addcmul_(entry[:, -1, None, None], grad_end)
        grad_retain = _decay_gradient(decay, grad_decay, entry, grad_entry)
        if gated:
            grad_retain.addcmul_(grad_erasing, step)
            if grad_before is not None:
                grad_retain.addcmul_(grad_before, _shifted(entry))
        grad_step += grad_erasing * retain if gated else grad_erasing
        return grad_q, grad_k, grad_target, grad_step, grad_retain, grad_weights, None


def _erasing(step: Tensor, retain: Tensor, gated: bool) -> Tensor:
    """How strongly each token erases what its key holds."""
    return step * retain if gated else step


def _before(entry: Tensor, retain: Tensor, gated: bool) -> Float[Tensor, "r c 1"]:
    """The coefficient of the entering weights in what each token erases."""
    before = _shifted(entry)
    return (before * retain if gated else before).unsqueeze(-1)


def _decay_gradient(decay: Tensor, grad_decay: Tensor, entry: Tensor, grad_entry: Tensor | None) -> Tensor:
    """``a_u`` is a factor of every ``A[t, s]`` with s < u <= t and of every ``A[t]`` with u <= t. Exact at 0 too."""
    later = torch.bmm(decay.mT, grad_decay.tril_(-1))
    grad = F.pad((later[:, 1:] * decay[:, :-1]).sum(-1), (1, 0))
    if grad_entry is None:
        return grad
    return grad.addcmul_(torch.bmm(decay.mT, grad_entry.unsqueeze(-1)).squeeze(-1), _shifted(entry))


def _shifted(entry: Tensor) -> Tensor:
    """What is left of the entering weights before each token."""
    return torch.cat([torch.ones_like(entry[:, :1]), entry[:, :-1]], 1)


def _written(
    q: Tensor, k: Tensor, target: Tensor, step: Tensor, retain: Tensor, weights: Tensor | None, gated: bool
) -> tuple[Tensor, Tensor]:
    """The same in operations that autograd knows."""
    decay, entry = segment_products(retain), retain.cumprod(-1)
    shifted = torch.cat([torch.zeros_like(decay[:, :1]), decay[:, :-1]], 1)
    inverse = unit_lower_inverse(_erasing(step, retain, gated).unsqueeze(-1) * shifted * product(k, k.mT))
    rest = target if weights is None else target - _before(entry, retain, gated) * product(k, weights.mT)
    change = product(inverse, rest * step.unsqueeze(-1))
    y = product(product(q, k.mT) * decay, change)
    end = product((change * decay[:, -1].unsqueeze(-1)).mT, k)
    if weights is not None:
        y = y + entry.unsqueeze(-1) * product(q, weights.mT)
        end = end + entry[:, -1, None, None] * weights
    return y, end


def delta_span(
    q: Float[Tensor, "r c in"],
    k: Float[Tensor, "r c in"],
    target: Float[Tensor, "r c out"],
    step: Float[Tensor, "r c"],
    retain: Float[Tensor, "r c"],
    weights: Float[Tensor, "r out in"] | None,
    *,
    gated: bool = False,
) -> tuple[Float[Tensor, "r c out"], Float[Tensor, "r out in"]]:
    r"""Reads and final weights of a span of the delta rule (NL Eq. 57 on one matrix).

        W_t = W_{t-1} (alpha_t I - g_t eta'_t k_t k_t^T) + eta'_t u_t k_t^T        y_t = W_t q_t

    with ``g_t = alpha_t`` if ``gated``, else 1.

    Args:
        q, k: queries and keys.
        target: u, what each key is associated with (minus the error of the objective at the anchor).
        step: eta'.
        retain: alpha; 0 is legal.
        weights: W_0, the weights that enter; None for zero.
    """
    if q.shape[1] == 1:
        return _token(q, k, target, step, retain, weights, gated)
    return DeltaSpan.apply(q, k, target, step, retain, weights, gated)  # type: ignore[return-value]


def _token(
    q: Tensor, k: Tensor, target: Tensor, step: Tensor, retain: Tensor, weights: Tensor | None, gated: bool
) -> tuple[Tensor, Tensor]:
    """The rule itself, for one token."""
    kept, change = retain.unsqueeze(-1), target
    if weights is not None:
        held = torch.bmm(k, weights.mT)
        change = target - (held * kept if gated else held)
    written = change.mT * step.unsqueeze(-1)
    end = torch.bmm(written, k) if weights is None else torch.baddbmm(weights * kept, written, k)
    return torch.bmm(q, end.mT), end
