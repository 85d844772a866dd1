"""What every optimizer of the package keeps to. A new one is one line in `OPTIMIZERS` and inherits every test below.

Their formulas are tested in tests/optim, two processes in tests/optim/test_distributed.py.
"""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from nestlearn.optim import (
    DGD,
    M3,
    AssociativeMomentum,
    DeepMomentum,
    DeltaMomentum,
    DeltaRule,
    Diagonal,
    GeneratedValues,
    HigherOrderMomentum,
    InputProjection,
    LeastSquares,
    MatrixOptimizer,
    MultiTimescale,
    NestedTransfer,
    NewtonSchulz,
    OrthogonalDescent,
    Polynomial,
    Sign,
    Whitening,
)

Make = Callable[..., Optimizer]


class Entry(NamedTuple):
    """An optimizer as ``make(model, params, **settings)``, and what it cannot do by its nature.

    Attributes:
        copyable: `copy.deepcopy` of model and optimizer together works.
        ties: a weight that two layers share can be trained.
        by_hand: gradients that no backward pass made are enough for a step.
        unscale: steps may follow `GradScaler.unscale_`.
        own_state: no parameter's update depends on the gradients of others.
        lr: with which it converges on the test functions.
        rosenbrock_lr: that on Rosenbrock's, for a rule whose steps grow with the gradient; half of `lr` by default.
        remains: the part of the loss that may remain there.
    """

    make: Make
    copyable: bool = True
    ties: bool = True
    by_hand: bool = True
    unscale: bool = True
    own_state: bool = True
    lr: float = 1.0
    rosenbrock_lr: float | None = None
    remains: float = 0.02


def of(optimizer: Callable[..., Optimizer], **settings: Any) -> Make:
    """An optimizer that needs to know the parameters only."""
    return lambda model, params, **more: optimizer(params, **{**settings, **more})


def timescales(model: nn.Module, params: Any, **settings: Any) -> Optimizer:
    base = M3(params, slow_period=2, **settings)
    return MultiTimescale(base, [1 + place % 3 for place, _ in enumerate(base.param_groups, 1)])


def timescales_of_dgd(model: nn.Module, params: Any, **settings: Any) -> Optimizer:
    base = DGD(params, model, **{"erase": 0.0, **settings})
    return MultiTimescale(base, [2] * len(base.param_groups))  # a bias needs the period of its weight


def transfer(model: nn.Module, params: Any, **settings: Any) -> Optimizer:
    return NestedTransfer(M3(params, slow_period=3, **settings), rate=0.5, period=4)


def outer_nesterov(model: nn.Module, params: Any, **settings: Any) -> Optimizer:
    return NestedTransfer(M3(params, alpha=0.0, **settings), rate=0.7, period=4, momentum=0.5)


def inverse(model: nn.Module, params: Any, **settings: Any) -> Optimizer:
    return DGD(params, model, **{"precondition": "inverse", "refresh": 3, **settings})


def timescales_of_inverse(model: nn.Module, params: Any, **settings: Any) -> Optimizer:
    base = inverse(model, params, **{"refresh": 2, **settings})
    return MultiTimescale(base, [2] * len(base.param_groups))


def projection(model: nn.Module, params: Any, **settings: Any) -> Optimizer:
    return InputProjection(M3(params, slow_period=3, **settings), model, alpha=100.0, period=4)


def dgd(form: str) -> Make:
    return lambda model, params, **settings: DGD(params, model, **{"form": form, "erase": 0.0, **settings})


