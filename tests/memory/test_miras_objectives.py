"""Errors of the further objectives against autograd of the written loss, and against the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestlearn.memory import (
    L2,
    MLP,
    AssociativeMemory,
    Gates,
    Huber,
    Lp,
    Matrix,
    Objective,
    OrthogonalizedMomentum,
    ValueShiftRobust,
    absorb,
    newton_schulz,
    scan,
    surprise,
)
from nestlearn.memory.objectives import with_threshold

from .test_objectives import normal

OBJECTIVES: list[Objective] = [
    *(Lp(p) for p in (1, 1.5, 2, 3, 4)),
    Lp(3, sharpness=50.0),
    *(Huber(form) for form in ("coordinate", "norm", "switch")),
    Huber("norm", threshold=0.8),
    ValueShiftRobust(),
    ValueShiftRobust(0.5),
]
THRESHOLD = torch.tensor([0.0, 0.3, 0.9, 1.7, 100.0, 1.0], dtype=torch.float64)


def at(objective: Objective, threshold: Tensor) -> Objective:
    constant = getattr(objective, "threshold", 0.0)
    return with_threshold(objective, threshold if constant is None else None)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_an_error_is_the_gradient_of_the_written_objective(objective: Objective):
    """First derivative, and the derivatives of a function of it with respect to residual and threshold."""
    outcomes = []
    for written in (True, False):
        prediction, v = normal(6, 4).requires_grad_(), normal(6, 4, seed=1).requires_grad_()
        threshold = THRESHOLD.clone().requires_grad_()
        here = at(objective, threshold)
        if written:
            (error,) = torch.autograd.grad(here.loss(prediction, v).sum(), prediction, create_graph=True)
        else:
            error = here.error(lambda p=prediction: p, v)
        leaves = [prediction, v, threshold]
        slopes = torch.autograd.grad((error * normal(6, 4, seed=2)).sum(), leaves, allow_unused=True)
        outcomes.append(
            [error.detach(), *(torch.zeros_like(x) if s is None else s for s, x in zip(slopes, leaves, strict=True))]
        )
    for hand, autograd in zip(*outcomes, strict=True):
        torch.testing.assert_close(hand, autograd, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o != Huber("switch")], ids=str)
def test_a_loss_is_the_integral_of_its_error(objective: Objective):
    """Along a line of residuals the loss rises by what finite differences of it say: the value is a true potential."""
    v = torch.zeros(6, 4, dtype=torch.float64)
    for scale in (0.01, 0.3, 3.0):
        r, step = scale * normal(6, 4), 1e-6 * normal(6, 4, seed=1)
        here = at(objective, THRESHOLD)
        rise = here.loss(r + step, v) - here.loss(r - step, v)
        expected = (here.error(lambda r=r: r, v) * 2 * step).sum(-1)
        torch.testing.assert_close(rise, expected, rtol=1e-4, atol=1e-11)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_an_error_is_finite_and_zero_at_zero(objective: Objective):
    r = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    threshold = THRESHOLD.clone().requires_grad_()
    here = at(objective, threshold)
    error = here.error(lambda: r, torch.zeros_like(r))
    assert not error.any()
    for loss in (error.sum(), here.loss(r, torch.zeros_like(r)).sum()):
        for gradient in torch.autograd.grad(loss, [r, threshold], allow_unused=True):
            assert gradient is None or torch.isfinite(gradient).all()


def test_errors_by_their_formulas():
    r, zero = normal(6, 4), torch.zeros(6, 4, dtype=torch.float64)
    norm = r.norm(dim=-1, keepdim=True)
    d = THRESHOLD[:, None]
    expected = {
        Lp(3): 3 * torch.tanh(10 * r) * (r**2 + 1e-6),
        Lp(1): torch.tanh(10 * r),
        Lp(2.5): 2.5 * torch.tanh(10 * r) * (r**2 + 1e-6) ** 0.75,
        Huber("coordinate"): torch.minimum(torch.maximum(r, -d), d),
        Huber("norm"): torch.where(norm <= d, r, d * r / norm),
        Huber("switch"): torch.where(norm <= d, r, d * torch.sign(r)),
        ValueShiftRobust(): r + d * r / (norm**2 + 1e-6).sqrt(),
    }
    for objective, error in expected.items():
        got = at(objective, THRESHOLD).error(lambda: r, zero)
        torch.testing.assert_close(got, error, rtol=1e-12, atol=1e-14, msg=str(objective))


def test_value_shifts_are_the_worst_within_the_threshold():
    """``max over ||u|| <= d of 1/2 ||r - u||^2`` is the loss plus ``d^2 / 2``."""
    r, d = normal(5), 0.7
    loss = ValueShiftRobust(d).loss(r[None], torch.zeros(1, 5, dtype=torch.float64)) + d**2 / 2
    directions = torch.nn.functional.normalize(normal(20000, 5, seed=1), dim=-1)
    found = (0.5 * (r - d * directions).square().sum(-1)).max()
    assert found <= loss + 1e-6 and loss - found < 0.05 * loss


@pytest.mark.parametrize("objective", [Lp(3), Huber("switch"), ValueShiftRobust()], ids=str)
def test_surprise_is_the_gradient_of_every_map(objective: Objective):
    memory = AssociativeMemory(MLP(3), objective)
    weights = {
        n: (0.4 * normal(2, *s, seed=i)).requires_grad_()
        for i, (n, s) in enumerate({"in": (12, 4), "out": (4, 12)}.items())
    }
    k, v = normal(2, 6, 4, seed=7), normal(2, 6, 4, seed=8)
    threshold = None if isinstance(objective, Lp) else THRESHOLD.expand(2, 6)
    prediction = k + torch.nn.functional.gelu(k @ weights["in"].mT) @ weights["out"].mT
    loss = with_threshold(objective, threshold).loss(prediction, v).sum()
    gradients = torch.autograd.grad(loss, list(weights.values()))
    factors = surprise(memory, weights, k, v, threshold)
    for (x, error), gradient in zip(factors.values(), gradients, strict=True):
        torch.testing.assert_close(error.mT @ x, gradient, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------------------- Newton-Schulz


def test_newton_schulz_is_its_polynomial_of_the_singular_values():
    a, b, c = 3.4445, -4.7750, 2.0315
    for shape in ((5, 3), (3, 5), (4, 4)):
        x = normal(2, *shape)
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        s = s / s.square().sum(-1, keepdim=True).sqrt()
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        expected = u @ (s.unsqueeze(-1) * vh)
        torch.testing.assert_close(newton_schulz(x), expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(newton_schulz(1e6 * x), expected, rtol=1e-9, atol=1e-10)
        assert torch.linalg.svdvals(newton_schulz(x, 8)).sub(1).abs().max() < 0.35


def test_newton_schulz_keeps_zero_and_its_gradients_finite():
    zero = torch.zeros(2, 3, 4, requires_grad=True)
    y = newton_schulz(zero)
    assert not y.any()
    assert torch.isfinite(torch.autograd.grad(y.sum(), zero)[0]).all()
    huge = torch.full((3, 4), 1e30)
    assert torch.isfinite(newton_schulz(huge)).all()


def test_orthogonalized_momentum_with_chunks_of_one_token():
    """``W_t = alpha_t W_{t-1} + eta_t NS(S_t)`` with ``S_t = beta_t S_{t-1} - e_t x_t^T``."""
    memory = AssociativeMemory(Matrix(), L2(), algorithm=OrthogonalizedMomentum(), chunk_size=1)
    q, k, v = normal(3, 1, 9, 4).unbind(0)
    lr, retain, beta = torch.rand(3, 1, 9, dtype=torch.float64)
    w, s = 0.3 * normal(4, 4, seed=5), torch.zeros(4, 4, dtype=torch.float64)
    state = memory.init_state((1,), 4, 4, params={"W": w}, dtype=torch.float64)
    y, _ = scan(memory, state, q, k, v, Gates(lr, retain, beta))
    for t in range(9):
        s = beta[0, t] * s - torch.outer(w @ k[0, t] - v[0, t], k[0, t])
        w = retain[0, t] * w + lr[0, t] * newton_schulz(s)
        torch.testing.assert_close(y[0, t], w @ q[0, t], rtol=1e-10, atol=1e-11)


def test_absorbing_part_of_a_chunk_keeps_the_pending_steps():
    memory = AssociativeMemory(Matrix(), L2(), algorithm=OrthogonalizedMomentum(), chunk_size=4)
    k, v = normal(2, 4, 3), normal(2, 4, 3, seed=1)
    gates = Gates(*torch.rand(3, 2, 4, dtype=torch.float64))
    state = memory.init_state((2,), 3, 3, dtype=torch.float64)
    whole = absorb(memory, state, surprise(memory, state.anchor, k, v), gates)
    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        here = surprise(memory, state.anchor, k[:, part], v[:, part])
        state = absorb(memory, state, here, gates.map(lambda g, part=part: g[:, part]))
        assert (state.pending is not None and bool(state.pending.any())) == (part.stop < 4)
    torch.testing.assert_close(state.params["W"], whole.params["W"], rtol=1e-12, atol=1e-12)
