"""M3 against its formulas written out, against torch's Muon, and resumed at every step of a slow period."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from nestlearn.optim import M3, m3, orthogonal

STEPS, PERIOD, BETAS, ALPHA, LR, DECAY, EPS, DAMPING = 20, 6, (0.9, 0.95, 0.8), 0.3, 0.01, 0.1, 1e-8, 0.2

# The shape of a parameter and how many matrices it is.
SHAPES = {"wide": (5, 7), "tall": (9, 4), "stack": (3, 4, 5), "kernel": (6, 2, 3, 2)}


def quintic(x: Tensor) -> Tensor:
    """Five iterations on one matrix, by the formula."""
    x = x / x.norm() if x.norm() > 0 else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def written_out(
    weight: Tensor, gradients: list[Tensor], accumulate: str, nesterov: bool, second_moment: bool, adjust_lr: str | None
) -> Tensor:
    """The matrix after all steps: sums of gradients from the list, nothing kept that the formulas do not name."""
    b1, b2, b3 = BETAS
    fast, slow, moment, slow_direction = (torch.zeros_like(weight) for _ in range(4))
    for t, g in enumerate(gradients, 1):
        if t > 1 and (t - 1) % PERIOD == 0:
            total = sum(gradients[t - 1 - PERIOD : t - 1], torch.zeros_like(weight))
            slow = slow + b3 * total if accumulate == "paper" else b3 * slow + (1 - b3) * total / PERIOD
            slow_direction = quintic(slow)
        if accumulate == "paper":
            fast, moment = fast + b1 * g, moment + b2 * g * g
            momentum, corrected = (fast + b1 * g if nesterov else fast), moment
        else:
            fast, moment = b1 * fast + (1 - b1) * g, b2 * moment + (1 - b2) * g * g
            momentum, corrected = (b1 * fast + (1 - b1) * g if nesterov else fast), moment / (1 - b2**t)
        update = quintic(momentum) + ALPHA * slow_direction
        if second_moment:
            root = corrected.sqrt()
            damped = root if adjust_lr is None else root + DAMPING * corrected.mean().sqrt()
            divided = update / (damped + EPS)
            update = divided if adjust_lr is None else divided * update.norm() / divided.norm()
        m, n = weight.shape
        scale = {None: 1.0, "original": max(1.0, m / n) ** 0.5, "match_rms_adamw": 0.2 * max(m, n) ** 0.5}[adjust_lr]
        weight = weight * (1 - LR * DECAY) - LR * scale * update
    return weight


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("adjust_lr", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("second_moment", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("accumulate", ["ema", "paper"])
def test_equals_the_written_out_algorithm(accumulate, nesterov, second_moment, adjust_lr, shape):
    start = torch.randn(shape, dtype=torch.float64)
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(STEPS)]
    weight = nn.Parameter(start.clone())
    form = {"accumulate": accumulate, "nesterov": nesterov, "second_moment": second_moment, "adjust_lr": adjust_lr}
    numbers = {"lr": LR, "betas": BETAS, "alpha": ALPHA, "slow_period": PERIOD, "weight_decay": DECAY, "eps": EPS}
    optimizer = M3([weight], damping=DAMPING, **form, **numbers)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    # A stack is its matrices one by one, a kernel the matrix [out, in · ...].
    places = range(shape[0]) if len(shape) == 3 else [None]
    flat = [x if len(shape) == 3 else x.reshape(shape[0], -1) for x in (weight.detach(), start, *gradients)]
    for place in places:
        result, first, *of_place = flat if place is None else [x[place] for x in flat]
        expected = written_out(first, of_place, accumulate, nesterov, second_moment, adjust_lr)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)


def test_a_batch_of_matrices_is_each_matrix_alone():
    """Matrices of one shape are updated together; each gets what it would get by itself."""
    starts = [torch.randn(6, 4, dtype=torch.float64) for _ in range(5)]

    def train(places: list[int]) -> list[Tensor]:
        weights = [nn.Parameter(starts[place].clone()) for place in places]
        optimizer = M3(weights, slow_period=2)
        generators = [torch.Generator().manual_seed(place) for place in places]
        for _ in range(7):
            for weight, generator in zip(weights, generators, strict=True):
                weight.grad = torch.randn(6, 4, generator=generator, dtype=torch.float64)
            optimizer.step()
        return [weight.detach() for weight in weights]

    together = train([0, 1, 2, 3, 4])
    for place, weight in enumerate(together):
        torch.testing.assert_close(weight, train([place])[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (16, 16)])
def test_without_slow_memory_and_second_moment_it_is_muon(shape, nesterov, adjust_lr):
    """To 2e-2 of the way gone: torch iterates in bfloat16."""
    start = torch.randn(shape)
    ours, torchs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    m3_optimizer = M3([ours], lr=0.01, alpha=0.0, second_moment=False, nesterov=nesterov, adjust_lr=adjust_lr)
    muon = torch.optim.Muon([torchs], lr=0.01, nesterov=nesterov, adjust_lr_fn=adjust_lr)
    for _ in range(20):
        ours.grad = torch.randn(shape)
        torchs.grad = ours.grad.clone()
        m3_optimizer.step()
        muon.step()
    moved = torchs.detach() - start
    assert float((ours - torchs).detach().norm()) < 2e-2 * float(moved.norm())
    assert set(m3_optimizer.state[ours]) == {"step", "fast_momentum"}


@pytest.mark.parametrize("accumulate", ["ema", "paper"])
def test_the_slow_direction_changes_where_a_period_begins_and_only_there(accumulate, monkeypatch):
    """NL Alg. 1: it is 0 in the first period; the iteration on the slow memory runs once per period."""
    calls: list[int] = []
    original = m3.orthogonalize

    def counting(*arguments):
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(m3, "orthogonalize", counting)
    weight = nn.Parameter(torch.randn(4, 6))
    optimizer = M3([weight], slow_period=5, accumulate=accumulate)
    directions = []
    for _ in range(17):
        weight.grad = torch.randn(4, 6)
        optimizer.step()
        directions.append(optimizer.state[weight]["slow_direction"].clone())
    assert not any(direction.any() for direction in directions[:5])
    changed = [step for step in range(2, 18) if not torch.equal(directions[step - 1], directions[step - 2])]
    assert changed == [6, 11, 16]
    assert len(calls) == 17 + 3


def test_the_printed_slow_memory_has_every_gradient_of_finished_periods_once():
    """``M2 = β3 Σ g`` when a period begins: a gradient at a boundary is not counted twice."""
    weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = M3([weight], slow_period=4, accumulate="paper", betas=BETAS)
    gradients = [torch.randn(3, 4, dtype=torch.float64) for _ in range(9)]
    for step, gradient in enumerate(gradients, 1):
        weight.grad = gradient.clone()
        optimizer.step()
        if step > 1 and (step - 1) % 4 == 0:
            finished = torch.stack(gradients[: step - 1]).sum(0)
            expected = quintic(BETAS[2] * finished)
            torch.testing.assert_close(optimizer.state[weight]["slow_direction"], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("accumulate", ["ema", "paper"])
@pytest.mark.parametrize("stop", range(1, 9))
def test_resumes_to_the_bit_at_every_step_of_a_slow_period(stop, accumulate, tmp_path):
    gradients = [[torch.randn(5, 3), torch.randn(2, 4, 4), torch.randn(7)] for _ in range(14)]

    def make() -> tuple[list[nn.Parameter], M3]:
        torch.manual_seed(1)
        weights = [nn.Parameter(torch.randn(x.shape)) for x in gradients[0]]
        return weights, M3(weights, slow_period=4, accumulate=accumulate)

    def train(weights: list[nn.Parameter], optimizer: M3, steps: range) -> None:
        for step in steps:
            for weight, gradient in zip(weights, gradients[step], strict=True):
                weight.grad = gradient.clone()
            optimizer.step()

    weights, optimizer = make()
    train(weights, optimizer, range(stop))
    torch.save([copy.deepcopy(weights), optimizer.state_dict()], tmp_path / "state.pt")
    train(weights, optimizer, range(stop, 14))
    again, resumed = make()
    saved, state = torch.load(tmp_path / "state.pt", weights_only=True)
    with torch.no_grad():
        for weight, value in zip(again, saved, strict=True):
            weight.copy_(value)
    resumed.load_state_dict(state)
    train(again, resumed, range(stop, 14))
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_the_step_has_the_size_that_adjust_lr_says():
    """`match_rms_adamw`: a root mean square of about 0.2 lr, whatever the gradient's size and the second moment."""
    for scale, second_moment in itertools.product((1e-4, 1.0, 1e4), (False, True)):
        weight = nn.Parameter(torch.zeros(40, 30))
        optimizer = M3([weight], lr=0.1, alpha=0.0, second_moment=second_moment, weight_decay=0.0)
        weight.grad = scale * torch.randn(40, 30)
        optimizer.step()
        root_mean_square = float(weight.detach().square().mean().sqrt())
        assert 0.65 < root_mean_square / (0.1 * 0.2) < 1.25


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"betas": (0.9, 0.95)}, "3 numbers"),
        ({"betas": (0.9, 0.95, 1.0)}, r"\[0, 1\)"),
        ({"betas": 0.9}, "betas is 0.9; it must be 3 numbers"),
        ({"lr": "0.1"}, "lr is '0.1'"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": None}, "alpha is None"),
        ({"slow_period": 0}, "slow_period is 0"),
        ({"slow_period": 2.5}, "slow_period is 2.5"),
        ({"ns_steps": 0}, "ns_steps is 0"),
        ({"ns_steps": 100}, "ns_steps is 100"),
        ({"ns_coefficients": "cubic"}, "quintic, polar_express"),
        ({"ns_coefficients": [(1.0, 2.0)]}, "triples"),
        ({"ns_coefficients": (3.4, -4.8, 2.0)}, "triples"),
        ({"accumulate": "sum"}, "ema, paper"),
        ({"mix": "between"}, "mix is 'between'; it must be one of after, before"),
        ({"mix": "before", "accumulate": "paper"}, "mix is \"before\" and accumulate is 'paper'"),
        ({"timescales": ()}, r"timescales is \(\); it must be a tuple of numbers of at least 1"),
        ({"timescales": 100.0}, "timescales is 100.0"),
        ({"timescales": (100.0, 0.5)}, "timescales is"),
        ({"timescales": ("100",)}, "timescales is"),
        ({"timescales": (float("nan"),)}, "timescales is"),
        ({"slow_from": 0}, "slow_from is 0; it must be a whole number of at least 1"),
        ({"slow_from": 2.5}, "slow_from is 2.5"),
        ({"adjust_lr": "spectral"}, "match_rms_adamw"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"damping": -0.1}, "damping is -0.1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"adamw": {"betas": (0.9, 0.9)}}, "adamw has"),
        ({"adamw": {"adamw_betas": (0.9, 1.5)}}, "adamw_betas"),
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_value(setting, message):
    with pytest.raises(ValueError, match=message):
        M3([nn.Parameter(torch.zeros(2, 2))], **setting)


def test_given_triples_are_used_one_per_iteration():
    """The cubic iteration 1.5 s - 0.5 s³ as triples goes to the exact polar factor."""
    weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    gradient = torch.randn(4, 4, dtype=torch.float64)
    optimizer = M3([weight], lr=1.0, alpha=0.0, second_moment=False, adjust_lr=None, weight_decay=0.0, ns_steps=60,
                   ns_coefficients=[(1.5, -0.5, 0.0)])  # fmt: skip
    weight.grad = gradient
    optimizer.step()
    u, _, v = torch.linalg.svd(gradient)
    torch.testing.assert_close(-weight.detach(), u @ v, rtol=1e-9, atol=1e-9)


def test_factors_of_the_learning_rate():
    assert orthogonal.lr_factor("match_rms_adamw", (100, 25)) == 0.2 * 10
    assert orthogonal.lr_factor("original", (100, 25)) == 2.0
    assert orthogonal.lr_factor("original", (25, 100)) == 1.0
    assert orthogonal.lr_factor(None, (100, 25)) == 1.0


MIXED = {"mix": "before", "timescales": (3.0, 7.5), "alpha": 0.6, "slow_from": 4}


def mixed_before(weight: Tensor, gradients: list[Tensor], nesterov: bool, second_moment: bool) -> Tensor:
    """``NS(M1 + α mean_k A_k)`` step by step; each average is a sum over all gradients so far."""
    b1, b2, _ = BETAS
    for t in range(1, len(gradients) + 1):
        past = gradients[:t]

        def average(keep: float, past: list[Tensor] = past) -> Tensor:
            return torch.stack([(1 - keep) * keep**age * g for age, g in enumerate(reversed(past))]).sum(0)

        momentum = b1 * average(b1) + (1 - b1) * past[-1] if nesterov else average(b1)
        if t >= MIXED["slow_from"]:
            slow = [average(1 - 1 / timescale) for timescale in MIXED["timescales"]]
            momentum = momentum + MIXED["alpha"] * (slow[0] + slow[1]) / 2
        update = quintic(momentum)
        if second_moment:
            moment = torch.stack([(1 - b2) * b2**age * g * g for age, g in enumerate(reversed(past))]).sum(0)
            corrected = moment / (1 - b2**t)
            divided = update / (corrected.sqrt() + DAMPING * corrected.mean().sqrt() + EPS)
            update = divided * update.norm() / divided.norm()
        weight = weight * (1 - LR * DECAY) - LR * 0.2 * max(weight.shape) ** 0.5 * update
    return weight


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("second_moment", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_averages_mixed_before_newton_schulz_equal_their_sums(nesterov, second_moment, shape):
    start = torch.randn(shape, dtype=torch.float64)
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(9)]
    weight = nn.Parameter(start.clone())
    form = {"nesterov": nesterov, "second_moment": second_moment, **MIXED}
    optimizer = M3([weight], lr=LR, betas=BETAS, weight_decay=DECAY, eps=EPS, damping=DAMPING, **form)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    flat = [x if len(shape) == 3 else x.reshape(1, shape[0], -1) for x in (weight.detach(), start, *gradients)]
    for result, first, *of_place in zip(*flat, strict=True):
        expected = mixed_before(first, of_place, nesterov, second_moment)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)


