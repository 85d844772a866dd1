"""MemoryMixer around the further objectives, retentions and algorithms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn import functional as F

from nestlearn.memory import (
    KL,
    L2,
    MLP,
    AssociativeMemory,
    Bregman,
    Decay,
    Delta,
    DotProduct,
    ElasticNet,
    Gates,
    Huber,
    Lp,
    Lq,
    LqDual,
    Matrix,
    Momentum,
    OrthogonalizedMomentum,
    Retention,
    State,
    ValueShiftRobust,
    catalog,
    scan,
)
from nestlearn.nn import MemoryMixer, MemoryMixerConfig
from nestlearn.nn.common import unit
from nestlearn.nn.state import flatten_state, unflatten_state

from .test_mixer import assert_finite, inputs, run, saturated

MEMORIES: dict[str, AssociativeMemory] = {
    **{name: replace(catalog[name], architecture=MLP(2)) for name in ("moneta", "yaad", "memora")},
    "oja": catalog["oja"],
    "omega": replace(catalog["omega"], architecture=MLP(2), window=3),
    "omega_delta": AssociativeMemory(Matrix(), retention=Delta(), window=3),
    "ggd": catalog["ggd"],
    "ggd_deep": replace(catalog["ggd"], architecture=MLP(2), algorithm=Momentum(), values=Huber("switch", 0.5)),
    "channels": AssociativeMemory(MLP(2), L2(), Decay(per_channel=True)),
    "channels_linear": AssociativeMemory(Matrix(), DotProduct(), Decay(per_channel=True)),
    "orthogonal": AssociativeMemory(MLP(2), L2(), algorithm=OrthogonalizedMomentum()),
    "orthogonal_linear": AssociativeMemory(Matrix(), L2(), algorithm=OrthogonalizedMomentum()),
    "lq_dual": AssociativeMemory(MLP(2), L2(), LqDual(4, eps=1e-3)),
    "elastic_net": AssociativeMemory(MLP(2), L2(), ElasticNet(1e-3)),
    "bregman": AssociativeMemory(MLP(2), Huber("norm"), Bregman()),
    "lp_linear": AssociativeMemory(Matrix(), Lp(1.5)),
    "robust": AssociativeMemory(MLP(2), ValueShiftRobust()),
    "kl_linear": AssociativeMemory(Matrix(), Huber("coordinate"), KL(2.0)),
    "lq_linear": AssociativeMemory(Matrix(), L2(), Lq(4)),
}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def make(name: str, **options) -> MemoryMixer:
    layer = MemoryMixerConfig(MEMORIES[name], chunk_size=4, **options).build(8, 2).double()
    assert layer.gates is not None
    with torch.no_grad():
        layer.gates.weight.normal_(0, 1)
    return layer


@pytest.mark.parametrize("name", MEMORIES)
def test_is_the_reference_engine_between_its_projections(name: str, monkeypatch: pytest.MonkeyPatch):
    layer = make(name)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    y, _ = layer(x)
    monkeypatch.setattr("nestlearn.nn.mixer.scan", lambda *args, **options: scan(*args, **options, engine="reference"))
    torch.testing.assert_close(layer(x)[0], y, **TOLERANCE)


@pytest.mark.parametrize("name", MEMORIES)
def test_a_state_survives_a_file_in_the_middle_of_a_chunk(name: str):
    layer = make(name)
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    whole, _ = run(layer, x)
    first, state = layer(x[:, :6])
    tensors, spec = flatten_state(state)
    rest, _ = layer(x[:, 6:], unflatten_state(tensors, spec))
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, **TOLERANCE)
    assert (state.memory.pending is not None) == name.startswith("orthogonal")


def test_a_state_saved_before_a_field_existed_can_be_read():
    layer = make("moneta")
    _, state = layer(torch.randn(1, 3, 8, dtype=torch.float64))
    tensors, spec = flatten_state(state.memory)
    for name in ("recent", "aligned"):
        assert spec["names"].pop() == name and spec["children"].pop()
    back = unflatten_state(tensors, spec)
    assert isinstance(back, State) and back.aligned is False
    spec["names"][0] = "other"
    with pytest.raises(ValueError, match="Load it with the version that saved it"):
        unflatten_state(tensors, spec)


@pytest.mark.parametrize("name", ["moneta", "yaad", "memora"])
def test_writes_off_reads_initial_weights_of_the_usual_scale(name: str):
    layer = MemoryMixerConfig(name).build(32, 2)
    assert layer.initial is not None
    for map_name, a in layer.initial.items():
        weights = layer.memory.retention.anchored(a)
        if name == "memora":
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            assert weights.std() > 1e-3
        else:
            assert 0.8 < weights.std() * weights.shape[-1] ** 0.5 < 1.2, map_name
    _, state = layer(torch.randn(1, 70, 32), writes=False)
    assert all(w.isfinite().all() for w in state.memory.params.values())


def test_gates_of_a_layer_with_thresholds_and_channels():
    gates = make("yaad")._gates(
        torch.randn(2, 5, 8, dtype=torch.float64), make("yaad").initial_weights(torch.zeros(1).double()), True
    )
    assert isinstance(gates, Gates) and gates.threshold is not None
    assert gates.threshold.shape == (2, 2, 5) and 0 < gates.threshold.min() < gates.threshold.max() < 2
    layer = make("channels_linear")
    assert layer._gates(torch.randn(2, 5, 8).double(), {}, True).retain.shape == (2, 2, 5, 4)


@pytest.mark.parametrize("tokens", [512, pytest.param(32768, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("name", [name for name in MEMORIES if name not in catalog])  # those: test_mixer.py
def test_finite_at_saturated_gates(name: str, tokens: int):
    for mode in ("open", "mixed"):
        assert_finite(saturated(MemoryMixerConfig(MEMORIES[name]).build(8, 1), mode), inputs(tokens, 1.0, 1e2, 1e4))


@pytest.mark.parametrize("name", MEMORIES)
def test_finite_in_small_chunks(name: str):
    layer = saturated(MemoryMixerConfig(MEMORIES[name], chunk_size=4).build(8, 1), "open")
    assert_finite(layer, inputs(256, 1.0))


@pytest.mark.parametrize("name", MEMORIES)
def test_a_layer_recalls_better_with_training(name: str):
    """The layer alone, trained to answer a repeated key with its value: the error falls."""
    torch.manual_seed(0)
    layer = MemoryMixerConfig(MEMORIES[name], chunk_size=4, learn_initial=True).build(16, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    values = unit(torch.randn(12, 16))
    errors = []
    for _ in range(20):
        x = values[torch.randint(0, 12, (8, 8))]
        y, _ = layer(x)
        loss = F.mse_loss(y[:, 1:], x[:, :-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.detach())
    assert sum(errors[-5:]) / 5 < 0.95 * errors[0]


# ------------------------------------------------------------------------------------- rules from outside the package


@dataclass(frozen=True)
class Quartic:
    """``25 sum r^4``: 1,200 times as steep as L2 at residuals of norm 2."""

    def loss(self, prediction, v):
        return 25 * (prediction - v).pow(4).sum(-1)

    def error(self, predict, v):
        return 100 * (predict() - v).pow(3)


@dataclass(frozen=True)
class SteepQuartic(Quartic):
    def steepness(self, width, reach):
        return 300 * reach**2


@dataclass(frozen=True)
class Tenfold(Retention):
    """``W = 10 tanh(A)``."""

    def weights(self, accumulator, anchor):
        return 10 * torch.tanh(accumulator)


@dataclass(frozen=True)
class SteepTenfold(Tenfold):
    def steepness(self, start):
        return 10.0


def test_an_objective_or_retention_that_states_no_steepness_is_refused():
    with pytest.raises(ValueError, match=r"Quartic\(\) does not state its steepness.*steepness\(width, reach\)"):
        MemoryMixerConfig(AssociativeMemory(objective=Quartic())).build(8, 2)
    with pytest.raises(ValueError, match=r"Tenfold\(\) does not state its steepness.*steepness\(start\)"):
        MemoryMixerConfig(AssociativeMemory(objective=L2(), retention=Tenfold())).build(8, 2)


@torch.no_grad()
@pytest.mark.parametrize(
    "memory",
    [
        AssociativeMemory(objective=SteepQuartic()),
        AssociativeMemory(MLP(2), objective=SteepQuartic()),
        AssociativeMemory(objective=L2(), retention=SteepTenfold()),
        AssociativeMemory(objective=SteepQuartic(), retention=SteepTenfold()),
    ],
    ids=repr,
)
def test_a_steep_rule_from_outside_stays_finite_with_open_gates(memory):
    torch.manual_seed(0)
    layer = MemoryMixerConfig(memory, chunk_size=8).build(8, 2)
    assert layer.gates is not None
    layer.gates.bias.fill_(30.0)
    y, state = layer(5 * torch.randn(2, 512, 8))
    assert state is not None and y.isfinite().all()
    assert all(w.isfinite().all() for w in state.memory.params.values())


def test_a_rule_from_outside_gives_the_same_layer_by_both_engines(monkeypatch):
    memory = AssociativeMemory(MLP(2), objective=SteepQuartic(), retention=SteepTenfold())
    layer, x = MemoryMixerConfig(memory, chunk_size=4).build(8, 2).double(), torch.randn(2, 11, 8, dtype=torch.float64)
    expected = layer(x)[0]
    monkeypatch.setattr("nestlearn.nn.mixer.scan", lambda *args, **options: scan(*args, **options, engine="reference"))
    torch.testing.assert_close(layer(x)[0], expected)
