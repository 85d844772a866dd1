"""All four axes take objects from outside the package, in both engines and in a layer; so do a memory's own values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nestlearn.memory import L2, MLP, AssociativeMemory, Decay, Delta, Factor, Gates, Matrix, Momentum, explain, scan
from nestlearn.memory.algorithms import Algorithm
from nestlearn.memory.contract import check_contract
from nestlearn.memory.retention import Retention
from nestlearn.nn import MemoryMixerConfig

DOUBLE = torch.float64


@dataclass(frozen=True)
class LogCosh:
    """``sum log cosh r``."""

    def loss(self, prediction: Tensor, v: Tensor) -> Tensor:
        return torch.log(torch.cosh(prediction - v)).sum(-1)

    def error(self, predict: Callable[[], Tensor], v: Tensor) -> Tensor:
        return torch.tanh(predict() - v)

    def steepness(self, width: int, reach: float) -> float:
        return 1.0


@dataclass(frozen=True)
class RowErasing(Retention):
    """Decay, and a part of every output row along the input erased: a rule that is no mirror map."""

    part: float = 0.5

    def keep(self, weights: Tensor, alpha: Tensor, eta: Tensor, x: Tensor) -> Tensor:
        unit = x / (x.square().sum(-1, keepdim=True) + 1).sqrt()
        return alpha * (weights - self.part * (weights @ unit.unsqueeze(-1)) * unit.unsqueeze(-2))

    def weights(self, accumulator: Tensor, anchor: Tensor) -> Tensor:
        return accumulator

    def steepness(self, start: Tensor) -> float:
        return 1.0


@dataclass(frozen=True)
class AdaGrad(Algorithm):
    """``-eta g / sqrt(1 + sum g^2)``, elementwise: carries one matrix, has no momentum gate."""

    carries = 1

    def step(
        self, carried: tuple[Tensor, ...], gradient: Tensor, eta: Tensor, beta: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        total = carried[0] + gradient.square()
        return -eta * gradient / (1 + total).sqrt(), (total,)

    def steepness(self, beta: float) -> float:
        return 1.0


@dataclass(frozen=True)
class TwoMomenta(Algorithm):
    """Two momenta of different speed, and the slow one is written once more when a chunk ends."""

    has_momentum = True
    carries = 2
    writes_at_close = True

    def step(
        self, carried: tuple[Tensor, ...], gradient: Tensor, eta: Tensor, beta: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert beta is not None
        fast = beta * carried[0] - eta * gradient
        return fast, (fast, 0.9 * carried[1] - 0.1 * gradient)

    def close(self, carried: tuple[Tensor, ...], pending: Tensor) -> Tensor:
        return 0.1 * pending * carried[1]

    def steepness(self, beta: float) -> float:
        return 2 / (1 - beta)


@dataclass(frozen=True)
class Gated:
    """``M(x) = (W x) * sigmoid(U x)``: two maps that see the key."""

    @property
    def query_map(self) -> str:
        return "W"

    def shapes(self, d_key: int, d_value: int) -> dict[str, tuple[int, int]]:
        return {"W": (d_value, d_key), "U": (d_value, d_key)}

    def init(self, name: str, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE) / shape[-1] ** 0.5

    def __call__(self, linear: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        return linear("W", x) * torch.sigmoid(linear("U", x))

    def factors(self, linear: Any, adjoint: Any, k: Tensor, v: Tensor, objective: Any) -> dict[str, Factor]:
        held, gate = linear("W", k), torch.sigmoid(linear("U", k))
        e = objective.error(lambda: held * gate, v)
        return {"W": Factor(k, e * gate), "U": Factor(k, e * held * gate * (1 - gate))}

    def steepness(self, weights: dict[str, Tensor]) -> Tensor:
        # Each map's error grows with the other: the squared norms bound both.
        norms = [w.square().sum((-2, -1)) for w in weights.values()]
        return (1 + torch.stack(norms).sum(0)).unsqueeze(-1)


OUTSIDE = {
    "objective": AssociativeMemory(MLP(2), LogCosh(), Decay()),
    "retention": AssociativeMemory(Matrix(), L2(), RowErasing()),
    "retention to initial": AssociativeMemory(MLP(2), L2(), RowErasing(), retain_to="initial"),
    "algorithm": AssociativeMemory(Matrix(), L2(), Decay(), AdaGrad()),
    "algorithm on delta": AssociativeMemory(MLP(2), L2(), Delta(), AdaGrad(), "proximal", "initial"),
    "algorithm per channel": AssociativeMemory(MLP(2), L2(), Decay(per_channel=True), AdaGrad()),
    "algorithm that writes at the end": AssociativeMemory(Matrix(), L2(), Decay(), TwoMomenta()),
    "chunk reads": AssociativeMemory(Matrix(), L2(), Decay(), TwoMomenta(), read="chunk"),
    "architecture": AssociativeMemory(Gated(), L2(), Decay()),
    "architecture with momentum": AssociativeMemory(Gated(), LogCosh(), Delta(), Momentum(), "proximal"),
    "all four": AssociativeMemory(Gated(), LogCosh(), RowErasing(), TwoMomenta()),
}
OWN = {
    "matrix": AssociativeMemory(Matrix(), retention=Delta(), retain_to="initial", values="own"),
    "matrix, L2": AssociativeMemory(Matrix(), L2(), Delta(), step_size="normalized", values="own"),
    "mlp": AssociativeMemory(MLP(2), retention=Delta(), step_size="proximal", retain_to="initial", values="own"),
    "mlp, chunk reads": AssociativeMemory(MLP(2), L2(), Decay(), Momentum(), read="chunk", values="own"),
}


def inputs(memory: AssociativeMemory, tokens: int = 11, width: int = 4) -> tuple[Any, dict[str, Tensor]]:
    """Random tokens and initial weights."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, tokens, width, generator=generator, dtype=DOUBLE)
    lr, retain, beta = 0.1 + 0.8 * torch.rand(3, 2, tokens, generator=generator, dtype=DOUBLE)
    if getattr(memory.retention, "per_channel", False):
        retain = retain.unsqueeze(-1).expand(2, tokens, width)
    gates = Gates(0.3 * lr, retain, beta if memory.has_momentum else None)
    start = memory.init_state((2,), width, width, generator=generator, dtype=DOUBLE).params
    initial = {name: w + 0.3 * torch.randn(w.shape, generator=generator, dtype=DOUBLE) for name, w in start.items()}
    return (q, k, v, gates), initial


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_object_from_outside_keeps_the_contract(name: str):
    check_contract(OUTSIDE[name])


