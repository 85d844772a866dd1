"""The closed forms of edits against the formulas of the papers, in float64 and by dense matrices."""

from __future__ import annotations

import pytest
import torch

from nestlearn.continual.editing.solve import null_space, right_factor, soft
from nestlearn.models.stacking.general import leading_directions

WIDTH, OUT, FACTS, PROTECT = 12, 5, 3, 0.1


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    """Keys, wanted changes, keys of earlier edits, and C of general inputs that hardly use the last five directions."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    general = (
        draw(200, WIDTH)
        * torch.tensor([1.0] * 7 + [1e-3] * 5, dtype=torch.float64)
        @ torch.linalg.qr(draw(WIDTH, WIDTH))[0]
    )
    return {
        "keys": draw(FACTS, WIDTH),
        "wanted": draw(FACTS, OUT),
        "earlier": draw(1, WIDTH),
        "C": general.mT @ general / len(general),
        "general": general,
    }


def scale_of(keys: torch.Tensor, opened: torch.Tensor) -> torch.Tensor:
    return (keys * opened).sum(1).mean()


def test_memit_is_its_formula_with_the_package_s_memory_of_general_inputs(given) -> None:
    """R Kᵀ (K Kᵀ + lambda (C + c_0 c I))⁻¹ in columns, with mu = lambda c_0 c."""
    keys, wanted, c = given["keys"], given["wanted"], given["C"]
    opening, mean = soft(leading_directions(c), PROTECT), c.trace() / WIDTH
    got = wanted.mT @ right_factor(keys, opening, weight=0.3)
    mu = 0.3 * scale_of(keys, opening(keys))
    metric = mu / (PROTECT * mean) * (c + PROTECT * mean * torch.eye(WIDTH, dtype=c.dtype))
    torch.testing.assert_close(got, wanted.mT @ keys @ (keys.mT @ keys + metric).inverse(), rtol=1e-9, atol=1e-12)


def test_every_form_is_the_minimum_of_its_objective(given) -> None:
    """The gradient of |K Dᵀ - R|² + |K_p Dᵀ|² + mu tr(D P⁻¹ Dᵀ), by autograd, is zero there."""
    keys, wanted, earlier, c = (given[name] for name in ("keys", "wanted", "earlier", "C"))
    opening = soft(leading_directions(c), PROTECT)
    inverse = opening(torch.eye(WIDTH, dtype=c.dtype)).inverse()
    mu = 0.3 * scale_of(keys, opening(keys))
    change = (wanted.mT @ right_factor(keys, opening, 0.3, earlier)).requires_grad_()
    misses = (keys @ change.mT - wanted).square().sum() + (earlier @ change.mT).square().sum()
    (gradient,) = torch.autograd.grad(misses + mu * (change @ inverse @ change.mT).trace(), change)
    assert gradient.abs().max() < 1e-10


def test_rome_reaches_the_wanted_output_and_is_its_formula(given) -> None:
    """Λ (C⁻¹ k)ᵀ with Λ = (v* - W k) / ((C⁻¹ k)ᵀ k)."""
    key, wanted, c = given["keys"][:1], given["wanted"][:1], given["C"]
    change = wanted.mT @ right_factor(key, soft(leading_directions(c), PROTECT))
    torch.testing.assert_close(key @ change.mT, wanted, rtol=1e-10, atol=1e-12)
    mean = c.trace() / WIDTH
    direction = key @ (c + PROTECT * mean * torch.eye(WIDTH, dtype=c.dtype)).inverse()
    torch.testing.assert_close(change, wanted.mT @ direction / (direction @ key.mT), rtol=1e-9, atol=1e-12)


def test_alphaedit_is_its_formula_and_leaves_general_inputs_and_earlier_keys(given) -> None:
    """(P (K Kᵀ + K_p K_pᵀ) + lambda I) Dᵀ = P K Rᵀ in columns."""
    keys, wanted, earlier, c = (given[name] for name in ("keys", "wanted", "earlier", "C"))
    opening = null_space(leading_directions(c), threshold=0.02)
    projector = opening(torch.eye(WIDTH, dtype=c.dtype))
    assert round(projector.trace().item()) == 5
    change = wanted.mT @ right_factor(keys, opening, 0.2, earlier)
    mu = 0.2 * scale_of(keys, opening(keys))
    left = projector @ (keys.mT @ keys + earlier.mT @ earlier) + mu * torch.eye(WIDTH, dtype=c.dtype)
    torch.testing.assert_close(change.mT, torch.linalg.solve(left, projector @ keys.mT @ wanted), rtol=1e-8, atol=1e-12)
    unprotected = wanted.mT @ right_factor(keys, lambda x: x, 0.2)
    assert (given["general"] @ change.mT).norm() < 0.02 * (given["general"] @ unprotected.mT).norm()
    exact = wanted.mT @ right_factor(keys, opening, 1e-9, earlier)
    torch.testing.assert_close(keys @ exact.mT, wanted, rtol=1e-4, atol=1e-4)
    assert (earlier @ exact.mT).abs().max() < 1e-5 < 1e-3 < (earlier @ change.mT).abs().max()


def test_keys_among_general_inputs_are_refused(given) -> None:
    opening = null_space(leading_directions(given["C"]), threshold=0.02)
    inside = given["general"][:1] - opening(given["general"][:1])
    with pytest.raises(ValueError, match="among the general inputs"):
        right_factor(inside, opening, 0.1)
