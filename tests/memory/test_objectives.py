"""Hand-written errors, factors and steps against autograd and against the minimization they come from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import (
    L2,
    MLP,
    AssociativeMemory,
    Delta,
    DotProduct,
    Gates,
    Matrix,
    absorb,
    scan,
    surprise,
)
from nestlearn.memory.types import Factor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("objective", "written"),
    [(DotProduct(), lambda p, v: -(p * v).sum()), (L2(), lambda p, v: 0.5 * ((p - v) ** 2).sum())],
    ids=["dot", "l2"],
)
def test_an_error_is_the_gradient_of_the_written_objective(objective, written):
    prediction, v = normal(5, 4).requires_grad_(), normal(5, 4, seed=1)
    (gradient,) = torch.autograd.grad(written(prediction, v), prediction)
    torch.testing.assert_close(objective.error(lambda: prediction, v), gradient, rtol=0, atol=1e-15)
    torch.testing.assert_close(objective.loss(prediction, v).sum(), written(prediction, v))


@pytest.mark.parametrize("objective", [DotProduct(), L2()], ids=["dot", "l2"])
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
def test_factors_are_the_gradient_of_every_map(objective, activation):
    """``sum_t error_t input_t^T`` equals autograd of the summed loss, map by map, with M written out here."""
    memory = AssociativeMemory(Matrix() if activation is None else MLP(3, activation), objective)
    shapes = memory.architecture.shapes(4, 4)
    weights = {n: (0.4 * normal(2, *s, seed=i)).requires_grad_() for i, (n, s) in enumerate(shapes.items())}
    k, v = normal(2, 6, 4, seed=7), normal(2, 6, 4, seed=8)
    if activation is None:
        prediction = k @ weights["W"].mT
    else:
        act = F.gelu if activation == "gelu" else F.silu
        prediction = k + act(k @ weights["in"].mT) @ weights["out"].mT
    loss = -(prediction * v).sum() if objective == DotProduct() else 0.5 * (prediction - v).square().sum()
    gradients = torch.autograd.grad(loss, list(weights.values()))
    factors = surprise(memory, weights, k, v)
    assert list(factors) == list(weights)
    for (x, error), gradient in zip(factors.values(), gradients, strict=True):
        torch.testing.assert_close(error.mT @ x, gradient, rtol=1e-12, atol=1e-14)


def one_write(
    step_size, w: Tensor, x: Tensor, error: Tensor, eta: float, retain: float = 1.0, gated: bool = False
) -> Tensor:
    """Weights after one token is absorbed by a matrix memory that stands at ``w``."""
    memory = AssociativeMemory(Matrix(), retention=Delta(gated=gated), step_size=step_size)
    state = memory.init_state((), w.shape[1], w.shape[0], params={"W": w}, dtype=torch.float64)
    gates = Gates(torch.full((1,), eta, dtype=w.dtype), torch.full((1,), retain, dtype=w.dtype))
    return absorb(memory, state, {"W": Factor(x[None], error[None])}, gates).params["W"]


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("eta", [0.01, 1.0, 50.0])
def test_the_proximal_step_is_the_argmin(eta: float, scale: float):
    """DGD is ``argmin_W 1/2 ||W x - u||^2 + 1/(2 eta) ||W - W_prev||^2`` with u = -e, solved exactly."""
    w, x, error = normal(3, 5), scale * normal(5, seed=1), normal(3, seed=2)
    # Setting the derivative to zero: W (x x^T + I / eta) = u x^T + W_prev / eta.
    left = torch.outer(x, x) + torch.eye(5, dtype=w.dtype) / eta
    right = torch.outer(-error, x) + w / eta
    minimum = torch.linalg.solve(left, right, left=False)
    torch.testing.assert_close(one_write("proximal", w, x, error, eta), minimum, rtol=1e-9, atol=1e-10)


def test_the_proximal_step_is_what_a_minimizer_finds():
    w, x, error, eta = normal(3, 4), normal(4, seed=1), normal(3, seed=2), 2.0
    found = w.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([found], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = 0.5 * (found @ x + error).square().sum() + (found - w).square().sum() / (2 * eta)
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(one_write("proximal", w, x, error, eta), found.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("retain", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("eta", [1e-3, 0.5, 1.0, 1.9, 1e6])
def test_eigenvalues_of_bounded_steps(eta: float, scale: float, retain: float):
    """The factor on W along the input: proximal in [0, 1] for alpha = 1; normalized in (-1, 1] for any input norm."""
    x = scale * normal(4, seed=1)
    w, zero = torch.outer(normal(3), x) / x.square().sum(), torch.zeros(3, dtype=torch.float64)

    def eigenvalue(kind: str, alpha: float) -> float:
        after = one_write(kind, w, x, zero, eta, alpha)
        ratio = (after @ x) / (w @ x)
        assert torch.allclose(ratio, ratio[:1])
        return ratio[0].item()

    assert -1e-12 <= eigenvalue("proximal", 1.0) < 1
    assert eigenvalue("proximal", 1.0) == pytest.approx(1 / (1 + eta * x.square().sum().item()), rel=1e-9, abs=1e-12)
    value = eigenvalue("normalized", retain)
    assert -1 < value < 1
    assert value == pytest.approx(
        retain - min(eta, 1 + retain) * x.square().sum().item() / (x.square().sum().item() + 1e-6), abs=1e-9
    )


@pytest.mark.parametrize("architecture", [Matrix(), MLP(4)], ids=["matrix", "mlp"])
@torch.no_grad()
def test_the_normalized_step_stays_finite_for_a_thousand_tokens(architecture):
    memory = AssociativeMemory(architecture, retention=Delta(), step_size="normalized", chunk_size=64)
    k = F.normalize(normal(1, 1024, 8), dim=-1).float()
    v = F.normalize(normal(1, 1024, 8, seed=1), dim=-1).float()
    state = memory.init_state((1,), 8, 8, generator=torch.Generator().manual_seed(0))
    gates = Gates(torch.full((1, 1024), 1.999), torch.ones(1, 1024))
    y, end = scan(memory, state, k, k, v, gates)
    assert torch.isfinite(y).all() and all(torch.isfinite(w).all() for w in end.params.values())
