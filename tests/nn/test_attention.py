"""CausalAttention against attention written as a loop over tokens."""

import math

import pytest
import torch
from tests.largest import LargestTensor

from nestlearn.nn import AttentionConfig, TitansMAGConfig, TitansMALConfig
from nestlearn.nn.attention import document_positions, rotate

D, HEADS = 16, 2


def layer(window=None, conv_size=0, persistent=0):
    torch.manual_seed(0)
    return AttentionConfig(window=window, conv_size=conv_size, persistent_tokens=persistent).build(D, HEADS).double()


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


def test_flops_are_those_of_a_transformer_layer():
    # 8 d^2 for the projections; a token sees (T + 1) / 2 tokens on average, at 4 d each.
    assert layer().flops_per_token(99) == 8 * D * D + 4 * D * 50
    assert layer(window=1).flops_per_token(99) == 8 * D * D + 4 * D
    assert layer(window=1, persistent=3).flops_per_token(99) == 8 * D * D + 4 * D * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window"),
        ({"conv_size": -1}, "conv_size"),
        ({"persistent_tokens": -1}, "persistent_tokens"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**options)


@pytest.mark.parametrize(("sizes", "message"), [((16, 3), "divisible"), ((6, 2), "even")])
def test_impossible_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig().build(*sizes)


def masked_form(attention, x, mask, reset, window):
    """All tokens at once, with one mask [b, t, t] of what sees what; without convolution."""
    q, k, v = attention.qkv(torch.where(mask[..., None], x, 0)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    place, document = document_positions(torch.zeros(len(x), dtype=torch.long), mask, reset & mask)
    near = place[:, :, None] - place[:, None] < window
    same = document[:, :, None] == document[:, None]
    seen = mask[:, None] & near & same & torch.ones(x.shape[1], x.shape[1]).tril().bool()
    scores = (rotate(q, place, 10000.0) @ rotate(k, place, 10000.0).mT) / math.sqrt(D / HEADS)
    scores = scores.masked_fill(~seen[:, None], -1e300)
    if attention.persistent is not None:
        first = (attention.persistent.tokens @ attention.qkv.weight.T).view(-1, 3, HEADS, D // HEADS)
        scores = torch.cat((torch.einsum("bhtd,nhd->bhtn", q, first[:, 1]) / math.sqrt(D / HEADS), scores), -1)
        v = torch.cat((first[:, 2].movedim(0, 1).expand(len(x), -1, -1, -1), v), 2)
    y = attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return torch.where(mask[..., None], y, 0)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 90])
@pytest.mark.parametrize("kind", ["plain", "padded", "documents", "padded documents"])
@pytest.mark.parametrize("persistent", [0, 2])
def test_blocks_of_windows_equal_the_masked_form_with_all_gradients(window, kind, persistent):
    attention = layer(window, persistent=persistent)
    generator = torch.Generator().manual_seed(2)
    time = 211
    x = torch.randn(2, time, D, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.rand(2, time, generator=generator) > (0.4 if "padded" in kind else -1)
    if "padded" in kind:
        mask[1, 20:140] = False  # longer than a block
    reset = torch.rand(2, time, generator=generator) > (0.97 if "documents" in kind else 1)
    slope = torch.randn(2, time, D, dtype=torch.float64, generator=generator)
    wanted = masked_form(attention, x, mask, reset, window)
    inputs = [x, *attention.parameters()]
    slopes = torch.autograd.grad(wanted, inputs, slope)
    for sizes in ([time], [100, 111], [3, 130, 1, 77]):
        state, parts = None, []
        for part, m, r in zip(x.split(sizes, 1), mask.split(sizes, 1), reset.split(sizes, 1), strict=True):
            flags = (m if "padded" in kind else None, r if "documents" in kind else None)
            y, state = attention(part, state, *flags)
            parts.append(y)
        found = torch.cat(parts, 1)
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
        for here, there in zip(torch.autograd.grad(found, inputs, slope), slopes, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-10)


def in_memory(make, time):
    """Bytes that autograd keeps, and the largest tensor, of one call forward and backward."""
    torch.manual_seed(0)
    module, x = make(), torch.randn(1, time, D, requires_grad=True)
    mask = torch.ones(1, time, dtype=torch.bool)
    mask[:, ::7] = False
    kept = {}

    def keep(saved):
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        y, _ = module(x, None, mask)
        total = sum(kept.values())
        y.sum().backward()
    return total, largest.elements


@pytest.mark.parametrize(
    "make",
    [
        lambda: AttentionConfig(window=8).build(D, HEADS),
        lambda: AttentionConfig(window=8, persistent_tokens=2).build(D, HEADS),
        lambda: TitansMAGConfig("deltanet", window=8).build(D, HEADS),
        lambda: TitansMALConfig("deltanet", window=8).build(D, HEADS),
    ],
    ids=["attention", "persistent", "titans_mag", "titans_mal"],
)
def test_a_window_takes_memory_linear_in_the_length(make):
    short, long = in_memory(make, 512), in_memory(make, 2048)
    assert long[0] < 4.4 * short[0]
    # No tensor holds a score for every pair of tokens.
    assert long[1] < 4.4 * short[1]
    assert long[1] < 2048 * 2048 / 8
