"""Which parameter, gradient or module first became NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.models.files import first_non_finite_parameter
from nestlearn.train.errors import TrainingError


def first_non_finite_gradient(model: nn.Module) -> str | None:
    """``the gradient of NAME`` for the first parameter whose gradient is not finite, otherwise None."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name}"
    return None


def refuse_non_finite_logits(model: nn.Module, name: str) -> None:
    """Make every later forward pass of ``model`` raise TrainingError if its logits are NaN or infinite.

    Finite weights can still overflow, and a score such as an accuracy hides it: a model with NaN logits scores 0.

    Args:
        model: the model; it gets a forward hook.
        name: the name of the model, for the message.
    """

    def check(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not torch.isfinite(output.logits).all():
            raise TrainingError(
                f"The model {name} computes logits that are NaN or infinite, so no result can be trusted. Use an "
                "earlier checkpoint, or train again with a lower --learning-rate."
            )

    model.register_forward_hook(check)


def first_non_finite_module(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """``the output of NAME (TYPE)`` for the first module, in order of execution, whose output is not finite.

    Runs one forward pass without gradients.
    """
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and any(not torch.isfinite(tensor).all() for tensor in _tensors(output)):
                found.append(f"the output of {name or 'the model'} ({type(module).__name__})")

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def locate_non_finite(model: nn.Module, inputs: dict[str, Any]) -> str:
    """The first component that explains a non-finite loss: a parameter, a module's output, or a gradient."""
    return (
        first_non_finite_parameter(model)
        or first_non_finite_module(model, inputs)
        or first_non_finite_gradient(model)
        or "the loss itself (every parameter and every module's output is finite)"
    )
