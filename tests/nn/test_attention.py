"""CausalAttention against attention written as a loop over tokens."""

import math

import pytest
import torch

from nestlearn.nn import CausalAttention

D, HEADS = 16, 2


def layer(window=None, conv_size=0, persistent=0):
    torch.manual_seed(0)
    return CausalAttention(D, HEADS, window, conv_size=conv_size, persistent_tokens=persistent).double()


def turned(x, position, theta=10000.0):
    """Rotary positions in complex numbers; x is [heads, d]."""
    half = x.shape[-1] // 2
    angle = position * theta ** -(torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones(half, dtype=torch.float64), angle)
    return torch.cat((z.real, z.imag), -1)


def loop(attention, x, mask, reset, window):
    """One row, token by token: the definition."""
    memory, outputs, first = [], [], []
    if attention.persistent is not None:
        first = [(attention.qkv.weight @ p).view(3, HEADS, -1)[1:] for p in attention.persistent.tokens]
    for t in range(x.shape[0]):
        if not mask[t]:
            outputs.append(torch.zeros(D, dtype=x.dtype))
            continue
        if reset[t]:
            memory = []
        q, k, v = (attention.qkv.weight @ x[t]).view(3, HEADS, -1)
        memory.append((turned(k, len(memory)), v))
        seen = memory if window is None else memory[-window:]
        scores = [(q * k).sum(-1) for k, _ in first]  # persistent tokens have no position
        q = turned(q, len(memory) - 1)
        scores = torch.stack(scores + [(q * k).sum(-1) for k, _ in seen]) / math.sqrt(D / HEADS)
        read = (scores.softmax(0)[..., None] * torch.stack([v for _, v in (*first, *seen)])).sum(0)
        outputs.append(attention.out.weight @ read.flatten())
    return torch.stack(outputs)


@pytest.mark.parametrize("window", [None, 1, 3, 30])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("persistent", [0, 2])
def test_any_split_equals_the_loop(window, padded, documents, persistent):
    attention = layer(window, persistent=persistent)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 17, D, dtype=torch.float64, generator=generator)
    mask = torch.rand(3, 17, generator=generator) > 0.3 if padded else torch.ones(3, 17, dtype=torch.bool)
    reset = torch.rand(3, 17, generator=generator) > 0.8 if documents else torch.zeros(3, 17, dtype=torch.bool)
    expected = torch.stack([loop(attention, x[i], mask[i], reset[i], window) for i in range(3)])
    poisoned = torch.where(mask[..., None], x, float("nan"))
    for sizes in ([17], [5, 12], [1] * 17, [2, 9, 1, 5]):
        state, parts = None, []
        for part, m, r in zip(poisoned.split(sizes, 1), mask.split(sizes, 1), reset.split(sizes, 1), strict=True):
            y, state = attention(part, state, m if padded else None, r if documents else None)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-12, atol=1e-12)
        if window is not None:
            assert state.keys.shape[2] <= window - 1


def test_the_state_of_a_window_does_not_grow():
    attention, state = layer(window=4), None
    for _ in range(10):
        _, state = attention(torch.randn(2, 1, D, dtype=torch.float64), state)
    assert state.keys.shape == (2, HEADS, 3, D // HEADS)


def test_no_state_when_none_is_asked_for():
    assert layer()(torch.randn(1, 3, D, dtype=torch.float64), return_state=False)[1] is None


def test_bfloat16_runs():
    y, _ = layer().bfloat16()(torch.randn(1, 3, D, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


def test_flops_are_those_of_a_transformer_layer():
    # 8 d^2 for the projections; a token sees (T + 1) / 2 tokens on average, at 4 d each.
    assert layer().flops_per_token(99) == 8 * D * D + 4 * D * 50
    assert layer(window=1).flops_per_token(99) == 8 * D * D + 4 * D
    assert layer(window=1, persistent=3).flops_per_token(99) == 8 * D * D + 4 * D * 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"d_model": 16, "num_heads": 3}, "divisible"),
        ({"d_model": 6, "num_heads": 2}, "even"),
        ({"d_model": 16, "num_heads": 2, "window": 0}, "window"),
        ({"d_model": 16, "num_heads": 2, "conv_size": -1}, "conv_size"),
        ({"d_model": 16, "num_heads": 2, "persistent_tokens": -1}, "persistent_tokens"),
    ],
)
def test_impossible_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        CausalAttention(**sizes)
