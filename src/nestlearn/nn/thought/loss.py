"""Certainty of the answers of a tick, and the loss over ticks."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def certainty_of(outputs: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b"]:
    """``1 - H(p) / ln c`` of the class probabilities p, averaged over the n answers; in [0, 1].

    Args:
        outputs: logits.

    Example:
        >>> certainty_of(torch.tensor([[[0.0, 0.0]], [[0.0, 40.0]]])).tolist()
        [0.0, 1.0]
    """
    log_p = outputs.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return 1 - entropy.mean(-1) / math.log(outputs.shape[-1])


def tick_losses(
    outputs: Float[Tensor, "b k n c"], targets: Int[Tensor, "b n"], ignore_index: int = IGNORE
) -> Float[Tensor, "b k"]:
    """Cross-entropy of every tick, in nats per answer; answers with the target ``ignore_index`` do not count."""
    wanted = targets.unsqueeze(1).expand(outputs.shape[:-1])
    losses = F.cross_entropy(outputs.flatten(0, 2), wanted.flatten(), ignore_index=ignore_index, reduction="none")
    counted = (targets != ignore_index).sum(-1, keepdim=True)
    return losses.view(wanted.shape).sum(-1) / counted.clamp(min=1)


def ticks_loss(
    outputs: Float[Tensor, "b k n c"], targets: Int[Tensor, "b n"], *, ignore_index: int = IGNORE
) -> Float[Tensor, ""]:
    r"""The loss of a Continuous Thought Machine, averaged over the rows (arXiv 2505.05522):

        L = (L[t1] + L[t2]) / 2,    t1 = argmin_t L[t],    t2 = argmax_t certainty[t]

    L[t] is the cross-entropy of the answers at tick t, in nats per answer. Both ticks are chosen for each row; no
    gradient passes through the choice.

    Args:
        outputs: logits of every tick, `Thoughts.outputs`.
        targets: the class of every answer.
        ignore_index: answers with this target do not count.

    Raises:
        ValueError: shapes that do not fit each other.

    Example:
        >>> outputs = torch.tensor([[[[0.0, 0.0]], [[0.0, 9.0]]]])  # one row, two ticks, one answer of two classes
        >>> loss = ticks_loss(outputs, torch.tensor([[0]]))  # least loss: ln 2 at tick 0; most certain: tick 1
        >>> round(loss.item(), 3)
        4.847
    """
    if outputs.dim() != 4 or tuple(targets.shape) != (outputs.shape[0], outputs.shape[2]):
        raise ValueError(
            "outputs must be [rows, ticks, answers, classes] and targets [rows, answers], got "
            f"{tuple(outputs.shape)} and {tuple(targets.shape)}."
        )
    losses = tick_losses(outputs, targets, ignore_index)
    ticks = torch.stack([losses.argmin(1), certainty_of(outputs).argmax(1)], 1)
    return losses.gather(1, ticks).mean()
