"""The fused products of a span: values by their formulas, first and second derivatives, shared leading dimensions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from nestlearn.memory.kernels import fused
from nestlearn.memory.kernels.delta_span import delta_span
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


def span_arguments(count: int, *, fresh: bool = False) -> tuple[Tensor, ...]:
    """Queries, keys, targets, steps and retentions of a span (one of them 0), and the entering weights."""
    gates = [torch.rand(2, count, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1)]
    gates[1][0, count // 2] = 0
    gates = [gate.requires_grad_() for gate in gates]
    vectors = (normal(2, count, IN), normal(2, count, IN) / 2, normal(2, count, OUT))
    return (*vectors, *gates) if fresh else (*vectors, *gates, normal(2, OUT, IN))


def delta_loop(gated: bool, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    """`delta_span` token by token, as written."""
    q, k, target, step, retain, *weights = arguments
    w = weights[0] if weights else q.new_zeros(len(q), OUT, IN)
    outputs = []
    for t in range(q.shape[1]):
        erased_part = torch.einsum("roi,ri,rj->roj", w, k[:, t], k[:, t]) * step[:, t, None, None]
        kept, gate = retain[:, t, None, None], retain[:, t, None, None] if gated else 1
        w = kept * w - gate * erased_part + step[:, t, None, None] * torch.einsum("ro,ri->roi", target[:, t], k[:, t])
        outputs.append(torch.einsum("roi,ri->ro", w, q[:, t]))
    return torch.stack(outputs, 1), w


def span_of(gated: bool, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    weights = arguments[5] if len(arguments) > 5 else None
    return delta_span(*arguments[:5], weights, gated=gated)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_span_of_the_delta_rule_equals_its_loop(count: int, gated: bool, fresh: bool) -> None:
    """Outputs, final weights and the gradients of either alone."""
    values = span_arguments(count, fresh=fresh)
    mine, oracle = span_of(gated, *values), delta_loop(gated, *values)
    for one, other in zip(mine, oracle, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for i in (0, 1):
        weight = torch.randn(mine[i].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        pair = [
            torch.autograd.grad((ends[i] * weight).sum(), values, retain_graph=True, materialize_grads=True)
            for ends in (mine, oracle)
        ]
        for got, expected in zip(*pair, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("gated", [False, True])
def test_a_span_of_the_delta_rule_can_be_differentiated_twice(gated: bool) -> None:
    for fresh in (False, True):
        assert gradgradcheck(lambda *x: span_of(gated, *x), span_arguments(3, fresh=fresh))