OPTIMIZERS: dict[str, Entry] = {
    "m3": Entry(of(M3, slow_period=3)),
    # It forgets no gradient, so it swings around a minimum and hardly comes to rest.
    "m3-paper": Entry(of(M3, alpha=0.5, slow_period=3, accumulate="paper"), lr=0.1, remains=0.6),
    "m3-polar-express": Entry(of(M3, slow_period=4, ns_coefficients="polar_express", adjust_lr="original"), lr=0.3),
    "m3-mixed-before": Entry(of(M3, alpha=1.0, mix="before", timescales=(4.0, 16.0), slow_from=3)),
    "m3-as-muon": Entry(of(M3, alpha=0.0, second_moment=False)),
    "momentum": Entry(of(AssociativeMomentum), lr=0.3, rosenbrock_lr=1e-3),
    "delta-momentum": Entry(of(DeltaMomentum), lr=2.0, rosenbrock_lr=2e-3),
    "higher-order-momentum": Entry(of(HigherOrderMomentum), lr=0.3, rosenbrock_lr=5e-4),
    "deep-momentum": Entry(of(DeepMomentum), lr=1.0, own_state=False, rosenbrock_lr=1e-3),
    "whitened-muon": Entry(of(AssociativeMomentum, preconditioner=Whitening(period=3), output=NewtonSchulz()), lr=0.3),
    "all-of-it": Entry(
        of(AssociativeMomentum, delta=DeltaRule(0.5), features=Polynomial(), preconditioner=Diagonal(), output=Sign()),
        lr=0.1,
    ),
    "least-squares-momentum": Entry(
        of(AssociativeMomentum, preconditioner=LeastSquares(alpha=1e6, period=3)), lr=0.3, rosenbrock_lr=1e-3
    ),
    # Where gradients turn, its answer is small and cuts what it learns: it comes to rest later.
    "generalized-momentum": Entry(
        of(AssociativeMomentum, values=GeneratedValues()), lr=0.1, rosenbrock_lr=1e-3, remains=0.05
    ),
    "orthogonal-descent": Entry(of(AssociativeMomentum, output=OrthogonalDescent()), lr=0.3),
    "multi-timescale": Entry(timescales, copyable=False),
    "nested-transfer": Entry(transfer, copyable=False),
    "outer-nesterov": Entry(outer_nesterov, copyable=False),
    "input-projection": Entry(projection, copyable=False),
    # Half as many steps.
    "multi-timescale-dgd": Entry(
        timescales_of_dgd, copyable=False, ties=False, by_hand=False, lr=2.0, rosenbrock_lr=2e-3
    ),
    "dgd": Entry(dgd("batch"), copyable=False, ties=False, by_hand=False, rosenbrock_lr=2e-3),
    "dgd-inverse": Entry(inverse, copyable=False, ties=False, by_hand=False, lr=0.3),
    "multi-timescale-dgd-inverse": Entry(timescales_of_inverse, copyable=False, ties=False, by_hand=False, lr=0.3),
    "dgd-sample": Entry(dgd("sample"), copyable=False, ties=False, by_hand=False, unscale=False, rosenbrock_lr=2e-3),
}

