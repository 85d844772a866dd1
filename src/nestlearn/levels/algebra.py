"""An algebra of systems that learn: every model with its optimizer is a system of nested problems (NL Def. 1-4).

A system is a machine with three parts: what it holds, what it answers, and how what it holds changes. Four operations
make large systems of small ones, and every result is a system again:

    compose     one after the other; feedback flows back                    layers of a network
    parallel    side by side, on separate inputs                            heads, branches
    nest        one update per period, on everything seen in the period     levels of a Continuum Memory System
    wire        parts that read, and write, each other                      memories that project and teach each other

`learner` is where two problems nest: the weights of a map, and the rule that changes them. The rule is a system too.
Its inputs are the gradients of the weights, so plain descent, momentum, Adam and a deep memory of gradients differ in
the rule alone. `levels` reads the order of all these problems off the structure.

Nothing here has hidden state and nothing is changed in place. Derivatives are those of single systems; the chain rule
is `compose`. A system is a learner in the sense of Fong, Spivak and Tuyéras (arXiv 1711.10455): `readout` is their
implementation, and `update` gives their update and their request together. Learners as dynamical systems: Spivak (arXiv
2103.01189); wiring that what flows can change: Spivak and Hosgood (arXiv 2111.01297).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

Tree = Any
"""A tensor, or tuples, lists and dictionaries of trees."""

Parts = Mapping[str, "System"]
"""The parts of a system by name, each with its present state."""


@dataclass(frozen=True)
class System:
    """A machine ``A -> B``: a state P, an answer ``P × A -> B``, and an update ``P × A × B' -> P × A'``.

    B' is feedback on the answer. A' is the feedback that the system passes on to whatever made its input.

    Args:
        state: what it holds, a tree of tensors.
        readout: ``readout(state, x) -> y``.
        update: ``update(state, x, e) -> (state, e_x)`` with the feedback e on ``readout(state, x)``.
        parts: the systems that it is made of; empty for one that is a problem by itself.
        period: inputs from one change of the state to the next; None never changes it.
        inside: whether it works inside another system, which needs its newest state at each update.

    Example:
        >>> counter = System(torch.tensor(0), readout=lambda n, x: n, update=lambda n, x, e: (n + 1, None))
        >>> counter.learn("a").learn("b")("c")
        tensor(2)
    """

    state: Tree
    readout: Callable[[Tree, Tree], Tree]
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
    parts: Parts = field(default_factory=dict)
    period: int | None = 1
    inside: bool = False

    def __call__(self, x: Tree) -> Tree:
        """The answer to x."""
        return self.readout(self.state, x)

    def learn(self, x: Tree, e: Tree = None) -> System:
        """The system after it has seen x, and feedback e on its answer."""
        return replace(self, state=self.update(self.state, x, e)[0])

    def run(self, inputs: Iterable[Tree], feedback: Callable[[Tree, int], Tree]) -> tuple[list[Tree], System]:
        """Answer each input, then learn from it.

        Args:
            inputs: a stream.
            feedback: ``feedback(y, t)`` on the t-th answer y, such as the derivative of a loss by y.

        Returns:
            All answers, and the system after the last input.

        Example:
            >>> line = learner(torch.mul, torch.tensor(0.0), descent(lr=0.5))
            >>> answers, line = line.run([torch.tensor(1.0)] * 20, lambda y, t: y - 3)
            >>> round(line(torch.tensor(1.0)).item(), 3)
            3.0
        """
        system, answers = self, []
        for t, x in enumerate(inputs):
            answers.append(system(x))
            system = system.learn(x, feedback(answers[-1], t))
        return answers, system


# -- systems of one problem -----------------------------------------------------------------------------------------


def lift(f: Callable[[Tree], Tree]) -> System:
    """A function as a system without state; its feedback goes through the transposed derivative.

    Example:
        >>> lift(torch.square).update((), torch.tensor(3.0), torch.tensor(1.0))
        ((), tensor(6.))
    """
    return System((), lambda _, x: f(x), lambda _, x, e: ((), _pull(f, x, e)))


def learner(
    readout: Callable[[Tree, Tree], Tree], weights: Tree, rule: Callable[[Tensor], System] | None = None
) -> System:
    """A map with weights, and inside it the rule that changes them.

    Each tensor of the weights has a rule of its own. A rule is a system whose inputs are gradients and whose answers
    are steps. It first learns the gradient, then answers it:

        (g, e_x) = (∂y/∂(W, x))ᵀ e        r <- r after g        W <- W - r(g)

    Args:
        readout: ``readout(weights, x) -> y``, differentiable. `nest` also calls it with a leading dimension more.
        weights: a tree of tensors.
        rule: makes the rule of a tensor, such as `descent`; None for weights that never change (frequency 0).

    Example:
        >>> line = learner(torch.mul, torch.tensor(2.0), descent(lr=0.1))
        >>> line.learn(torch.tensor(3.0), torch.tensor(1.0))(torch.tensor(1.0))
        tensor(1.7000)
    """
    if rule is None:
        return nest(learner(readout, weights, descent(0.0)), None)
    rules = [replace(rule(w), inside=True) for w in tree_leaves(weights)]
    held = System(weights, readout, lambda now, x, steps: (tree_map(torch.sub, now, steps), None))

    def update(state: Tree, x: Tree, e: Tree) -> tuple[Tree, Tree]:
        now, inner = state
        gradients, back = _pull(lambda both: readout(*both), (now, x), e)
        flat, form = tree_flatten(gradients)
        inner = [r.update(s, g, None)[0] for r, s, g in zip(rules, inner, flat, strict=True)]
        steps = [r.readout(s, g) for r, s, g in zip(rules, inner, flat, strict=True)]
        return (held.update(now, x, tree_unflatten(steps, form))[0], inner), back

    return System(
        (weights, [r.state for r in rules]),
        lambda state, x: readout(state[0], x),
        update,
        parts={"weights": held, **{f"rule{i}" if i else "rule": r for i, r in enumerate(rules)}},
    )


def descent(lr: float) -> Callable[[Tensor], System]:
    """Gradient descent as a rule: ``r(g) = lr g``. It holds nothing, so it is no level of its own."""
    return lambda _: lift(lambda g: lr * g)


def average(beta: float, like: Tensor, new: float = 1.0) -> System:
    """A memory of all inputs, ``m <- β m + new x``, which answers m: linear attention with decay (NL Eq. 33-34).

    Momentum is this system as a rule. An exponential average has ``new = 1 - β``.

    Example:
        >>> average(0.5, torch.tensor(0.0)).learn(torch.tensor(1.0)).learn(torch.tensor(1.0))(None)
        tensor(1.5000)
    """
    return System(torch.zeros_like(like), lambda m, _: m, lambda m, x, _: (beta * m + new * x, None))


# -- operations -----------------------------------------------------------------------------------------------------


def compose(*systems: System) -> System:
    """One system after the other. Feedback flows from the last to the first: this is backpropagation.

    All systems learn at once, from the answers of the others before this input.

    Example:
        >>> double, square = lift(lambda x: 2 * x), lift(torch.square)
        >>> both = compose(double, square)
        >>> both(torch.tensor(3.0)), both.update(both.state, torch.tensor(3.0), torch.tensor(1.0))[1]
        (tensor(36.), tensor(24.))
    """

    def inputs(states: Tree, x: Tree) -> list[Tree]:
        seen = [x]
        for system, state in zip(systems, states, strict=True):
            seen.append(system.readout(state, seen[-1]))
        return seen

    def update(states: Tree, x: Tree, e: Tree) -> tuple[Tree, Tree]:
        after = []
        for system, state, seen in reversed(list(zip(systems, states, inputs(states, x), strict=False))):
            state, e = system.update(state, seen, e)
            after.append(state)
        return tuple(reversed(after)), e

    return System(_states(systems), lambda states, x: inputs(states, x)[-1], update, _numbered(systems))


def parallel(*systems: System) -> System:
    """Systems side by side: a tuple of inputs gives a tuple of answers.

    Example:
        >>> parallel(lift(torch.square), lift(torch.neg))((torch.tensor(3.0), torch.tensor(1.0)))
        (tensor(9.), tensor(-1.))
    """

    def readout(states: Tree, xs: Tree) -> Tree:
        return tuple(system.readout(*pair) for system, *pair in zip(systems, states, xs, strict=True))

    def update(states: Tree, xs: Tree, es: Tree) -> tuple[Tree, Tree]:
        es = (None,) * len(systems) if es is None else es
        pairs = [system.update(*triple) for system, *triple in zip(systems, states, xs, es, strict=True)]
        return tuple(state for state, _ in pairs), tuple(e for _, e in pairs)

    return System(_states(systems), readout, update, _numbered(systems))


def nest(system: System, period: int | None) -> System:
    """A slower level: the system learns once per ``period`` inputs, from all inputs and feedback of the period at once.

    They are stacked in a leading dimension. Until then it answers with its old state and passes feedback on. A sum over
    inputs of gradients then is ``θ <- θ - Σ_{t in the last C} η f(θ; x_t)`` (NL Eq. 71). Periods of nested nests
    multiply.

    Args:
        period: in inputs, at least 1; None never learns.

    Raises:
        ValueError: a period that is not a positive integer.

    Example:
        >>> slow = nest(learner(torch.mul, torch.tensor(0.0), descent(lr=0.1)), period=3)
        >>> one = torch.tensor(1.0)
        >>> answers, _ = slow.run([one] * 4, lambda y, t: -one)
        >>> [round(y.item(), 1) for y in answers]
        [0.0, 0.0, 0.0, 0.3]
    """
    if period is not None and (isinstance(period, bool) or not isinstance(period, int) or period < 1):
        raise ValueError(
            f"period={period!r} must be a positive number of inputs, or None for a level that never learns."
        )

    def update(state: Tree, x: Tree, e: Tree) -> tuple[Tree, Tree]:
        inner, seen = state
        back = _pull(lambda x: system.readout(inner, x), x, e)
        if period is None:
            return state, back
        seen = (*seen, (x, e))
        if len(seen) < period:
            return (inner, seen), back
        context = tree_map(lambda *values: torch.stack(values), *seen)
        return (system.update(inner, *context)[0], ()), back

    return System(
        (system.state, ()), lambda state, x: system.readout(state[0], x), update, parts={"": system}, period=period
    )


def wire(
    parts: Parts,
    readout: Callable[[Parts, Tree], Tree],
    flow: Callable[[Parts, Tree, Tree], Mapping[str, tuple[Tree, Tree]]],
) -> System:
    """Systems whose wiring is a function of what flows: what each learns may be what the others answer.

    The wiring is adaptive. It sees the parts with their present state, so that the answer of one can be the input, the
    feedback, the step size or the target of another, or decide whether another learns at all.

    Args:
        parts: by name.
        readout: ``readout(parts, x) -> y``. A part can also answer after it has learned: ``parts["m"].learn(k, e)(q)``.
        flow: ``flow(parts, x, e) -> {name: (x_part, e_part)}``, what each part learns from; one that is not named
            keeps its state.

    Example:
        >>> memory = learner(torch.mul, torch.tensor(0.0), descent(lr=1.0))
        >>> def surprise(parts, x, e):  # it learns the square of its input, and only where it is wrong
        ...     wrong = parts["memory"](x) - x * x
        ...     return {"memory": (x, wrong)} if wrong.abs() > 0.1 else {}
        >>> box = wire({"memory": memory}, lambda parts, x: parts["memory"](x), surprise)
        >>> box.learn(torch.tensor(1.0))(torch.tensor(2.0))
        tensor(2.)
    """

    def at(states: Mapping[str, Tree]) -> Parts:
        return {name: replace(part, state=states[name]) for name, part in parts.items()}

    def update(states: Mapping[str, Tree], x: Tree, e: Tree) -> tuple[Tree, Tree]:
        now = at(states)
        contexts = flow(now, x, e)
        unknown = set(contexts) - set(parts)
        if unknown:
            raise ValueError(f"flow names {sorted(unknown)}, but the parts are {sorted(parts)}.")
        after = {
            name: part.learn(*contexts[name]).state if name in contexts else part.state for name, part in now.items()
        }
        return after, None if e is None else _pull(lambda x: readout(now, x), x, e)

    states = {name: part.state for name, part in parts.items()}
    return System(states, lambda states, x: readout(at(states), x), update, parts)


# -- structure ------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A level of a system: the period of its updates in inputs (None: never) and the problems that share it.

    Each problem is named by the path of parts that leads to it.
    """

    period: int | None
    names: tuple[str, ...]