def test_before_its_first_step_the_slow_part_learns_and_does_not_act():
    for mix in ("before", "after"):
        weights = [nn.Parameter(torch.ones(4, 6)) for _ in range(3)]
        settings = {"mix": mix, "slow_period": 2, "timescales": (5.0,)}
        late, never, always = (
            M3([weight], alpha=alpha, slow_from=first, **settings)
            for weight, alpha, first in zip(weights, (0.5, 0.0, 0.5), (8, 1, 1), strict=True)
        )
        for weight, optimizer in zip(weights, (late, never, always), strict=True):
            steps_of(weight, optimizer, range(7))
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
        name = "slow_average_0" if mix == "before" else "slow_momentum"
        assert torch.equal(late.state[weights[0]][name], always.state[weights[2]][name])
        for weight, optimizer in zip(weights[:2], (late, never), strict=True):
            steps_of(weight, optimizer, range(7, 8))
        assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("stop", range(1, 6))
def test_mixed_averages_resume_to_the_bit_around_the_first_step_of_the_slow_part(stop, tmp_path):
    weight, other = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    optimizer, resumed = M3([weight], **MIXED), M3([other], **MIXED)
    steps_of(weight, optimizer, range(stop))
    torch.save([weight, optimizer.state_dict()], tmp_path / "state.pt")
    saved, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.data.copy_(saved)
    resumed.load_state_dict(state)
    for w, o in ((weight, optimizer), (other, resumed)):
        steps_of(w, o, range(stop, 9))
    assert torch.equal(weight, other)


