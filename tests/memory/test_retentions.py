"""Retentions that are minimizers, against the minimum found numerically; the printed form of Lq by its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nestlearn.memory import (
    KL,
    L2,
    MLP,
    AssociativeMemory,
    Bregman,
    Decay,
    Delta,
    DotProduct,
    ElasticNet,
    Gates,
    Lq,
    LqDual,
    Matrix,
    Oja,
    Retention,
    absorb,
    scan,
)
from nestlearn.memory.types import Factor

ROWS, COLUMNS, ETA, ALPHA = 3, 4, 0.7, 0.8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, ERROR = normal(COLUMNS, seed=1), normal(ROWS, seed=2)
GRADIENT = torch.outer(ERROR, X)


def after_one_token(retention: Retention, start: Tensor) -> tuple[Tensor, Tensor]:
    """Weights before and after one token, written with gradient ``GRADIENT``, step ETA and decay ALPHA."""
    memory = AssociativeMemory(Matrix(), retention=retention, chunk_size=1)
    state = memory.init_state((1,), COLUMNS, ROWS, params={"W": start}, dtype=torch.float64)
    gates = Gates(torch.full((1, 1), ETA, dtype=start.dtype), torch.full((1, 1), ALPHA, dtype=start.dtype))
    end = absorb(memory, state, {"W": Factor(X[None, None], ERROR[None, None])}, gates)
    return retention.anchored(start), retention.anchored(end.params["W"][0])


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The minimizer of a smooth convex function, by Newton's method with step halving."""
    shape, point = start.shape, start.detach().flatten()

    def flat(z: Tensor) -> Tensor:
        return loss(z.view(shape))

    for _ in range(40):
        gradient = torch.autograd.functional.jacobian(flat, point)
        if gradient.abs().max() < 1e-13:  # type: ignore[union-attr]
            break
        hessian = torch.autograd.functional.hessian(flat, point)
        step = torch.linalg.lstsq(hessian, gradient.unsqueeze(-1)).solution.squeeze(-1)
        size = 1.0
        while size > 1e-6 and not flat(point - size * step) <= flat(point):
            size /= 2
        point = point - size * step
    return point.view(shape)


