"""Levels of the optimizer: equal to accumulating and stepping by hand, resumable in the middle of a period."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from nestlearn.optim import InputProjection, MultiTimescale, NestedTransfer, OptimizerWrapper, timescale_groups

BASES = [
    partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    partial(torch.optim.Adam, lr=1e-2),
    partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
]


def three_layers() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def loss_at(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return (model(x) - x[:, :2] * step).square().mean()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_accumulating_and_stepping_by_hand(base, reduction):
    """One optimizer per level, gradients of whole periods by autograd at the weights as they then were."""
    periods = [1, 3, 4]
    model, twin = three_layers(), three_layers()
    groups = timescale_groups(model, zip((model[0], model[2], model[4]), periods, strict=True))
    optimizer = MultiTimescale(base(groups), reduction=reduction)
    levels = [list(twin[place].parameters()) for place in (0, 2, 4)]
    singles = [base(level) for level in levels]
    sums = [[torch.zeros_like(p) for p in level] for level in levels]
    for step in range(1, 25):
        optimizer.zero_grad()
        loss_at(model, step).backward()
        optimizer.step()
        gradients = torch.autograd.grad(loss_at(twin, step), [p for level in levels for p in level])
        for total, gradient in zip([t for level in sums for t in level], gradients, strict=True):
            total += gradient
        for level, single, totals, period in zip(levels, singles, sums, periods, strict=True):
            if step % period == 0:
                for p, total in zip(level, totals, strict=True):
                    p.grad = total / period if reduction == "mean" else total.clone()
                    total.zero_()
                single.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_the_sum_of_plain_descent_is_the_printed_formula():
    """NL Eq. 71: after C steps the weights moved by minus the sum of η times the gradients at the period's start."""
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = MultiTimescale(torch.optim.SGD([weight], lr=0.1), [3], reduction="sum")
    for x in (1.0, 2.0, 4.0):
        optimizer.zero_grad()
        (0.5 * (weight * x - 1.0) ** 2).sum().backward()
        assert float(weight.detach()) == 2.0
        optimizer.step()
    expected = 2.0 - 0.1 * sum((2.0 * x - 1.0) * x for x in (1.0, 2.0, 4.0))
    assert float(weight.detach()) == pytest.approx(expected, rel=1e-14)


def test_period_one_is_the_base():
    model, twin = three_layers(), three_layers()
    wrapped = MultiTimescale(torch.optim.Adam(model.parameters(), lr=1e-2))
    plain = torch.optim.Adam(twin.parameters(), lr=1e-2)
    for step in range(5):
        for net, optimizer in ((model, wrapped), (twin, plain)):
            optimizer.zero_grad()
            loss_at(net, step).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def wrapped(model: nn.Sequential) -> OptimizerWrapper:
    groups = timescale_groups(model, [(model[0], 4), (model[2], 3)])
    projection = InputProjection(MultiTimescale(torch.optim.Adam(groups, lr=1e-2)), model, alpha=5.0, period=5)
    return NestedTransfer(projection, rate=0.5, period=7)


@pytest.mark.parametrize("stop", range(1, 9))
def test_resumes_bit_exactly_in_the_middle_of_every_period(stop, tmp_path):
    """Levels, projection and transfer stopped after any step, their state through a file that is read as weights."""

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss_at(model, step).backward()
            optimizer.step()

    model = three_layers()
    optimizer = wrapped(model)
    train(model, optimizer, range(stop))
    file = tmp_path / "state.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(stop, 24))
    again = three_layers()
    resumed = wrapped(again)
    loaded = torch.load(file, weights_only=True)
    again.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    train(again, resumed, range(stop, 24))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_scheduler_reaches_the_base():
    model = three_layers()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = MultiTimescale(base, [2])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    assert base.param_groups[0]["lr"] == 0.5
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is base.param_groups


