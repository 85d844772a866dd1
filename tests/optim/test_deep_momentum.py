"""The momentum that is a network: against autograd of its written objective, and what sharing it must not break."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestlearn.optim import AssociativeMomentum, DeepMemory, DeepMomentum, Diagonal, NewtonSchulz, deep_memory
from nestlearn.optim.deep_memory import unit_rows

SHAPES = [(3, 5), (7, 4), (3, 5), (2, 3, 5), (4, 5, 1, 1), (3, 5), (1, 4)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(random(*shape, seed=i).to(dtype)) for i, shape in enumerate(SHAPES)]


def gradient(parameter: Tensor, step: int, place: int) -> Tensor:
    fixed, noise = (random(*parameter.shape, seed=seed) for seed in (1000 + place, 7919 * step + place))
    return (10.0 ** ((step % 5) - 3) * (fixed + noise)).to(parameter.dtype)


class Written:
    """The network with autograd for its errors and least squares for the argmin of its step."""

    def __init__(self, spec: DeepMemory, columns: int):
        generator = torch.Generator().manual_seed(spec.seed)
        hidden = spec.expansion * columns
        self.start = torch.randn(hidden, columns, generator=generator, dtype=torch.float64) / columns**0.5
        self.spec, self.w_in = spec, self.start.clone()
        self.w_out = torch.zeros(columns, hidden, dtype=torch.float64)

    def argmin(self, d: Tensor, inputs: Tensor, errors: Tensor) -> Tensor:
        """Of ``η/2 E‖D' x + e‖² + 1/2 ‖D' - α D‖²``: a linear regression with α D as further data."""
        weight = (self.spec.step / len(inputs)) ** 0.5
        data = torch.cat([weight * inputs, torch.eye(d.shape[1], dtype=d.dtype)])
        targets = torch.cat([-weight * errors, self.spec.retention * d.T])
        return torch.linalg.lstsq(data, targets).solution.T

    def step(self, rows: Tensor) -> Tensor:
        """Learns all rows at once, then answers."""
        sizes = (rows.square().sum(1, keepdim=True) / rows.shape[1]).sqrt()
        x = rows / sizes
        z = (x @ self.w_in.T).requires_grad_()
        h = torch.nn.functional.gelu(z)
        o = h @ self.w_out.T
        answer = x + o
        if self.spec.objective == "dot":
            loss = -(answer * self.spec.gain * x).sum()
        else:
            loss = 0.5 * (answer - (1 + self.spec.gain) * x).square().sum()
        e_in, e_out = torch.autograd.grad(loss, [z, o])
        new_in = self.start + self.argmin(self.w_in - self.start, x, e_in)
        self.w_out = self.argmin(self.w_out, h.detach(), e_out)
        self.w_in = new_in
        return sizes * (x + torch.nn.functional.gelu(x @ self.w_in.T) @ self.w_out.T)


SPECS = [
    DeepMemory(),
    DeepMemory(expansion=3, objective="l2", step=0.3, retention=0.5, gain=2.0, seed=4),
    DeepMemory(expansion=1, step=30.0, retention=0.0, gain=0.5),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("pieces", [None, 12])
def test_equals_autograd_of_the_written_objective(spec: DeepMemory, pieces: int | None, monkeypatch: Any) -> None:
    """20 steps; memories are shared by shape; some parameters have no gradient at some steps, the first at first."""
    if pieces:  # rows are read in many pieces, parameters in many batches: all the same
        monkeypatch.setattr(deep_memory, "CPU_ELEMENTS", pieces)
        monkeypatch.setattr("nestlearn.optim.matrices.CPU_ELEMENTS", pieces)
    params, lr = parameters(), 0.01
    optimizer = DeepMomentum(params, lr=lr, memory=spec, weight_decay=0.1)
    weights = [p.detach().reshape(-1, p.shape[-1] if p.ndim == 3 else p[0].numel()).clone() for p in params]
    twins = {shape: Written(spec, w.shape[1]) for shape, w in zip(SHAPES, weights, strict=True)}
    for step in range(20):
        for place, parameter in enumerate(params):
            silent = (place == 0 and step < 3) or (place == 2 and step % 3 == 0)
            parameter.grad = None if silent else gradient(parameter, step, place)
        for shape, twin in twins.items():
            members = [i for i, p in enumerate(params) if p.grad is not None and SHAPES[i] == shape]
            gradients = [p.grad.reshape(weights[i].shape) for i, p in enumerate(params) if i in members]  # type: ignore[union-attr]
            answers = twin.step(torch.cat(gradients)).split([len(g) for g in gradients])
            for i, answer in zip(members, answers, strict=True):
                weights[i] = (1 - 0.1 * lr) * weights[i] - lr * answer
        optimizer.step()
    for parameter, weight in zip(params, weights, strict=True):
        torch.testing.assert_close(parameter.detach().reshape(weight.shape), weight, rtol=1e-9, atol=1e-10)


def test_an_untrained_memory_gives_the_gradient_back() -> None:
    rows = random(6, 5)
    spec = DeepMemory(step=1e-30)
    torch.testing.assert_close(spec.apply(spec.new_state(rows, 5), rows), rows, rtol=1e-12, atol=1e-12)


def test_directions_that_rows_share_are_amplified_most() -> None:
    """Rows along u and rare ones: u is answered about (1 + γ)-fold, an unseen direction is left nearly as it is."""
    n, spec = 16, DeepMemory(step=1.0, retention=0.9, gain=1.0)
    u, v = torch.linalg.qr(random(n, 2))[0].T
    state = spec.new_state(random(1), n)
    for _ in range(30):
        spec.apply(state, u.expand(8, n) * random(8, 1).abs())
    maps = {name: state[f"memory_{name}"] for name in ("in", "out")}
    seen, unseen = (spec.memory.architecture(lambda name, y: y @ maps[name].T, n**0.5 * x) for x in (u, v))
    assert 1.8 < (seen @ u) / n**0.5 < 2.2
    assert 0.9 < (unseen @ v) / n**0.5 < 1.1


def test_updates_scale_with_the_gradient_row_by_row() -> None:
    rows, sizes = random(6, 5), torch.tensor([1e-30, 1e-3, 1.0, 1e3, 1e150, 0.0], dtype=torch.float64)[:, None]
    spec = DeepMemory()
    plain = spec.apply(spec.new_state(rows, 5), torch.where(sizes > 0, rows, 0.0))
    scaled = spec.apply(spec.new_state(rows, 5), sizes * rows)
    torch.testing.assert_close(scaled, sizes * plain, rtol=1e-9, atol=0)


def test_rows_that_are_not_finite_spoil_their_own_parameter_only() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        params, alone = parameters()[:3], parameters()[:3]
        optimizer, single = DeepMomentum(params, lr=0.1), DeepMomentum(alone, lr=0.1)
        for step in range(3):
            for place, (parameter, twin) in enumerate(zip(params, alone, strict=True)):
                parameter.grad, twin.grad = gradient(parameter, step, place), gradient(twin, step, place)
            if step == 1:
                params[2].grad[:] = bad  # type: ignore[index]
                alone[2].grad = None
            optimizer.step()
            single.step()
            if step == 1:
                assert not params[2].isfinite().any()
            torch.testing.assert_close(params[0], alone[0], rtol=1e-12, atol=1e-12)


def test_unit_rows() -> None:
    rows = torch.tensor([[3e30, -4e30], [0.0, 0.0], [torch.nan, 1.0], [1e-40, 0.0]])
    x, size, valid = unit_rows(rows)
    assert valid.flatten().tolist() == [True, False, False, True]
    assert not x[1:3].any()
    torch.testing.assert_close(x[[0, 3]].square().mean(1), torch.ones(2))
    torch.testing.assert_close((x * size)[0], rows[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_to_the_bit_from_a_file(dtype: torch.dtype) -> None:
    """Also where the parameter that keeps a shape's memory has had no gradient."""

    def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for place, parameter in enumerate(params):
                parameter.grad = gradient(parameter, step, place) if place > 0 or step > 5 else None
            optimizer.step()

    settings: dict[str, Any] = {"memory": SPECS[1], "momentum": 0.8, "preconditioner": Diagonal()}
    params = parameters(dtype)
    optimizer = DeepMomentum(params, lr=0.01, output=NewtonSchulz(), **settings)
    train(params, optimizer, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(params)
    resumed = DeepMomentum(other, lr=0.5)
    resumed.load_state_dict(torch.load(file))
    train(params, optimizer, range(4, 9))
    train(other, resumed, range(4, 9))
    assert all(torch.equal(x, y) for x, y in zip(params, other, strict=True))
    assert all(p.isfinite().all() for p in params)


def test_a_state_with_a_memory_of_another_shape_is_refused() -> None:
    params = parameters()
    optimizer = DeepMomentum(params)
    for place, parameter in enumerate(params):
        parameter.grad = gradient(parameter, 0, place)
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["memory"] = DeepMemory(expansion=3)
    with pytest.raises(ValueError, match="memory_in"):
        DeepMomentum(params).load_state_dict(state)
    del optimizer.state[params[0]]["memory_in"]
    with pytest.raises(ValueError, match="memory_in"):
        DeepMomentum(params).load_state_dict(optimizer.state_dict())


def test_groups_have_memories_of_their_own() -> None:
    params = [nn.Parameter(random(3, 5, seed=i)) for i in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:], "memory": DeepMemory(3)}]
    optimizer = DeepMomentum(groups, lr=0.1)
    for place, parameter in enumerate(params):
        parameter.grad = gradient(parameter, 0, place)
    optimizer.step()
    assert [optimizer.state[p].get("memory_in", torch.zeros(0)).shape[0] for p in params] == [10, 15, 0]


def test_combines_with_momentum_and_orthogonal_output() -> None:
    """The network reads the rows of the momentum, and the output is of what it answers."""
    parameter, spec = nn.Parameter(random(4, 6)), DeepMemory()
    start = parameter.detach().clone()
    optimizer = AssociativeMomentum([parameter], lr=1.0, memory=spec, momentum=0.7, output=NewtonSchulz(adjust_lr=None))
    twin, buffer = Written(spec, 6), torch.zeros(4, 6, dtype=torch.float64)
    for step in range(5):
        parameter.grad = gradient(parameter, step, 0)
        buffer = 0.7 * buffer + parameter.grad
        optimizer.step()
        u, s, v = torch.linalg.svd(twin.step(buffer), full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        start = start - (u * s) @ v
    torch.testing.assert_close(parameter.detach(), start, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("expansion", 0),
        ("objective", "l1"),
        ("step", 0.0),
        ("retention", 1.0),
        ("retention", -0.1),
        ("gain", 0.0),
    ],
)
def test_bad_settings_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting} is .*{value}"):
        DeepMemory(**{setting: value})
