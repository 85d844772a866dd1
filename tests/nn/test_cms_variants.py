"""ContinuumMemory: every variant and rule of levels that teach themselves, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import newton_schulz
from nestlearn.nn import ContinuumMemory, FeedForward, Level
from nestlearn.nn.cms.local import LocalLevel
from nestlearn.nn.state import index_rows, map_tensors, state_bytes, tensors_of

from .cms_checks import assert_past_and_other_rows_keep_every_bit, assert_rows_are_separate

TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}
D = 6
CASES = {
    "momentum": ("sequential", [Level(3, 2, rule="momentum"), Level(None, 1)], "swiglu"),
    "momentum gelu": ("sequential", [Level(2, 1, rule="momentum", momentum=0.5, retain=0.6)], "gelu"),
    "orthogonalized": ("sequential", [Level(3, 1, rule="orthogonalized"), Level(None, 1)], "gelu"),
    "low rank": ("sequential", [Level(3, 2, rank=2), Level(5, hidden=7, rank=1, rule="momentum")], "swiglu"),
    "forgets at once": ("sequential", [Level(3, 2, retain=0.0), Level(4, 1, retain=1.0)], "gelu"),
    "nested two": ("nested", [Level(2, 2), Level(6, 1)], "swiglu"),
    "nested three": ("nested", [Level(2, 1), Level(4, 1, rule="momentum"), Level(8, 1), Level(None, 1)], "gelu"),
    "nested orthogonalized": ("nested", [Level(2, 1, rule="orthogonalized"), Level(4, 1)], "gelu"),
    "nested by gradient": ("nested by gradient", [Level(2, 2), Level(6, 1)], "swiglu"),
    "nested three by gradient": (
        "nested by gradient",
        [Level(2, 1, rank=2), Level(4, 1, rule="momentum", retain=0.7), Level(8, 1), Level(None, 1)],
        "gelu",
    ),
    "independent": ("independent", [Level(2, 1), Level(5, 2, rank=2), Level(None, 1)], "swiglu"),
    "independent delta": ("independent", [Level(3, 1, rule="delta"), Level(4, 1)], "gelu"),
}


def make(case: str, levels: list[Level] | None = None) -> ContinuumMemory:
    """A float64 system that writes: value maps, gates, parts of low rank and aggregation weights are random."""
    variant, chain, activation = CASES[case]
    variant, _, by = variant.partition(" by ")
    options = {"transfer": 0.6, "transfer_by": by or "difference", "heads": 3 if variant == "independent" else 1}
    cms = ContinuumMemory(D, levels or chain, activation, variant, **options).double()
    with torch.no_grad():
        for level in cms.networks:
            if isinstance(level, LocalLevel):
                level.value.normal_(0, 1)
                level.gate.weight.normal_(0, 1)
                if level.keep.logit is not None:
                    level.keep.logit.fill_(1.0)
                for name, weight in level.initial.items():
                    if name.endswith("_B"):
                        weight.normal_(0, 0.3)
        if cms.aggregation is not None:
            cms.aggregation.weight.uniform_(0.5, 1.5)
    return cms


# ---------------------------------------------------------------------------------------------------- the oracle


def network(level: LocalLevel, weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A feed-forward network for one vector, and the input of each map."""
    inputs: dict[str, Tensor] = {}

    def linear(name: str, u: Tensor) -> Tensor:
        if level.fixed is None:
            inputs[name] = u
            return weights[name] @ u
        inputs[f"{name}_A"], inputs[f"{name}_B"] = u, weights[f"{name}_A"] @ u
        return level.fixed[name] @ u + weights[f"{name}_B"] @ inputs[f"{name}_B"]

    if level.network.activation == "gelu":
        return linear("down", F.gelu(linear("up", x))), inputs
    return linear("down", F.silu(linear("gate", x)) * linear("up", x)), inputs


def eighth(w: Tensor) -> Tensor:
    return (torch.linalg.svdvals(w) ** 8).sum() ** 0.25


def growth(level: LocalLevel) -> Tensor:
    """Curvature of the initial weights over that of a random start."""
    start, parts = dict(level.initial.items()), []
    if level.fixed is not None:
        for name, slow in level.fixed.items():
            a, b = start.pop(f"{name}_A"), start.pop(f"{name}_B")
            start[name] = slow + b @ a
            parts.append((a**2).sum() * 3 / len(a) + (b**2).sum())
    now, expected = torch.zeros((), dtype=torch.float64), 0.0
    for w in start.values():
        y = w.shape[0] / w.shape[1]
        now, expected = now + eighth(w), expected + (w.shape[0] * (1 + 6 * y + 6 * y * y + y**3)) ** 0.25 / 3
    grown = torch.clamp(now / expected, min=1) ** (len(start) - 1)
    return grown * torch.clamp(torch.stack(parts).max(), min=1) if parts else grown