def test_delta_is_the_minimizer():
    """The proximal step of DGD: ``argmin_W 1/2 ||W x - u||^2 + 1/(2 eta) ||W - W_prev||^2`` with u = -e."""
    w = normal(ROWS, COLUMNS, seed=3)
    memory = AssociativeMemory(Matrix(), retention=Delta(), step_size="proximal", chunk_size=1)
    state = memory.init_state((1,), COLUMNS, ROWS, params={"W": w}, dtype=torch.float64)
    gates = Gates(torch.full((1, 1), ETA, dtype=w.dtype), torch.ones(1, 1, dtype=w.dtype))
    end = absorb(memory, state, {"W": Factor(X[None, None], ERROR[None, None])}, gates)
    found = minimum(lambda z: 0.5 * (z @ X + ERROR).square().sum() + (z - w).square().sum() / (2 * ETA), w)
    torch.testing.assert_close(end.params["W"][0], found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("step_size", ["raw", "proximal"])
def test_oja_descends_and_minimizes_its_objective(step_size):
    """NL Eq. 67: one step of descent on ``-<W k, v> + 1/2 ||W^T v||^2``; proximal steps are its minimizer."""
    w, v = normal(ROWS, COLUMNS, seed=3), -ERROR
    memory = AssociativeMemory(Matrix(), retention=Oja(), step_size=step_size, chunk_size=1)
    state = memory.init_state((1,), COLUMNS, ROWS, params={"W": w}, dtype=torch.float64)
    gates = Gates(torch.full((1, 1), ETA, dtype=w.dtype), torch.ones(1, 1, dtype=w.dtype))
    _, end = scan(memory, state, X[None, None], X[None, None], v[None, None], gates)

    def objective(z: Tensor) -> Tensor:
        return -torch.dot(z @ X, v) + 0.5 * (z.mT @ v).square().sum()

    expected = w - ETA * torch.func.grad(objective)(w)
    if step_size == "proximal":
        expected = minimum(lambda z: objective(z) + (z - w).square().sum() / (2 * ETA), w)
    torch.testing.assert_close(end.params["W"][0], expected, rtol=0, atol=1e-10)


def test_decay_is_the_minimizer():
    before, after = after_one_token(Decay(), normal(ROWS, COLUMNS, seed=3))

    def loss(w: Tensor) -> Tensor:
        kept = ALPHA / 2 * (w - before).square().sum() + (1 - ALPHA) / 2 * w.square().sum()
        return ETA * (w * GRADIENT).sum() + kept

    torch.testing.assert_close(after, minimum(loss, before), rtol=0, atol=1e-10)


@pytest.mark.parametrize("q", [1.5, 2.0, 3.0, 4.0])
def test_lq_dual_is_the_minimizer(q: float):
    """``argmin_W <W, eta G - alpha A> + 1/2 ||W||_q^2``; the gradient of the norm at W_prev is the accumulator A."""
    start = normal(ROWS, COLUMNS, seed=3)
    before, after = after_one_token(LqDual(q), start)
    dual = before.clone().requires_grad_()
    (slope,) = torch.autograd.grad(dual.abs().pow(q).sum().pow(2 / q) / 2, dual)
    torch.testing.assert_close(slope, start, rtol=0, atol=1e-9)
    target = ALPHA * slope.detach() - ETA * GRADIENT

    def loss(w: Tensor) -> Tensor:
        return 0.5 * w.abs().pow(q).sum().pow(2 / q) - (w * target).sum()

    # Convex, but for q < 2 without a second derivative at 0: the minimizer is compared by its first-order condition.
    (residual,) = torch.autograd.grad(loss(after.requires_grad_()), after)
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-8)
    found = after.detach() + 0.1 * normal(ROWS, COLUMNS, seed=4)
    optimizer = torch.optim.LBFGS([found.requires_grad_()], max_iter=300, tolerance_grad=1e-13, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(found)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(found.detach(), after.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("c", [1.0, 3.0])
def test_kl_is_the_minimizer(c: float):
    """Over rows of sum c: ``eta <W, G> + alpha KL(W | W_prev) + (1 - alpha) sum W log W``."""
    before, after = after_one_token(KL(c), normal(ROWS, COLUMNS, seed=3))
    torch.testing.assert_close(after.sum(-1), torch.full((ROWS,), c, dtype=after.dtype))

    def loss(free: Tensor) -> Tensor:
        w = torch.cat([free, c - free.sum(-1, keepdim=True)], -1)
        kept = ALPHA * (w * (w / before).log()).sum() + (1 - ALPHA) * (w * w.log()).sum()
        value = ETA * (w * GRADIENT).sum() + kept
        return torch.where((w > 0).all(), value, torch.inf)

    found = minimum(loss, before[:, :-1])
    torch.testing.assert_close(after[:, :-1], found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 2.0])
def test_elastic_net_is_the_minimizer(threshold: float):
    """``eta <W, G> + alpha/2 ||W - W_prev||^2 + (1 - alpha)/2 ||W||^2 + g ||W||_1``, entry by entry by bisection."""
    before, after = after_one_token(ElasticNet(threshold), normal(ROWS, COLUMNS, seed=3))
    low, high = torch.full_like(before, -50.0), torch.full_like(before, 50.0)
    for _ in range(100):
        middle = (low + high) / 2
        slope = ETA * GRADIENT + ALPHA * (middle - before) + (1 - ALPHA) * middle + threshold * middle.sign()
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    torch.testing.assert_close(after, (low + high) / 2, rtol=0, atol=1e-12)
    assert threshold < 1 or (after == 0).any()


def test_the_smooth_soft_threshold_approaches_the_sharp_one():
    a = 3 * normal(200)
    sharp, smooth = ElasticNet(0.1), ElasticNet(0.1, smooth=True)
    assert (sharp.close(a) - smooth.close(a)).abs().max() < 0.1
    torch.testing.assert_close(smooth.close(10 * a), sharp.close(10 * a), rtol=0, atol=0.03)
    small = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.grad(smooth.close(small).sum(), small)[0].any()


@pytest.mark.parametrize("c", [0.5, 2.0])
def test_bregman_is_the_minimizer(c: float):
    """``eta <W, G> + 2c (alpha D_F(u, u_prev) + (1 - alpha) D_F(u, 1/2))`` with u = (W / c + 1) / 2."""
    before, after = after_one_token(Bregman(c), normal(ROWS, COLUMNS, seed=3))

    def entropy(u: Tensor) -> Tensor:
        return u * u.log() + (1 - u) * (1 - u).log()

    def divergence(u: Tensor, v: Tensor) -> Tensor:
        return (entropy(u) - entropy(v) - (v / (1 - v)).log() * (u - v)).sum()

    def loss(w: Tensor) -> Tensor:
        u, previous = (w / c + 1) / 2, (before / c + 1) / 2
        kept = ALPHA * divergence(u, previous) + (1 - ALPHA) * divergence(u, torch.full_like(u, 0.5))
        inside = ((u > 0) & (u < 1)).all()
        return torch.where(inside, ETA * (w * GRADIENT).sum() + 2 * c * kept, torch.inf)

    torch.testing.assert_close(after, minimum(loss, before), rtol=0, atol=1e-10)


@pytest.mark.parametrize("q", [2.0, 3.0, 4.0])
def test_lq_is_the_printed_formula(q: float):
    start = normal(ROWS, COLUMNS, seed=3)
    before, after = after_one_token(Lq(q, eps=1e-6), start)
    for weights, a in ((before, start), (after, ALPHA * start - ETA * GRADIENT)):
        norm = (sum(abs(float(x)) ** q for x in a.flatten()) + 1e-6) ** (1 / q)
        torch.testing.assert_close(weights, a / norm ** (q - 2), rtol=1e-12, atol=0)
    # eps bounds the weights however small the accumulator.
    for size in (1.0, 1e-1, 1e-2, 1e-9, 0.0):
        assert q > 2 or size <= 1
        entry = Lq(4).anchored(torch.full((1, 1), size, dtype=torch.float64))
        assert entry <= 1e-6**-0.25 / 2**0.5


@pytest.mark.parametrize("retention", [Decay(), Lq(4), LqDual(4), LqDual(1.5), Bregman(4.0), ElasticNet()], ids=str)
def test_a_start_has_the_weights_it_is_asked_for(retention: Retention):
    weights = 0.3 * normal(2, 5, 4)
    # The smooth root of LqDual flattens what is below a hundredth.
    torch.testing.assert_close(retention.anchored(retention.start(weights)), weights, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("retention", [Lq(), LqDual(), KL(), ElasticNet(), Bregman()], ids=str)
def test_gradients_are_finite_where_everything_is_zero(retention: Retention):
    """An empty matrix, zero keys and zero gates: no gradient is NaN."""
    memory = AssociativeMemory(Matrix(), L2(), retention, chunk_size=2)
    zero = torch.zeros(1, 5, 3, dtype=torch.float64, requires_grad=True)
    gates = Gates(torch.zeros(1, 5, dtype=torch.float64, requires_grad=True), torch.zeros(1, 5, dtype=torch.float64))
    start = torch.zeros(1, 3, 3, dtype=torch.float64, requires_grad=True)
    for engine in ("reference", "chunked"):
        state = memory.init_state((1,), 3, 3, params={"W": start}, dtype=torch.float64)
        y, end = scan(memory, state, zero, zero, zero, gates, engine=engine)
        loss = y.sum() + end.params["W"].square().sum()
        for gradient in torch.autograd.grad(loss, [zero, gates.lr, start]):
            assert torch.isfinite(gradient).all()


def test_gates_per_channel_that_are_equal_are_one_gate():
    """`Decay(per_channel=True)` contains `Decay()`; the second map of an MLP decays along its outputs."""
    q, k, v = normal(3, 2, 9, 4).unbind(0)
    lr, retain = 0.1 * torch.rand(2, 9, dtype=torch.float64), torch.rand(2, 9, dtype=torch.float64)
    outcomes = []
    for channels in (False, True):
        memory = AssociativeMemory(MLP(2), DotProduct(), Decay(channels), chunk_size=4)
        state = memory.init_state((2,), 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gate = retain.unsqueeze(-1).expand(2, 9, 4) if channels else retain
        outcomes.append(scan(memory, state, q, k, v, Gates(lr, gate))[0])
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-12)


def test_each_channel_decays_by_its_own_gate():
    """Gated linear attention, ``S_t = S_{t-1} Diag(alpha_t) + v_t k_t^T``, written out."""
    q, k, v = normal(3, 1, 9, 4).unbind(0)
    retain = torch.rand(1, 9, 4, dtype=torch.float64)
    memory = AssociativeMemory(retention=Decay(per_channel=True), chunk_size=4)
    ones = torch.ones(1, 9, dtype=torch.float64)
    y, _ = scan(memory, memory.init_state((1,), 4, 4, dtype=torch.float64), q, k, v, Gates(ones, retain))
    s = torch.zeros(4, 4, dtype=torch.float64)
    for t in range(9):
        s = s * retain[0, t] + torch.outer(v[0, t], k[0, t])
        torch.testing.assert_close(y[0, t], s @ q[0, t], rtol=1e-12, atol=1e-12)
