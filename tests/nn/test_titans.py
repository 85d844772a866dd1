"""Titans with attention (MAC, MAG, MAL) against plain loops, and the properties a stream needs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.memory.oracle import Row, Rule, forward, fresh, step
from tests.nn.test_attention import turned
from tests.nn.test_mixer import naive, naive_gates
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory import MLP, catalog
from nestlearn.nn import (
    CausalAttention,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    TitansMACConfig,
    TitansMAGConfig,
    TitansMALConfig,
)
from nestlearn.nn.common import unit
from nestlearn.nn.state import index_rows, map_tensors, reset_rows, tensors_of

KINDS = {
    "mac": (TitansMACConfig, {"segment_length": 5}),
    "mag": (TitansMAGConfig, {"window": 4}),
    "mal": (TitansMALConfig, {"window": 4}),
}
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
D, HEADS = 8, 2


def make(kind: str, memory: str = "titans", persistent: int = 3, d: int = D, heads: int = HEADS, **options: Any) -> Any:
    """A small float64 layer whose gates and norms matter."""
    torch.manual_seed(0)
    cls, own = KINDS[kind]
    config = cls(memory, persistent_tokens=persistent, **({"chunk_size": 4} | own | options))
    layer = config.build(d, heads).double()
    with torch.no_grad():
        if layer.memory.gates is not None:
            layer.memory.gates.weight.normal_()
        for module in layer.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.uniform_(0.5, 1.5)
    return layer


def tokens(batch: int, length: int, d: int = D, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(layer: Any, *pieces: Tensor, state: Any = None, **flags: Any) -> tuple[Tensor, Any]:
    outputs = []
    for piece in pieces:
        y, state = layer(piece, state, **flags)
        outputs.append(y)
    return torch.cat(outputs, 1), state


# ---------------------------------------------------------------------------------------------------- the oracles


def rms(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def convolved(conv: Any, x: Tensor) -> Tensor:
    """The causal convolution of one row, term by term."""
    rows = [
        sum((conv.weight[3 - j] * x[t - j] for j in range(4) if t >= j), torch.zeros_like(x[0])) for t in range(len(x))
    ]
    return torch.stack(rows)


def windowed(attention: CausalAttention, x: Tensor) -> Tensor:
    """Attention of one row to its window and the persistent tokens, token by token."""
    assert attention.persistent is not None and attention.window is not None
    qkv = convolved(attention.conv, x @ attention.qkv.weight.mT).view(len(x), 3, HEADS, -1)
    first = (attention.persistent.tokens @ attention.qkv.weight.mT).view(-1, 3, HEADS, D // HEADS)
    outputs = []
    for t in range(len(x)):
        q, seen = qkv[t, 0], range(max(0, t - attention.window + 1), t + 1)
        scores = [(q * p[1]).sum(-1) for p in first]
        scores += [(turned(q, t) * turned(qkv[s, 1], s)).sum(-1) for s in seen]
        values = torch.stack([p[2] for p in first] + [qkv[s, 2] for s in seen])
        weights = (torch.stack(scores) / math.sqrt(D // HEADS)).softmax(0)
        outputs.append(attention.out.weight @ (weights[..., None] * values).sum(0).flatten())
    return torch.stack(outputs)


class Memory:
    """The memory of MAC for one row: a `Row` per head, written and read token by token."""

    def __init__(self, layer: MemoryAsContext) -> None:
        self.mixer = layer.memory
        memory = self.mixer.memory
        self.rule = Rule(
            deep=isinstance(memory.architecture, MLP),
            activation="gelu",
            objective="l2",
            retention="decay",
            step={"in": "raw", "out": "raw"},
            momentum=True,
            to_initial=False,
            chunk_size=memory.chunk_size,
            read="token",
        )
        assert self.mixer.initial is not None
        self.rows: list[Row] = [fresh({n: w[h] for n, w in self.mixer.initial.items()}) for h in range(HEADS)]

    def weights(self) -> list[dict[str, Tensor]]:
        return [dict(row.weights) for row in self.rows]

    def read_write(self, u: Tensor) -> Tensor:
        """What the mixer answers to one token."""
        q, k, v = (unit(F.silu(z)) for z in (self.mixer.qkv.weight @ u).view(3, HEADS, -1))
        answers = []
        for head, row in enumerate(self.rows):
            assert self.mixer.initial is not None
            initial = {n: w[head] for n, w in self.mixer.initial.items()}
            lr, retain, beta = naive_gates(self.mixer, u, head)
            # Copies: the gradient of the objective is that of the anchor alone, though u was read from it as well.
            row.anchor = {n: w.clone() for n, w in row.anchor.items()}
            row = step(self.rule, row, initial, k[head], v[head], lr, retain, beta)
            answers.append(rms(self.mixer.norm, forward(self.rule, row.weights, q[head])[0]))
            row.position = (row.position + 1) % self.rule.chunk_size
            if row.position == 0:
                row.anchor = dict(row.weights)
            self.rows[head] = row
        return self.mixer.out.weight @ torch.cat(answers)


def segmented(layer: MemoryAsContext, x: Tensor) -> Tensor:
    """Memory as context for one row, token by token."""
    assert layer.persistent is not None
    mixed = convolved(layer.conv, torch.cat([x @ layer.ask.weight.mT, x @ layer.qkv.weight.mT], -1))
    mixed = mixed.view(len(x), 4, HEADS, -1)
    first = (layer.persistent.tokens @ layer.qkv.weight.mT).view(-1, 3, HEADS, D // HEADS)
    n, length, memory, outputs = len(first), layer.segment_length, Memory(layer), []
    start, context = memory.weights(), []
    for t in range(len(x)):
        place = t % length
        if place == 0:
            start, context = memory.weights(), [(turned(p[1], i), p[2]) for i, p in enumerate(first)]
        ask = unit(F.silu(mixed[t, 0]))
        h = torch.cat([forward(memory.rule, start[head], ask[head])[0] for head in range(HEADS)])
        _, k, v = (layer.qkv.weight @ rms(layer.recall_norm, h)).view(3, HEADS, -1)
        context.append((turned(k, n + place), v))
        q, k, v = mixed[t, 1:]
        context.append((turned(k, n + length + place), v))
        q = turned(q, n + length + place)
        scores = torch.stack([(q * key).sum(-1) for key, _ in context]) / math.sqrt(D // HEADS)
        read = (scores.softmax(0)[..., None] * torch.stack([value for _, value in context])).sum(0)
        u = rms(layer.attention_norm, layer.attended.weight @ read.flatten())
        m = rms(layer.memory_norm, memory.read_write(u))
        outputs.append(layer.out.weight @ (u * F.silu(m)))
    return torch.stack(outputs)


def gated(layer: MemoryAsGate, x: Tensor) -> Tensor:
    y, m = rms(layer.attention_norm, windowed(layer.attention, x)), rms(layer.memory_norm, naive(layer.memory, x))
    return (y * F.silu(m)) @ layer.out.weight.mT


def layered(layer: MemoryAsLayer, x: Tensor) -> Tensor:
    return windowed(layer.attention, rms(layer.memory_norm, naive(layer.memory, x)))


ORACLES: dict[str, Any] = {"mac": segmented, "mag": gated, "mal": layered}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_token_loop_with_all_outer_gradients(kind: str) -> None:
    layer, x = make(kind), tokens(2, 12).requires_grad_()
    target, wanted = tokens(2, 12, seed=2), [x, *layer.parameters()]
    expected = torch.stack([ORACLES[kind](layer, row) for row in x])
    gradients = torch.autograd.grad((expected * target).sum(), wanted)
    everyone = torch.ones(2, 12, dtype=torch.bool)
    for flags in ({}, {"mask": everyone}, {"reset": ~everyone}):
        y, _ = layer(x, **flags)
        torch.testing.assert_close(y, expected, **CLOSE)
        for got, want in zip(torch.autograd.grad((y * target).sum(), wanted), gradients, strict=True):
            assert want.abs().max() > 0
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------------------------------------- streams of rows


@pytest.mark.parametrize("memory", catalog)
@pytest.mark.parametrize("kind", KINDS)
def test_any_split_equals_one_call(kind: str, memory: str) -> None:
    layer, x = make(kind, memory), tokens(2, 17)
    whole, end = run(layer, x)
    with torch.inference_mode():
        for sizes in ([5, 5, 5, 2], [3, 1, 9, 4], [1] * 17, [10, 7]):
            y, state = run(layer, *x.split(sizes, 1))
            torch.testing.assert_close(y, whole, **CLOSE)
            for name, weight in end.memory.memory.params.items():
                torch.testing.assert_close(state.memory.memory.params[name], weight, **CLOSE)


@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_phases_and_resets_equal_separate_runs(kind: str, persistent: int) -> None:
    layer, x = make(kind, persistent=persistent), tokens(4, 30)
    mask = torch.ones(4, 30, dtype=torch.bool)
    mask[0, :7] = False  # left padding
    mask[1, 20:] = False  # right padding
    mask[2, 5:9] = False  # a hole
    mask[3] = torch.rand(30, generator=torch.Generator().manual_seed(4)) > 0.4
    x = torch.where(mask.unsqueeze(-1), x, float("nan"))
    reset = torch.zeros_like(mask)
    # Several resets in one segment, at a segment's first token, and at a masked token (without effect).
    for row, places in enumerate([(18,), (3, 4, 11, 16), (6, 12, 14, 15), (9, 10, 11, 12, 25)]):
        reset[row, list(places)] = True
    for sizes in ([30], [13, 17], [2, 3, 1, 24], [1] * 30):
        outputs, state = [], None
        with torch.inference_mode():
            for part, m, r in zip(x.split(sizes, 1), mask.split(sizes, 1), reset.split(sizes, 1), strict=True):
                y, state = layer(part, state, m, r)
                outputs.append(y)
            got = torch.cat(outputs, 1)
            assert (got[~mask] == 0).all()
            more, _ = layer(tokens(4, 7, seed=6), state)
            for row in range(4):
                documents: list[list[int]] = [[]]
                for t in mask[row].nonzero().flatten().tolist():
                    if reset[row, t]:
                        documents.append([])
                    documents[-1].append(t)
                for document in filter(None, documents):
                    alone, _ = layer(x[row : row + 1, document])
                    torch.testing.assert_close(got[row : row + 1, document], alone, **CLOSE)
                # Rows stand at different phases: going on equals each row alone.
                last = torch.cat([x[row : row + 1, documents[-1]], tokens(4, 7, seed=6)[row : row + 1]], 1)
                torch.testing.assert_close(more[row : row + 1], layer(last)[0][:, -7:], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_rows_first_and_can_be_reordered_and_reset(kind: str) -> None:
    layer, x, more = make(kind), tokens(3, 7), tokens(3, 6, seed=2)
    _, state = layer(x)
    shapes: list[torch.Size] = []
    map_tensors(lambda t: shapes.append(t.shape) or t, state)
    assert shapes and all(shape[0] == 3 for shape in shapes)
    order = torch.tensor([2, 0, 0])
    y, _ = layer(more, index_rows(state, order))
    torch.testing.assert_close(y, run(layer, x[order], more)[0][:, 7:], **CLOSE)
    _, fresh_state = layer(x, writes=False, mask=torch.zeros(3, 7, dtype=torch.bool))
    if kind == "mac":  # the number of stored tokens of a window depends on the text
        y, _ = layer(more, reset_rows(state, fresh_state, torch.tensor([False, True, False])))
        torch.testing.assert_close(y[1:2], layer(more[1:2])[0], **CLOSE)
        torch.testing.assert_close(y[:1], run(layer, x, more)[0][:1, 7:], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_does_not_grow(kind: str) -> None:
    layer, sizes = make(kind), []
    state = None
    for _ in range(9):
        _, state = layer(tokens(2, 5), state)
        sizes.append([x.shape for x in tensors_of(state)])
    assert sizes[1] == sizes[-1]


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_future_tokens_and_other_rows_change_no_bit(kind: str, flagged: bool) -> None:
    layer, x = make(kind).float(), tokens(3, 13).float()
    flags = {"mask": torch.ones(3, 13, dtype=torch.bool)} if flagged else {}
    before, _ = layer(x, **flags)
    for value in (3.0, 1e30, float("nan"), float("inf")):
        changed = x.clone()
        changed[:, 8:] = value
        assert torch.equal(layer(changed, **flags)[0][:, :8], before[:, :8])
        changed = x.clone()
        changed[1, 8] = value
        after, _ = layer(changed, **flags)
        assert torch.equal(after[::2], before[::2])
        assert not torch.equal(after[1, 8:], before[1, 8:])


@pytest.mark.parametrize("split", [12, 5, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_cures_a_poisoned_row(kind: str, split: int) -> None:
    layer, x = make(kind).float(), tokens(2, 12).float()
    poisoned = x.clone()
    poisoned[0, 3] = float("nan")
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 6] = True
    y, state = layer(poisoned[:, :split], reset=reset[:, :split])
    if split < 12:
        rest, _ = layer(poisoned[:, split:], state, reset=reset[:, split:])
        y = torch.cat([y, rest], 1)
    assert y[0, 3:6].isnan().all()
    torch.testing.assert_close(y[:1, 6:], layer(x[:1, 6:])[0])
    torch.testing.assert_close(y[1:], layer(x[1:])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_earlier_segments_reach_a_token_through_the_memory(kind: str) -> None:
    """Beyond segment, window and convolutions, only what was written can tell two texts apart."""
    layer, x = make(kind), tokens(1, 40)
    other = x.clone()
    other[:, :2] += 1
    assert (layer(x)[0] - layer(other)[0])[:, -1].abs().max() > 1e-9
    with torch.no_grad():
        # Without writes only retention acts; with fixed gates it does not depend on the text either.
        layer.memory.gates.weight.zero_()
    frozen = [layer(text, writes=False)[0][:, -1] for text in (x, other)]
    torch.testing.assert_close(*frozen, rtol=0, atol=1e-12)


def test_recall_uses_the_memory_before_the_segment() -> None:
    """A change in one segment changes what a later segment recalls, and nothing that its own segment recalls."""
    layer, x = make("mac", conv_size=0), tokens(1, 15)
    recalled: list[Tensor] = []
    original = layer.recall
    layer.recall = lambda ask, weights: recalled.append(original(ask, weights)) or recalled[-1]
    for change in (0, 1):
        text = x.clone()
        text[:, 5] += change
        layer(text)
    first, second = recalled[:3], recalled[3:]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][:, :, 1:], second[1][:, :, 1:])
    assert (first[2] - second[2]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_no_state_when_none_is_asked_for(kind: str) -> None:
    layer, x = make(kind), tokens(2, 13)
    y, state = layer(x, return_state=False)
    assert state is None
    assert torch.equal(y, layer(x)[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_inputs_keep_wide_fast_weights(kind: str, autocast: bool) -> None:
    layer, x = make(kind).float(), tokens(2, 9).float()
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = run(layer, x[:, :4], x[:, 4:])
    assert y.dtype == torch.bfloat16
    assert {w.dtype for w in state.memory.memory.params.values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------- stability


@pytest.mark.parametrize("length", [1024, pytest.param(32768, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("text", ["random", "constant", "alternating"])
@pytest.mark.parametrize("kind", KINDS)
def test_saturated_gates_stay_finite_forward_and_backward(kind: str, text: str, length: int) -> None:
    for scale, gate in ((1.0, "open"), (1e2, "mixed"), (1e4, "mixed")):
        torch.manual_seed(0)
        layer = KINDS[kind][0](**({"segment_length": 128} if kind == "mac" else {"window": 32})).build(8, 1)
        with torch.no_grad():
            layer.memory.gates.weight.normal_(0, 0 if gate == "open" else 30)
            layer.memory.gates.bias.fill_(30 if gate == "open" else 0)
        x = torch.randn(1, length, 8)
        x = x if text == "random" else x[:, :1].expand(1, length, 8).clone()
        if text == "alternating":
            x[:, ::2] *= -1
        x = (scale * x).requires_grad_()
        # In pieces: the scores of a window are computed densely, 4 GB at once for 32,768 tokens.
        y, state = run(layer, *x.split(2048, 1))
        y.square().mean().backward()
        assert y.isfinite().all()
        assert all(w.isfinite().all() for w in state.memory.memory.params.values())
        assert x.grad is not None and x.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


# ----------------------------------------------------------------------------------------------- costs and bad input


@pytest.mark.parametrize("kind", KINDS)
def test_flops_count_weights_attention_and_memory(kind: str) -> None:
    """Against a count of the matrix products of one forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    span = {"segment_length": 16} if kind == "mac" else {"window": 16}
    layer = KINDS[kind][0]("deltanet", persistent_tokens=4, conv_size=0, chunk_size=16, **span).build(32, 2)
    x = torch.randn(1, 64, 32)
    with FlopCounterMode(display=False) as counter:
        layer(x, return_state=False)
    # Attention is computed densely with a mask; the formula counts visible pairs.
    dense = 4 * 32 * ((4 + 2 * 16) if kind == "mac" else (4 + 64))
    visible = 4 * 32 * ((4 + 17) if kind == "mac" else (4 + 64 * 16 / 64))
    counted = counter.get_total_flops() / 64 - dense + visible
    assert abs(layer.flops_per_token(64) / counted - 1) < 0.15


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mac", {"segment_length": 0}, "segment_length"),
        ("mac", {"persistent_tokens": -1}, "persistent_tokens"),
        ("mag", {"persistent_tokens": -1}, "persistent_tokens"),
        ("mag", {"window": 0}, "window"),
        ("mal", {"memory": "deltanets"}, "Did you mean 'deltanet'"),
        ("mac", {"memory": "titans", "max_step": 1.5}, "at most 1"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KINDS[kind][0](**options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "message"), [(9, "divisible"), (6, "even")])
def test_impossible_sizes_are_refused(kind: str, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KINDS[kind][0]().build(width, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_inputs_are_refused(kind: str) -> None:
    layer = make(kind)
    with pytest.raises(ValueError, match="tokens >= 1"):
        layer(torch.zeros(1, 0, 8).double())
    with pytest.raises(TypeError, match="not token ids"):
        layer(torch.zeros(1, 3, 8, dtype=torch.long))
