"""Attention is a memory without parameters: the Nadaraya-Watson solution of a regression (NL Eq. 62-63)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestlearn.nn import AttentionConfig, CausalAttention
from nestlearn.nn.attention import rotate

ROWS, TOKENS, HEADS, WIDTH = 2, 9, 2, 4


def layer(window: int | None) -> CausalAttention:
    torch.manual_seed(0)
    made = AttentionConfig(window=window).build(HEADS * WIDTH, HEADS).double()
    with torch.no_grad():
        made.out.weight.copy_(torch.eye(HEADS * WIDTH))  # outputs are what the heads read
        made.qkv.weight.mul_(3)
    return made


def minimizer(keys: Tensor, values: Tensor, q: Tensor) -> Tensor:
    """``argmin_m Σ_i s(k_i, q) ‖v_i - m‖²`` with ``s = exp(k·q / √d)``, by Newton's step, exact as it is quadratic."""

    def objective(m: Tensor) -> Tensor:
        similarity = torch.exp(keys @ q / WIDTH**0.5)
        return (similarity * (values - m).square().sum(-1)).sum()

    somewhere = torch.ones_like(q)
    gradient, hessian = torch.func.grad(objective)(somewhere), torch.func.jacrev(torch.func.grad(objective))(somewhere)
    return somewhere - torch.linalg.solve(hessian, gradient)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_attention_minimizes_the_written_objective_over_its_window(window: int | None):
    """Outputs and the gradients of inputs and projections; a memory that was read in two calls too."""
    attention = layer(window)
    x = torch.randn(ROWS, TOKENS, HEADS * WIDTH, dtype=torch.float64, requires_grad=True)
    q, k, v = attention.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
    place = torch.arange(TOKENS).expand(ROWS, -1)
    q, k = (rotate(part, place, attention.rope_theta) for part in (q, k))
    reads = []
    for t in range(TOKENS):
        first = 0 if window is None else max(0, t - window + 1)
        seen = slice(first, t + 1)
        heads = [[minimizer(k[b, h, seen], v[b, h, seen], q[b, h, t]) for h in range(HEADS)] for b in range(ROWS)]
        reads.append(torch.stack([torch.cat(row) for row in heads]))
    expected = torch.stack(reads, 1)
    y, _ = attention(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    weight = torch.randn(y.shape, dtype=y.dtype)
    wanted = (x, attention.qkv.weight)
    gradients = (torch.autograd.grad((z * weight).sum(), wanted) for z in (y, expected))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    some, state = attention(x[:, :5])
    rest, _ = attention(x[:, 5:], state)
    torch.testing.assert_close(torch.cat([some, rest], 1), expected, rtol=1e-9, atol=1e-10)


def test_the_state_of_this_memory_is_its_keys_and_values():
    """Without a window it keeps every token; a window c keeps the c - 1 that the next token can see."""
    x = torch.randn(1, TOKENS, HEADS * WIDTH, dtype=torch.float64)
    for window, kept in ((None, TOKENS), (4, 3)):
        _, state = layer(window)(x)
        assert state is not None
        assert state.keys.shape == state.values.shape == (1, HEADS, kept, WIDTH)