@pytest.mark.parametrize(("base", "name"), [(BASES[0], "momentum"), (BASES[1], "betas")])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda base, model: MultiTimescale(base, [2]),
        lambda base, model: InputProjection(base, model),
        lambda base, model: NestedTransfer(base, period=2),
        lambda base, model: NestedTransfer(InputProjection(MultiTimescale(base), model), period=2),
    ],
)
def test_a_scheduler_of_momentum_works_on_every_wrapper(wrap, base, name):
    """One cycle over the wrapper sets the base's groups as one cycle over the base does."""
    model, seen = three_layers(), []
    for wrapper in (wrap, lambda base, model: base):
        inner = base(model.parameters())
        optimizer = wrapper(inner, model)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
        values = []
        for _ in range(5):
            optimizer.step()
            schedule.step()
            values.append((inner.param_groups[0]["lr"], inner.param_groups[0][name]))
        seen.append(values)
    assert seen[0] == seen[1] and len(set(seen[0])) == 5


def test_a_copy_is_refused_and_its_replacement_works():
    model = three_layers()
    optimizer = wrapped(model)
    for part in (optimizer, optimizer.base):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled: .*optimizer\.state_dict\(\)"):
            copy.deepcopy(part)
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            pickle.dumps(part)
    other = copy.deepcopy(model)
    twin = wrapped(other)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(9):
        for net, each in ((model, optimizer), (other, twin)):
            each.zero_grad()
            loss_at(net, step).backward()
            each.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_gradients_are_given_back_and_added_groups_step():
    model, more = three_layers(), nn.Linear(2, 1)
    optimizer = MultiTimescale(torch.optim.SGD(model.parameters(), lr=0.1), [3])
    optimizer.add_param_group({"params": more.parameters(), "lr": 0.1})
    before = copy.deepcopy(more.weight)
    loss = more(model(torch.ones(1, 4, dtype=torch.float64)).float()).sum()
    loss.backward()
    gradient = model[0].weight.grad
    optimizer.step()
    assert model[0].weight.grad is gradient
    assert not torch.equal(more.weight, before)


def test_gradients_are_given_back_where_the_base_raises():
    weight = nn.Parameter(torch.zeros(2))
    base = torch.optim.SGD([weight], lr=0.1)
    optimizer = MultiTimescale(base, [3])
    weight.grad = gradient = torch.ones(2)

    def fail(*_: object) -> None:
        raise RuntimeError("no step")

    base.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    assert weight.grad is gradient


def test_the_mean_is_of_the_gradients_that_there_were():
    """A group added at step 3 of 4 has gradients of steps 3 and 4; one that a step did not reach has one fewer."""
    first, late = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    optimizer = MultiTimescale(torch.optim.SGD([first], lr=1.0), [4])
    for step in range(1, 9):
        if step == 3:
            optimizer.add_param_group({"params": [late], "update_period": 4})
        first.grad = None if step in (5, 6) else torch.full_like(first, float(step))
        late.grad = torch.full_like(late, float(step))
        if step == 7:  # in the middle of a period, with what it has collected
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        if step == 4:
            assert (float(first.detach()), float(late.detach())) == (-2.5, -3.5)
    assert (float(first.detach()), float(late.detach())) == (-2.5 - 7.5, -3.5 - 6.5)


def test_bad_settings_name_the_cause():
    model = three_layers()
    adam = partial(torch.optim.Adam, lr=1e-3)
    with pytest.raises(ValueError, match=r"period of group 0 is 0; .*at least 1"):
        MultiTimescale(adam(model.parameters()), [0])
    with pytest.raises(ValueError, match="2 periods for 1 parameter groups"):
        MultiTimescale(adam(model.parameters()), [1, 2])
    with pytest.raises(ValueError, match="reduction is 'max'"):
        MultiTimescale(adam(model.parameters()), reduction="max")
    with pytest.raises(TypeError, match="base is a list"):
        MultiTimescale(list(model.parameters()))
    with pytest.raises(ValueError, match="Level 1 of period 2 has 2 trainable parameters, 2 of them in an earlier"):
        timescale_groups(model, [(model[0], 1), (model[0], 2)])
    with pytest.raises(ValueError, match="2 outside the model"):
        timescale_groups(model, [(nn.Linear(1, 1), 2)])
    for period in (0, 2.5, True):
        added = {"params": nn.Linear(1, 1).parameters(), "update_period": period}
        with pytest.raises(ValueError, match=rf"update_period of the added group is {period}"):
            MultiTimescale(adam(model.parameters())).add_param_group(added)
    optimizer = MultiTimescale(adam(model.parameters()))
    optimizer.base.add_param_group({"params": nn.Linear(1, 1).parameters()})
    optimizer.step()
    state = adam(model.parameters()).state_dict()
    with pytest.raises(ValueError, match="of no wrapper .* not of MultiTimescale"):
        MultiTimescale(adam(model.parameters())).load_state_dict(state)
    with pytest.raises(ValueError, match=r"rate is 1\.5"):
        NestedTransfer(adam(model.parameters()), rate=1.5, period=2)
    with pytest.raises(ValueError, match=r"momentum is 1\.0; it must be in \[0, 1\)"):
        NestedTransfer(adam(model.parameters()), period=2, momentum=1.0)
    outer = NestedTransfer(adam(model.parameters()), period=2, momentum=0.5)
    with pytest.raises(ValueError, match=r"saved with no momentum, and momentum is 0\.5"):
        outer.load_state_dict(NestedTransfer(adam(model.parameters()), period=2).state_dict())
    with pytest.raises(ValueError, match=r"saved with a momentum, and momentum is 0\.0"):
        NestedTransfer(adam(model.parameters()), period=2).load_state_dict(outer.state_dict())


