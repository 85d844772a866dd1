"""Newton-Schulz moves each singular value by its polynomial and nothing else; where it arrives within five steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestlearn.memory import newton_schulz
from nestlearn.memory.kernels.newton_schulz import COEFFICIENTS, POLAR_EXPRESS, printed_iteration

TRIPLES = {"quintic": (COEFFICIENTS,), "polar_express": POLAR_EXPRESS}
RANGES = {"quintic": (0.65, 1.25), "polar_express": (0.85, 1.15)}


def of_spectrum(values: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U diag(values) Vᵀ`` with random U and V."""
    size = len(values)
    u, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, size, dtype=torch.float64))
    return u @ torch.diag(values) @ v.mT, u, v


def scalar(values: Tensor, name: str, steps: int = 5) -> Tensor:
    """The iteration on single numbers, after division by their Euclidean norm."""
    values = values / values.norm()
    for step in range(steps):
        a, b, c = TRIPLES[name][min(step, len(TRIPLES[name]) - 1)]
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("name", TRIPLES)
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e2, 1e4, 1e8])
@pytest.mark.parametrize("columns", [8, 13])
def test_equals_the_scalar_iteration_at_any_condition_number(name, condition, columns):
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), 8, dtype=torch.float64) * 3.7
    x, u, v = of_spectrum(values, columns)
    expected = u @ torch.diag(scalar(values, name)) @ v.mT
    result = newton_schulz(x, 5, TRIPLES[name])
    # Rounding of X Xᵀ is relative to its largest value; the steep start multiplies it by up to a thousand.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(newton_schulz(x.mT, 5, TRIPLES[name]).mT, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", TRIPLES)
@pytest.mark.parametrize("condition", [1.0, 3.0, 10.0, 30.0, 100.0])
def test_singular_values_arrive_at_one_for_condition_numbers_to_a_hundred(name, condition):
    low, high = RANGES[name]
    exponent = -float(torch.tensor(condition).log10())
    spectra = [torch.logspace(0, exponent, size, dtype=torch.float64) for size in (2, 16, 64, 256)]
    # The worst spectrum: one small value makes the others large in the norm. The docstring's sizes.
    worst = torch.ones(50 if name == "quintic" else 110, dtype=torch.float64)
    worst[-1] = 1 / condition
    for values in (*spectra, worst):
        x, _, _ = of_spectrum(values, len(values) + 3)
        result = torch.linalg.svdvals(newton_schulz(x, 5, TRIPLES[name]))
        assert low <= float(result.min()) and float(result.max()) <= high, len(values)


@pytest.mark.parametrize("name", TRIPLES)
def test_the_stated_bounds_of_the_range_are_sharp(name):
    """From the smallest value of the docstring on all arrive; half of it does not."""
    smallest = {"quintic": 1.43e-3, "polar_express": 9.6e-4}[name]
    low, high = RANGES[name]
    values = torch.logspace(float(torch.tensor(smallest).log10()), 0, 100_001, dtype=torch.float64)

    def arrived(s: Tensor) -> Tensor:
        for step in range(5):
            a, b, c = TRIPLES[name][min(step, len(TRIPLES[name]) - 1)]
            s = a * s + b * s**3 + c * s**5
        return (s >= low) & (s <= high)

    assert bool(arrived(values).all())
    assert not bool(arrived(torch.tensor(smallest / 2)))
    many = torch.ones(400, dtype=torch.float64)
    many[-1] = 0.01
    x, _, _ = of_spectrum(many, 400)
    assert float(torch.linalg.svdvals(newton_schulz(x, 5, TRIPLES[name])).min()) < low


@pytest.mark.parametrize("name", TRIPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_goes_to_zero(name, dtype):
    x = torch.zeros(2, 3, 5, dtype=dtype)
    assert torch.equal(newton_schulz(x, 5, TRIPLES[name]), x)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e18])
def test_only_the_direction_matters(scale):
    x = torch.randn(6, 9)
    torch.testing.assert_close(
        newton_schulz(x * scale), newton_schulz(x), rtol=2e-2 if scale < 1e-5 else 1e-4, atol=2e-3
    )


def test_the_printed_iteration_ends_at_the_roots_of_its_cubic_and_is_not_orthogonal():
    values = torch.tensor([2.0, 1.0, 0.6, 0.1], dtype=torch.float64)
    x, u, v = of_spectrum(values, 7)
    found = torch.linalg.diagonal(u.mT @ printed_iteration(x, steps=2000, step_size=0.05) @ v)
    torch.testing.assert_close(2 * found**3 - found, values, rtol=0, atol=1e-9)
    torch.testing.assert_close(found[1], torch.ones((), dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(found.max() - found.min()) > 0.3
    torch.testing.assert_close(u @ torch.diag(found) @ v.mT, printed_iteration(x, 2000), rtol=0, atol=1e-9)
