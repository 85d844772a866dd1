"""Taps: functions of the inputs and outputs of named modules of a stacked model, in this thread or task only.

Edits of maps act through the same hooks. A hook stays on a module once it was needed, and does nothing where no tap and
no edit is active. So threads share one model, each with edits and taps of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from .network import active_levels
from .plan import StackPlan

Tap = Callable[[Tensor, Tensor], Tensor | None]
"""``(input, output)`` to another output, or to None for the same one."""

_TAPS: ContextVar[tuple[tuple[StackPlan, Mapping[str, Tap]], ...]] = ContextVar("taps", default=())
_LOCK = threading.Lock()


class _Hook:
    """The forward hook of one module."""

    def __init__(self, plan: StackPlan, path: str) -> None:
        self.plan, self.path = plan, path

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        del module
        first: Tensor = output[0] if isinstance(output, tuple) else output
        changed, state = first, active_levels(self.plan).state
        change = None if state is None else state.changes.get(self.path)
        if change is not None:
            changed = changed + change(inputs[0]).to(changed.dtype)
        for plan, taps in _TAPS.get():
            if plan is self.plan and self.path in taps:
                found = taps[self.path](inputs[0], changed)
                changed = changed if found is None else found
        if changed is first:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def hook_modules(model: nn.Module, plan: StackPlan, paths: Iterable[str]) -> None:
    """Make sure that the modules have their hooks.

    Raises:
        ValueError: the model has no such module.
    """
    for path in paths:
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(
                f"the level state edits {path}, which this {type(model).__name__} does not have. Use it with the model "
                "that it was made for."
            ) from error
        if not _hooks(module):
            with _LOCK:
                if not _hooks(module):
                    module.register_forward_hook(_Hook(plan, path))


def hook_edited_maps(model: nn.Module, plan: StackPlan) -> None:
    """Make sure that the maps have their hooks that the active level state edits."""
    state = active_levels(plan).state
    if state is not None and state.edits:
        hook_modules(model, plan, state.changes)


def unhook_modules(model: nn.Module) -> None:
    """Take all hooks off."""
    for module in model.modules():
        for number in _hooks(module):
            del module._forward_hooks[number]


def _hooks(module: nn.Module) -> list[int]:
    return [number for number, hook in module._forward_hooks.items() if isinstance(hook, _Hook)]


@contextmanager
def tapping(model: nn.Module, plan: StackPlan, taps: Mapping[str, Tap]) -> Iterator[None]:
    """Forward passes inside call a function at each of some modules.

    Args:
        model: a stacked model.
        plan: of the model.
        taps: by the path of the module. Inputs and outputs are the first of several.
    """
    hook_modules(model, plan, taps)
    token = _TAPS.set((*_TAPS.get(), (plan, taps)))
    try:
        yield
    finally:
        _TAPS.reset(token)