pytestmark = pytest.mark.parametrize("entry", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Mixed(nn.Module):
    """A parameter of every kind: a kernel, a stack of matrices, matrices, vectors, a scalar and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3)
        self.stack = nn.Parameter(torch.randn(3, 4, 5) / 3)
        self.first = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 6, bias=False)
        self.third = nn.Linear(6, 6, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x).flatten(2).transpose(0, 1)
        x = torch.tanh(torch.bmm(x, self.stack)).mean(0)
        x = self.norm(self.first(x))
        return self.scale * self.third(torch.tanh(self.second(x))) + self.empty.sum()


def mixed(dtype: torch.dtype = torch.float32) -> Mixed:
    torch.manual_seed(0)
    return Mixed().to(dtype)


def batch(step: int, rows: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.sin(3 * x.flatten(1)[:, :6]).to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    x, y = batch(step, dtype=dtype)
    return F.mse_loss(model(x), y)


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def innermost(optimizer: Optimizer) -> Optimizer:
    while not isinstance(optimizer, MatrixOptimizer):
        optimizer = optimizer.base  # pyright: ignore[reportAttributeAccessIssue]
    return optimizer


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_two_runs_are_equal_to_the_bit(entry: Entry):
    runs = []
    for _ in range(2):
        model = mixed()
        train(model, entry.make(model, model.parameters()), range(9))
        runs.append(model)
    assert same(*runs)
    assert not same(runs[0], mixed())


@pytest.mark.parametrize(("dtype", "stops"), [(torch.float32, range(1, 7)), (torch.bfloat16, (2, 5))])
def test_resumes_to_the_bit_in_the_middle_of_a_period(entry: Entry, dtype: torch.dtype, stops: Sequence[int]):
    """Of periods of up to 4 steps; float64 is in `test_float64_stays_float64`."""
    model = mixed(dtype)
    optimizer, saved = entry.make(model, model.named_parameters()), {}
    for step in range(10):
        train(model, optimizer, [step])
        if step + 1 in stops:
            saved[step + 1] = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    for stop, state in saved.items():
        again = mixed(dtype)
        resumed = entry.make(again, again.named_parameters())
        train(again, resumed, [99])  # what it was before does not matter
        again.load_state_dict(state["model"])
        resumed.load_state_dict(state["optimizer"])
        train(again, resumed, range(stop, 10))
        assert same(model, again), f"stopped after step {stop}"


def test_a_copy_of_model_and_optimizer_goes_on_as_they_do(entry: Entry):
    model = mixed()
    optimizer = entry.make(model, model.parameters())
    train(model, optimizer, range(4))
    if not entry.copyable:
        with pytest.raises(TypeError, match="load_state_dict"):
            copy.deepcopy(optimizer)
        return
    other, other_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(4, 9))
    assert not same(model, other)
    train(other, other_optimizer, range(4, 9))
    assert same(model, other)


def test_accumulated_gradients_are_one_large_batch(entry: Entry):
    models = [mixed(torch.float64), mixed(torch.float64)]
    for model, parts in zip(models, (1, 4), strict=True):
        optimizer = entry.make(model, model.parameters(), lr=1e-2)
        for step in range(7):
            optimizer.zero_grad()
            x, y = batch(step, dtype=torch.float64)
            for own_x, own_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.mse_loss(model(own_x), own_y) / parts).backward()
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_sparse_gradient_is_refused_before_anything_changes(entry: Entry):
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3))
    optimizer = entry.make(model, model.parameters())
    before = copy.deepcopy(model)
    for layer in (0, 2):
        model[layer](model[1](torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        for _ in range(3):  # at the latest where a period ends
            optimizer.step()
    assert same(before, model)
    assert not innermost(optimizer).state


def test_without_a_gradient_a_parameter_and_its_state_stay(entry: Entry):
    model = mixed()
    optimizer = entry.make(model, model.parameters())
    for step in range(12):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if step % 3 == 2:
            model.second.weight.grad = model.scale.grad = None
            paused = (model.second.weight, model.scale)
            kept = [copy.deepcopy((p.detach(), dict(innermost(optimizer).state[p]))) for p in paused]
        model.first.weight.grad = model.first.bias.grad = None
        optimizer.step()
        # Sums of the steps before, and slow weights, are due at their own time.
        if step % 3 == 2 and not isinstance(optimizer, (NestedTransfer, MultiTimescale)):
            for p, (value, state) in zip(paused, kept, strict=True):
                assert torch.equal(p, value)
                own = state if entry.own_state else {"step": state["step"]}
                assert all(torch.equal(innermost(optimizer).state[p][name], x) for name, x in own.items())
    assert torch.equal(model.first.weight, mixed().first.weight)
    assert not innermost(optimizer).state.get(model.first.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_spoils_its_own_parameter_only(entry: Entry, value: float):
    """`second` and `third` are updated in one batch."""
    if not entry.own_state:
        pytest.skip("its parameters learn from each other's gradients")
    if not entry.by_hand:
        pytest.skip("it needs the inputs of the layers; see its own tests")
    clean, spoiled = mixed(), mixed()
    for model in (clean, spoiled):
        optimizer = entry.make(model, model.parameters())
        train(model, optimizer, range(3))
        for step in range(3, 6):
            optimizer.zero_grad()
            # Gradients at fixed weights: what is spoiled would reach all others through the model itself.
            loss_of(mixed(), step)
            for place, parameter in enumerate(model.parameters()):
                parameter.grad = torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(31 * step + place)
                )
            if model is spoiled and step == 3:
                model.second.weight.grad[0, 0] = value
                model.norm.weight.grad[0] = value
            optimizer.step()
    assert not spoiled.second.weight.isfinite().all()
    assert not spoiled.norm.weight.isfinite().all()
    for (name, a), b in zip(clean.named_parameters(), spoiled.parameters(), strict=True):
        if name not in ("second.weight", "norm.weight"):
            assert torch.equal(a, b), name


def test_a_closure_is_called_once_with_gradients(entry: Entry):
    model, twin = mixed(), mixed()
    optimizer, plain = (entry.make(m, m.parameters()) for m in (model, twin))
    calls = []

    def closure(step: int) -> Tensor:
        assert torch.is_grad_enabled()
        calls.append(step)
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    for step in range(4):
        expected = loss_of(twin, step)
        assert torch.equal(optimizer.step(partial(closure, step)), expected)
        train(twin, plain, [step])
    assert calls == [0, 1, 2, 3]
    assert same(model, twin)
    assert plain.step() is None


class Tied(nn.Module):
    """One weight, used by two layers or twice by one."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False) if tied else self.first
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.flatten(1)[:, :6])))


