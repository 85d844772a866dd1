"""One training step of a method: the loss, its check, the gradients, the optimizer."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from nestlearn.continual.methods import Method
from nestlearn.continual.scoring import device_of, loss_of
from nestlearn.data.continual import Examples

_USUAL_FIX = (
    "The weights are as they were before this step. Check the inputs for values that are not finite, the weights as "
    "they were loaded, and a batch for targets that are all ignored; otherwise lower the learning rate or a penalty's "
    "strength, or give max_grad_norm."
)


def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    method: Method,
    batch: Examples,
    generator: torch.Generator,
    *,
    number: int,
    first_pass: bool,
    max_grad_norm: float | None,
) -> tuple[float, int]:
    """Learns from a batch, with what the method adds to it; returns the loss in nats and how many examples were used.

    The loss returned leaves out the method's penalty.

    Args:
        model: what learns, in training mode.
        optimizer: of parameters of the model; all others keep their gradients, which are not counted.
        method: adds examples and a penalty, and observes the batch after the step.
        batch: examples, on any device.
        generator: of the method's random choices.
        number: of the step, counted from 1; for the errors.
        first_pass: whether the batch is seen for the first time.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.

    Raises:
        ValueError: the loss is not finite, or the norm of the gradients where it is bounded. No weight has changed.
    """
    together = method.batch(batch, generator).to(device_of(model))
    loss, penalty = loss_of(model, together), method.penalty()
    total = loss if penalty is None else loss + penalty
    if not math.isfinite(value := total.item()):
        part = "" if penalty is None else f" ({loss.item()} and a penalty of {penalty.item()})"
        raise ValueError(f"The loss is {value}{part} at step {number} of {method.name}, counted from 1. {_USUAL_FIX}")
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    if max_grad_norm is not None:
        # What the optimizer does not step keeps the gradients of all steps so far, which are no part of this one.
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, max_grad_norm).item()
        if not math.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
            raise ValueError(
                f"The gradients' norm is {norm} at step {number} of {method.name}, counted from 1, with a loss of "
                f"{value}. {_USUAL_FIX}"
            )
    optimizer.step()
    method.observe(batch, generator, first_pass)
    return loss.item(), len(together)
