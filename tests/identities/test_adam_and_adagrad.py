"""Adam and AdaGrad are the best memories of past gradients, in closed form (NL Appendix B).

A memory m of gradients g_i with the value P minimizes a ridge regression, element by element or with matrices:

    Σ w_i (m g_i - P)² + λ m²          m* = P M / (H + λ),      M = Σ w_i g_i, H = Σ w_i g_i²      (NL Eq. 101-103)
    Σ w_i ‖g_iᵀ m - I‖² + λ ‖m‖²       P m* = P (H + λ I)⁻¹ M,  M = Σ w_i g_i, H = Σ w_i g_i g_iᵀ  (NL Eq. 106-110)

In the second line g is transposed and P stands outside, unlike in NL: as printed, ``m g`` and the [out, out] matrix P
have a common shape only where the layer is square. The tests find minimizers by autograd and compare them with the
closed forms and with the optimizers of torch.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nestlearn.optim import AssociativeMomentum, Whitening

STEPS, SHAPE = 12, (3, 5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRADIENTS = [random(*SHAPE, seed=t) for t in range(STEPS)]


def adam_memory(first: Tensor, second: Tensor, value: Tensor, ridge: float | Tensor = 0.0) -> Tensor:
    """``P M / (H + λ)``, element by element; 0 where there was no gradient."""
    return value * first / (second + ridge).clamp(min=torch.finfo(second.dtype).tiny)


def adagrad_memory(first: Tensor, second: Tensor, value: Tensor, ridge: float = 0.0) -> Tensor:
    """``P (H + λ I)⁻¹ M``, with matrices."""
    return value @ torch.linalg.solve(second + ridge * torch.eye(len(second), dtype=second.dtype), first)


def minimizer(objective: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Of a quadratic: one Newton step from a random point, with derivatives by autograd."""
    start = random(*shape, seed=99).flatten().requires_grad_()
    gradient = torch.autograd.grad(objective(start.view(shape)), start, create_graph=True)[0]
    hessian = torch.stack([torch.autograd.grad(g, start, retain_graph=True)[0] for g in gradient])
    return (start - torch.linalg.solve(hessian, gradient)).detach().view(shape)


def weights(beta: float, t: int) -> list[float]:
    """Of a moving average corrected for its start at zero, after t steps."""
    return [(1 - beta) * beta ** (t - i) / (1 - beta**t) for i in range(1, t + 1)]


def changes(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[Tensor]:
    """What an optimizer with lr = 1 does with the gradients, step by step, as updates."""
    parameter = nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    optimizer, found = make([parameter]), []
    for g in GRADIENTS:
        before = parameter.detach().clone()
        parameter.grad = g.clone()
        optimizer.step()
        found.append(before - parameter.detach())
    return found


@pytest.mark.parametrize("beta", [0.3, 0.9])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_the_best_memory_of_the_gradients_root_is_adam(beta: float, eps: float) -> None:
    """NL Eq. 101 with moving averages, P = √H and λ = ε√H, minimized numerically: Adam with β1 = β2."""
    updates = changes(lambda p: torch.optim.Adam(p, lr=1.0, betas=(beta, beta), eps=eps))
    for t in range(1, STEPS + 1):
        pairs = list(zip(weights(beta, t), GRADIENTS[:t], strict=True))
        value = sum((w * g * g for w, g in pairs), torch.zeros(SHAPE, dtype=torch.float64)).sqrt()

        def objective(m: Tensor, pairs=pairs, value=value) -> Tensor:
            losses = [w * (m * g - value).square() for w, g in pairs]
            return torch.stack(losses).sum() + (eps * value * m.square()).sum()

        best = minimizer(objective, SHAPE)
        torch.testing.assert_close(best, updates[t - 1], rtol=1e-9, atol=1e-10)
        first, second = (torch.stack([w * g**power for w, g in pairs]).sum(0) for power in (1, 2))
        torch.testing.assert_close(best, adam_memory(first, second, value, eps * value), rtol=1e-9, atol=1e-10)


def test_betas_that_differ_are_separate_accumulators() -> None:
    """NL Eq. 102: no one regression, but the same expression."""
    updates = changes(lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.9, 0.99), eps=1e-3))
    for t in range(1, STEPS + 1):
        zero = torch.zeros(SHAPE, dtype=torch.float64)
        first = sum((w * g for w, g in zip(weights(0.9, t), GRADIENTS, strict=False)), zero)
        second = sum((w * g * g for w, g in zip(weights(0.99, t), GRADIENTS, strict=False)), zero)
        update = adam_memory(first, second, second.sqrt(), 1e-3 * second.sqrt())
        torch.testing.assert_close(update, updates[t - 1], rtol=1e-9, atol=1e-10)