def test_a_shared_weight_is_one_parameter(entry: Entry):
    models = Tied(tied=True), Tied(tied=False)
    for model in models:
        if not entry.ties and model.second is not model.first:
            with pytest.raises(ValueError, match="share"):
                entry.make(model, model.parameters())
            continue
        optimizer = entry.make(model, model.parameters())
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
        train(model, optimizer, range(6))
    assert not same(models[1], Tied(tied=False))
    assert same(*models) is entry.ties


def test_vectors_scalars_and_empty_tensors_are_trained_by_adamw(entry: Entry):
    model = mixed()
    optimizer = entry.make(model, model.parameters())
    train(model, optimizer, range(6))
    state = innermost(optimizer).state
    for parameter in (model.norm.weight, model.convolution.bias, model.scale):
        assert set(state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
    assert not torch.equal(model.scale, mixed().scale)
    assert model.empty not in state


@pytest.mark.parametrize("shape", [(), (3,)])
def test_vectors_under_the_matrix_rule_are_refused(entry: Entry, shape: tuple[int, ...]):
    model = nn.Linear(3, 3)
    model.extra = nn.Parameter(torch.zeros(shape))
    groups = [{"params": [model.weight]}, {"params": [model.extra], "rule": "matrix"}]
    with pytest.raises(ValueError, match="two dimensions"):
        entry.make(model, groups)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_numbers_that_are_not_real_are_refused(entry: Entry, dtype: torch.dtype):
    model = nn.Linear(3, 3)
    model.extra = nn.Parameter(torch.zeros(3, 3, dtype=dtype), requires_grad=dtype.is_complex)
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
        entry.make(model, model.parameters())


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"weight_decay": -0.1}, {"adamw": {"eps": 1.0}}])
def test_a_refused_setting_leaves_no_trace_on_the_model(entry: Entry, setting: dict[str, Any]):
    model = mixed()
    with pytest.raises(ValueError, match=next(iter(setting))):
        entry.make(model, model.parameters(), **setting)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_half_precision_is_float32(entry: Entry, dtype: torch.dtype):
    """One step is that of the float32 weights, rounded; also after a state has been loaded."""
    if not entry.by_hand:
        pytest.skip("it needs the inputs of the layers; see its own tests")
    model, wide = mixed(dtype), mixed(dtype).float()
    half, full = (entry.make(m, m.parameters(), lr=0.1) for m in (model, wide))
    for step in range(4):
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            q.data.copy_(p.data)
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            q.grad = p.grad.float()
        before = [q.detach().clone() for q in wide.parameters()]
        half.step()
        full.step()
        if isinstance(half, NestedTransfer) and step == 3:
            break  # the slow weights of both are float32; those of `wide` were set back to rounded ones
        for p, q, start in zip(model.parameters(), wide.parameters(), before, strict=True):
            assert p.dtype == dtype
            rounding = torch.finfo(dtype).eps * float(q.detach().norm())
            # A wrapper hands gradients on in the parameter's type; where they are small, dividing by them shows it.
            handed_on = 0.05 * float((q.detach() - start).norm()) if isinstance(half, MultiTimescale) else 0.0
            assert float((p - q).detach().norm()) <= rounding + handed_on
        half.load_state_dict(through_a_file(half.state_dict()))
    tensors = [x for state in innermost(half).state.values() for x in state.values()]
    assert {x.dtype for x in tensors} == {torch.float32}