def test_weights_loaded_after_the_wrapper_was_made_are_where_it_starts():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = NestedTransfer(torch.optim.SGD([weight], lr=1.0), rate=0.5, period=1)
    with torch.no_grad():
        weight.fill_(10.0)
    weight.grad = torch.full((1,), -2.0)
    optimizer.step()
    assert float(weight.detach()) == 11.0


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_transfer_equals_its_formula(momentum):
    model, twin = three_layers(), three_layers()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = NestedTransfer(base, rate=0.3, period=3, momentum=momentum)
    slow = [p.detach().clone() for p in twin.parameters()]
    velocity = [torch.zeros_like(p) for p in slow]
    for step in range(1, 10):
        optimizer.zero_grad()
        loss_at(model, step).backward()
        optimizer.step()
        gradients = torch.autograd.grad(loss_at(twin, step), list(twin.parameters()))
        with torch.no_grad():
            for place, (p, gradient) in enumerate(zip(twin.parameters(), gradients, strict=True)):
                p -= 0.1 * gradient
                if step % 3 == 0:
                    change = p - slow[place]
                    velocity[place] = momentum * velocity[place] + change
                    slow[place] = slow[place] + 0.3 * (change + momentum * velocity[place])
                    p.copy_(slow[place])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_the_outer_step_is_torchs_nesterov_on_the_changes_of_whole_periods():
    """`torch.optim.SGD` with momentum and Nesterov on the negative change, as DiLoCo's outer optimizer."""
    model, twin = three_layers(), three_layers()
    wrapped = NestedTransfer(torch.optim.SGD(model.parameters(), lr=0.1), rate=0.7, period=2, momentum=0.9)
    slow = [torch.nn.Parameter(p.detach().clone()) for p in twin.parameters()]
    inner, outer = (
        torch.optim.SGD(twin.parameters(), lr=0.1),
        torch.optim.SGD(slow, lr=0.7, momentum=0.9, nesterov=True),
    )
    for step in range(1, 9):
        for net, optimizer in ((model, wrapped), (twin, inner)):
            optimizer.zero_grad()
            loss_at(net, step).backward()
            optimizer.step()
        if step % 2 == 0:
            for p, start in zip(twin.parameters(), slow, strict=True):
                start.grad = (start - p).detach()
            outer.step()
            for p, start in zip(twin.parameters(), slow, strict=True):
                p.data.copy_(start.detach())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stop", range(1, 7))
def test_an_outer_step_resumes_bit_exactly_in_the_middle_of_a_period(stop, tmp_path):
    def make(model):
        return NestedTransfer(torch.optim.Adam(model.parameters(), lr=0.01), rate=0.7, period=3, momentum=0.5)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss_at(model, step).backward()
            optimizer.step()

    model, again = three_layers(), three_layers()
    optimizer, resumed = make(model), make(again)
    train(model, optimizer, range(stop))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for net, its in ((model, optimizer), (again, resumed)):
        train(net, its, range(stop, 10))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