@pytest.mark.parametrize("name", OWN)
def test_own_values_keep_the_contract(name: str):
    check_contract(OWN[name])


@pytest.mark.parametrize("flags", ["mask", "reset", "both"])
@pytest.mark.parametrize("name", [*OUTSIDE, *OWN])
def test_masks_and_resets(name: str, flags: str):
    memory = dataclasses.replace({**OUTSIDE, **OWN}[name], chunk_size=4)
    args, initial = inputs(memory)
    generator = torch.Generator().manual_seed(4)
    given = {}
    if flags != "reset":
        given["mask"] = torch.rand(2, 11, generator=generator) < 0.7
    if flags != "mask":
        given["reset"] = torch.rand(2, 11, generator=generator) < 0.3
    outcomes = [scan(memory, None, *args, initial=initial, engine=e, **given) for e in ("reference", "chunked")]
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=1e-9, atol=1e-11)
    expected, got = (torch.utils._pytree.tree_leaves(state) for _, state in outcomes)
    for want, have in zip(expected, got, strict=True):
        if isinstance(want, Tensor):
            torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [*OUTSIDE, *OWN])
def test_it_writes(name: str):
    """What was read changes later answers; with step sizes of 0 it does not."""
    memory = dataclasses.replace({**OUTSIDE, **OWN}[name], chunk_size=4)
    (q, k, v, gates), initial = inputs(memory)
    still = gates._replace(lr=torch.zeros_like(gates.lr), retain=torch.ones_like(gates.retain))
    still = still._replace(momentum=None if gates.momentum is None else torch.zeros_like(gates.momentum))
    y, _ = scan(memory, None, q, k, v, gates._replace(retain=torch.ones_like(gates.retain)), initial=initial)
    same, end = scan(memory, None, q, k, v, still, initial=initial)
    assert (y - same)[:, 4:].abs().amax() > 1e-2
    if not isinstance(memory.retention, RowErasing):
        for key, w in end.params.items():
            torch.testing.assert_close(w, initial[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_layer_trains_it(name: str):
    torch.manual_seed(0)
    layer = MemoryMixerConfig(memory=OUTSIDE[name], chunk_size=4, learn_initial=True).build(8, 2)
    x = torch.randn(2, 10, 8)
    y, state = layer(x)
    first, state = layer(x[:, :7])
    rest, _ = layer(x[:, 7:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), y, rtol=1e-4, atol=1e-5)
    still, _ = layer(x, writes=False)
    assert (y - still).abs().amax() > 1e-6
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert layer.qkv.weight.grad.abs().amax() > 0


@pytest.mark.parametrize("name", OUTSIDE)
@torch.no_grad()
def test_no_gate_makes_a_layer_expand(name: str):
    """Saturated gates, one key for a thousand tokens."""
    torch.manual_seed(0)
    layer = MemoryMixerConfig(memory=OUTSIDE[name], chunk_size=16, learn_initial=True).build(8, 2)
    assert layer.gates is not None
    layer.gates.bias.fill_(12.0)
    x = torch.randn(1, 1, 8).expand(1, 1000, 8) + 0.01 * torch.randn(1, 1000, 8)
    y, state = layer(x)
    assert y.isfinite().all() and state is not None
    assert all(w.abs().amax() < 1e3 for w in state.memory.params.values())


@pytest.mark.parametrize("axis", ["objective", "retention", "algorithm", "architecture"])
def test_a_layer_refuses_what_does_not_state_its_steepness(axis: str):
    mute = type("Mute", (type(getattr(OUTSIDE[axis], axis)),), {"steepness": None})
    with pytest.raises(ValueError, match=r"does not state its steepness.*Give it a method steepness\("):
        MemoryMixerConfig(memory=dataclasses.replace(OUTSIDE[axis], **{axis: mute()})).build(8, 2)


def test_explain_says_what_runs_token_by_token():
    assert "RowErasing has no closed form" in str(explain(OUTSIDE["retention"]))
    assert "AdaGrad has no closed form" in str(explain(OUTSIDE["algorithm"]))
    assert "no closed form" not in str(explain(OUTSIDE["architecture"]))


def test_no_state_is_a_fresh_one():
    """``state=None`` starts at the initial weights, to the last bits of a state made by hand."""
    for memory in (AssociativeMemory(Matrix(), retention=Delta()), OWN["mlp"], OUTSIDE["algorithm"]):
        args, initial = inputs(memory)
        made = memory.init_state((2,), 4, 4, params=initial, dtype=DOUBLE)
        for engine in ("reference", "chunked"):
            y, end = scan(memory, None, *args, initial=initial, engine=engine)
            other, other_end = scan(memory, made, *args, initial=initial, engine=engine)
            torch.testing.assert_close(y, other, rtol=1e-12, atol=1e-14)
            for name, w in other_end.params.items():
                torch.testing.assert_close(end.params[name], w, rtol=1e-12, atol=1e-14)
    args, _ = inputs(OWN["mlp"])
    with pytest.raises(ValueError, match="MLP starts at random weights, and a fresh state.*pass initial="):
        scan(OWN["mlp"], None, *args)