def test_float64_stays_float64(entry: Entry):
    model = mixed(torch.float64)
    optimizer = entry.make(model, model.parameters())
    train(model, optimizer, range(5))
    for parameter, state in innermost(optimizer).state.items():
        assert {x.dtype for name, x in state.items() if name != "step"} <= {torch.float64}
        assert not torch.equal(parameter, parameter.float().double())
    again = mixed(torch.float64)
    resumed = entry.make(again, again.parameters())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    again.load_state_dict(model.state_dict())
    train(model, optimizer, range(5, 8))
    train(again, resumed, range(5, 8))
    assert same(model, again)


def test_the_layout_in_memory_does_not_matter(entry: Entry):
    def strided(model: Mixed) -> Mixed:
        model = model.to(memory_format=torch.channels_last)
        model.second.weight = nn.Parameter(model.second.weight.detach().t().contiguous().t())
        model.stack = nn.Parameter(model.stack.detach().transpose(0, 2).contiguous().transpose(0, 2))
        return model

    plain, other = mixed(torch.float64), strided(mixed(torch.float64))
    assert not other.second.weight.is_contiguous() and not other.convolution.weight.is_contiguous()
    strides = [p.stride() for p in other.parameters()]
    for model in (plain, other):
        train(model, entry.make(model, model.parameters(), lr=1e-2), range(7))
    assert strides == [p.stride() for p in other.parameters()]
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_groups_are_added_whole_or_not_at_all(entry: Entry):
    model = mixed()
    later = [model.third.weight, model.scale]
    first = [p for p in model.parameters() if all(p is not q for q in later)]
    optimizer = entry.make(model, first)
    count = len(optimizer.param_groups)  # DGD divides one that has linear layers and other parameters
    train(model, optimizer, range(3))
    assert torch.equal(model.third.weight, mixed().third.weight)
    for wrong in ({"lr": -1.0}, {"weight_decay": float("nan")}, {"rule": "matrix"}, {"rule": "other"}):
        with pytest.raises(ValueError, match=next(iter(wrong)) if "rule" not in wrong else "rule"):
            optimizer.add_param_group({"params": list(later), **wrong})
        assert len(optimizer.param_groups) == len(innermost(optimizer).param_groups) == count
    optimizer.add_param_group({"params": list(later), "lr": 0.02})
    assert optimizer.param_groups[count]["weight_decay"] == optimizer.param_groups[0]["weight_decay"]
    train(model, optimizer, range(3, 12))
    assert not torch.equal(model.third.weight, mixed().third.weight)
    assert not torch.equal(model.scale, mixed().scale)


def test_learning_rates_as_tensors_and_schedules(entry: Entry):
    models = [mixed(torch.float64), mixed(torch.float64)]
    for model, lr in zip(models, (0.02, torch.tensor(0.02, dtype=torch.float64)), strict=True):
        optimizer = entry.make(model, model.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(8):
            train(model, optimizer, [step])
            schedule.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.02 / 9)
        assert isinstance(optimizer.param_groups[0]["lr"], type(lr))
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler, when it is loaded
def test_a_compiled_step_is_the_same_and_is_not_compiled_again(entry: Entry):
    torch.compiler.reset()
    models = [mixed(), mixed()]
    with importlib.import_module("torch._dynamo.config").patch(error_on_recompile=True):
        for model in models:
            lr = torch.tensor(0.02)
            optimizer = entry.make(model, model.parameters(), lr=lr)
            step = torch.compile(optimizer.step) if model is models[0] else optimizer.step
            for number in range(8):
                lr.fill_(0.02 / (1 + number))
                optimizer.zero_grad()
                loss_of(model, number).backward()
                step()
    assert same(*models)