def levels(system: System) -> list[Place]:
    """The levels of a system, the fastest first (NL Def. 2-4).

    A system with a shorter period is faster. Of two with one period, the one inside comes first, because the other
    needs its newest state at each update: a momentum before the weights that it moves. Systems that do not need each
    other share a level.

    Example:
        >>> momentum = lambda w: average(0.9, w)
        >>> fast, slow = (learner(torch.mul, torch.tensor(1.0), momentum) for _ in range(2))
        >>> for level in levels(compose(fast, nest(slow, 8))):
        ...     print(level.period, level.names)
        1 ('0.rule',)
        1 ('0.weights',)
        8 ('1.rule',)
        8 ('1.weights',)
    """
    found: dict[tuple[float, int], list[str]] = {}
    for name, period, depth, _ in problems(system):
        found.setdefault((float("inf") if period is None else period, -depth), []).append(name)
    return [
        Place(None if period == float("inf") else int(period), tuple(found[period, depth]))
        for period, depth in sorted(found)
    ]


def problems(
    system: System, name: str = "", period: int | None = 1, depth: int = 0
) -> Iterator[tuple[str, int | None, int, System]]:
    """``(name, period, depth, system)`` of every part that holds tensors of its own.

    Periods on the way multiply; depth counts the systems that each works inside.
    """
    period = None if period is None or system.period is None else period * system.period
    depth += system.inside
    if not system.parts and any(isinstance(leaf, Tensor) for leaf in tree_leaves(system.state)):
        yield name, period, depth, system
    for key, part in system.parts.items():
        yield from problems(part, ".".join(filter(None, (name, key))), period, depth)


def _pull(f: Callable[[Tree], Tree], x: Tree, e: Tree) -> Tree:
    """``(∂f/∂x)ᵀ e``; None without feedback."""
    return None if e is None else vjp(f, x)[1](e)[0]


def _states(systems: Iterable[System]) -> tuple[Tree, ...]:
    return tuple(system.state for system in systems)


def _numbered(systems: Iterable[System]) -> dict[str, System]:
    return {str(i): system for i, system in enumerate(systems)}
