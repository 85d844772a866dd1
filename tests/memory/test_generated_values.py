"""Generalized gradient descent (NL Eq. 58-60): values that a memory generates from its own surprise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nestlearn.memory import (
    KL,
    L2,
    MLP,
    AssociativeMemory,
    Delta,
    DotProduct,
    Gates,
    Huber,
    Lp,
    Lq,
    Matrix,
    Momentum,
    Oja,
    catalog,
    scan,
)
from nestlearn.memory.contract import check_contract

from .test_retentions import minimum

ROWS, TOKENS, D = 2, 19, 4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = (0.7 * normal(ROWS, TOKENS, D, seed=seed) for seed in range(3))
RATE, KEEP = (torch.sigmoid(normal(ROWS, TOKENS, seed=seed)) for seed in (3, 4))
ONE = torch.ones(ROWS, TOKENS, dtype=torch.float64)
START = {"W": 0.5 * normal(ROWS, D, D, seed=5)}


def run(memory: AssociativeMemory, gates: Gates, engine="chunked") -> tuple[Tensor, Tensor]:
    y, state = scan(memory, None, Q, K, V, gates, initial=START, engine=engine)
    return y, state.params["W"]


LOSSES = {
    "l2": (L2(), lambda y, v: 0.5 * (y - v).square().sum()),
    "huber": (Huber("norm", threshold=0.4), lambda y, v: 0.4 * ((y - v).norm() - 0.2)),
}


@pytest.mark.parametrize("engine", ["reference", "chunked"])
@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_every_write_is_the_minimizer_for_the_surprise(name: str, chunk: int, engine: str):
    """``argmin_W 1/2 ||W k - u||^2 + 1/(2 eta) ||W - alpha W_prev||^2``, found numerically, u by autograd."""
    values, written = LOSSES[name]
    memory = replace(catalog["ggd"], values=values, chunk_size=chunk)
    y, end = run(memory, Gates(2 * RATE, KEEP), engine)
    for row in range(ROWS):
        w = anchor = START["W"][row]
        for t in range(TOKENS):
            anchor = w if t % chunk == 0 else anchor
            k, v, eta, kept = K[row, t], V[row, t], 2 * RATE[row, t], KEEP[row, t] * w
            loss = values.loss if (name == "huber" and (anchor @ k - v).norm() <= 0.4) else written
            u = -torch.func.grad(lambda y, v=v, loss=loss: loss(y, v).sum())(anchor @ k)

            def objective(z: Tensor, k=k, u=u, kept=kept, eta=eta) -> Tensor:
                return 0.5 * (z @ k - u).square().sum() + (z - kept).square().sum() / (2 * eta)

            w = minimum(objective, kept)
            torch.testing.assert_close(y[row, t], w @ Q[row, t], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(end[row], w, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "memory",
    [
        catalog["ggd"],
        AssociativeMemory(Matrix(), L2(), values=Lp(3)),
        AssociativeMemory(Matrix(), Huber("norm", threshold=0.4), values=L2(), step_size="proximal"),
        AssociativeMemory(MLP(2), L2(), Delta(), step_size="proximal", values=Huber("norm", threshold=0.4)),
        AssociativeMemory(MLP(2), L2(), algorithm=Momentum(), step_size="proximal", values=Lp(3)),
        AssociativeMemory(MLP(2), Lp(3), KL(), values=L2()),
        AssociativeMemory(MLP(2), L2(), Lq(4), values=L2(), retain_to="initial", read="chunk"),
        AssociativeMemory(Matrix(), retention=Oja(), values=L2()),
    ],
    ids=str,
)
def test_the_contract_holds_with_other_parts(memory: AssociativeMemory):
    check_contract(memory)


def test_gradient_descent_and_its_delta_form_are_instances():
    """NL Eq. 55-57: the dot product gives plain descent on L, L2 gives delta gradient descent on L."""
    for loss in (L2(), Huber("norm", threshold=0.4)):
        raw = run(AssociativeMemory(objective=loss), Gates(0.2 * RATE, KEEP))
        general = run(AssociativeMemory(objective=DotProduct(), values=loss), Gates(0.2 * RATE, KEEP))
        delta = run(AssociativeMemory(objective=loss, retention=Delta(), step_size="proximal"), Gates(RATE, ONE))
        ggd = run(AssociativeMemory(objective=L2(), step_size="proximal", values=loss), Gates(RATE, ONE))
        for got, expected in ((general, raw), (ggd, delta)):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_generated_value_is_not_the_given_one():
    gates = Gates(RATE, KEEP)
    own, given = (run(replace(catalog["ggd"], values=values), gates)[0] for values in (L2(), "given"))
    same = run(replace(catalog["ggd"], values=DotProduct()), gates)[0]
    assert (own - given).norm() > 0.1 * given.norm()
    torch.testing.assert_close(same, given, rtol=0, atol=0)