@pytest.mark.parametrize("clip", [False, True])
def test_gradient_scaling_changes_nothing_and_leaves_out_steps_that_overflow(entry: Entry, clip: bool):
    """The scale is a power of two, so that scaled gradients are exact."""
    scaled, plain = mixed(), mixed()
    optimizer, other = (entry.make(m, m.parameters()) for m in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for step in range(10):
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        if step in (2, 5):
            scaled.third.weight.grad[1, 1] = float("inf")
        if clip:
            scaler.unscale_(optimizer)
            if not entry.unscale:
                with pytest.raises(ValueError, match="unscale_"):
                    scaler.step(optimizer)
                return
            nn.utils.clip_grad_norm_(scaled.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
        other.zero_grad()
        loss_of(plain, step).backward()
        if step not in (2, 5):
            if clip:
                nn.utils.clip_grad_norm_(plain.parameters(), 1e6)
            other.step()
        elif isinstance(other, InputProjection):
            other.load_state_dict(optimizer.state_dict())  # a step left out has still read its inputs
    assert same(scaled, plain)
    assert not same(plain, mixed())


def test_states_that_do_not_fit_are_refused(entry: Entry):
    model = mixed()
    optimizer = entry.make(model, model.named_parameters())
    train(model, optimizer, range(5))
    before, state = copy.deepcopy(optimizer.state_dict()), optimizer.state_dict()

    def refused(wrong: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(wrong)

    refused(torch.optim.AdamW(model.parameters()).state_dict(), "This state is of")
    wider = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    other = entry.make(wider, wider.parameters())
    refused(other.state_dict(), "groups of")
    names = dict(model.named_parameters())
    order = list(reversed(names))
    shuffled = entry.make(model, [(name, names[name]) for name in order])
    refused(shuffled.state_dict(), "another order")
    shapes = copy.deepcopy(state)
    key = max(k for k, v in shapes["state"].items() if any(x.ndim >= 2 for x in v.values()))
    shapes["state"][key] = {name: x if x.ndim < 2 else x[:, :-1] for name, x in shapes["state"][key].items()}
    refused(shapes, "must have")
    # A refused state changes nothing.
    assert str(optimizer.state_dict()) == str(before)


def minimize(entry: Entry, weight: nn.Parameter, loss: Callable[[Tensor], Tensor], lr: float, steps: int) -> float:
    """The loss at the end of a linear schedule to zero. The weight is a layer's, read from its outputs."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = weight
    optimizer = entry.make(layer, layer.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    basis = torch.eye(weight.shape[1], dtype=weight.dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(layer(basis).mT).backward()
        optimizer.step()
        schedule.step()
    return float(loss(weight.detach()))


def test_converges_on_a_quadratic(entry: Entry):
    """Least squares with a condition number of 100."""
    x = torch.randn(64, 6, dtype=torch.float64) * torch.logspace(0, -1, 6, dtype=torch.float64)
    target = torch.randn(4, 6, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))

    def loss(w: Tensor) -> Tensor:
        return (x @ (w - target).mT).square().mean()

    start = float(loss(weight.detach()))
    assert minimize(entry, weight, loss, entry.lr, steps=400) < entry.remains * start


def test_converges_to_a_target(entry: Entry):
    target = torch.randn(5, 3, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    start = float((weight.detach() - target).norm())
    assert minimize(entry, weight, lambda w: (w - target).norm(), entry.lr, steps=300) < entry.remains * start


@pytest.mark.slow
def test_converges_on_rosenbrock(entry: Entry):
    """A row is a point: ``(1 - x)² + 100 (y - x²)²``, from the usual start and three more."""
    weight = nn.Parameter(torch.tensor([[-1.2, 1.0], [0.0, 0.0], [1.5, 0.5], [-0.5, -0.5]], dtype=torch.float64))

    def loss(w: Tensor) -> Tensor:
        return ((1 - w[:, 0]) ** 2 + 100 * (w[:, 1] - w[:, 0] ** 2) ** 2).mean()

    start = float(loss(weight.detach()))
    assert minimize(entry, weight, loss, entry.rosenbrock_lr or entry.lr / 2, steps=1000) < entry.remains * start
