"""Functions with hand-written gradients: values, first and second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from nestlearn.memory import MLP
from nestlearn.memory.kernels import products
from nestlearn.memory.kernels.products import (
    BLOCK_ELEMENTS,
    activate_with_error,
    limit_gradient,
    potential,
    segment_products,
    solved_erasure,
    unit_lower_inverse,
    unit_norm,
)

from .cases import Case, make_inputs, run


def normal(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_()


GATES = torch.tensor([[0.5, 0.9, 0.0, 1.0, 0.3], [1.0, 0.0, 0.7, 0.0, 1.0]], dtype=torch.float64)

FUNCTIONS = {
    "segment_products": (segment_products, (GATES.clone().requires_grad_(),)),
    "unit_lower_inverse": (lambda x: unit_lower_inverse(x.tril(-1)), (normal(2, 4, 4),)),
    "solved_erasure": (
        lambda x, before, eta: solved_erasure(x, before.tril(-1), eta),
        (normal(2, 3, 4, 5), normal(2, 1, 4, 4), normal(2, 1, 4)),
    ),
    "gelu_and_error": (lambda z, b: activate_with_error("gelu", z, b), (normal(7), normal(7, seed=1))),
    "silu_and_error": (lambda z, b: activate_with_error("silu", z, b), (normal(7), normal(7, seed=1))),
    "unit_norm": (unit_norm, (normal(3, 4),)),
    "potential": (lambda r: potential(r, r.pow(4).sum(-1) / 4, r.pow(3)), (normal(3, 4),)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives(name: str):
    function, arguments = FUNCTIONS[name]
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


def test_every_hand_written_gradient_is_checked():
    """A new autograd function must be added to the table above."""
    classes = {n for n, x in vars(products).items() if isinstance(x, type) and issubclass(x, torch.autograd.Function)}
    # LimitGradient is no derivative: it bounds one on purpose.
    assert classes - {"LimitGradient"} == {
        "SegmentProducts",
        "UnitLowerInverse",
        "SolvedErasure",
        "GeluAndError",
        "UnitNorm",
        "Potential",
    }


def test_segment_products_are_the_written_products():
    products = segment_products(GATES)
    for row, gates in enumerate(GATES):
        for t in range(5):
            for s in range(5):
                expected = gates[s + 1 : t + 1].prod() if s <= t else torch.zeros(())
                assert products[row, t, s] == expected, (row, t, s)


def test_slopes_are_the_derivatives_of_the_activations():
    for name, act in (("gelu", F.gelu), ("silu", F.silu)):
        # More than one block of the CPU path, the last one short.
        z = 3 * normal(BLOCK_ELEMENTS + 50).detach()
        back = normal(BLOCK_ELEMENTS + 50, seed=1).detach()
        z.requires_grad_()
        (expected,) = torch.autograd.grad(act(z), z, back, create_graph=True)
        h, error = activate_with_error(name, z, back)  # type: ignore[arg-type]
        torch.testing.assert_close(h, act(z), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(error, expected, rtol=1e-12, atol=1e-14)
        found, wanted = (torch.autograd.grad((act(z) + e).square().sum(), z)[0] for e in (error, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_unit_lower_inverse_and_unit_norm():
    strict = normal(3, 6, 6).detach().tril(-1)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(unit_lower_inverse(strict) @ (strict + eye), eye.expand(3, 6, 6), atol=1e-12, rtol=0)
    x = normal(3, 4).detach()
    torch.testing.assert_close(unit_norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    assert not unit_norm(torch.zeros(4)).any()


@pytest.mark.parametrize("flags", ["none", "both"])
@pytest.mark.parametrize("momentum", [False, True])
def test_the_outer_gradient_of_an_outer_gradient(momentum: bool, flags: str):
    """A gradient penalty through the chunked engine equals the one through the token loop."""
    case = Case(MLP(2), step_size="proximal", retain_to="initial", momentum=momentum, flags=flags, tokens=9)
    inputs, penalties = make_inputs(case), {}
    for engine in ("reference", "chunked"):
        y, _ = run(case, inputs, engine)
        first = torch.autograd.grad(y.square().sum(), [inputs.k, inputs.initial["in"]], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        assert isinstance(penalty, Tensor)
        penalties[engine] = torch.autograd.grad(penalty, [inputs.k, inputs.v, *inputs.initial.values()])
    for chunked, reference in zip(penalties["chunked"], penalties["reference"], strict=True):
        torch.testing.assert_close(chunked, reference, rtol=1e-9, atol=1e-12)


def test_a_limited_gradient_is_exact_below_the_limit_short_above_it_and_never_nan() -> None:
    x = torch.ones(4, 2, 3, dtype=torch.float64, requires_grad=True)
    incoming = torch.ones(4, 2, 3, dtype=torch.float64)
    incoming[1] *= 1e8
    incoming[2, 0, 0] = float("inf")
    incoming[3, 1, 2] = float("nan")
    y = limit_gradient(x, 10.0)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad(y, x, incoming)
    assert torch.equal(gradient[0], incoming[0])
    assert torch.allclose(gradient[1].norm(), torch.tensor(10.0, dtype=torch.float64))
    assert torch.equal(gradient[2:], torch.zeros_like(gradient[2:]))