def test_settings_of_the_slow_part_may_change_between_steps():
    """Averages begin empty where they are first asked for; a state with unused ones is loaded."""
    weight, other = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    optimizer = M3([weight], **MIXED)
    steps_of(weight, optimizer, range(3))
    for changes in ({"timescales": (3.0, 7.5, 50.0)}, {"timescales": (4.0,)}, {"mix": "after"}, {"alpha": 0.0}):
        optimizer.param_groups[0] |= changes
        steps_of(weight, optimizer, range(3, 6))
        resumed = M3([other])
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.data.copy_(weight)
        for w, o in ((weight, optimizer), (other, resumed)):
            steps_of(w, o, range(6, 8))
        assert torch.equal(weight, other)
    assert {"slow_average_2", "slow_direction"} <= set(resumed.state[other])


def steps_of(weight: nn.Parameter, optimizer: M3, steps: range) -> None:
    for step in steps:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).to(weight)
        optimizer.step()


def test_the_slow_memory_begins_empty_when_alpha_is_raised_and_stays_when_it_is_0_again():
    weight, other = (nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)) for _ in range(2))
    optimizer, whole = (M3([w], alpha=alpha, slow_period=3) for w, alpha in ((weight, 0.0), (other, 0.4)))
    steps_of(weight, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["alpha"] = 0.4
    for name in ("slow_momentum", "slow_direction"):
        state["state"][0][name] = torch.zeros(4, 6, dtype=torch.float64)
    whole.load_state_dict(state)
    other.data.copy_(weight)
    optimizer.param_groups[0]["alpha"] = 0.4
    for w, o in ((weight, optimizer), (other, whole)):
        steps_of(w, o, range(2, 8))
    assert torch.equal(weight, other)

    optimizer.param_groups[0]["alpha"] = 0.0
    again = M3([other])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for w, o in ((weight, optimizer), (other, again)):
        steps_of(w, o, range(8, 12))
    assert torch.equal(weight, other) and "slow_momentum" in again.state[other]


def test_a_second_moment_that_comes_late_is_refused():
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer = M3([weight], second_moment=False)
    steps_of(weight, optimizer, range(2))
    optimizer.param_groups[0]["second_moment"] = True
    with pytest.raises(ValueError, match=r"no state 'second_moment': a setting .*state\[parameter\].clear\(\)"):
        steps_of(weight, optimizer, range(1))
    optimizer.state[weight].clear()
    steps_of(weight, optimizer, range(1))


def test_damping_keeps_the_step_from_elements_without_gradients():
    """The others have gradients of size 1: without damping they get next to nothing. It is relative to their size."""
    gradient = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    gradient[0, 0] = 0.0
    shares = []
    for damping, size in ((0.0, 1.0), (0.1, 1.0), (0.1, 1e-4)):
        weight = nn.Parameter(torch.zeros(16, 16))
        optimizer = M3([weight], damping=damping)
        weight.grad = gradient * size
        optimizer.step()
        shares.append(float(weight[0, 0].detach() / weight.detach().norm()) ** 2)
    assert shares[0] > 0.99 and shares[1] < 0.05
    assert abs(shares[2] - shares[1]) < 0.01