def test_a_constant_ridge_is_not_torch_s_epsilon() -> None:
    """NL Eq. 105 writes ε for it: close where H is large, not where it is small."""
    first, second = torch.tensor([1.0, 1e-5]), torch.tensor([1.0, 1e-10])
    update = adam_memory(first, second, second.sqrt(), 1e-8)
    adam = first / (second.sqrt() + 1e-8)
    torch.testing.assert_close(update[0], adam[0])
    assert update[1] < 0.02 * adam[1]


def test_the_square_as_value_is_plain_momentum() -> None:
    """NL Eq. 104: H cancels, and the sum of gradients is what `torch.optim.SGD` with momentum steps along."""
    updates = changes(lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.7))
    first = sum((0.7 ** (STEPS - 1 - i) * g for i, g in enumerate(GRADIENTS)), torch.zeros(SHAPE, dtype=torch.float64))
    second = random(*SHAPE, seed=5).square()
    torch.testing.assert_close(adam_memory(first, second, second), updates[-1], rtol=1e-12, atol=1e-12)


def test_the_newest_gradient_over_all_is_torch_adagrad() -> None:
    updates = changes(lambda p: torch.optim.Adagrad(p, lr=1.0, eps=0.0))
    second = torch.zeros(SHAPE, dtype=torch.float64)
    for g, update in zip(GRADIENTS, updates, strict=True):
        second = second + g * g
        torch.testing.assert_close(adam_memory(g, second, second.sqrt()), update, rtol=1e-12, atol=1e-12)
        one = adagrad_memory(g[:1, :1], second[:1, :1], second[:1, :1].sqrt())
        torch.testing.assert_close(one, update[:1, :1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_the_best_memory_with_matrices(ridge: float) -> None:
    """NL Eq. 106: minimized numerically, then times P."""
    identity, value = torch.eye(SHAPE[1], dtype=torch.float64), random(SHAPE[0], SHAPE[0], seed=7)

    def objective(m: Tensor) -> Tensor:
        return sum(((g.T @ m - identity).square().sum() for g in GRADIENTS), ridge * m.square().sum())

    first = torch.stack(GRADIENTS).sum(0)
    second = torch.stack([g @ g.T for g in GRADIENTS]).sum(0)
    update = adagrad_memory(first, second, value, ridge)
    torch.testing.assert_close(update, value @ minimizer(objective, SHAPE), rtol=1e-8, atol=1e-9)


def test_whitening_by_sums_is_adagrad_with_a_full_matrix() -> None:
    """NL Eq. 111 without momentum: ``H^(-1/2) g``."""
    whitening = Whitening("rows", beta=None, damping=1e-13, period=1)
    updates = changes(lambda p: AssociativeMomentum(p, lr=1.0, momentum=0.0, preconditioner=whitening))
    second = torch.zeros(SHAPE[0], SHAPE[0], dtype=torch.float64)
    for g, update in zip(GRADIENTS, updates, strict=True):
        second = second + g @ g.T
        vectors, values, _ = torch.linalg.svd(second)
        root = vectors * values.sqrt() @ vectors.T
        torch.testing.assert_close(adagrad_memory(g, second, root), update, rtol=1e-7, atol=1e-8)