class Learner:
    """One row of one level."""

    def __init__(self, level: LocalLevel) -> None:
        self.level, self.start = level, dict(level.initial.items())
        self.weights = dict(self.start)
        self.momentum = {n: torch.zeros_like(w) for n, w in self.start.items()}
        kept = (
            torch.sigmoid(level.keep.logit.squeeze(0))
            if level.keep.logit is not None
            else torch.tensor(level.level.retain, dtype=torch.float64)
        )
        self.retain = kept ** (1 / level.period)
        self.losses: list[Tensor] = []
        # How much of each token's gradient is in the momentum, and in the weights.
        self.carried: list[Tensor] = []
        self.written: list[Tensor] = []

    def learn(self, tokens: Tensor) -> None:
        """One period: errors of all tokens at the weights before it, by autograd of the objective."""
        level, rule, new, pending = self.level, self.level.level.rule, dict(self.weights), torch.zeros(())
        beta = level.level.momentum ** (1 / level.period)
        for t, x in enumerate(tokens):
            u = level.value @ x
            u = u / (1 + (u * u).mean()).sqrt()
            eta = level.level.lr * torch.sigmoid(level.gate.weight[0] @ x + level.gate.bias[0])
            target = network(level, dict(level.initial.items()), x)[0] + u

            def objective(w, x=x, u=u, target=target, rule=rule):
                y = network(self.level, w, x)[0]
                return -(y @ u) if rule == "delta" else 0.5 * ((y - target) ** 2).sum()

            gradients, inputs = torch.func.grad(objective)(self.weights), network(level, self.weights, x)[1]
            if rule == "orthogonalized":
                eta = eta * (1 - self.retain)
                pending = self.retain * pending + eta
            else:
                eta = eta / torch.clamp(x @ x, min=D)
            if rule in ("descent", "momentum"):
                eta = eta / (4 * level.period * growth(level))
            if rule == "momentum":
                eta = eta * (1 - beta) * min(1.0, level.period * (1 - beta))
            self.losses.append(objective(self.weights))
            past = beta if rule == "momentum" else 0.0
            self.carried = [past * c for c in self.carried] + [eta]
            self.written = [self.retain * w for w in self.written] + [torch.zeros_like(eta)]
            self.written = [w + c for w, c in zip(self.written, self.carried, strict=True)]
            for name, w in new.items():
                distance, z = w - self.start[name], inputs[name]
                kept = self.start[name] + self.retain * distance
                if rule == "delta":
                    step = eta / (1 + eta * (z @ z))
                    new[name] = kept - step * torch.outer(distance @ z, z) - step * gradients[name]
                elif rule == "orthogonalized":
                    self.momentum[name] = beta * self.momentum[name] - gradients[name]
                    last = t == level.period - 1
                    new[name] = kept + pending * newton_schulz(self.momentum[name], 5) if last else kept
                elif rule == "momentum":
                    self.momentum[name] = beta * self.momentum[name] - eta * gradients[name]
                    new[name] = kept + self.momentum[name]
                else:
                    new[name] = kept - eta * gradients[name]
        self.weights = new

    def transfer(self, rho: float, by: str, window: Tensor) -> None:
        change = {n: self.weights[n] - w for n, w in self.start.items()}
        if by == "gradient":
            change = {n: -g for n, g in torch.func.grad(lambda w: self.objective(w, window))(self.start).items()}
        self.start = {n: w + rho * change[n] for n, w in self.start.items()}
        self.weights = dict(self.start)
        self.momentum = {n: torch.zeros_like(w) for n, w in self.start.items()}

    def objective(self, start: dict[str, Tensor], window: Tensor) -> Tensor:
        """J(theta_0): losses of the window's tokens as they are read, each with the weight of its gradient's write."""
        again = Learner(self.level)
        again.start, again.weights = start, dict(start)
        for tokens in window.split(self.level.period):
            again.learn(tokens)
        return sum((w * loss for w, loss in zip(again.written, again.losses, strict=True)), torch.zeros(()))


