"""Titans with attention (MAC, MAG, MAL) against plain loops; what every layer keeps to is in tests/contracts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.memory.oracle import Row, Rule, forward, fresh, step
from tests.nn.test_attention import turned
from tests.nn.test_mixer import assert_finite, inputs, naive, naive_gates, saturated
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory import MLP
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
            step={"in": "proximal", "out": "proximal"},
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


# ------------------------------------------------------------------------------------------------ what memory does


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


# ------------------------------------------------------------------------------------------------------- stability


@pytest.mark.parametrize("length", [1024, pytest.param(32768, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("kind", KINDS)
def test_saturated_gates_stay_finite_forward_and_backward(kind: str, length: int) -> None:
    for mode in ("open", "mixed"):
        layer = KINDS[kind][0](**({"segment_length": 128} if kind == "mac" else {"window": 32})).build(8, 1)
        saturated(layer.memory, mode)
        assert_finite(layer, inputs(length, 1.0, 1e2, 1e4))


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
        ("mac", {"memory": "deltanet", "max_step": 2.5}, "at most 2"),
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
