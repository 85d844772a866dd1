"""What memories write while a model reads: counted on the modules themselves, token by token."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.memory import State
from nestlearn.models.stacking.network import StackedLevel
from nestlearn.nn.cms.loss import LossLevel
from nestlearn.nn.state import children_of

from .system import Component


@dataclass(frozen=True)
class Written:
    """What one memory wrote in the first row of a batch.

    Args:
        tokens: read one by one.
        updates: of them that changed the weights that are read.
        size: norm of the change over the whole row, relative to the initial weights (of zero weights the norm itself).
        rank: effective rank of the change, the mean over its matrices.
        change: all changes as one vector.
        share: of the module's answers that depends on its writes, ``‖y − y without writes‖ / ‖y‖``.
    """

    tokens: int
    updates: int
    size: float
    rank: float
    change: Tensor
    share: float


def observe(
    model: nn.Module, read: Callable[[], Any], components: Iterable[Component], tokens: int
) -> dict[str, Written]:
    """Read once, and say what each memory wrote, by the label of its component.

    Args:
        model: with the memories.
        read: a forward pass of one batch.
        components: those to observe. Of repeated blocks the first is observed.
        tokens: how many are read one by one at most.
    """
    modules, found = dict(model.named_modules()), {}
    chosen = {c.label: (c, modules[c.members[0]]) for c in components if c.kind == "memory" and c.members[0] in modules}
    with _calls(module for _, module in chosen.values()) as calls, torch.no_grad():
        read()
    with torch.no_grad():
        for label, (component, module) in chosen.items():
            if isinstance(module, LossLevel):
                written = _by_loss(module, calls.get(id(module), []))
            elif calls.get(id(module)):
                written = _by_token(component, module, calls[id(module)][0], tokens)
            else:
                written = None
            if written is not None:
                found[label] = written
    return found


def can_stop_writing(module: nn.Module) -> bool:
    """Whether the writes of a module can be switched off, by an argument of its forward pass or of `absorb`."""
    asked = {"state", "writes"} <= set(inspect.signature(module.forward).parameters)
    return asked or isinstance(module, LossLevel | StackedLevel)


@contextlib.contextmanager
def without_writes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Forward passes inside run with step size 0 of these modules."""
    handles: list[Callable[[], Any]] = []
    for module in modules:
        if isinstance(module, LossLevel):
            handles.append(_replace_absorb(module, lambda absorb: lambda s, f, learns=None: absorb(s, f, _none(f))))
        elif can_stop_writing(module) and not isinstance(module, StackedLevel):
            hook = module.register_forward_pre_hook(_stop, with_kwargs=True)
            handles.append(hook.remove)
    try:
        yield
    finally:
        for remove in handles:
            remove()


def _stop(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.arguments["writes"] = False
    return bound.args, bound.kwargs


def _none(factors: Mapping[str, Any]) -> Tensor:
    x = next(iter(factors.values())).input
    return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)


def _replace_absorb(level: LossLevel, change: Callable[[Any], Any]) -> Callable[[], None]:
    """Put a function around `LossLevel.absorb` of one level; the result takes it away."""
    level.absorb = change(level.absorb)  # type: ignore[method-assign]
    return lambda: delattr(level, "absorb")


