"""Levels that a loss teaches: factors, norms and writes against dense weights, autograd and a token loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestlearn.memory import Factor, State, newton_schulz
from nestlearn.memory.architectures import Matrix
from nestlearn.nn.cms.level import Level, level_memory, loss_gates
from nestlearn.nn.cms.network import LowRank, Network, low_rank_linear, low_rank_shapes, low_rank_start
from nestlearn.nn.cms.tape import Tape, fast_linear, segment_factors, squared_norm, write

D, HIDDEN, ROWS = 4, 6, 2
RULES = ["descent", "momentum", "delta", "orthogonalized"]
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


def gated(linear, x: Tensor) -> Tensor:
    """A network with fixed biases, as a pretrained model has it."""
    return linear("down", torch.tanh(linear("gate", x) + 0.3) * linear("up", x)) + 0.1


SHAPES = {"gate": (HIDDEN, D), "up": (HIDDEN, D), "down": (D, HIDDEN)}


def start(shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: 0.5 * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def segment_loss(y: Tensor, target: Tensor) -> Tensor:
    """Not separable over tokens: later losses depend on earlier outputs, as through attention."""
    return (torch.cumsum(y, 1).sin() * target).sum()


# ---------------------------------------------------------------------------------------------------- the oracle


def run_per_token(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Every token has weights of its own, so that its gradient is its own; the outputs and the input of each map."""
    inputs: dict[str, Tensor] = {}

    def linear(name: str, u: Tensor) -> Tensor:
        inputs[name] = u
        return torch.einsum("toi,ti->to", weights[name], u)

    return gated(linear, x), inputs


def dense_level(level: Level, initial: dict[str, Tensor], x: Tensor, target: Tensor, segment: int):
    """One row ``[t, d]``: dense gradients by autograd, token by token; the outputs and the final weights."""
    assert level.period is not None
    weights, momentum = dict(initial), {n: torch.zeros_like(w) for n, w in initial.items()}
    anchor, outputs, pending = dict(initial), [], torch.zeros((), dtype=x.dtype)
    retain = (1.0 if level.retain is None else level.retain) ** (1 / level.period)
    beta = level.momentum ** (1 / level.period)
    for first in range(0, len(x), segment):
        here = x[first : first + segment]
        copies = {n: w.expand(len(here), *w.shape).clone().requires_grad_() for n, w in anchor.items()}
        y, inputs = run_per_token(copies, here)
        outputs.append(y)
        if len(here) < segment:
            break
        loss = segment_loss(y[None], target[first : first + segment][None])
        gradients = dict(zip(copies, torch.autograd.grad(loss, list(copies.values()), create_graph=True), strict=True))
        if level.clip is not None:
            norm = torch.stack([g.sum(0).square().sum() for g in gradients.values()]).sum().sqrt()
            gradients = {n: g * torch.clamp(level.clip / norm, max=1) for n, g in gradients.items()}
        for t in range(segment):
            closes = (first + t + 1) % level.period == 0
            lr = level.lr
            if level.rule == "orthogonalized":
                lr = lr / level.period
                pending = retain * pending + lr
            for name, w in weights.items():
                g, z = gradients[name][t], inputs[name][t]
                distance = w - initial[name]
                if level.rule == "descent":
                    w = initial[name] + retain * distance - lr * g
                elif level.rule == "momentum":
                    momentum[name] = beta * momentum[name] - lr * (1 - beta) * g
                    w = initial[name] + retain * distance + momentum[name]
                elif level.rule == "delta":
                    step = lr / (1 + lr * (z @ z))
                    w = initial[name] + retain * distance - step * torch.outer(distance @ z, z) - step * g
                else:
                    momentum[name] = beta * momentum[name] - g
                    w = initial[name] + retain * distance
                    if closes:
                        w = w + pending * newton_schulz(momentum[name], 5)
                weights[name] = w
            if closes:
                anchor, pending = dict(weights), torch.zeros_like(pending)
    return torch.cat(outputs), weights


