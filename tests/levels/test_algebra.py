"""Each method of the package as nested systems, in a few lines, equal to the package's own in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vjp
from torch.nn import functional as F

from nestlearn.levels.algebra import (
    Parts,
    System,
    average,
    compose,
    descent,
    learner,
    levels,
    lift,
    nest,
    parallel,
    wire,
)
from nestlearn.nn import ContinuumMemory, Level, SelfModifyingConfig
from nestlearn.optim import DGD, AssociativeMomentum, DeltaMomentum, GeneratedValues, MultiTimescale

WIDTH, STEPS = 5, 12
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def linear(w: Tensor, x: Tensor) -> Tensor:
    return x @ w.mT


def maps(count: int = 3) -> list[Tensor]:
    return [0.5 * torch.randn(WIDTH, WIDTH, dtype=torch.float64) for _ in range(count)]


def network(weights: list[Tensor], rule: Callable[[Tensor], System]) -> System:
    first, *rest = (learner(linear, w, rule) for w in weights)
    return compose(first, *(part for layer in rest for part in (lift(torch.tanh), layer)))


def by_autograd(weights: list[Tensor], make: Callable[[Any], Any], xs: Tensor, ys: Tensor) -> list[Tensor]:
    """The same network, trained by torch; the answers of all steps."""
    model: Any = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64) for _ in weights))
    for layer, w in zip(model, weights, strict=True):
        layer.weight = nn.Parameter(w.clone())
    optimizer, answers = make(model), []
    for x, y in zip(xs, ys, strict=True):
        h = model[0](x)
        for layer in list(model)[1:]:
            h = layer(h.tanh())
        optimizer.zero_grad()
        (h - y).square().sum().div(2).backward()
        optimizer.step()
        answers.append(h.detach())
    return answers


def momentum(w: Tensor) -> System:
    return compose(average(0.9, w), descent(0.05)(w))


def adam(w: Tensor, lr: float = 0.01, b1: float = 0.9, b2: float = 0.99) -> System:
    clock = System(torch.zeros((), dtype=w.dtype), lambda t, _: t, lambda t, *_: (t + 1, None))

    def step(has: Parts, g: Tensor) -> Tensor:
        m, v, t = (part(g) for part in has.values())
        return lr * m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + 1e-8)

    parts = {"m": average(b1, w, 1 - b1), "v": average(b2, w, 1 - b2), "t": clock}
    return wire(parts, step, lambda has, g, e: {"m": (g, None), "v": (g * g, None), "t": (g, None)})


def delta_momentum(w: Tensor, lr: float = 0.05, alpha: float = 0.9, eps: float = 1e-8) -> System:
    def erase(m: Tensor, g: Tensor) -> Tensor:
        key = g / (g.norm() + eps)
        return alpha * m - m @ key.mT @ key + g

    return System(torch.zeros_like(w), lambda m, g: lr * m, lambda m, g, e: (erase(m, g), None))


def self_generated(w: Tensor, lr: float = 0.05, alpha: float = 0.9, threshold: float = 0.7) -> System:
    """The momentum generates what it learns: its own answer to the gradient, and how far it moves from it."""

    def context(has: Parts, g: Tensor, e: Tensor) -> dict[str, tuple[Tensor, None]]:
        answer = (1 - alpha) * has["momentum"](g)
        limit = threshold * answer.norm()
        surprise = g - answer
        if 0 < limit < surprise.norm():
            surprise = surprise * limit / surprise.norm()
        return {"momentum": (answer + surprise, None)}

    return wire({"momentum": average(alpha, w)}, lambda has, g: lr * has["momentum"](g), context)


RULES = {
    "descent": (descent(0.05), lambda m: torch.optim.SGD(m.parameters(), 0.05)),
    "momentum": (momentum, lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9)),
    "adam": (adam, lambda m: torch.optim.Adam(m.parameters(), 0.01, betas=(0.9, 0.99))),
    "generalized momentum": (
        self_generated,
        lambda m: AssociativeMomentum(m.parameters(), 0.05, values=GeneratedValues(0.7)),
    ),
    "delta momentum": (
        delta_momentum,
        lambda m: DeltaMomentum(m.parameters(), 0.05, momentum=0.9, weight_decay=0.0),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_composed_network_learns_as_by_autograd(name: str) -> None:
    rule, make = RULES[name]
    weights, xs, ys = maps(), *torch.randn(2, STEPS, WIDTH, dtype=torch.float64)
    answers, _ = network(weights, rule).run(xs, lambda y, t: y - ys[t])
    close(torch.stack(answers), torch.stack(by_autograd(weights, make, xs, ys)))


def test_a_period_per_part_is_multi_timescale() -> None:
    """A Continuum Memory System over an optimizer: each layer learns once per period, from all of it (NL Eq. 71)."""
    weights, xs, ys = maps(), *torch.randn(2, STEPS, WIDTH, dtype=torch.float64)
    first, second, third = (learner(linear, w, adam) for w in weights)
    system = compose(first, lift(torch.tanh), nest(second, 3), lift(torch.tanh), nest(third, None))

    def make(model: Any) -> MultiTimescale:
        model[2].weight.requires_grad_(False)
        groups = [{"params": [layer.weight]} for layer in list(model)[:2]]
        return MultiTimescale(torch.optim.Adam(groups, 0.01, betas=(0.9, 0.99)), [1, 3], reduction="sum")

    answers, _ = system.run(xs, lambda y, t: y - ys[t])
    close(torch.stack(answers), torch.stack(by_autograd(weights, make, xs, ys)))
    assert [level.period for level in levels(system)] == [1, 1, 3, 3, None, None]


def test_an_optimizer_whose_context_the_model_generates_is_dgd() -> None:
    """The rule learns pairs that the rest of the model makes: the input of the map, and the error of its answer."""

    def dgd(w: Tensor, eta: float = 0.2) -> System:
        def update(w: Tensor, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
            step = eta / (1 + eta * x @ x)
            return w - step * (torch.outer(w @ x, x) + torch.outer(e, x)), w.mT @ e

        return System(w, lambda w, x: w @ x, update)

    weights, xs, ys = maps(), *torch.randn(2, STEPS, WIDTH, dtype=torch.float64)
    first, second, third = map(dgd, weights)
    system = compose(first, lift(torch.tanh), second, lift(torch.tanh), third)
    answers, _ = system.run(xs, lambda y, t: y - ys[t])
    expected = by_autograd(weights, lambda m: DGD(m.parameters(), m, lr=0.2), xs, ys)
    close(torch.stack(answers), torch.stack(expected))


def test_a_continuum_memory_is_composed_of_nested_levels() -> None:
    cms: Any = ContinuumMemory(4, [Level(3, hidden=6, retain=1.0), Level(6, hidden=6, retain=1.0)], "gelu").double()
    for network in cms.networks:
        nn.init.normal_(network.value)

    def level(network: Any, norm: Any) -> System:
        initial = network.initial(torch.float64)

        def mlp(w: dict[str, Tensor], x: Tensor) -> Tensor:
            return linear(w["down"], F.gelu(linear(w["up"], x)))

        def flow(parts, x, e):
            key = norm(x)[None, None]
            error = parts["M"](key) - network._value(key, initial)
            return {"M": (key, network._gates(key, initial, True).lr.unsqueeze(-1) * error)}

        memory = nest(learner(mlp, dict(initial), descent(1.0)), network.period)
        return wire({"M": memory}, lambda parts, x: x + parts["M"](norm(x)), flow)

    system = compose(*map(level, cms.networks, cms.norms))
    x = torch.randn(1, 20, 4, dtype=torch.float64)
    with torch.no_grad():
        answers, _ = system.run(x[0], lambda y, t: torch.zeros_like(y))
        expected = x + cms(x)[0]
        still = x + cms(x, writes=False)[0]
    close(torch.stack(answers), expected[0])
    assert (expected - still).norm() > 1e-3 * still.norm()  # levels did write
    assert [(p.period, p.names) for p in levels(system)] == [(3, ("0.M.weights",)), (6, ("1.M.weights",))]


def mlp_memory(initial: dict[str, Tensor]) -> System:
    """A two-layer memory that learns by DGD on -<M(k), target>: a step of each map, with its own input and error."""

    def update(w: Any, k: Tensor, e: Any) -> tuple[Any, None]:
        target, eta, alpha = e
        h, back = vjp(F.gelu, w["in"] @ k)[:2]
        moved = {}
        for name, x, error in (("in", k, back(-w["out"].mT @ target)[0]), ("out", h, -target)):
            step, d = eta / (1 + eta * x @ x), w[name] - initial[name]
            moved[name] = initial[name] + alpha * d - step * torch.outer(d @ x + error, x)
        return moved, None

    return System(initial, lambda w, x: x + w["out"] @ F.gelu(w["in"] @ x), update)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum() + 1e-6).sqrt()


def self_modifying(layer: Any, memories: dict[str, System]) -> System:
    """Five memories make the keys, values and gates that all five learn from, and each makes its own target."""

    def tokens(parts: Parts, x: Any) -> tuple[Tensor, ...]:
        s = {name: parts[name](x[name]) for name in layer.adaptive}
        eta = layer.max_step * torch.sigmoid(s["eta"] @ layer.eta_vector[0] + layer.eta_bias[0])
        alpha = torch.sigmoid(s["alpha"] @ layer.alpha_vector[0] + layer.alpha_bias[0])
        return unit(s["k"]), unit(s["v"]), eta, alpha

    def flow(parts: Parts, x: Any, e: Any) -> dict[str, Any]:
        k, v, eta, alpha = tokens(parts, x)
        return {name: (k, (unit(part(v)), eta, alpha)) for name, part in parts.items()}

    def answer(parts: Parts, x: Any) -> Tensor:  # of the memory that has learned this token
        return parts["memory"].learn(*flow(parts, x, None)["memory"])(unit(x["q"]))

    return wire(memories, answer, flow)


def test_a_self_modifying_memory_is_adaptive_wiring() -> None:
    layer: Any = SelfModifyingConfig(chunk_size=1, projection_chunk_size=1, conv_size=0).build(8, num_heads=1).double()
    nn.init.normal_(layer.streams.weight)
    start = {name: {m: w[0] for m, w in layer.initial[name](torch.float64).items()} for name in layer.initial}
    system = self_modifying(layer, {name: mlp_memory(w) for name, w in start.items()})
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        streams = F.silu(layer.streams(x))[0].unflatten(-1, (len(layer.streams_order), -1))
        stream = [dict(zip(layer.streams_order, s, strict=True)) for s in streams]
        answers, after = system.run(stream, lambda y, t: None)
        close(layer._merge(torch.stack(answers)[None], x), layer(x)[0])
    assert not torch.equal(after.state["k"]["in"], start["k"]["in"])
    assert levels(system) == [(1, ("k", "v", "eta", "alpha", "memory"))]


# -- structure ------------------------------------------------------------------------------------------------------


def test_moments_share_a_level_and_weights_need_them() -> None:
    system = network(maps(2), adam)
    assert levels(system) == [
        (1, ("0.rule.m", "0.rule.v", "0.rule.t", "2.rule.m", "2.rule.v", "2.rule.t")),
        (1, ("0.weights", "2.weights")),
    ]


def test_periods_read_off_the_structure_are_the_real_ones() -> None:
    """Each level changes after as many inputs as `levels` says, and at no other."""
    layers = [learner(linear, w, momentum) for w in maps(3)]
    system = compose(layers[0], nest(compose(nest(layers[1], 2), layers[2]), 3), nest(learner(linear, maps(1)[0]), 5))
    for place in levels(system):
        assert place.period in (1, 3, 6, None)
    found = {name: place.period for place in levels(system) for name in place.names}
    assert found["1.0.weights"] == 6 and found["1.1.weights"] == 3 and found["2.weights"] is None
    weights = {
        "0.weights": lambda s: s[0][0],
        "1.0.weights": lambda s: s[1][0][0][0][0],
        "1.1.weights": lambda s: s[1][0][1][0],
        "2.weights": lambda s: s[2][0][0][0],
    }
    changes = dict.fromkeys(weights, 0)
    for _ in range(12):
        after = system.learn(*torch.randn(2, WIDTH, dtype=torch.float64))
        for name, get in weights.items():
            changes[name] += not torch.equal(get(system.state), get(after.state))
        system = after
    assert changes == {name: 12 // (found[name] or 13) for name in weights}


def test_parts_in_parallel_learn_apart_and_composition_is_associative() -> None:
    a, b, c = (learner(linear, w, momentum) for w in maps())
    x, y, e, f = torch.randn(4, WIDTH, dtype=torch.float64)
    both = parallel(a, b).learn((x, y), (e, f))
    close(both((x, y)), (a.learn(x, e)(x), b.learn(y, f)(y)))
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    for _ in range(3):
        left, right = left.learn(x, e), right.learn(x, e)
    close(left(x), right(x))


@pytest.mark.parametrize("period", [0, -1, 1.5, True, "3"])
def test_a_period_is_a_positive_number_of_inputs(period: object) -> None:
    with pytest.raises(ValueError, match="must be a positive number of inputs"):
        nest(lift(torch.tanh), period)  # type: ignore[arg-type]


def test_a_flow_names_parts() -> None:
    box = wire({"a": lift(torch.tanh)}, lambda parts, x: x, lambda parts, x, e: {"b": (x, e)})
    with pytest.raises(ValueError, match=r"flow names \['b'\], but the parts are \['a'\]"):
        box.learn(torch.ones(2))
