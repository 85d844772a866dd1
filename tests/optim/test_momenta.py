"""Momentum memories equal rules written out for one matrix, and the optimizers that they contain."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestlearn.memory import Gates, catalog, scan
from nestlearn.optim import (
    M3,
    AssociativeMomentum,
    DeepMemory,
    DeepMomentum,
    DeltaMomentum,
    DeltaRule,
    Diagonal,
    GeneratedValues,
    HigherOrderMomentum,
    InputProjection,
    LeastSquares,
    MultiTimescale,
    NewtonSchulz,
    OrthogonalDescent,
    Polynomial,
    Sign,
    Whitening,
)
from nestlearn.optim.preconditioners import inverse_power, where_finite

SHAPES = {
    "wide": (3, 7),
    "tall": (9, 4),
    "row": (1, 5),
    "column": (6, 1),
    "stack": (2, 5, 3),
    "kernel": (4, 3, 2, 3),
    "kernel again": (4, 3, 2, 3),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes.values())]


def gradient(parameter: Tensor, step: int, place: int) -> Tensor:
    """Correlated from step to step and of a size that changes by orders."""
    fixed, noise = (random(*parameter.shape, seed=seed) for seed in (1000 + place, 7919 * step + place))
    return 10.0 ** ((step % 5) - 3) * (fixed + noise)


def matrices(parameter: Tensor) -> list[Tensor]:
    """The matrices that a parameter is, as copies."""
    tensor = parameter.detach().clone()
    return list(tensor) if tensor.ndim == 3 else [tensor.reshape(len(tensor), -1)]


class Written:
    """One matrix and the rule of the extensions, line by line; ``settings`` are those of the optimizer."""

    def __init__(self, weight: Tensor, lr: float, momentum: float = 0.9, nesterov: bool = False, **settings: Any):
        self.w, self.lr, self.momentum, self.nesterov = weight, lr, momentum, nesterov
        self.m, self.v = torch.zeros_like(weight), torch.zeros_like(weight)
        self.gram: Any = 0.0
        self.p: Any = None
        self.t = 0
        self.decay = settings.pop("weight_decay", 0.0)
        self.axes: dict[str, Any] = (
            dict.fromkeys(("delta", "features", "preconditioner", "values", "output")) | settings
        )

    def features(self, g: Tensor) -> Tensor:
        rms = (sum(float(x) ** 2 for x in g.flatten()) / g.numel()) ** 0.5
        z = g / rms
        return rms * sum(c * z.sign() * z.abs() ** k for k, c in enumerate(self.axes["features"].coefficients, 1))

    def precondition(self, g: Tensor) -> Tensor:
        p = self.axes["preconditioner"]
        if isinstance(p, Diagonal):
            self.v = p.beta * self.v + (1 - p.beta) * g * g
            corrected = self.v / (1 - p.beta**self.t) if p.bias_correction else self.v
            return g / (corrected.sqrt() + p.eps)
        product = g @ g.T if p.side == "rows" else g.T @ g
        eye = torch.eye(len(product), dtype=g.dtype)
        if isinstance(p, LeastSquares) or p.beta is None:
            self.gram = self.gram + product
            average = self.gram
        else:
            self.gram = p.beta * self.gram + (1 - p.beta) * product
            average = self.gram / (1 - p.beta**self.t)
        if (self.t - 1) % p.period == 0:
            if isinstance(p, LeastSquares):
                self.p = torch.linalg.inv(eye + self.gram / p.alpha)
            else:
                inverse = torch.linalg.inv(average + p.damping * average.trace() / len(average) * eye)
                self.p = inverse if p.power == 1 else denman_beavers(inverse)
        return self.p @ g if p.side == "rows" else g @ self.p

    def surprise(self, g: Tensor) -> Tensor:
        """The momentum's answer, and minus the gradient by it of Huber's norm, written out."""
        p = ((1 - self.momentum) * self.m).requires_grad_()
        r, d = (p - g).norm(), self.axes["values"].threshold * p.detach().norm()
        loss = 0.5 * r**2 if r <= d or d == 0 else d * (r - d / 2)
        return p.detach() - torch.autograd.grad(loss, p)[0]

    def output(self, m: Tensor) -> Tensor:
        if isinstance(self.axes["output"], Sign):
            return m.sign()
        if isinstance(self.axes["output"], OrthogonalDescent):
            return 0.2 * max(m.shape) ** 0.5 * self.descend(m / m.norm())
        a, b, c = 3.4445, -4.7750, 2.0315
        u, s, v = torch.linalg.svd(m, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(self.axes["output"].ns_steps):
            s = a * s + b * s**3 + c * s**5
        return 0.2 * max(m.shape) ** 0.5 * (u * s) @ v

    def descend(self, g: Tensor) -> Tensor:
        """Gradient descent on the objective of NL Eq. 42-43, by autograd."""
        o, eye = g, torch.eye(g.shape[1], dtype=g.dtype)
        for _ in range(self.axes["output"].steps):
            o = o.detach().requires_grad_()
            loss = 0.5 * (o - g).square().sum() + 0.5 * (o.T @ o - eye).square().sum()
            o = o - self.axes["output"].step_size * torch.autograd.grad(loss, o)[0]
        return o.detach()

    def step(self, g: Tensor) -> None:
        self.t += 1
        key = g if self.axes["features"] is None else self.features(g)
        value = key if self.axes["preconditioner"] is None else self.precondition(key)
        value = value if self.axes["values"] is None else self.surprise(value)
        keep = self.momentum * torch.eye(g.shape[1], dtype=g.dtype)
        if self.axes["delta"] is not None:
            k = key / (torch.linalg.norm(key) + self.axes["delta"].eps)
            keep = keep - self.axes["delta"].rho * k.T @ k
        self.m = self.m @ keep + value
        update = value + self.momentum * self.m if self.nesterov else self.m
        if self.axes["output"] is not None:
            update = self.output(update)
        self.w = (1 - self.lr * self.decay) * self.w - self.lr * update


def denman_beavers(a: Tensor) -> Tensor:
    """The root of a positive definite matrix, without eigenvalues."""
    y, z = a, torch.eye(len(a), dtype=a.dtype)
    for _ in range(60):
        y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
    return y


COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": True, "weight_decay": 0.1},
    {"delta": DeltaRule()},
    {"delta": DeltaRule(0.3, 1e-3), "nesterov": True},
    {"features": Polynomial((0.5, 0.2, 0.0, 0.1)), "momentum": 0.0},
    {"features": Polynomial((0.0, 0.0, 1.0)), "delta": DeltaRule(0.7), "weight_decay": 0.01},
    {"preconditioner": Diagonal(0.9)},
    {"preconditioner": Diagonal(0.9, 1e-4, bias_correction=False), "delta": DeltaRule()},
    {"preconditioner": Whitening("columns", 0.9, 0.5, 0.05, period=3), "nesterov": True},
    {"preconditioner": Whitening("rows", None, 0.5, 0.05, period=1), "momentum": 0.5},
    {"preconditioner": Whitening("columns", 0.8, 1, 0.1, period=4), "delta": DeltaRule(0.5)},
    {"preconditioner": LeastSquares("rows", 0.5, period=2), "features": Polynomial((1.0, 0.3))},
    {"preconditioner": LeastSquares("columns", 3.0, period=7), "output": Sign()},
    {"values": GeneratedValues(1.5)},
    {"values": GeneratedValues(0.3), "preconditioner": Diagonal(0.9), "nesterov": True},
    {"values": GeneratedValues(3.0), "delta": DeltaRule(0.5), "output": OrthogonalDescent(7, 0.2)},
    {"output": OrthogonalDescent()},
    {"output": NewtonSchulz()},
    {"output": NewtonSchulz(3), "delta": DeltaRule(0.5), "features": Polynomial((1.0, 0.0, 0.2))},
    {"output": Sign(), "preconditioner": Diagonal(), "delta": DeltaRule(), "weight_decay": 0.2},
]


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
def test_equals_the_written_rule(settings: dict[str, Any]) -> None:
    params = parameters()
    optimizer = AssociativeMomentum(params, lr=0.03, **settings)
    written = [[Written(w, 0.03, **settings) for w in matrices(p)] for p in params]
    for step in range(20):
        for place, (parameter, twins) in enumerate(zip(params, written, strict=True)):
            parameter.grad = gradient(parameter, step, place)
            for twin, g in zip(twins, matrices(parameter.grad), strict=True):
                twin.step(g)
        optimizer.step()
    for parameter, twins in zip(params, written, strict=True):
        for got, twin in zip(matrices(parameter), twins, strict=True):
            torch.testing.assert_close(got, twin.w, rtol=1e-8, atol=1e-9)


def test_rules_whose_steps_are_of_the_gradients_size_begin_at_rates_of_descent() -> None:
    for kind in (DeltaMomentum, HigherOrderMomentum, DeepMomentum):
        assert kind([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]["lr"] == 0.01


def test_named_rules_are_settings_of_the_general_one() -> None:
    named: list[tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = [
        (lambda p: DeltaMomentum(p, 0.03, rho=0.6, momentum=0.8), {"delta": DeltaRule(0.6), "momentum": 0.8}),
        (lambda p: HigherOrderMomentum(p, 0.03, coefficients=(1.0, 0.5)), {"features": Polynomial((1.0, 0.5))}),
    ]
    for make, settings in named:
        ours, general = parameters(), parameters()
        for params, optimizer in ((ours, make(ours)), (general, AssociativeMomentum(general, 0.03, **settings))):
            for step in range(4):
                for place, parameter in enumerate(params):
                    parameter.grad = gradient(parameter, step, place)
                optimizer.step()
        assert all(torch.equal(x, y) for x, y in zip(ours, general, strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_momentum_is_torch_sgd_to_the_bit(nesterov: bool, dtype: torch.dtype) -> None:
    ours, theirs = ([nn.Parameter(p.detach().to(dtype)) for p in parameters()] for _ in range(2))
    pairs = [
        (ours, AssociativeMomentum(ours, 0.05, momentum=0.9, nesterov=nesterov)),
        (theirs, torch.optim.SGD(theirs, 0.05, momentum=0.9, nesterov=nesterov)),
    ]
    for params, optimizer in pairs:
        for step in range(20):
            for place, parameter in enumerate(params):
                parameter.grad = gradient(parameter, step, place).to(dtype)
            optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_diagonal_without_correction_is_torch_rmsprop() -> None:
    ours, theirs = parameters(), parameters()
    pairs = [
        (ours, AssociativeMomentum(ours, 0.01, preconditioner=Diagonal(0.99, 1e-8, bias_correction=False))),
        (theirs, torch.optim.RMSprop(theirs, 0.01, alpha=0.99, momentum=0.9)),
    ]
    for params, optimizer in pairs:
        for step in range(20):
            for place, parameter in enumerate(params):
                parameter.grad = gradient(parameter, step, place)
            optimizer.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_orthogonalized_momentum_is_torch_muon(nesterov: bool) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if len(shape) == 2 and min(shape) > 1}
    ours, theirs = ([nn.Parameter(p.detach().float()) for p in parameters(shapes)] for _ in range(2))
    start = [p.detach().clone() for p in ours]
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    pairs = [
        (ours, AssociativeMomentum(ours, output=NewtonSchulz(), **options)),
        (theirs, torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)),
    ]
    for params, optimizer in pairs:
        for step in range(20):
            for place, parameter in enumerate(params):
                parameter.grad = gradient(parameter, step, place).float()
            optimizer.step()
    for x, y, s in zip(ours, theirs, start, strict=True):  # torch iterates in bfloat16
        assert (x - y).norm() < 2e-2 * (y - s).norm()


def test_momentum_is_linear_attention_over_inputs_and_errors() -> None:
    """NL Eq. 33-34: the buffer of one linear layer is the state of a decayed linear attention, values minus errors."""
    x, target, alpha = random(20, 5), random(20, 3, seed=1), 0.8
    layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    optimizer = AssociativeMomentum(layer.parameters(), lr=0.05, momentum=alpha)
    errors = []
    for t in range(20):
        optimizer.zero_grad()
        errors.append((layer(x[t]) - target[t]).detach())
        (0.5 * (layer(x[t]) - target[t]).square().sum()).backward()
        optimizer.step()
    memory = catalog["retnet"]
    ones = torch.ones(1, 20, dtype=torch.float64)
    state = memory.init_state((1,), 5, 3, dtype=torch.float64)
    _, state = scan(memory, state, x[None], x[None], -torch.stack(errors)[None], Gates(ones, alpha * ones))
    buffer = optimizer.state[layer.weight]["momentum_buffer"]
    torch.testing.assert_close(-buffer, state.params["W"][0], rtol=1e-12, atol=1e-12)


def test_generated_values_without_a_threshold_are_plain_momentum() -> None:
    ours, plain = parameters(), parameters()
    train(ours, AssociativeMomentum(ours, 0.03, values=GeneratedValues(1e30)), range(12))
    train(plain, AssociativeMomentum(plain, 0.03), range(12))
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_a_single_gradient_changes_a_momentum_with_generated_values_by_a_part_of_itself() -> None:
    weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = AssociativeMomentum([weight], lr=1.0, momentum=0.9, values=GeneratedValues(2.0))
    norms = []
    for step in range(40):
        weight.grad = (1e6 if step == 20 else 1.0) * random(3, 4)
        optimizer.step()
        norms.append(optimizer.state[weight]["momentum_buffer"].norm().item() / random(3, 4).norm().item())
    assert norms[0] == pytest.approx(1.0)  # the first is taken whole
    assert norms[20] / norms[19] == pytest.approx(1.2)
    assert max(norms) < 11 and norms[-1] == pytest.approx(10, rel=0.1)


def test_the_printed_iteration_of_a_scaled_momentum_ends_nearly_orthogonal() -> None:
    """NL Eq. 44: singular values go to the roots of ``2 σ³ - σ = s``, which are in [0.71, 1]."""
    weight = nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    weight.grad = random(5, 8)
    output = OrthogonalDescent(steps=200, adjust_lr=None)
    AssociativeMomentum([weight], lr=1.0, momentum=0.0, output=output).step()
    s = torch.linalg.svdvals(weight.grad / weight.grad.norm())
    found = torch.linalg.svdvals(weight.detach())
    torch.testing.assert_close(2 * found**3 - found, s, rtol=1e-8, atol=1e-10)
    assert found.min() > 0.7 and found.max() <= 1
    angle = weight.detach().T @ weight.grad  # symmetric and negative: the same singular vectors, downhill
    torch.testing.assert_close(angle, angle.T)
    assert torch.linalg.eigvalsh(angle).max() < 1e-10


def test_delta_rule_replaces_what_lies_along_the_gradient() -> None:
    """A gradient of rank one is stored as with α = 0 along itself, and nothing else changes but by α."""
    weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = DeltaMomentum([weight], lr=1.0, momentum=0.9, eps=0.0)
    weight.grad = random(3, 4)
    optimizer.step()
    before = optimizer.state[weight]["momentum_buffer"].clone()
    left, right = random(3, 1, seed=5), torch.nn.functional.normalize(random(1, 4, seed=6))
    weight.grad = left @ right
    optimizer.step()
    after = optimizer.state[weight]["momentum_buffer"]
    torch.testing.assert_close(after @ right.T, -0.1 * before @ right.T + left)
    across = torch.linalg.svd(right)[2][1:]
    torch.testing.assert_close(after @ across.T, 0.9 * before @ across.T)


def test_delta_momentum_never_grows_whatever_the_gradients() -> None:
    weight = nn.Parameter(torch.zeros(6, 3, dtype=torch.float64))
    optimizer = DeltaMomentum([weight], lr=0.0, momentum=0.99)
    for step in range(200):
        weight.grad = 1e6 * random(6, 3, seed=step) if step < 5 else 1e4 ** (step % 3 - 1) * random(6, 3, seed=step)
        optimizer.step()
        if step == 5:
            bound = optimizer.state[weight]["momentum_buffer"].norm() + 100 * 1e4 * 10
    assert optimizer.state[weight]["momentum_buffer"].norm() < bound


def test_features_keep_signs_and_scale() -> None:
    """φ(-g) = -φ(g), φ(c g) = c φ(g), and the step is downhill with coefficients that are not negative."""
    outputs = []
    for scale in (1.0, -1.0, 1e-12):
        weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
        weight.grad = scale * random(4, 6)
        HigherOrderMomentum([weight], lr=1.0, coefficients=(0.3, 0.5, 0.2)).step()
        outputs.append(weight.detach().clone())
    assert ((outputs[0] * random(4, 6)) < 0).all()
    torch.testing.assert_close(outputs[1], -outputs[0])
    torch.testing.assert_close(outputs[2], 1e-12 * outputs[0], rtol=1e-10, atol=0)


def test_features_of_gradients_whose_squares_are_0_stay_small() -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = HigherOrderMomentum([weight], lr=1.0)
    weight.grad = torch.full((3, 4), 1e-23)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -weight.grad, rtol=0.2, atol=0.0)


def test_momentum_may_be_raised_from_0_and_lowered_again() -> None:
    weight, other = (nn.Parameter(random(3, 4)) for _ in range(2))
    optimizer, torchs = AssociativeMomentum([weight], lr=0.1, momentum=0.0), torch.optim.SGD([other], lr=0.1)
    for step in range(9):
        for w, o in ((weight, optimizer), (other, torchs)):
            o.param_groups[0]["momentum"] = 0.9 if 3 <= step < 6 else 0.0
            w.grad = random(3, 4, seed=step)
            o.step()
        assert torch.equal(weight, other)
    AssociativeMomentum([weight]).load_state_dict(optimizer.state_dict())


def test_extensions_that_come_late() -> None:
    """The memory of a shape begins when it is named, a preconditioner must know all gradients."""
    weight = nn.Parameter(random(3, 4))
    optimizer = AssociativeMomentum([weight])
    train([weight], optimizer, range(2))
    optimizer.param_groups[0]["memory"] = DeepMemory()
    train([weight], optimizer, range(2, 4))
    assert float(optimizer.state[weight]["memory_out"].abs().sum()) > 0
    optimizer.param_groups[0]["preconditioner"] = Whitening()
    with pytest.raises(ValueError, match=r"no state 'gram': a setting .* changed after the first step"):
        train([weight], optimizer, range(4, 5))


def test_whitening_of_one_gradient_is_its_polar_factor() -> None:
    weight = nn.Parameter(torch.zeros(7, 4, dtype=torch.float64))
    weight.grad = 1e-5 * random(7, 4)
    AssociativeMomentum([weight], lr=1.0, momentum=0.0, preconditioner=Whitening(damping=1e-12)).step()
    u, _, v = torch.linalg.svd(random(7, 4), full_matrices=False)
    torch.testing.assert_close(weight.detach(), -u @ v, rtol=1e-5, atol=1e-6)


def test_inverse_powers_are_finite_for_whatever_came() -> None:
    gram = torch.stack([torch.zeros(3, 3), torch.eye(3), torch.full((3, 3), torch.nan)])
    for power in (0.5, 1):
        zero, one, bad = where_finite(gram, lambda finite, p=power: inverse_power(finite, p, 1e-3))
        assert not zero.any() and bad.isnan().all()
        torch.testing.assert_close(one, torch.eye(3) * 1.001**-power)


ALL: list[dict[str, Any]] = [
    {"delta": DeltaRule(), "features": Polynomial(), "preconditioner": Diagonal()},
    {"preconditioner": Whitening(period=3), "output": NewtonSchulz()},
    {"preconditioner": LeastSquares("rows", period=3), "output": Sign()},
    {"delta": DeltaRule(eps=0.0), "features": Polynomial()},
]


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for place, parameter in enumerate(params):
            parameter.grad = gradient(parameter, step, place).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("settings", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resumes_to_the_bit_from_a_file(settings: dict[str, Any], dtype: torch.dtype) -> None:
    params = [nn.Parameter(p.detach().to(dtype)) for p in parameters()]
    optimizer = AssociativeMomentum(params, lr=0.03, **settings)
    train(params, optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(params)
    resumed = AssociativeMomentum(other, lr=0.5)
    resumed.load_state_dict(torch.load(file))  # with weights_only, as by default: plain values
    train(params, optimizer, range(5, 9))
    train(other, resumed, range(5, 9))
    assert all(torch.equal(x, y) for x, y in zip(params, other, strict=True))
    copied = copy.deepcopy(optimizer)
    assert copied.param_groups[0]["preconditioner"] == optimizer.param_groups[0]["preconditioner"]


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_a_gradient_that_is_not_finite_spoils_its_own_parameter_only(settings: dict[str, Any]) -> None:
    shapes = {"a": (3, 4), "b": (3, 4)}
    params, alone = parameters(shapes), parameters(shapes)
    optimizer = AssociativeMomentum(params, lr=0.03, **settings)
    single = AssociativeMomentum(alone[1:], lr=0.03, **settings)
    for step in range(5):
        params[0].grad = torch.full((3, 4), torch.inf if step == 2 else 1.0, dtype=torch.float64)
        for parameter in (params[1], alone[1]):
            parameter.grad = gradient(parameter, step, 1)
        optimizer.step()
        single.step()
    assert params[1].isfinite().all()
    torch.testing.assert_close(params[1], alone[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_zero_gradients_change_nothing(settings: dict[str, Any]) -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = AssociativeMomentum(params, lr=0.03, **settings)
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(params, before, strict=True))


def test_one_dimensional_kernels_are_matrices() -> None:
    """Of several equal ones, with the rules that collect whole matrices."""
    for make in (
        lambda p: M3([{"params": p, "kernels": True}], lr=0.1),
        lambda p: AssociativeMomentum([{"params": p, "kernels": True}], lr=0.1, **ALL[1]),
        lambda p: DeltaMomentum([{"params": p, "kernels": True}], lr=0.1),
    ):
        kernels = [nn.Parameter(random(4, 3, 5, seed=i)) for i in range(2)]
        flat = [nn.Parameter(p.detach().reshape(4, 15).clone()) for p in kernels]
        first, second = make(kernels), make(flat)
        for step in range(4):
            for place, (kernel, matrix) in enumerate(zip(kernels, flat, strict=True)):
                kernel.grad = gradient(kernel, step, place)
                matrix.grad = kernel.grad.reshape(4, 15)
            first.step()
            second.step()
        for kernel, matrix in zip(kernels, flat, strict=True):
            assert torch.equal(kernel.reshape(4, 15), matrix)


def test_combines_with_a_preconditioner_of_inputs() -> None:
    """`InputProjection` gives the momentum projected gradients (NL Eq. 47 with P of the inputs)."""
    layer, twin = (nn.Linear(6, 3, bias=False, dtype=torch.float64) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    optimizer = InputProjection(
        DeltaMomentum(layer.parameters(), lr=0.1, preconditioner=Diagonal(0.9)),
        layer,
        alpha=0.5,
        period=2,
        apply_to="gradient",
        dtype=torch.float64,
    )
    written = Written(twin.weight.detach().clone(), 0.1, delta=DeltaRule(), preconditioner=Diagonal(0.9))
    seen, applied = torch.zeros(6, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for step in range(8):
        x, y = random(4, 6, seed=step), random(4, 3, seed=100 + step)
        optimizer.zero_grad()
        (0.5 * (layer(x) - y).square().sum()).backward()
        optimizer.step()
        written.step((x @ written.w.T - y).T @ x @ applied)
        seen = seen + x.T @ x
        if step % 2 == 1:
            applied = torch.linalg.inv(torch.eye(6, dtype=torch.float64) + seen / 0.5)
    torch.testing.assert_close(layer.weight.detach(), written.w, rtol=1e-9, atol=1e-10)
    optimizer.close()


def test_several_timescales_over_a_momentum() -> None:
    fast, slow = nn.Parameter(random(3, 4)), nn.Parameter(random(3, 4, seed=1))
    groups = [{"params": [fast], "update_period": 1}, {"params": [slow], "update_period": 2}]
    optimizer = MultiTimescale(DeltaMomentum(groups, lr=0.1))
    before = slow.detach().clone()
    fast.grad, slow.grad = random(3, 4, seed=2), random(3, 4, seed=3)
    optimizer.step()
    assert torch.equal(slow, before) and not torch.equal(fast, random(3, 4))
    optimizer.step()
    assert not torch.equal(slow, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeltaRule(0.0), "rho is 0.0; it must be in"),
        (lambda: DeltaRule(1.5), "rho is 1.5"),
        (lambda: DeltaRule(eps=-1.0), "eps is -1.0"),
        (lambda: Polynomial(()), "coefficients is"),
        (lambda: Polynomial((0.0, 0.0)), "coefficients is"),
        (lambda: Diagonal(1.0), "beta is"),
        (lambda: Diagonal(eps=-1e-8), "eps is"),
        (lambda: Whitening("both"), "side is 'both'"),  # type: ignore[arg-type]
        (lambda: Whitening(beta=1.0), "beta is"),
        (lambda: Whitening(power=2), "power is 2"),
        (lambda: Whitening(damping=0.0), "damping is 0.0"),
        (lambda: Whitening(period=0), "period is 0"),
        (lambda: LeastSquares(alpha=0.0), "alpha is 0.0"),
        (lambda: LeastSquares(period=-1), "period is -1"),
        (lambda: NewtonSchulz(0), "ns_steps is 0"),
        (lambda: NewtonSchulz(adjust_lr="more"), "adjust_lr is 'more'"),  # type: ignore[arg-type]
        (lambda: AssociativeMomentum(parameters(), momentum=1.0), "momentum is"),
        (lambda: AssociativeMomentum(parameters(), lr=-1.0), "lr is -1.0"),
        (
            lambda: AssociativeMomentum(parameters(), delta=0.5),
            "delta is 0.5; it must be None or an object of DeltaRule",
        ),  # type: ignore[arg-type]
        (lambda: AssociativeMomentum(parameters(), output=Diagonal()), "output is Diagonal"),  # type: ignore[arg-type]
        (lambda: AssociativeMomentum(parameters(), momentum=0.0, nesterov=True), "momentum is 0"),
        (lambda: DeltaMomentum(parameters(), momentum=0.0), "momentum is 0"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_of_other_extensions_is_refused() -> None:
    params = parameters()
    optimizer = AssociativeMomentum(params, preconditioner=Diagonal())
    train(params, optimizer, range(2))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="of AssociativeMomentum, not of DeltaMomentum"):
        DeltaMomentum(params).load_state_dict(state)
    state["param_groups"][0]["preconditioner"] = {"kind": "Whitening", "side": "rows"}
    with pytest.raises(ValueError, match="It is of another version"):
        AssociativeMomentum(params).load_state_dict(state)
    state["param_groups"][0]["preconditioner"] = Whitening()
    with pytest.raises(ValueError, match="The saved state of a parameter of shape"):
        AssociativeMomentum(params).load_state_dict(state)


@pytest.mark.parametrize("settings", COMBINATIONS[:3] + ALL, ids=str)
def test_a_rate_may_be_a_tensor(settings: dict[str, Any]) -> None:
    by_number, by_tensor = parameters(), parameters()
    train(by_number, AssociativeMomentum(by_number, lr=0.03, **settings), range(4))
    rate = torch.tensor(0.03, dtype=torch.float64)
    train(by_tensor, AssociativeMomentum(by_tensor, lr=rate, **settings), range(4))
    for x, y in zip(by_number, by_tensor, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


RULES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "plain": lambda p: AssociativeMomentum(p, lr=0.1),
    "delta": lambda p: DeltaMomentum(p, lr=0.1),
    "delta, fading": lambda p: DeltaMomentum(p, lr=0.1, eps=1.0),
    "higher order": lambda p: HigherOrderMomentum(p, lr=0.05),
    "deep": lambda p: DeepMomentum(p, lr=0.08),
    "deep, with momentum": lambda p: DeepMomentum(p, lr=0.05, momentum=0.9),
    "diagonal": lambda p: AssociativeMomentum(p, lr=0.003, preconditioner=Diagonal(0.99)),
    "whitening": lambda p: AssociativeMomentum(p, lr=0.003, preconditioner=Whitening()),
    "least squares": lambda p: AssociativeMomentum(p, lr=0.3, preconditioner=LeastSquares(alpha=100.0)),
    "orthogonal": lambda p: AssociativeMomentum(p, lr=0.1, output=NewtonSchulz()),
    "sign": lambda p: AssociativeMomentum(p, lr=0.012, output=Sign()),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_comes_down_a_quadratic(rule: str) -> None:
    """A least-squares problem of condition number 10 and a stack of two: to a hundredth of the loss in 300 steps."""
    scales = torch.linspace(1.0, 10.0**0.5, 6, dtype=torch.float64)
    params = [nn.Parameter(random(4, 6)), nn.Parameter(random(2, 4, 6, seed=1))]
    optimizer, losses = RULES[rule](params), []
    for _ in range(300):
        optimizer.zero_grad()
        loss = sum((0.5 * ((p - 1.0) * scales).square().sum() for p in params), torch.zeros(()))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]
