"""NL Appendix B: minimizers found by autograd, their closed forms, and the optimizers of torch that they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nestlearn.optim import (
    AdaGradMemory,
    AdamMemory,
    AssociativeMomentum,
    Whitening,
    adagrad_memory,
    adam_memory,
)

STEPS, SHAPE = 12, (3, 5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRADIENTS = [random(*SHAPE, seed=t) for t in range(STEPS)]


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
        first, second = sum(w * g for w, g in pairs), sum(w * g * g for w, g in pairs)
        torch.testing.assert_close(best, adam_memory(first, second, value, eps * value), rtol=1e-9, atol=1e-10)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.9, 0.99)])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3), (4, 3, 2, 2)])
def test_adam_memory_is_torch_adamw(betas: tuple[float, float], shape: tuple[int, ...]) -> None:
    ours, theirs = (nn.Parameter(random(*shape, seed=3)) for _ in range(2))
    settings = {"lr": 0.02, "betas": betas, "eps": 1e-3, "weight_decay": 0.1}
    pairs = [(ours, AdamMemory([ours], **settings)), (theirs, torch.optim.AdamW([theirs], **settings))]  # type: ignore[arg-type]
    for parameter, optimizer in pairs:
        for step in range(20):
            parameter.grad = random(*shape, seed=step) * (step != 0)  # also where there has been no gradient yet
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_other_values_and_ridges() -> None:
    """Steps along the minimizer of NL Eq. 101 with P = H, and with a constant λ."""
    for value, ridge in (("square", 0.0), ("square", 0.3), ("root", 0.3)):
        made = changes(lambda p, v=value, r=ridge: AdamMemory(p, lr=1.0, betas=(0.8, 0.8), value=v, ridge=r))  # type: ignore[arg-type]
        for t in (1, 5, STEPS):
            pairs = list(zip(weights(0.8, t), GRADIENTS[:t], strict=True))
            square = torch.stack([w * g * g for w, g in pairs]).sum(0)
            asked = square.sqrt() if value == "root" else square

            def objective(m: Tensor, pairs=pairs, asked=asked, ridge=ridge) -> Tensor:
                return sum((w * (m * g - asked).square().sum() for w, g in pairs), ridge * m.square().sum())

            torch.testing.assert_close(made[t - 1], minimizer(objective, SHAPE), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("momentum", "period"), [(0.0, 1), (0.8, 3)])
def test_adagrad_memory_equals_the_written_rule(momentum: float, period: int) -> None:
    made = changes(lambda p: AdaGradMemory(p, lr=1.0, momentum=momentum, ridge=0.2, period=period))
    first, second, applied = torch.zeros(SHAPE), torch.zeros(SHAPE[0], SHAPE[0]), torch.zeros(0)
    for step, (g, update) in enumerate(zip(GRADIENTS, made, strict=True)):
        first, second = momentum * first + g, second + g @ g.T
        if step % period == 0:
            vectors, values, _ = torch.linalg.svd(second)
            identity = torch.eye(len(second), dtype=g.dtype)
            root, mean = vectors * values.sqrt() @ vectors.T, float(second.trace()) / len(second)
            applied = adagrad_memory(identity, second, root, ridge=0.2 * mean)
        torch.testing.assert_close(update, applied @ first, rtol=1e-8, atol=1e-9)


def test_adagrad_memory_of_single_rows_is_torch_adagrad() -> None:
    """One column per row: each row's H is its own square, as in the element-wise rule."""
    ours, theirs = (nn.Parameter(random(6, 1, 1)) for _ in range(2))
    pairs = [(ours, AdaGradMemory([ours], lr=0.1, ridge=1e-12)), (theirs, torch.optim.Adagrad([theirs], lr=0.1))]
    for parameter, optimizer in pairs:
        for step in range(10):
            parameter.grad = random(6, 1, 1, seed=step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamMemory(p, betas=(0.9, 1.0)), "betas is"),
        (lambda p: AdamMemory(p, value="mean"), "value is 'mean'"),
        (lambda p: AdamMemory(p, ridge=-1.0), "ridge is -1.0"),
        (lambda p: AdamMemory(p, eps=-1.0), "eps is -1.0"),
        (lambda p: AdaGradMemory(p, momentum=1.0), "momentum is"),
        (lambda p: AdaGradMemory(p, ridge=0.0), "ridge is 0.0"),
        (lambda p: AdaGradMemory(p, period=0), "period is 0"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[list[nn.Parameter]], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(2, 2))])
