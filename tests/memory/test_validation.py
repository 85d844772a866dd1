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
    OrthogonalizedMomentum,
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
        (
            {"step_size": "normalized"},
            r"needs retention=Delta\(\).*Use step_size='raw', 'proximal' for all maps, or Delta",
        ),
        ({"step_size": "proximal", "retention": Decay(per_channel=True)}, "with one gate a token"),
        ({"step_size": "proximal", "algorithm": OrthogonalizedMomentum()}, "writes when a chunk ends"),
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
    assert catalog["ggd"].step_size == "proximal"
    others = [memory for name, memory in catalog.items() if name not in ("hope", "ggd")]
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
        ((X, X, X, GATES), {"engine": "triton"}, ValueError, "unknown engine 'triton': use 'auto'"),
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


# ---------------------------------------------------------------------------------------------- what is no tensor


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"state": {}}, TypeError, "state must be a nestlearn.memory.State, got dict.*init_state"),
        ({"state": None, "k": X.tolist()}, TypeError, "k must be a tensor, got list.*torch.as_tensor"),
        ({"gates": None}, TypeError, r"gates must be a nestlearn.memory.Gates, got NoneType.*Gates\(lr, retain\)"),
        ({"gates": Gates(None, G)}, TypeError, "gates.lr is None"),  # type: ignore[arg-type]
        ({"gates": Gates(G, G.tolist())}, TypeError, "gates.retain must be a tensor, got list"),  # type: ignore[arg-type]
        ({"q": X.tolist()}, TypeError, "q must be a tensor, got list.*torch.as_tensor"),
        ({"v": X.numpy()}, TypeError, "v must be a tensor, got ndarray"),
        ({"mask": [[True] * 5] * 2}, TypeError, "mask must be a tensor, got list"),
        ({"k": X.to("meta")}, ValueError, "k is on meta, but the state is on cpu"),
        ({"gates": Gates(G, G.to("meta"))}, ValueError, "gates.retain is on meta"),
        ({"gates": Gates(G.double(), G)}, TypeError, "gates.lr is float64 but the state is torch.float32"),
        ({"q": X[..., :0], "k": X[..., :0]}, ValueError, "width of at least 1"),
        ({"v": X[..., :0]}, ValueError, "width of at least 1"),
    ],
)
def test_what_is_no_tensor_of_the_state_is_refused_by_name(replaced, error, message):
    given = {"state": state(), "q": X, "k": X, "v": X, "gates": GATES, **replaced}
    with pytest.raises(error, match=message):
        scan(catalog["deltanet"], **given)


# ------------------------------------------------------------------------------------------------ initial weights


def test_a_reset_goes_back_to_the_initial_weights_that_are_given():
    memory = replace(catalog["deltanet"], chunk_size=4)
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[:, 4] = True
    learned = {"W": torch.eye(4)}
    begin = memory.init_state((2,), 4, 4, learned)
    key = torch.ones(2, 5, 4) / 2
    args = (begin, key, key, 3 * key, Gates(torch.ones(2, 5), torch.ones(2, 5)))
    for engine in ("reference", "chunked"):
        for options, start in (({"initial": learned}, torch.eye(4)), ({}, torch.zeros(4, 4))):
            _, end = scan(memory, *args, reset=reset, engine=engine, **options)
            fresh = memory.init_state((2,), 4, 4, {"W": start})
            _, alone = scan(memory, fresh, *(x[:, 4:] for x in args[1:4]), args[4].map(lambda g: g[:, 4:]))
            torch.testing.assert_close(end.params["W"], alone.params["W"])


def test_a_memory_that_starts_at_random_asks_for_its_start():
    deep = replace(catalog["dla"], chunk_size=4)
    begin = deep.init_state((2,), 4, 4)
    scan(deep, begin, X, X, X, GATES)
    with pytest.raises(ValueError, match="MLP starts at random weights.*pass initial="):
        scan(deep, begin, X, X, X, GATES, reset=BOOL)
    with pytest.raises(ValueError, match="pass initial="):
        scan(catalog["hope"], begin, X, X, X, GATES)
    with pytest.raises(ValueError, match="initial has maps"):
        scan(deep, begin, X, X, X, GATES, initial={"W": X}, reset=BOOL)
    with pytest.raises(ValueError, match="initial weights 'in' have shape"):
        scan(deep, begin, X, X, X, GATES, initial={**begin.params, "in": X}, reset=BOOL)
    scan(deep, begin, X, X, X, GATES, initial=begin.params, reset=BOOL)