@contextlib.contextmanager
def _calls(modules: Iterable[nn.Module]) -> Iterator[dict[int, list[Any]]]:
    """The arguments of calls; of a level that learns from the loss the states before and after each write."""
    calls: dict[int, list[Any]] = {}
    removes: list[Callable[[], Any]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(id(module), []).append(inspect.signature(module.forward).bind(*args, **kwargs))

    def around(level: LossLevel) -> Callable[[Any], Any]:
        def wrap(absorb: Any) -> Any:
            def recorded(state: Any, factors: Any, learns: Any = None) -> Any:
                after = absorb(state, factors, learns)
                calls.setdefault(id(level), []).append((state, after, next(iter(factors.values())).input))
                return after

            return recorded

        return wrap

    for module in modules:
        if isinstance(module, LossLevel):
            removes.append(_replace_absorb(module, around(module)))
        elif can_stop_writing(module) and not isinstance(module, StackedLevel):
            removes.append(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
    try:
        yield calls
    finally:
        for remove in removes:
            remove()


def _by_token(component: Component, module: nn.Module, call: inspect.BoundArguments, tokens: int) -> Written:
    call.apply_defaults()
    first = next(iter(call.arguments))
    fixed = {"state": None, "mask": None, "reset": None, "return_state": True}
    arguments = {**call.arguments, **{k: v for k, v in fixed.items() if k in call.arguments}}
    x = arguments.pop(first)[:1].detach()

    def run(part: Tensor, state: Any = None, writes: bool = True) -> tuple[Tensor, Any]:
        y, after = module(part, **{**arguments, "state": state, "writes": writes})[:2]
        return y, after

    start = _state(run(x[:, :1], writes=False)[1], component)
    state, before, updates = None, _read(start, component), 0
    count = min(max(tokens, int(component.frequency.period) + 1), x.shape[1])
    for t in range(count):
        _, state = run(x[:, t : t + 1], state)
        now = _read(_state(state, component), component)
        updates += not all(torch.equal(now[name], before[name]) for name in now)
        before = now
    y, end = run(x)
    off = run(x, writes=False)[0]
    return written_over(count, updates, start.params, _state(end, component).params, y, off)


def _by_loss(level: LossLevel, calls: list[Any]) -> Written | None:
    if not calls:
        return None
    updates, tokens = 0, 0
    for before, after, x in calls:
        tokens += x.shape[1]
        old, new = _find(before), _find(after)
        updates += not all(torch.equal(new.anchor[name], old.anchor[name]) for name in new.anchor)
    first, (_, last, x) = _find(calls[0][0]), calls[-1]
    x = x.detach().to(level.initial[level.initial.maps[0]].dtype)
    y, off = (level(x, state, None, False)[0] for state in (last, None))
    return written_over(tokens, updates, first.params, _find(last).params, y, off)


def written_over(
    tokens: int, updates: int, start: Mapping[str, Tensor], end: Mapping[str, Tensor], y: Tensor, off: Tensor
) -> Written:
    """The figures of weights that went from ``start`` to ``end``; y are the answers, off those without writes."""
    changes = {name: (end[name] - start[name])[0] for name in sorted(end)}
    change = torch.cat([x.flatten() for x in changes.values()])
    size = torch.cat([start[name][0].flatten() for name in sorted(end)]).norm()
    relative = float(change.norm() / size) if size > 0 else float(change.norm())
    share = float((y - off).norm() / y.norm().clamp(min=1e-30))
    return Written(tokens, updates, relative, effective_rank(changes.values()), change, share)


def _state(tree: Any, component: Component) -> State:
    """The state of the component's memory in what a module returns."""
    own = getattr(tree, "projections", None) if component.name.endswith("}") else None
    return _find(tree if own is None else own)


def _find(tree: Any) -> State:
    """The first memory in a tree that is no group of projections."""
    if isinstance(tree, State):
        return tree
    for name, child in children_of(tree) or []:
        if name != "projections" and (found := _find(child)) is not None:
            return found
    return None  # type: ignore[return-value] - only below the top


def _read(state: State, component: Component) -> Mapping[str, Tensor]:
    """The weights that the next token reads."""
    return state.params if component.frequency.period == 1 else state.anchor


def effective_rank(matrices: Iterable[Tensor], most: int = 8) -> float:
    """``exp(H(σ / Σσ))`` of the singular values σ, the mean over some matrices; 0 without any that is not 0.

    Example:
        >>> effective_rank([torch.eye(4), torch.zeros(3, 3)])
        4.0
    """
    found = []
    for x in matrices:
        if x.dim() < 2:
            continue
        x = x.detach().to(torch.complex128 if x.is_complex() else torch.float64)
        for matrix in x.flatten(0, -3) if x.dim() > 2 else x.unsqueeze(0):
            values = torch.linalg.svdvals(matrix.flatten(1))
            if len(found) < most and values.sum() > 0:
                shares = values / values.sum()
                found.append(float(torch.special.entr(shares).sum().exp()))
    return round(sum(found) / len(found), 6) if found else 0.0


def real(x: Tensor) -> Tensor:
    """The numbers of a tensor of any type in float64; of a complex one both parts."""
    return (torch.view_as_real(x) if x.is_complex() else x).double()


def norm(x: Tensor) -> float:
    """The norm of a tensor of any type, sparse ones included, in float64."""
    return float(x.to(torch.complex128 if x.is_complex() else torch.float64).norm())