def naive_level(level: LocalLevel | FeedForward, x: Tensor) -> Tensor:
    if isinstance(level, FeedForward):
        return torch.stack([level(token[None, None])[0][0, 0] for token in x])
    learner, outputs = Learner(level), []
    for t, token in enumerate(x):
        if t and t % level.period == 0:
            learner.learn(x[t - level.period : t])
        if t and level.outer and t % level.outer == 0:
            learner.transfer(level.transfer, level.transfer_by, x[t - level.outer : t])
        outputs.append(network(level, learner.weights, token)[0])
    return torch.stack(outputs)


def naive(cms: ContinuumMemory, x: Tensor) -> Tensor:
    """One row ``[t, d]``."""
    total = torch.zeros_like(x)
    for i, level in enumerate(cms.networks):
        if cms.aggregation is not None:
            y = naive_level(level, cms.norms[i](x))
            parts = y.view(len(x), cms.aggregation.weight.shape[1], -1)
            total = total + (parts * cms.aggregation.weight[i][None, :, None]).flatten(1)
        else:
            total = total + naive_level(level, cms.norms[i](x + total))
    return total


@pytest.mark.parametrize("case", CASES)
def test_equals_the_token_loop_with_all_outer_gradients(case):
    cms = make(case)
    x = (2 * torch.randn(2, 13, D, dtype=torch.float64)).requires_grad_()
    target = torch.randn(2, 13, D, dtype=torch.float64)
    wanted = [x, *cms.parameters()]
    expected = torch.stack([naive(cms, row) for row in x])
    y, _ = cms(x)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    ours = torch.autograd.grad((y * target).sum(), wanted, allow_unused=True)
    theirs = torch.autograd.grad((expected * target).sum(), wanted, allow_unused=True)
    for got, want in zip(ours, theirs, strict=True):
        assert want is not None and got is not None and want.abs().sum() > 0
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_any_split_equals_one_call(case):
    cms = make(case)
    x = torch.randn(2, 19, D, dtype=torch.float64)
    whole, _ = cms(x)
    for sizes in ([8, 11], [3, 1, 6, 9], [1] * 19):
        state, outputs = None, []
        for piece in x.split(sizes, 1):
            y, state = cms(piece, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_padding_phases_and_resets_equal_separate_runs(case):
    assert_rows_are_separate(make(case))


@pytest.mark.parametrize("case", CASES)
def test_future_tokens_and_other_rows_change_no_bit(case):
    assert_past_and_other_rows_keep_every_bit(make(case).float())


@pytest.mark.parametrize("case", ["nested two", "nested by gradient"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_token_that_is_not_finite_spoils_its_row_from_there_on(case, whole):
    cms = make(case)
    level, x = cms.networks[0], torch.randn(2, 20, D, dtype=torch.float64)
    assert isinstance(level, LocalLevel)
    x[0, 8] = float("nan")
    parts, state, outputs = [x] if whole else [*x.split([7, 6, 7], 1)], None, []
    for part in parts:
        y, state = level(part, state, None, None, True, True)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    assert y[0, :8].isfinite().all() and y[0, 8:].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_evaluation_equals_training_and_rows_can_be_reordered(case):
    cms = make(case)
    x, more = torch.randn(3, 9, D, dtype=torch.float64), torch.randn(3, 6, D, dtype=torch.float64)
    expected = cms(torch.cat([x, more], 1))[0].detach()
    with torch.inference_mode():
        y, state = cms.eval()(x)
        shapes: list[torch.Size] = []
        map_tensors(lambda t: shapes.append(t.shape) or t, state)
        assert shapes and all(shape[0] == 3 for shape in shapes)
        order = torch.tensor([2, 0, 0])
        later, _ = cms(more[order], index_rows(state, order))
    torch.testing.assert_close(y, expected[:, :9], **TOLERANCE)
    torch.testing.assert_close(later, expected[order, 9:], **TOLERANCE)


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_a_level_that_does_not_reset_keeps_what_it_learned(variant):
    """Documents in a row: the first level starts anew at each, the second goes on as if there were one document."""
    case = {"sequential": "forgets at once", "nested": "nested two", "independent": "independent"}[variant]
    levels = [Level(2, 2), Level(4, 1, reset=False)]
    cms = make(case, levels)
    x, reset = torch.randn(1, 11, D, dtype=torch.float64), torch.zeros(1, 11, dtype=torch.bool)
    reset[0, 5] = True
    fast, kept = cms.networks
    assert isinstance(fast, LocalLevel) and isinstance(kept, LocalLevel)
    y, state = cms(x, reset=reset)
    here = cms.norms[0](x)
    first = torch.cat([fast(part, None, None, None, True, False)[0] for part in (here[:, :5], here[:, 5:])], 1)
    below = x if cms.aggregation is not None else x + first
    second = kept(cms.norms[1](below), None, None, None, True, False)[0]
    total = cms.aggregation([first, second]) if cms.aggregation is not None else first + second
    torch.testing.assert_close(y, total, **TOLERANCE)
    assert state.levels[1].position.tolist() == [11 % 4]


@pytest.mark.parametrize("case", ["independent", "nested by gradient"])
def test_levels_that_do_not_write_are_chosen_by_number(case):
    """Of levels with the same inputs, those that are named learn as if all did, the others as if none did."""
    cms = make(case)
    x = torch.randn(2, 13, D, dtype=torch.float64)
    states = [cms(x, writes=writes)[1].levels for writes in (True, False, [0], [0, 1])]
    everyone, known_empty, first, both = ([[*tensors_of(level)] for level in levels[:2]] for levels in states)
    torch.testing.assert_close([first[0], both], [everyone[0], everyone])
    if case == "independent":
        torch.testing.assert_close(first[1], known_empty[1])
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(everyone[1], known_empty[1], strict=True))


@pytest.mark.parametrize("tokens", [11, 12, 24])
@pytest.mark.parametrize("periods", [(4,), (3, 6), (2, 4, 12), (2, 4, 8, 16)])
def test_a_nested_level_starts_anew_with_the_slower_one(periods, tokens):
    """The weights a level reads hold the tokens since the slower level's last period, and of earlier ones the part
    rho: with rho = 1 it has seen what a sequential level has, all whole periods in order."""
    levels = [Level(period, 1, retain=1.0) for period in periods]
    chains = [make("nested two", levels)]
    chains.append(ContinuumMemory(D, levels, "swiglu", "sequential").double())
    chains[1].load_state_dict(chains[0].state_dict())
    for level in chains[0].networks:
        assert isinstance(level, LocalLevel)
        level.transfer = 1.0
    x = torch.randn(2, tokens, D, dtype=torch.float64)
    torch.testing.assert_close(chains[0](x)[0], chains[1](x)[0], **TOLERANCE)


def test_knowledge_transfer_by_the_formula():
    """theta_0 <- theta_0 + rho (theta - theta_0), then theta <- theta_0, momentum gone, a new period."""
    cms = make("nested three")
    x = torch.randn(2, 7, D, dtype=torch.float64)
    for tokens, moved in ((3, False), (4, True), (6, True)):
        state = cms(x[:, :tokens])[1].levels[0]
        level = cms.networks[0]
        assert torch.equal(state.initial["up"][0], level.initial["up"]) == (not moved)
    before = cms(x[:, :3])[1].levels[0]
    at = cms(x[:, :4])[1].levels[0]
    learner = Learner(cms.networks[0])  # type: ignore[arg-type]
    here = cms.norms[0](x)[0]
    learner.learn(here[:2])
    learner.learn(here[2:4])
    want = learner.start["up"] + 0.6 * (learner.weights["up"] - learner.start["up"])
    torch.testing.assert_close(at.initial["up"][0], want, **TOLERANCE)
    assert torch.equal(at.fast.params["up"], at.initial["up"]) and torch.equal(at.fast.anchor["up"], at.initial["up"])
    assert before.fast.position.tolist() == [1, 1] and at.fast.position.tolist() == [0, 0]
    assert at.position.tolist() == [0, 0] and at.aligned


@pytest.mark.parametrize("rule", ["descent", "momentum"])
def test_the_difference_is_the_meta_gradient_with_writes_as_constants(rule):
    """theta - theta_0 = - sum_t w_t dL_t / d theta_c(t), the gradient of J when the Jacobians of the writes are 1."""
    level = make("nested by gradient", [Level(2, 1, rule=rule, retain=0.8), Level(6, 1)]).networks[0]
    assert isinstance(level, LocalLevel)
    learner, tokens, anchors = Learner(level), torch.randn(6, D, dtype=torch.float64), []
    for part in tokens.split(2):
        anchors += [{n: w.detach().requires_grad_() for n, w in learner.weights.items()}]
        learner.weights = anchors[-1]
        learner.learn(part)
    first = sum(w.detach() * loss for w, loss in zip(learner.written, learner.losses, strict=True))
    for name, start in learner.start.items():
        slopes = torch.autograd.grad(first, [anchor[name] for anchor in anchors], retain_graph=True)
        torch.testing.assert_close(learner.weights[name] - start, -sum(slopes), **TOLERANCE)


def test_the_meta_gradient_by_finite_differences():
    """Initial weights move by - rho times the slope of J, which a loop over tokens computes at both sides."""
    cms = make("nested by gradient", [Level(2, 1), Level(6, 1)])
    level, x = cms.networks[0], torch.randn(1, 6, D, dtype=torch.float64)
    assert isinstance(level, LocalLevel)
    moved, window = cms(x)[1].levels[0].initial, cms.norms[0](x)[0].detach()
    for name, weight in level.initial.items():
        start = {n: w.detach().clone() for n, w in level.initial.items()}
        sides = []
        for step in (1e-5, -1e-5):
            start[name][1, 2] = weight[1, 2].detach() + step
            sides.append(Learner(level).objective(start, window))
        slope = (sides[0] - sides[1]) / 2e-5
        torch.testing.assert_close(moved[name][0, 1, 2] - weight[1, 2], -0.6 * slope, rtol=1e-6, atol=1e-9)


def saturated(cms: ContinuumMemory, keep: float) -> ContinuumMemory:
    for level in cms.networks:
        assert isinstance(level, LocalLevel)
        torch.nn.init.constant_(level.gate.bias, 30.0)
        if level.keep.logit is not None:
            torch.nn.init.constant_(level.keep.logit, keep)
    return cms.float()


@pytest.mark.parametrize("kind", ["random", "constant", "alternating"])
@pytest.mark.parametrize(
    "case", ["momentum", "momentum gelu", "low rank", "orthogonalized", "nested two", "nested by gradient"]
)
def test_finite_at_extreme_inputs(case, kind):
    """A long stream of noise, of one token and of two opposite ones, with the gate fully open."""
    chain = CASES[case][1]
    options = {"rule": chain[0].rule, "rank": chain[0].rank, "momentum": chain[0].momentum}
    levels = [Level(16, 2, **options), Level(64, 2, **options)]
    for keep, scale in ((30.0, 1.0), (30.0, 1e4), (-30.0, 1.0)):
        cms = saturated(make(case, levels), keep)
        x = torch.randn(1, 256, D)
        x = x if kind == "random" else x[:, :1].expand(1, 256, D)
        if kind == "alternating":
            x = x * torch.where(torch.arange(256) % 2 == 0, 1.0, -1.0)[None, :, None]
        x = (scale * x).to(torch.bfloat16).float().requires_grad_()
        y, _ = cms(x)
        y.square().mean().backward()
        assert y.isfinite().all() and y.abs().max() < 1e3, scale
        gradients = [x.grad, *(p.grad for p in cms.parameters())]
        limit = 1e6 if case == "orthogonalized" else 1e3
        assert all(g is not None and g.abs().max() < limit for g in gradients), scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": [Level(4), Level(6)], "variant": "nested"}, "multiple of 4"),
        ({"levels": [Level(4), Level(6)], "signal": "loss"}, "must be a multiple"),
        ({"levels": [Level(1)], "signal": "loss"}, "at least 2"),
        ({"levels": [Level(4, clip=1.0)]}, "Drop it"),
        ({"levels": [Level(4, rule="orthogonalized", retain=1.0)]}, "retain below 1"),
        ({"levels": [Level(4, rule="delta", rank=2)], "activation": "gelu"}, "unstable with rank"),
        ({"levels": [Level(4, rule="delta"), Level(8)], "activation": "gelu", "variant": "nested"}, "no bound"),
        ({"levels": [Level(4), Level(8)], "transfer_by": "gradient"}, "only nested levels"),
        (
            {"levels": [Level(4), Level(8)], "variant": "nested", "signal": "loss", "transfer_by": "gradient"},
            "graph of the whole model",
        ),
        (
            {"levels": [Level(4, rule="orthogonalized"), Level(8)], "variant": "nested", "transfer_by": "gradient"},
            "no meta-gradient",
        ),
        ({"levels": [Level(4), Level(8)], "variant": "nested", "transfer_by": "exact"}, "'difference' or 'gradient'"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContinuumMemory(8, **options)


def test_bytes_are_bounded_by_hidden_and_rank():
    x = torch.zeros(1, 1, 64)
    sizes = {}
    for name, level in (("full", Level(4)), ("hidden", Level(4, hidden=16)), ("rank", Level(4, rank=4))):
        _, state = ContinuumMemory(64, [level], "gelu")(x.expand(1, 5, 64))
        sizes[name] = state_bytes(state)
    assert sizes["hidden"] < sizes["full"] / 10 and sizes["rank"] < sizes["full"] / 10
