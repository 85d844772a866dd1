"""Moneta, Yaad and Memora, each written out as its own loop: formulas and autograd, nothing of the package."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import MLP, Gates, catalog, scan

ROWS, TOKENS, D, HIDDEN = 2, 29, 4, 8


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = (0.5 * normal(ROWS, TOKENS, D, seed=s) for s in range(3))
RATE = 0.1 * torch.sigmoid(normal(ROWS, TOKENS, seed=3))
KEEP = torch.sigmoid(normal(ROWS, TOKENS, seed=4) + 3)
DELTA = torch.sigmoid(normal(ROWS, TOKENS, seed=5)) + 0.3
START = {"in": 0.5 * normal(ROWS, HIDDEN, D, seed=6), "out": 0.5 * normal(ROWS, D, HIDDEN, seed=7)}


def network(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return x + w["out"] @ F.gelu(w["in"] @ x)


def gradients(w: dict[str, Tensor], loss) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in w.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))


def moneta(a: dict[str, Tensor], anchor: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x / (anchor[n].abs() ** 4).sum().add(1e-6) ** (2 / 4) for n, x in a.items()}


def moneta_gradient(w: dict[str, Tensor], k: Tensor, v: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """The smooth form of ``3 sign(r) |r|^2``, as the gradient of a linear function of M(k) that has it."""
    r = network(w, k) - v
    error = 3 * torch.tanh(10 * r) * (r**2 + 1e-6)
    return gradients(w, lambda x: torch.dot(network(x, k), error))


def yaad(a: dict[str, Tensor], anchor: dict[str, Tensor]) -> dict[str, Tensor]:
    return a


def yaad_gradient(w: dict[str, Tensor], k: Tensor, v: Tensor, delta: Tensor) -> dict[str, Tensor]:
    if (network(w, k) - v).norm() <= delta:
        return gradients(w, lambda x: 0.5 * (network(x, k) - v).square().sum())
    return gradients(w, lambda x: delta * (network(x, k) - v).abs().sum())


def memora(a: dict[str, Tensor], anchor: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.exp() / x.exp().sum(-1, keepdim=True) for n, x in a.items()}


def memora_gradient(w: dict[str, Tensor], k: Tensor, v: Tensor, delta: Tensor) -> dict[str, Tensor]:
    return gradients(w, lambda x: 0.5 * (network(x, k) - v).square().sum())


RULES = {"moneta": (moneta, moneta_gradient), "yaad": (yaad, yaad_gradient), "memora": (memora, memora_gradient)}


@pytest.mark.parametrize("engine", ["reference", "chunked"])
@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("read", ["token", "chunk"])
@pytest.mark.parametrize("name", RULES)
def test_equals_its_own_loop(name: str, read: str, chunk: int, engine: str):
    weights_of, gradient = RULES[name]
    memory = replace(catalog[name], architecture=MLP(HIDDEN // D), chunk_size=chunk, read=read)
    state = memory.init_state((ROWS,), D, D, params=START, dtype=torch.float64)
    gates = Gates(RATE, KEEP, threshold=DELTA if name == "yaad" else None)
    y, end = scan(memory, state, Q, K, V, gates, engine=engine)
    for row in range(ROWS):
        a = {n: x[row] for n, x in START.items()}
        for t in range(TOKENS):
            anchor = dict(a) if t % chunk == 0 else anchor
            g = gradient(weights_of(anchor, anchor), K[row, t], V[row, t], DELTA[row, t])
            a = {n: KEEP[row, t] * x - RATE[row, t] * g[n] for n, x in a.items()}
            seen = weights_of(a if read == "token" else anchor, anchor)
            torch.testing.assert_close(y[row, t], network(seen, Q[row, t]), rtol=1e-9, atol=1e-10)
        for n, x in a.items():
            torch.testing.assert_close(end.params[n][row], x, rtol=1e-9, atol=1e-10)
    assert name != "yaad" or 0.1 < share_of_large_residuals() < 0.9


def share_of_large_residuals() -> float:
    """Both sides of Yaad's switch are met."""
    start = {n: x[0] for n, x in START.items()}
    large = [(network(start, K[0, t]) - V[0, t]).norm() > DELTA[0, t] for t in range(TOKENS)]
    return sum(map(bool, large)) / TOKENS
