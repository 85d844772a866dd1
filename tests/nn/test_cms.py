"""ContinuumMemory: the order in which levels see tokens, equality with a token loop, streams, and its frozen limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.nn import ContinuumMemory, ContinuumState, FeedForward, Level
from nestlearn.nn.cms.local import LocalLevel
from nestlearn.nn.state import index_rows, map_tensors

from .cms_checks import assert_past_and_other_rows_keep_every_bit, assert_rows_are_separate

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
CHAINS = {
    "one": [Level(4, 2)],
    "frozen_last": [Level(3, 2), Level(None, 2)],
    "three": [Level(2, 2, lr=0.5), Level(5, 1.5), Level(None, 2)],
    "four": [Level(2, 1), Level(3, 2), Level(7, 1), Level(None, 1)],
    "delta": [Level(3, 2, rule="delta"), Level(5, 2, rule="delta"), Level(None, 1)],
    "mixed": [Level(2, 2, rule="delta"), Level(4, 2), Level(7, 1, rule="delta")],
}
RULES = [("descent", "swiglu"), ("descent", "gelu"), ("delta", "gelu")]


def make(levels: str | list[Level], d: int = 6, activation: str | None = None) -> ContinuumMemory:
    """A float64 chain that writes: value maps and gates are random."""
    levels = CHAINS[levels] if isinstance(levels, str) else levels
    if activation is None:
        activation = "gelu" if any(level.rule == "delta" for level in levels) else "swiglu"
    cms = ContinuumMemory(d, levels, activation).double()
    for level in cms.networks:
        if isinstance(level, LocalLevel):
            with torch.no_grad():
                level.value.normal_(0, 1)
                level.gate.weight.normal_(0, 1)
                level.keep.logit.fill_(1.0)
    return cms


def run(cms: ContinuumMemory, *pieces: Tensor, state: ContinuumState | None = None) -> tuple[Tensor, ContinuumState]:
    outputs = []
    for piece in pieces:
        y, state = cms(piece, state)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 1), state


# ---------------------------------------------------------------------------------------------------- the oracle


def network(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A feed-forward network for one vector, and the input of each map."""
    up = weights["up"] @ x
    hidden = F.silu(weights["gate"] @ x) * up if "gate" in weights else F.gelu(up)
    return weights["down"] @ hidden, {name: hidden if name == "down" else x for name in weights}


def objective(level: LocalLevel, weights: dict[str, Tensor], x: Tensor, u: Tensor, target: Tensor) -> Tensor:
    prediction = network(weights, x)[0]
    return -(prediction @ u) if level.level.rule == "delta" else 0.5 * ((prediction - target) ** 2).sum()


def growth(start: dict[str, Tensor]) -> Tensor:
    """The squared norms of a curvature, all maps but one, over their expectation at a random start."""
    now, expected = torch.zeros((), dtype=torch.float64), 0.0
    for weight in start.values():
        now = now + (torch.linalg.svdvals(weight) ** 8).sum() ** 0.25
        out, width = weight.shape
        y = out / width
        expected += (out * (1 + 6 * y + 6 * y * y + y**3)) ** 0.25 / 3
    return torch.clamp(now / expected, min=1) ** (len(start) - 1)


