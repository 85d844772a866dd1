"""`nested_system`: any model with any optimizer as nested problems."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from textwrap import shorten
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from .algebra import System, problems
from .modules import memories, starts_memory, traced
from .names import Units
from .probe import Probe, ProbeError, Slot, optimizers_in, probe, states_of
from .system import Component, Frequency, NestedSystem, numbered

NEVER = Frequency(math.inf)


def nested_system(
    model: nn.Module | System,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    trainer: Any = None,
    example: Any = None,
    accumulation: int = 1,
) -> NestedSystem:
    """A model, and what trains it, as a system of nested problems (NL Def. 1-4).

    Each memory, each set of weights and each state of the optimizer is a component with a context flow, an objective,
    a rule and a frequency. Levels order them by frequency. Nothing depends on names: fast weights are known by the
    modules of this package, attention and caches by what a forward pass on an example does, states of optimizers by a
    small copy of the optimizer that takes some steps. The model and the optimizer do not change.

    Args:
        model: any module. Compiled models and those in DistributedDataParallel, FSDP2 or PEFT are fine. A `System` of
            `nestlearn.levels.algebra` is shown too.
        optimizer: of any class, with or without a state, or several. None: weights have frequency 0.
        trainer: a `transformers.Trainer`, in place of the optimizer and the accumulation.
        example: an input that the model can run: a tensor, a tuple of arguments, or a dictionary of named ones. Models
            of transformers need none.
        accumulation: batches whose gradients are summed before each step of the optimizer.

    Raises:
        TypeError: no module, or no optimizer.
        ValueError: lazy parameters, flat ones of FSDP1, an example that the model cannot run, a parameter that several
            groups step, or an optimizer of another model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> system = nested_system(model, torch.optim.Adam(model.parameters()))
        >>> for level in system.levels:
        ...     print(level[0].level, level[0].frequency, [component.label for component in level])
        1 1 / batch ['Adam.exp_avg', 'Adam.exp_avg_sq']
        2 1 / batch ['1 · statistics', '0', '1', '2']
    """
    if isinstance(model, System):
        return _of_algebra(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module.")
    if trainer is not None:
        optimizer = trainer.optimizer if optimizer is None else optimizer
        accumulation = trainer.args.gradient_accumulation_steps
    if isinstance(accumulation, bool) or not isinstance(accumulation, int) or accumulation < 1:
        raise ValueError(f"accumulation={accumulation!r} must be a positive number of batches per step.")
    model = unwrapped(model)
    _check_parameters(model)
    optimizers = _optimizers(optimizer)
    units = Units(model)
    fast = list(memories(model))
    seen, notes = traced(model, example, known=bool(fast))
    slow, more = _trained(model, optimizers, units, accumulation)
    merged = units.merge([*fast, *seen, *slow])
    title = type(model).__name__ + "".join(f" + {_chain(each)}" for each in optimizers)
    return NestedSystem(title, numbered(merged), (*notes, *more), model, tuple(optimizers), accumulation)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel, DistributedDataParallel and FSDP."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel | FullyShardedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(parameter):
            raise ValueError(
                f"{name} is lazy: it has no shape before the first batch. Run the model on one batch first."
            )
        if name.rpartition(".")[2] == "_flat_param":
            raise ValueError(
                f"{name} holds many parameters of FSDP1 in one. Wrap the model with use_orig_params=True or with "
                "fully_shard (FSDP2), or look at it before it is wrapped."
            )


def _optimizers(given: Any) -> list[Optimizer]:
    several = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    found = []
    for each in several:
        inner = each
        while isinstance(inner, AcceleratedOptimizer):
            inner = inner.optimizer
        if not isinstance(inner, Optimizer):
            raise TypeError(
                f"optimizer is a {type(each).__name__}; give a torch.optim.Optimizer or a list of several"
                + (", not the scheduler around it." if hasattr(each, "optimizer") else ".")
            )
        found.append(inner)
    return found


# -- weights and the states of optimizers ---------------------------------------------------------------------------


def _trained(
    model: nn.Module, optimizers: list[Optimizer], units: Units, accumulation: int
) -> tuple[list[Component], list[str]]:
    """Components of all parameters and of the states of their optimizers, and notes."""
    places, notes = _places(model, optimizers)
    starts, found = starts_memory(model), []
    probes: dict[tuple[int, int, int], Probe | None] = {}
    for name, parameter in model.named_parameters():
        frequency, rule, states = NEVER, "none", []
        if not optimizers:
            rule = "none: no optimizer given"
        elif id(parameter) not in places:
            rule = "none: in no group of the optimizer" if parameter.requires_grad else "none: frozen"
        elif not parameter.requires_grad:
            rule = "none: frozen"
        else:
            at, group = places[id(parameter)]
            optimizer = optimizers[at]
            key = (at, group, parameter.dim())
            if key not in probes:
                try:
                    probes[key] = probe(optimizer, group, parameter)
                except ProbeError as error:
                    probes[key] = None
                    notes.append(_unprobed(optimizer, group, error))
            settings = optimizer.param_groups[group]
            rule = _rule(optimizer, settings)
            period = _period(optimizer, group, probes[key])
            frequency = NEVER if float(settings.get("lr", 1)) == 0 else Frequency(period * accumulation, "batch")
            states = list(_states(optimizer, parameter, probes[key], name, accumulation))
        found += [_weights(name, parameter, frequency, rule, starts(parameter)), *states]
    outside = sorted(name for name, p in model.named_parameters() if id(p) not in places and p.requires_grad)
    if optimizers and outside:
        shown = ", ".join(outside[:3]) + (f" and {len(outside) - 3} more" if len(outside) > 3 else "")
        notes.append(f"In no group of the optimizer, so never trained: {shown}.")
    useless = {c.name for c in found if c.kind == "optimizer state" and c.depth == 0}
    notes += [f"{name} never reaches the weights: nothing that they become depends on it." for name in sorted(useless)]
    return found, list(dict.fromkeys(notes))


def _places(model: nn.Module, optimizers: list[Optimizer]) -> tuple[dict[int, tuple[int, int]], list[str]]:
    """Optimizer and group of each parameter of the model, by its identity."""
    names = {id(p): name for name, p in model.named_parameters()}
    places: dict[int, tuple[int, int]] = {}
    foreign = 0
    for at, optimizer in enumerate(optimizers):
        mine = [(g, p) for g, group in enumerate(optimizer.param_groups) for p in group["params"]]
        if mine and not any(id(p) in names for _, p in mine):
            raise ValueError(
                f"{type(optimizer).__name__} has none of the model's {len(names)} parameters: it was made for another "
                "model, or for this one before its parameters were replaced. Make it from model.parameters()."
            )
        foreign += sum(id(p) not in names for _, p in mine)
        for group, parameter in mine:
            if places.setdefault(id(parameter), (at, group)) != (at, group):
                raise ValueError(
                    f"{names.get(id(parameter), 'a parameter')} is in two groups ({places[id(parameter)]} and "
                    f"{(at, group)}, as optimizer and group): two rules would step it. Put it in one."
                )
    note = f"The optimizer also steps {foreign} tensors that are not the model's; they are not shown."
    return places, [note] if foreign else []


def _weights(name: str, parameter: Tensor, frequency: Frequency, rule: str, starts: bool) -> Component:
    trained = frequency.period < math.inf
    return Component(
        name, "initial weights" if starts else "weights", frequency,
        "its inputs and errors" if trained else "none", "training loss" if trained else "none", rule,
        (*(("initialization",) if starts else ()), "backpropagation" if trained else "direct, parametric"),
        parameter.numel(), parameter.numel() * parameter.element_size(), (name,),
    )  # fmt: skip


def _states(
    optimizer: Optimizer, parameter: Tensor, found: Probe | None, name: str, accumulation: int
) -> Iterator[Component]:
    """A component for each state of one parameter."""
    real = dict(states_of(optimizer, parameter))
    slots = dict(found.slots) if found else {k: Slot(1, None, (), 1) for k in real}
    holds = {
        None: "gradients of a period",
        1.0: "−⟨m, g⟩: keeps gradients",
        2.0: "½(v − g²)²: keeps squared gradients",
        0.0: "keeps directions",
    }
    for key, slot in slots.items():
        period = slot.period * accumulation
        yield Component(
            f"{type(optimizer).__name__}.{key}", "optimizer state",
            Frequency(period, "batch") if period < math.inf else NEVER,
            "gradients" if slot.depth <= 1 else "gradients, for the other states", holds.get(slot.power, "gradients"),
            _chain(optimizer), ("generation",), bytes=real[key].nbytes if key in real else slot.bytes(parameter),
            members=(name,), depth=slot.depth,
        )  # fmt: skip


def _period(optimizer: Optimizer, group: int, found: Probe | None) -> float:
    if found is not None and found.period < math.inf:
        return found.period
    return float(optimizer.param_groups[group].get("update_period", 1))


def _unprobed(optimizer: Optimizer, group: int, error: ProbeError) -> str:
    period = optimizer.param_groups[group].get("update_period", 1)
    return (
        f"A copy of {type(optimizer).__name__} cannot step alone ({shorten(str(error), 200)}): its states, once it has "
        f"some, are shown with the period of their group ({period})."
    )


def _chain(optimizer: Optimizer) -> str:
    """``Outer(Inner)`` of wrappers."""
    names = [type(each).__name__ for each in optimizers_in(optimizer)]
    return "(".join(names) + ")" * (len(names) - 1)


def _rule(optimizer: Optimizer, group: dict[str, Any]) -> str:
    """The class, the rule that the group chooses, and its learning rate."""
    chosen = group.get("rule")
    rate = f", lr {float(group['lr']):g}" if "lr" in group else ""
    return _chain(optimizer) + (f" [{chosen}]" if isinstance(chosen, str) else "") + rate


# -- systems of the algebra -----------------------------------------------------------------------------------------


def _of_algebra(system: System) -> NestedSystem:
    found = []
    for name, period, depth, part in problems(system):
        tensors = [leaf for leaf in tree_leaves(part.state) if isinstance(leaf, Tensor)]
        kind, context, way = (
            ("optimizer state", "gradients", "generation") if depth else ("memory", "its inputs", "direct, parametric")
        )
        frequency = NEVER if period is None else Frequency(period)
        numbers = sum(x.numel() for x in tensors), sum(x.nbytes for x in tensors)
        found.append(
            Component(name or "system", kind, frequency, context, "–", "its update", (way,), *numbers, (name,), depth)
        )
    return NestedSystem("System", numbered(found))
