"""Every refused setting and argument: the message names what was received and how to go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nestlearn.memory import (
    L2,
    MLP,
    AssociativeMemory,
    Decay,
    Delta,
    DotProduct,
    Factor,
    Gates,
    Matrix,
    Momentum,
    absorb,
    catalog,
    scan,
    surprise,
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be a positive number of tokens, got 0"),
        ({"chunk_size": -4}, "got -4"),
        ({"chunk_size": 2.0}, r"got 2\.0"),
        ({"chunk_size": True}, "got True"),
        ({"architecture": "matrix"}, r"architecture must be Matrix\(\) or MLP\(\), got 'matrix'"),
        ({"architecture": Matrix}, "architecture must be"),
        ({"objective": "l2"}, r"objective must be DotProduct\(\) or L2\(\), got 'l2'"),
        ({"objective": L2}, "objective must be"),
        ({"retention": "delta"}, r"retention must be Decay\(\) or Delta\(\), got 'delta'"),
        ({"algorithm": "momentum"}, r"algorithm must be Descent\(\) or Momentum\(\), got 'momentum'"),
        ({"retain_to": "start"}, "retain_to must be one of 'zero', 'initial'; got 'start'"),
        ({"read": "both"}, "read must be one of 'token', 'chunk'; got 'both'"),
        ({"step_size": "proximate", "retention": Delta()}, "step_size must be one of .*got 'proximate'"),
        ({"step_size": "proximal"}, r"needs retention=Delta\(\).*Use step_size='raw', or Delta"),
        ({"step_size": "normalized", "retention": Decay()}, "needs retention=Delta"),
        ({"step_size": {"in": "raw"}, "architecture": MLP(2)}, r"names the maps \['in'\].*has \['in', 'out'\]"),
        ({"step_size": {"in": "raw", "out": "raw"}}, r"has \['W'\]"),
        ({"step_size": {"in": "raw", "out": "proximal"}, "architecture": MLP(2)}, "needs retention=Delta"),
    ],
)
def test_contradictory_memories(settings, message: str):
    with pytest.raises(ValueError, match=message):
        AssociativeMemory(**settings)


@pytest.mark.parametrize(("expansion", "activation"), [(0, "gelu"), (-1, "gelu"), (1.5, "gelu"), (2, "relu")])
def test_impossible_architectures(expansion, activation):
    with pytest.raises(ValueError, match="expansion|activation"):
        MLP(expansion, activation)


def test_an_mlp_needs_one_width():
    with pytest.raises(ValueError, match=r"d_key=4, d_value=6.*Matrix\(\)"):
        catalog["titans"].init_state((1,), 4, 6)


@pytest.mark.parametrize("name", catalog)
def test_memories_are_data(name: str):
    memory = catalog[name]
    assert memory == replace(memory) and hash(memory) == hash(replace(memory))
    small = replace(memory, chunk_size=8)
    assert small.chunk_size == 8 and small != memory and memory.chunk_size == 64
    with pytest.raises(AttributeError):
        memory.chunk_size = 3  # type: ignore[misc]


def test_steps_per_map_are_hashable_and_survive_replace():
    steps = {"out": "proximal", "in": "normalized"}
    memory = AssociativeMemory(MLP(2), retention=Delta(), step_size=steps)  # type: ignore[arg-type]
    assert memory.step_size_of("in") == "normalized" and memory.step_size_of("out") == "proximal"
    assert hash(memory) == hash(replace(memory)) and replace(memory).step_size == memory.step_size
    with pytest.raises(ValueError, match="names the maps"):
        replace(memory, architecture=Matrix())
    assert replace(memory, architecture=Matrix(), step_size="raw").step_size_of("W") == "raw"


def test_defaults_are_the_documented_ones():
    memory = AssociativeMemory()
    assert (memory.chunk_size, memory.read, memory.retain_to, memory.step_size) == (64, "token", "zero", "raw")
    assert memory.objective == DotProduct()
    hope = catalog["hope"]
    assert (hope.step_size, hope.retain_to) == ("proximal", "initial")
    others = [memory for name, memory in catalog.items() if name != "hope"]
    assert {(m.step_size, m.retain_to, m.read, m.chunk_size) for m in others} == {("raw", "zero", "token", 64)}


def state(memory: AssociativeMemory = catalog["deltanet"], batch=(2,), dtype=torch.float32):
    return memory.init_state(batch, 4, 4, dtype=dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.bfloat16}, "must be float32 or float64, got torch.bfloat16; inputs may be bfloat16"),
        ({"params": {"W": torch.zeros(2, 3, 4)}}, r"'W' have shape \(2, 3, 4\), expected \(2, 4, 4\)"),
        ({"params": {"V": torch.zeros(4, 4)}}, r"params has maps \['V'\], this memory has \['W'\]"),
    ],
)
def test_impossible_states(options, message: str):
    with pytest.raises(ValueError, match=message):
        catalog["deltanet"].init_state((2,), 4, 4, **options)


def test_initial_weights_broadcast_and_start_the_state():
    memory = catalog["titans"]
    params = {"in": torch.randn(16, 4), "out": torch.randn(3, 4, 16)}
    fresh = memory.init_state((2, 3), 4, 4, params=params)
    assert fresh.params["in"].shape == (2, 3, 16, 4) and torch.equal(fresh.anchor["out"][1], params["out"])
    assert fresh.aligned and not fresh.position.any() and fresh.momentum is not None
    drawn = memory.init_state((2,), 4, 4, generator=torch.Generator().manual_seed(1))
    again = memory.init_state((2,), 4, 4, generator=torch.Generator().manual_seed(1))
    assert all(w.any() and torch.equal(w, again.params[name]) for name, w in drawn.params.items())
    assert not state().params["W"].any() and state().momentum is None


X = torch.zeros(2, 5, 4)
G = torch.zeros(2, 5)
GATES = Gates(G, G)
BOOL = torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[:, :0], X[:, :0], X[:, :0], Gates(G[:, :0], G[:, :0])), {}, ValueError, "at least one token"),
        ((X[0, 0], X, X, GATES), {}, ValueError, "at least one token"),
        ((X[:, :4], X, X, GATES), {}, ValueError, "must agree but for v's width"),
        ((X, X, X[:, :4], GATES), {}, ValueError, "must agree"),
        ((X, X, X[..., :3], GATES), {}, ValueError, r"map 'W' must be \(2, 3, 4\).*init_state"),
        ((X[:1], X[:1], X[:1], Gates(G[:1], G[:1])), {}, ValueError, r"must be \(1, 4, 4\)"),
        ((X.long(), X, X, GATES), {}, TypeError, "q must be a floating-point tensor, got torch.int64"),
        ((X, X, X.double(), GATES), {}, TypeError, "v is float64 but the state is torch.float32.*dtype=torch.float64"),
        ((X, X, X, Gates(G, G[:, :4])), {}, ValueError, r"retain must have shape \(2, 5\), got \(2, 4\)"),
        ((X, X, X, Gates(G[..., None], G)), {}, ValueError, "lr must have shape"),
        ((X, X, X, Gates(G, G, G)), {}, ValueError, r"Descent\(\) has no momentum; drop it, or use Momentum"),
        ((X, X, X, GATES), {"mask": BOOL[:1]}, ValueError, "mask must have shape"),
        ((X, X, X, GATES), {"reset": BOOL[:, :2]}, ValueError, "reset must have shape"),
        ((X, X, X, GATES), {"mask": BOOL.float()}, TypeError, "mask must be a bool tensor, got torch.float32"),
        ((X, X, X, GATES), {"reset": BOOL.long()}, TypeError, "reset must be a bool tensor"),
        ((X, X, X, GATES), {"engine": "triton"}, ValueError, "engine='triton' cannot run.*engine='auto'"),
        ((X, X, X, GATES), {"engine": "fast"}, ValueError, "unknown engine 'fast': use 'auto'"),
        ((X, X, X, GATES), {"read": "row"}, ValueError, "read must be 'token' or 'chunk', got 'row'"),
    ],
)
def test_arguments_that_do_not_fit(arguments, options, error, message: str):
    with pytest.raises(error, match=message):
        scan(catalog["deltanet"], state(), *arguments, **options)


def test_momentum_needs_its_gate_and_its_state():
    memory = replace(catalog["deltanet"], algorithm=Momentum())
    with pytest.raises(ValueError, match=r"needs gates.momentum; pass it, or use Descent\(\)"):
        scan(memory, state(memory), X, X, X, GATES)
    with pytest.raises(ValueError, match="made without momentum"):
        scan(memory, state(), X, X, X, Gates(G, G, G))


def test_absorb_and_surprise_refuse_what_does_not_fit():
    memory = replace(catalog["deltanet"], chunk_size=4)
    factors = surprise(memory, state().params, X, X)
    with pytest.raises(ValueError, match="5 tokens cannot be absorbed at one anchor with chunk_size=4"):
        absorb(memory, state(), factors, GATES)
    memory = catalog["deltanet"]
    with pytest.raises(ValueError, match=r"factors name the maps \['in'\], this memory has \['W'\]"):
        absorb(memory, state(), {"in": factors["W"]}, GATES)
    with pytest.raises(ValueError, match=r"factor 'W' has input \(2, 5, 3\)"):
        absorb(memory, state(), {"W": Factor(X[..., :3], X)}, GATES)
    with pytest.raises(ValueError, match="Descent"):
        absorb(memory, state(), factors, Gates(G, G, G))
    with pytest.raises(ValueError, match="map 'W' must be"):
        surprise(memory, state().params, X[:1], X[:1])
