"""What an optimizer keeps, how often each part of it changes and what it moves: found by running a small copy of it."""

from __future__ import annotations

import copy
import math
import re
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .trace import tensors_in

STEPS, MOST_STEPS = 24, 200
"""Steps of the copy, and its steps where something has not changed in so many."""

SECONDS = 10.0
"""Processor time of the thread for one copy: what is found must not depend on other work of the machine."""

SIDES = (5, 7, 3, 4)
"""Sides of the copy's tensors: different ones, so that a state of one side is recognized."""

WEIGHTS = "weights"

NUMBER = re.compile(r"\.\d+")


@dataclass(frozen=True)
class Slot:
    """One kind of state of an optimizer.

    Args:
        period: steps between two changes; ``math.inf`` if none was seen.
        power: how it grows with the gradients: 1 in proportion, 2 with their squares, 0 not at all.
        sides: which sides of the parameter each of its own sides has (None: a fixed number).
        depth: 1 if only the weights need it, more if other states do; 0 if it never reaches the weights.
        itemsize: bytes of one number.
    """

    period: float
    power: float | None
    sides: tuple[int | None, ...]
    depth: int
    itemsize: int = 4

    def bytes(self, parameter: Tensor) -> int:
        """Of this state for a parameter."""
        return math.prod(parameter.shape[side] for side in self.sides if side is not None) * self.itemsize


@dataclass(frozen=True)
class Probe:
    """What was found of one parameter group, for parameters of one number of dimensions.

    ``period`` is that of the weights.
    """

    period: float
    slots: Mapping[str, Slot] = field(default_factory=dict)


class ProbeError(Exception):
    """A copy of an optimizer cannot be made, or cannot step on gradients alone; the message says why."""


def probe(optimizer: Optimizer, group: int, parameter: Tensor) -> Probe:
    """Run a copy of the optimizer on a small parameter of the same number of dimensions in one group.

    Raises:
        ProbeError: the copy cannot step, or takes too long.
    """
    shape = tuple(min(size, SIDES[i % len(SIDES)]) for i, size in enumerate(parameter.shape))
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)
        start, gradients = torch.randn(shape), torch.randn(MOST_STEPS, *shape)
        try:
            # Not counted: what a first step imports.
            _Copy(optimizer, group, start, math.inf).step(gradients[0])
            deadline = time.thread_time() + SECONDS
            found = _run(lambda: _Copy(optimizer, group, start, deadline), gradients)
            once = _Copy(optimizer, group, start.to(parameter.dtype), deadline)
            once.step(gradients[0].to(parameter.dtype))
            sizes = {name: x.element_size() for name, x in once.tensors().items()}
            slots = {n: replace(slot, itemsize=sizes.get(n, slot.itemsize)) for n, slot in found.slots.items()}
            return replace(found, slots=slots)
        except Exception as error:  # a foreign optimizer may raise anything where it is not at home
            raise ProbeError(f"{type(error).__name__}: {error}") from error


class _Copy:
    """A copy of an optimizer with one small parameter."""

    def __init__(self, optimizer: Optimizer, group: int, start: Tensor, deadline: float) -> None:
        self.parameter, self.deadline = nn.Parameter(start.clone()), deadline
        others = {id(p): self.parameter for g in optimizer.param_groups for p in g["params"]}
        self.optimizer = clone(optimizer, others)
        kept = dict(self.optimizer.param_groups[group], params=[self.parameter])
        for each in optimizers_in(self.optimizer):
            each.param_groups = [kept]
        if _rate(kept) == 0:
            kept["lr"] = 1e-3

    def step(self, gradient: Tensor) -> None:
        if time.thread_time() > self.deadline:
            raise TimeoutError(f"some steps of it took more than {SECONDS:g} s")

        def closure() -> Tensor:
            self.parameter.grad = gradient.clone()
            return (self.parameter.detach() * gradient).sum()

        step: Any = self.optimizer.step
        closure()
        try:
            step()
        except (TypeError, AssertionError):  # it wants a closure
            step(closure)

    def tensors(self) -> dict[str, Tensor]:
        """Weights and states by name."""
        found = {WEIGHTS: self.parameter.detach()}
        for name, tensor in states_of(self.optimizer, self.parameter):
            found.setdefault(NUMBER.sub(".*", name), tensor)  # of a list the first stands for all
        return found

    def fork(self) -> _Copy:
        other = object.__new__(_Copy)
        other.deadline, other.parameter = self.deadline, nn.Parameter(self.parameter.detach().clone())
        other.optimizer = clone(self.optimizer, {id(self.parameter): other.parameter}, with_state=True)
        return other