def stream(level: Level, initial: dict[str, Tensor], x: Tensor, target: Tensor, segment: int, second_order=True):
    """Rows ``[b, t, d]`` in segments by the tape: outputs and the final state."""
    memory = level_memory(level, Network(HIDDEN))
    state = memory.init_state((len(x),), D, D, initial, dtype=torch.float64)
    outputs = []
    for here, wanted in zip(x.split(segment, 1), target.split(segment, 1), strict=True):
        tape = Tape(second_order)
        y = gated(fast_linear(state.anchor, tape, key=0), here)
        outputs.append(y)
        if here.shape[1] == segment:
            factors = segment_factors(segment_loss(y, wanted), tape, keep_graph=True)[0]
            gates = loss_gates(level, torch.ones(here.shape[:2], dtype=x.dtype))
            state = write(memory, state, factors, gates, level.clip, initial=initial)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("options", [{}, {"retain": 0.5, "clip": 0.7}, {"retain": 0.0}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_loop_over_dense_gradients_with_all_outer_gradients(rule, options):
    level = Level(period=6, rule=rule, lr=0.05, **options)
    initial = {n: w.requires_grad_() for n, w in start(SHAPES).items()}
    x = torch.randn(ROWS, 14, D, dtype=torch.float64, requires_grad=True)
    target = torch.randn(ROWS, 14, D, dtype=torch.float64)
    rows = [dense_level(level, initial, x[i], target[i], 3) for i in range(ROWS)]
    y, state = stream(level, initial, x, target, 3)
    torch.testing.assert_close(y, torch.stack([out for out, _ in rows]), **TOLERANCE)
    for name in initial:
        torch.testing.assert_close(state.params[name], torch.stack([w[name] for _, w in rows]), **TOLERANCE)
        # 14 tokens are two periods: the weights read are those of the second's end.
        assert not torch.equal(state.anchor[name], initial[name].expand_as(state.anchor[name]))
    wanted = [x, *initial.values()]
    probe = torch.randn_like(y)
    expected = torch.autograd.grad(sum((out * p).sum() for (out, _), p in zip(rows, probe, strict=True)), wanted)
    for got, want in zip(torch.autograd.grad((y * probe).sum(), wanted), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
        assert want.abs().sum() > 0


def test_first_order_counts_factors_as_constants():
    """The outer gradient reaches the initial weights along the retained path, not through the errors."""
    level = Level(period=3, lr=0.05)
    initial = {n: w.requires_grad_() for n, w in start(SHAPES).items()}
    x, target = torch.randn(2, ROWS, 5, D, dtype=torch.float64)
    first, _ = stream(level, initial, x, target, 3, second_order=False)
    second, _ = stream(level, initial, x, target, 3)
    assert torch.equal(first, second)
    ours = torch.autograd.grad(first[:, 3:].sum(), list(initial.values()), retain_graph=True)
    # By hand: the initial weights plus a constant.
    _, state = stream(level, initial, x[:, :3], target[:, :3], 3, second_order=False)
    change = {n: (state.params[n] - initial[n]).detach() for n in initial}
    y = gated(fast_linear({n: initial[n] + change[n] for n in initial}), x[:, 3:])
    for got, want in zip(ours, torch.autograd.grad(y.sum(), list(initial.values())), strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE)
    theirs = torch.autograd.grad(second[:, 3:].sum(), list(initial.values()))
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------------ low rank


@pytest.mark.parametrize("rule", RULES)
def test_low_rank_maps_equal_dense_ones_with_their_parts_as_weights(rule):
    """The network of the parts, written densely, learns the same by the same oracle."""
    rank = 2
    fixed = start(SHAPES)
    parts = {n: low_rank_start(n, s) + 0.3 * torch.randn(s) for n, s in low_rank_shapes(SHAPES, rank).items()}
    level = Level(period=4, rule=rule, lr=0.05, retain=0.7)

    def network(weights, x, tape=None):
        change = low_rank_linear(fast_linear(weights, tape))
        return gated(lambda name, u: u @ fixed[name].mT + change(name, u), x)

    memory = level_memory(level, LowRank(Network(HIDDEN), rank))
    x, target = torch.randn(2, ROWS, 4, D, dtype=torch.float64)
    state = memory.init_state((ROWS,), D, D, parts, dtype=torch.float64)
    tape = Tape()
    y = network(state.anchor, x, tape)
    factors = segment_factors(segment_loss(y, target), tape, keep_graph=True)[None]
    leaves = {n: w.clone().requires_grad_() for n, w in state.anchor.items()}
    dense = torch.autograd.grad(segment_loss(network(leaves, x), target), list(leaves.values()))
    for name, gradient in zip(leaves, dense, strict=True):
        torch.testing.assert_close(factors[name].error.mT @ factors[name].input, gradient, **TOLERANCE)
    norm = torch.stack([g.square().sum((-2, -1)) for g in dense]).sum(0)
    torch.testing.assert_close(squared_norm(factors), norm, **TOLERANCE)
    state = write(memory, state, factors, loss_gates(level, torch.ones(ROWS, 4, dtype=x.dtype)), initial=parts)
    assert all(not torch.equal(state.anchor[n][0], parts[n]) for n in parts)
    whole = network(state.anchor, x)
    joined = {n: fixed[n] + state.anchor[f"{n}_B"] @ state.anchor[f"{n}_A"] for n in fixed}
    torch.testing.assert_close(whole, gated(fast_linear(joined), x), **TOLERANCE)


# ----------------------------------------------------------------------------------------------- rows, pieces, masks


def written(level: Level, x: Tensor, e: Tensor, pieces: tuple[int, ...] = ()) -> State:
    """The state after factors (x, e) of one matrix, written in pieces."""
    memory = level_memory(level, Matrix())
    initial = {"W": torch.ones(3, D, dtype=x.dtype)}
    state = memory.init_state((len(x),), D, 3, initial, dtype=x.dtype)
    for part in torch.arange(x.shape[1]).split(list(pieces) or x.shape[1]):
        gates = loss_gates(level, torch.ones(len(x), len(part), dtype=x.dtype))
        state = write(memory, state, {"W": Factor(x[:, part], e[:, part])}, gates, level.clip, initial)
    return state


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("period", [10, 12])
def test_segments_of_any_length_make_one_period(rule, period):
    level = Level(period=period, rule=rule, lr=0.1, retain=0.6)
    x, e = torch.randn(2, 10, D, dtype=torch.float64), torch.randn(2, 10, 3, dtype=torch.float64)
    whole = written(level, x, e)
    for pieces in ((5, 5), (1,) * 10, (7, 1, 2)):
        state = written(level, x, e, pieces=pieces)
        for name in ("params", "anchor"):
            torch.testing.assert_close(getattr(state, name)["W"], getattr(whole, name)["W"], **TOLERANCE)
        assert torch.equal(state.position, whole.position)
    assert bool((whole.anchor["W"] == 1).all()) == (period == 12)


@pytest.mark.parametrize("rule", RULES)
def test_rows_do_not_touch_each_other(rule):
    level = Level(period=6, rule=rule, lr=0.1, clip=1.0)
    x, e = torch.randn(3, 6, D), torch.randn(3, 6, 3)
    plain = written(level, x, e)
    for value in (3.0, 1e30, float("nan")):
        x[1] = value
        assert torch.equal(written(level, x, e).anchor["W"][::2], plain.anchor["W"][::2])


def test_long_segments_run_in_spans():
    level = Level(period=300, rule="delta", lr=0.1)
    x, e = torch.randn(1, 300, D, dtype=torch.float64), torch.randn(1, 300, 3, dtype=torch.float64)
    torch.testing.assert_close(
        written(level, x, e).params["W"], written(level, x, e, pieces=(60,) * 5).params["W"], **TOLERANCE
    )


# --------------------------------------------------------------------------------------------------------- gates


def test_gates_of_the_rules():
    ones = torch.ones(1, 3, dtype=torch.float64)
    half = loss_gates(Level(period=3, lr=0.2, retain=0.5), ones)
    torch.testing.assert_close(half.retain[0, 0] ** 3, torch.tensor(0.5, dtype=torch.float64))
    assert half.momentum is None and half.lr.tolist() == [[0.2] * 3]
    pushed = loss_gates(Level(period=3, lr=0.2, rule="momentum", momentum=0.9), ones)
    assert pushed.momentum is not None
    # The total effect of one gradient is lr.
    torch.testing.assert_close(pushed.lr / (1 - pushed.momentum), 0.2 * ones)
    turned = loss_gates(Level(period=3, lr=0.2, rule="orthogonalized"), ones)
    torch.testing.assert_close(turned.lr.sum(), torch.tensor(0.2, dtype=torch.float64))


def test_orthogonalized_writes_have_the_norm_lr():
    level = Level(period=6, rule="orthogonalized", lr=0.2)
    x, e = torch.randn(2, 6, D, dtype=torch.float64), torch.randn(2, 6, 3, dtype=torch.float64)
    state = written(level, x, e)
    values = torch.linalg.svdvals(state.params["W"] - 1)
    assert ((values > 0.2 * 0.6) & (values < 0.2 * 1.3)).all()


# --------------------------------------------------------------------------------------------------------- errors


def test_a_map_runs_once_in_a_segment():
    tape, x = Tape(), torch.randn(1, 2, 3)
    tape.record("a", "up", x, x)
    tape.record("b", "up", x, x)
    with pytest.raises(ValueError, match="ran twice in one segment"):
        tape.record("a", "up", x, x)


def test_a_tape_needs_gradients():
    x = torch.randn(1, 2, 3)
    with torch.no_grad(), pytest.raises(ValueError, match="needs gradients"):
        Tape().record("a", "up", x, x)
    tape = Tape()
    tape.record("a", "up", x, x)
    with pytest.raises(ValueError, match="no graph"):
        segment_factors(torch.zeros(()), tape)
    assert segment_factors(torch.zeros(()), Tape()) == {}


def test_a_map_that_the_loss_does_not_see_learns_nothing():
    tape, x = Tape(), torch.randn(1, 2, 3)
    seen, _ = tape.record(0, "up", x, x), tape.record(0, "down", x, x)
    factors = segment_factors(seen.sum(), tape)[0]
    assert not factors["down"].error.any() and factors["up"].error.all()


def test_a_frozen_level_is_no_memory():
    with pytest.raises(ValueError, match="never learns"):
        level_memory(Level(), Matrix())
    with pytest.raises(ValueError, match="has no gates"):
        loss_gates(Level(), torch.ones(1, 1))


def test_shapes_of_a_level():
    assert Level(period=4, hidden=5).shapes(3, "swiglu") == Network(5).shapes(3, 3)
    assert Level(period=4, hidden=5, rank=2).shapes(3, "gelu") == low_rank_shapes({"up": (5, 3), "down": (3, 5)}, 2)
