"""The fused products of a span: values by their formulas, first and second derivatives, shared leading dimensions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from nestlearn.memory.kernels import fused
from nestlearn.memory.kernels.fused import advanced, answered, erased

C, IN, OUT = 4, 3, 5


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def arguments(*lead: int, shared: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """Arguments of all three; keys and kernels have leading dimensions ``shared``."""
    few = lead if shared is None else shared
    return {
        "q": normal(*lead, C, IN),
        "base": normal(*lead, OUT, IN),
        "weights": normal(*lead, OUT, IN),
        "entry": normal(*few, C),
        "x": normal(*few, C, IN),
        "kernel": normal(*few, C, C),
        "change": normal(*lead, C, OUT),
        "solved": normal(*few, C, C),
        "through": normal(*few),
    }


def erase(error: Tensor, solved: Tensor, x: Tensor, weights: Tensor, before: Tensor) -> Tensor:
    return erased(error, solved, x, weights, before)


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "Erase": (erase, ("change", "solved", "x", "weights", "entry")),
    "Answer": (answered, ("q", "base", "weights", "entry", "x", "kernel", "change")),
    "Answer of a fresh memory": (
        lambda q, base, x, kernel, change: answered(q, base, None, normal(2, 1, C)[:, 0], x, kernel, change),
        ("q", "base", "x", "kernel", "change"),
    ),
    "Answer without initial weights": (
        lambda q, w, entry, x, kernel, change: answered(q, None, w, entry, x, kernel, change),
        ("q", "weights", "entry", "x", "kernel", "change"),
    ),
    "Advance": (advanced, ("weights", "through", "change", "entry", "x")),
    "Advance of a fresh memory": (
        lambda change, last, x: advanced(None, normal(2, 1)[:, 0], change, last, x),
        ("change", "entry", "x"),
    ),
}
LEADS = {"rows": ((2,), None), "memories of shared keys": ((2, 3), (2, 1))}


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives(name: str, lead: str) -> None:
    function, names = CALLS[name]
    values = arguments(*LEADS[lead][0], shared=LEADS[lead][1])
    chosen = tuple(values[n] for n in names)
    assert gradcheck(function, chosen)
    assert gradgradcheck(function, chosen)


def test_values_by_their_formulas() -> None:
    a = {name: x.detach()[0] for name, x in arguments(1).items()}
    held = a["x"] @ a["weights"].T
    expected = a["solved"] @ (a["change"] + a["entry"][:, None] * held)
    torch.testing.assert_close(erased(a["change"], a["solved"], a["x"], a["weights"], a["entry"]), expected)
    y = torch.stack(
        [
            a["base"] @ a["q"][t]
            + a["entry"][t] * (a["weights"] @ a["q"][t])
            + sum(a["kernel"][t, s] * (a["x"][s] @ a["q"][t]) * a["change"][s] for s in range(C))
            for t in range(C)
        ]
    )
    names = ("q", "base", "weights", "entry", "x", "kernel", "change")
    torch.testing.assert_close(answered(*(a[n] for n in names)), y)
    end = a["through"] * a["weights"] + sum(a["entry"][s] * torch.outer(a["change"][s], a["x"][s]) for s in range(C))
    torch.testing.assert_close(advanced(a["weights"], a["through"], a["change"], a["entry"], a["x"]), end)


def test_a_gradient_is_partial_where_one_argument_depends_on_another() -> None:
    """Differentiated again, an input that is a function of another input must not be counted twice."""
    values = arguments(2)
    x, names = values["x"], ("solved", "weights")

    def penalty(apply: Callable[..., Tensor]) -> Tensor:
        before = x.square().sum(-1)
        y = apply(values["change"], *(values[n] for n in names[:1]), x, values["weights"], before)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    def plain(error: Tensor, solved: Tensor, x: Tensor, weights: Tensor, before: Tensor) -> Tensor:
        return solved @ (error + before.unsqueeze(-1) * (x @ weights.mT))

    torch.testing.assert_close(penalty(erased), penalty(plain), rtol=1e-10, atol=1e-12)


def test_every_fused_product_is_in_the_table() -> None:
    classes = {n for n, x in vars(fused).items() if isinstance(x, type) and issubclass(x, torch.autograd.Function)}
    assert classes == {name.split()[0] for name in CALLS}