def clone(optimizer: Optimizer, others: dict[int, Any], with_state: bool = False) -> Optimizer:
    """A copy of an optimizer, and of those that it wraps, with other parameters.

    It has no hooks, and no wrapper that a scheduler has put around its step.

    Args:
        others: the new parameter by the identity of the old one; objects inside are copied once.
        with_state: copy the states too.
    """
    if id(optimizer) in others:
        return others[id(optimizer)]
    made = others[id(optimizer)] = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name == "step" or isinstance(value, OrderedDict):
            new: Any = OrderedDict()
        elif name == "state" and not with_state:
            # Wrappers share the state of what they wrap.
            new = others.setdefault(id(value), defaultdict(dict))
        elif isinstance(value, Optimizer):
            new = clone(value, others, with_state)
        elif isinstance(value, nn.Module) or callable(value):
            new = value
        else:
            new = copy.deepcopy(value, others)
        if name != "step":
            made.__dict__[name] = new
    return made


def optimizers_in(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizer and all that it wraps, the outermost first."""
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            yield from optimizers_in(value)


def states_of(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """States of a parameter by name, scalars (counters) left out.

    A wrapper's own are in dictionaries by parameter among its attributes.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for each in optimizers_in(optimizer):
        tables = {"": each.state, **{k: v for k, v in vars(each).items() if isinstance(v, dict) and k != "state"}}
        for table, held in tables.items():
            if any(key is parameter for key in held):
                for path, tensor in tensors_in(held[parameter], table.strip("_")):
                    if id(tensor) in trained:
                        continue
                    if tensor.numel() > 1 or (parameter.numel() == 1 and tensor.dim() == parameter.dim() > 0):
                        found.setdefault(id(tensor), (path, tensor))
    yield from found.values()


def _run(make: Callable[[], _Copy], gradients: Tensor) -> Probe:
    running, changes = make(), defaultdict(list)
    running.step(gradients[0])
    before = {name: x.clone() for name, x in running.tensors().items()}
    first, early = before, running
    for steps in range(1, MOST_STEPS):
        running.step(gradients[steps])
        early = running.fork() if steps == 2 else early
        now = running.tensors()
        for name, tensor in now.items():
            old = before.get(name)
            if old is None or old.shape != tensor.shape or not torch.equal(old, tensor):
                changes[name].append(steps)
        before = {name: x.clone() for name, x in now.items()}
        slow = time.thread_time() > running.deadline - SECONDS / 2
        if steps >= STEPS and (slow or all(len(changes[name]) > 2 for name in before)):
            break
    periods = {name: _period(changes[name]) for name in before}
    powers = _powers(make, gradients, first)
    length = int(max(p for p in periods.values() if p < math.inf)) + 1
    # Early too, where a state that grows without end still has an effect that numbers can hold.
    late, soon = (_feeds(copied, before, gradients[:length]) for copied in (running, early))
    depths = _distances({name: fed | soon[name] for name, fed in late.items()})
    sides = {size: i for i, size in enumerate(running.parameter.shape)}
    slots = {
        name: Slot(
            periods[name], powers.get(name), tuple(sides.get(s) for s in x.shape), depths[name], x.element_size()
        )
        for name, x in before.items()
        if name != WEIGHTS
    }
    return Probe(periods[WEIGHTS], slots)


def _period(steps: list[int]) -> float:
    """The mean distance between changes."""
    if len(steps) > 1:
        return float(round((steps[-1] - steps[0]) / (len(steps) - 1)))
    return float(steps[0]) if steps else math.inf


def _powers(make: Callable[[], _Copy], gradients: Tensor, plain: Mapping[str, Tensor]) -> dict[str, float]:
    """How each state after one step grows where the gradient is four times as large."""
    larger = make()
    larger.step(4 * gradients[0])
    now = larger.tensors()
    found = {}
    for name, x in plain.items():
        if name in now and name != WEIGHTS and x.norm() > 0 and now[name].norm() > 0 and now[name].shape == x.shape:
            found[name] = round(math.log(float(now[name].norm() / x.norm()), 4), 1)
    return found


def _feeds(copied: _Copy, names: Iterable[str], gradients: Tensor) -> dict[str, set[str]]:
    """Which tensors come out different if one is changed before these steps, by the name of the changed one."""

    def run(changed: str | None = None) -> dict[str, Tensor]:
        fork = copied.fork()
        if changed is not None and (x := fork.tensors().get(changed)) is not None:
            x.copy_(x * 1.5 + 0.1 * x.abs().mean() + 1e-3)
        for gradient in gradients:
            fork.step(gradient)
        return {name: x.clone() for name, x in fork.tensors().items()}

    usual = run()
    return {
        name: {key for key, x in run(name).items() if key != name and not torch.equal(x, usual[key])} for name in names
    }


def _distances(feeds: Mapping[str, set[str]], longest: int = 3) -> dict[str, int]:
    """The longest way of each state to the weights, through states that do not feed it; 0 if there is none."""
    needed_by = {
        name: [m for m in others if m == WEIGHTS or name not in feeds.get(m, ())] for name, others in feeds.items()
    }
    far = {WEIGHTS: 0}
    for _ in range(longest):  # what feeds each other in a circle stays at this length
        far |= {
            name: 1 + max(far[m] for m in way) for name in feeds if (way := [m for m in needed_by[name] if m in far])
        }
    return {name: far.get(name, 0) for name in feeds if name != WEIGHTS} | {WEIGHTS: 0}


def _rate(group: Mapping[str, Any]) -> float:
    return float(group.get("lr", 1.0))