def learn(level: LocalLevel, weights: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The weights after one period: errors of all tokens at the weights before it, by autograd of the objective."""
    start, new = dict(level.initial.items()), dict(weights)
    retain = torch.sigmoid(level.keep.logit.squeeze(0)) ** (1 / level.period)
    for x in tokens:
        u = level.value @ x
        u = u / (1 + (u * u).mean()).sqrt()
        eta = level.level.lr * torch.sigmoid(level.gate.weight[0] @ x + level.gate.bias[0])
        eta = eta / torch.clamp(x @ x, min=level.d_model)
        target = network(start, x)[0] + u
        gradients = torch.func.grad(lambda w, x=x, u=u, target=target: objective(level, w, x, u, target))(weights)
        inputs = network(weights, x)[1]
        for name, w in new.items():
            z, distance = inputs[name], w - start[name]
            if level.level.rule == "delta":
                step = eta / (1 + eta * (z @ z))
                kept = retain * distance - step * torch.outer(distance @ z, z)
            else:
                step = eta / (4 * level.period * growth(start))
                kept = retain * distance
            new[name] = start[name] + kept - step * gradients[name]
    return new


def naive_level(level: LocalLevel | FeedForward, x: Tensor) -> Tensor:
    if isinstance(level, FeedForward):
        return torch.stack([level(token[None, None])[0][0, 0] for token in x])
    weights, outputs = dict(level.initial.items()), []
    for t, token in enumerate(x):
        if t and t % level.period == 0:
            weights = learn(level, weights, x[t - level.period : t])
        outputs.append(network(weights, token)[0])
    return torch.stack(outputs)


def naive(cms: ContinuumMemory, x: Tensor) -> Tensor:
    """The chain for one row ``[t, d]``."""
    total = torch.zeros_like(x)
    for i, level in enumerate(cms.networks):
        total = total + naive_level(level, cms.norms[i](x + total))
    return total


@pytest.mark.parametrize(("chain", "activation"), [*((chain, None) for chain in CHAINS), ("four", "gelu")])
def test_equals_the_token_loop_with_all_outer_gradients(chain, activation):
    cms = make(chain, activation=activation)
    x = (2 * torch.randn(2, 11, 6, dtype=torch.float64)).requires_grad_()
    target = torch.randn(2, 11, 6, dtype=torch.float64)
    wanted = [x, *cms.parameters()]
    expected = torch.stack([naive(cms, row) for row in x])
    gradients = torch.autograd.grad((expected * target).sum(), wanted)
    y, _ = cms(x)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    for got, want in zip(torch.autograd.grad((y * target).sum(), wanted), gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("map_name", "rule"),
    [("gate", "descent"), ("up", "descent"), ("down", "descent"), ("up", "delta"), ("down", "delta")],
)
def test_gradient_of_each_initial_state_matches_finite_differences(map_name, rule):
    cms = make([Level(3, 2, rule=rule), Level(5, 2, rule=rule), Level(None, 1)])
    x, target = torch.randn(2, 1, 11, 6, dtype=torch.float64)
    for level in cms.networks:
        if not isinstance(level, LocalLevel):
            continue
        weight = level.initial[map_name]
        direction = torch.randn_like(weight)
        cms.zero_grad()
        (cms(x)[0] * target).sum().backward()
        assert weight.grad is not None
        slope = (weight.grad * direction).sum()
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight.add_(direction, alpha=step)
                losses.append((cms(x)[0] * target).sum())
                weight.sub_(direction, alpha=step)
        assert slope.abs() > 1e-3
        torch.testing.assert_close(slope, (losses[0] - losses[1]) / 2e-5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chain", CHAINS)
def test_every_parameter_gets_an_outer_gradient(chain):
    cms = make(chain)
    cms(torch.randn(2, 11, 6, dtype=torch.float64))[0].square().sum().backward()
    assert not {n for n, p in cms.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}


# ------------------------------------------------------------------------------------- which tokens a level has seen


def tokens_read(level: LocalLevel, x: Tensor) -> list[set[int]]:
    """For each token, the tokens whose values are in the weights it reads: exactly those with a non-zero gradient."""
    weight = level.value
    seen: list[set[int]] = []
    # A value map of its own for every token: the gradient of an output with respect to it says who was written.
    probe = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    values = level._value

    def probed(tokens: Tensor, initial: dict[str, Tensor]) -> Tensor:
        return values(tokens, initial) * (1 + probe[None, :, None])

    level._value = probed  # type: ignore[method-assign]
    y, _ = level(x, None, None, None, True, False)
    level._value = values  # type: ignore[method-assign]
    assert weight.requires_grad
    for t in range(x.shape[1]):
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), probe, retain_graph=True, materialize_grads=True)
        seen.append(set(gradient.nonzero().flatten().tolist()))
    return seen


@pytest.mark.parametrize("tokens", [12, 13, 24])
@pytest.mark.parametrize("periods", [(4,), (3, 6), (2, 4, 12), (2, 5, 7), (2, 3, 5, 7), (1, 2, 4, 8)])
def test_a_level_has_read_whole_periods_in_order(periods, tokens):
    """A level of period C sees tokens 1..C, then C+1..2C, at every depth of the chain."""
    cms = make([Level(period, 2) for period in periods])
    x = torch.randn(1, tokens, 6, dtype=torch.float64)
    total = torch.zeros_like(x)
    for i, (period, level) in enumerate(zip(periods, cms.networks, strict=True)):
        assert isinstance(level, LocalLevel)
        here = cms.norms[i](x + total)
        assert tokens_read(level, here.detach()) == [set(range(t // period * period)) for t in range(tokens)]
        total = total + level(here, None, None, None, True, False)[0].detach()
    torch.testing.assert_close(cms(x)[0], total, **TOLERANCE)


def test_the_order_of_tokens_inside_a_period_counts():
    """Delta retention erases what came before: two tokens swapped inside a period give other weights."""
    cms = make([Level(4, 2, rule="delta")])
    x = torch.randn(1, 6, 6, dtype=torch.float64)
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.allclose(cms(x)[0][:, 4:], cms(swapped)[0][:, 4:], atol=1e-6)


# ------------------------------------------------------------------------------------------------- the frozen limit


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_one_frozen_level_is_a_feed_forward_network(activation):
    cms = ContinuumMemory(8, [Level(None, 3)], activation)
    ffn = FeedForward(8, 3, activation)
    ffn.load_state_dict(cms.networks[0].state_dict())
    x = torch.randn(2, 7, 8)
    y, state = cms(x)
    assert torch.equal(y, ffn(x)[0])
    assert state == ContinuumState((None,))
    assert sum(p.numel() for p in cms.parameters()) == sum(p.numel() for p in ffn.parameters())


@pytest.mark.parametrize(("rule", "activation"), RULES)
def test_a_new_level_starts_as_a_feed_forward_network(rule, activation):
    cms = ContinuumMemory(8, [Level(3, 3, rule=rule)], activation).double()
    ffn = FeedForward(8, 3, activation).double()
    level = cms.networks[0]
    assert isinstance(level, LocalLevel)
    ffn.load_state_dict({f"{name}.weight": w for name, w in level.initial.items()})
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    torch.testing.assert_close(cms(x)[0], ffn(cms.norms[0](x))[0], rtol=1e-12, atol=1e-12)
    # ... and what it could write is learned: its value map has a gradient from the first step.
    cms(x)[0].square().sum().backward()
    assert level.value.grad is not None and level.value.grad.abs().sum() > 0


def test_writes_off_is_the_initial_network():
    cms = make("three")
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    fixed, _ = cms(x, writes=False)
    with torch.no_grad():
        for level in cms.networks:
            if isinstance(level, LocalLevel):
                level.value.zero_()
    torch.testing.assert_close(fixed, cms(x)[0], **TOLERANCE)


# ------------------------------------------------------------------------------------------------- streams of rows


@pytest.mark.parametrize("chain", CHAINS)
def test_any_split_equals_one_call(chain):
    cms = make(chain)
    x = torch.randn(2, 17, 6, dtype=torch.float64)
    whole, _ = run(cms, x)
    for sizes in ([8, 9], [3, 1, 6, 7], [1] * 17, [16, 1]):
        torch.testing.assert_close(run(cms, *x.split(sizes, 1))[0], whole, **TOLERANCE)


@pytest.mark.parametrize("chain", CHAINS)
def test_padding_phases_and_resets_equal_separate_runs(chain):
    assert_rows_are_separate(make(chain))


@pytest.mark.parametrize("chain", CHAINS)
def test_future_tokens_and_other_rows_change_no_bit(chain):
    assert_past_and_other_rows_keep_every_bit(make(chain).float())


def test_rows_can_be_reordered():
    cms = make("four")
    x, more = torch.randn(3, 8, 6, dtype=torch.float64), torch.randn(3, 6, 6, dtype=torch.float64)
    _, state = cms(x)
    shapes: list[torch.Size] = []
    map_tensors(lambda t: shapes.append(t.shape) or t, state)
    assert shapes and all(shape[0] == 3 for shape in shapes)
    order = torch.tensor([2, 0, 0])
    y, _ = cms(more, index_rows(state, order))
    torch.testing.assert_close(y, run(cms, x[order], more)[0][:, 8:], **TOLERANCE)


# --------------------------------------------------------------------------------------------------- modes and types


@pytest.mark.parametrize("chain", CHAINS)
def test_evaluation_equals_training(chain):
    cms = make(chain)
    x = torch.randn(2, 13, 6, dtype=torch.float64)
    expected, none = cms(x, return_state=False)
    assert none is None
    assert torch.equal(cms(x)[0], expected)
    with torch.inference_mode():
        y, _ = run(cms.eval(), x[:, :5], x[:, 5:])
    torch.testing.assert_close(y, expected, **TOLERANCE)


def test_bfloat16_keeps_fast_weights_in_float32():
    cms = make("three").bfloat16()
    y, state = cms(torch.randn(2, 9, 6).bfloat16())
    assert y.dtype == torch.bfloat16
    kinds = set()
    map_tensors(lambda t: kinds.add(t.dtype) or t, state)
    assert kinds == {torch.float32, torch.long}
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cms.parameters())


def test_state_dict_round_trip():
    cms, other = make("three"), make("three")
    other.load_state_dict(cms.state_dict())
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    assert torch.equal(cms(x)[0], other(x)[0])


def test_reset_parameters_stops_all_writes():
    cms = make("three")
    cms.reset_parameters()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(cms(x)[0], cms(x, writes=False)[0], **TOLERANCE)


def saturated(cms: ContinuumMemory, keep: float) -> ContinuumMemory:
    for level in cms.networks:
        assert isinstance(level, LocalLevel)
        torch.nn.init.constant_(level.gate.bias, 30.0)
        torch.nn.init.constant_(level.keep.logit, keep)
    return cms.float()


@pytest.mark.parametrize("kind", ["random", "constant", "alternating"])
@pytest.mark.parametrize(("rule", "activation"), RULES)
def test_finite_at_extreme_inputs(rule, activation, kind):
    """A long stream of noise, of one token and of two opposite ones, with the gate fully open."""
    levels = [Level(16, 2, rule=rule), Level(64, 2, rule=rule)]
    for keep, scale, grown in ((30.0, 1.0, 1.0), (30.0, 1e4, 1.0), (-30.0, 1.0, 1.0), (30.0, 1.0, 3.0)):
        cms = saturated(make(levels, 8, activation), keep)
        for level in cms.networks:
            for weight in level.initial.values():
                torch.nn.init.normal_(weight, 0, grown * float(weight.detach().std()))
        x = torch.randn(1, 512, 8)
        x = x if kind == "random" else x[:, :1].expand(1, 512, 8)
        if kind == "alternating":
            x = x * torch.where(torch.arange(512) % 2 == 0, 1.0, -1.0)[None, :, None]
        x = (scale * x).to(torch.bfloat16).float().requires_grad_()
        y, _ = cms(x)
        y.square().mean().backward()
        assert y.isfinite().all(), scale
        gradients = [x.grad, *(p.grad for p in cms.parameters())]
        # Stable, not merely finite: no gradient grows with the number of periods.
        assert all(g is not None and g.abs().max() < 1e3 for g in gradients), scale


# -------------------------------------------------------------------------------------------------- counts and errors


def test_levels_that_never_write():
    cms = ContinuumMemory(6, [Level(4), Level(16), Level(32), Level(None)])
    assert cms.levels_that_never_write(4) == [0, 1, 2]
    assert cms.levels_that_never_write(17) == [2]
    assert cms.levels_that_never_write(33) == []


def test_flops_count_writes_only_where_they_are_read():
    frozen = ContinuumMemory(32, [Level(None, 4)]).flops_per_token(64)
    fast = ContinuumMemory(32, [Level(64, 4)])
    assert frozen == 2 * sum(p.numel() for p in ContinuumMemory(32, [Level(None, 4)]).parameters())
    assert frozen < fast.flops_per_token(64) < fast.flops_per_token(128) < fast.flops_per_token(640)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "non-empty"),
        ([{"period": 4}], r"Level\(\*\*m\)"),
        ([Level(4), Level(4)], "strictly increasing"),
        ([Level(None), Level(4)], "it comes last"),
        ([Level(None), Level(None)], "strictly increasing"),
    ],
    ids=str,
)
def test_bad_chains_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        ContinuumMemory(8, levels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 0}, "at least 1"),
        ({"period": True}, "at least 1"),
        ({"period": 2.5}, "at least 1"),
        ({"expansion": 0}, "expansion=0 must be .* above 0"),
        ({"rule": "hebb"}, "rule=.hebb. must be"),
        ({"lr": 0.0}, "above 0"),
        ({"lr": float("inf")}, "above 0"),
        ({"retain": 1.5}, "at most 1"),
        ({"clip": 0.0}, "clip=0.0 must be .* above 0"),
        ({"hidden": 0}, "hidden=0"),
        ({"rank": True}, "rank=True"),
        ({"rank": 4}, "never learns"),
        ({"momentum": 1.0}, "below 1"),
    ],
    ids=str,
)
def test_bad_levels_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Level(**options)


def test_bad_arguments_are_refused():
    for options, message in (
        ({"variant": "parallel"}, "'sequential' or 'nested' or 'independent'"),
        ({"signal": "global"}, "'local' or 'loss'"),
        ({"meta": "third"}, "'first' or 'second'"),
        ({"heads": 3}, "divisible by heads=3"),
        ({"transfer": 0.0}, "transfer=0.0"),
        ({"activation": "relu"}, "activation"),
    ):
        with pytest.raises(ValueError, match=message):
            ContinuumMemory(8, [Level(4)], **options)
    with pytest.raises(ValueError, match="unstable with activation='swiglu'"):
        ContinuumMemory(8, [Level(4, rule="delta")])
    with pytest.raises(ValueError, match="at most 1"):
        ContinuumMemory(8, [Level(4, lr=2.0)])
    with pytest.raises(ValueError, match="expected x of shape"):
        ContinuumMemory(8)(torch.zeros(1, 3, 7))
    with pytest.raises(TypeError, match="not token ids"):
        ContinuumMemory(8)(torch.zeros(1, 3, 8, dtype=torch.long))
