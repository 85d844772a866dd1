"""The hierarchy of memories against a sequential loop; its windows run as one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.memory.oracle import Rule, forward, fresh, step
from tests.nn.test_mixer import assert_finite, inputs, naive_gates, saturated
from tests.nn.test_titans import convolved, rms
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import L2, MLP, Decay, Momentum, scan
from nestlearn.nn import HierarchicalMemory, TNTConfig, tnt
from nestlearn.nn.common import unit

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
D, HEADS = 8, 2


def make(memory: str = "titans", windows: tuple[int, ...] = (4, 6), chunks: tuple[int, ...] = (2, 3), **options: Any):
    torch.manual_seed(0)
    config = TNTConfig(memory, chunk_size=5, local_windows=windows, local_chunk_sizes=chunks, **options)
    layer = config.build(D, HEADS).double()
    with torch.no_grad():
        for mixer in (layer, *layer.locals):
            if mixer.gates is not None:
                mixer.gates.weight.normal_()
    return layer


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(layer: HierarchicalMemory, *pieces: Tensor, state: Any = None, **flags: Any) -> tuple[Tensor, Any]:
    outputs = []
    for piece in pieces:
        y, state = layer(piece, state, **flags)
        outputs.append(y)
    return torch.cat(outputs, 1), state


# ---------------------------------------------------------------------------------------------------- the oracle


def rule_of(mixer: Any) -> Rule:
    memory = mixer.memory
    names = list(memory.architecture.shapes(1, 1))
    return Rule(
        deep=isinstance(memory.architecture, MLP),
        activation="gelu",
        objective="l2" if isinstance(memory.objective, L2) else "dot",
        retention="decay" if isinstance(memory.retention, Decay) else "gated" if memory.retention.gated else "delta",
        step={name: memory.step_size_of(name) for name in names},
        momentum=isinstance(memory.algorithm, Momentum),
        to_initial=memory.retain_to == "initial",
        chunk_size=memory.chunk_size,
        read=memory.read,
    )


def sequence(mixer: Any, head: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One memory of one head in sequence over a row: a Python loop with a Python clock for the window."""
    rule, initial = rule_of(mixer), {name: w[head] for name, w in mixer.initial.items()}
    row, outputs = fresh(initial), []
    keys = torch.zeros(D // HEADS, D // HEADS, dtype=x.dtype)
    for t in range(len(x)):
        if window is not None and t % window == 0:
            row, keys = fresh(initial), torch.zeros_like(keys)
        ask = q[t]
        if window is not None:
            keys = keys + torch.outer(k[t], k[t])
            ask = unit(keys @ q[t])
        lr, retain, beta = naive_gates(mixer, x[t], head)
        before = row
        row = step(rule, row, initial, k[t], v[t], lr, retain, beta)
        outputs.append(forward(rule, row.weights if rule.read == "token" else before.anchor, ask)[0])
        row.position = (row.position + 1) % rule.chunk_size
        if row.position == 0:
            row.anchor = dict(row.weights)
    return torch.stack(outputs)


def plain_loop(layer: HierarchicalMemory, x: Tensor) -> Tensor:
    mixed = F.silu(convolved(layer.conv, x @ layer.qkv.weight.mT)).view(len(x), 3, HEADS, -1)
    q, k, v = mixed.unbind(1)
    q, k, v = unit(q), unit(k), unit(v) if rule_of(layer).deep else v
    answers = []
    for head in range(HEADS):
        here = (x, q[:, head], k[:, head], v[:, head])
        y = sequence(layer, head, *here, None)
        for local in layer.locals:
            y = y + sequence(local, head, *here, local.window)
        answers.append(rms(layer.norm, y))
    return torch.cat(answers, -1) @ layer.out.weight.mT


@pytest.mark.parametrize("memory", ["titans", "deltanet", "hope"])
def test_equals_the_sequential_loop_with_all_outer_gradients(memory: str) -> None:
    layer, x = make(memory), tokens(2, 13).requires_grad_()
    target, wanted = tokens(2, 13, seed=2), [x, *layer.parameters()]
    expected = torch.stack([plain_loop(layer, row) for row in x])
    gradients = torch.autograd.grad((expected * target).sum(), wanted)
    everyone = torch.ones(2, 13, dtype=torch.bool)
    for flags in ({}, {"mask": everyone}):
        y, _ = layer(x, **flags)
        torch.testing.assert_close(y, expected, **CLOSE)
        for got, want in zip(torch.autograd.grad((y * target).sum(), wanted), gradients, strict=True):
            assert want.abs().max() > 0
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_windows_run_as_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine whole windows of four tokens and a rest of three: two calls a memory, not ten."""
    calls: list[tuple[str, tuple[int, ...]]] = []

    def spy(memory: Any, state: Any, q: Tensor, *args: Any, **options: Any) -> Any:
        calls.append(("projector" if memory is tnt.PROJECTOR else memory.read, tuple(q.shape[:-1])))
        return scan(memory, state, q, *args, **options)

    monkeypatch.setattr(tnt, "scan", spy)
    layer = make(windows=(4,), chunks=(2,))
    layer(tokens(3, 39))
    assert calls == [
        ("chunk", (3, HEADS, 39)),
        ("projector", (3, HEADS, 9, 4)),
        ("token", (3, HEADS, 9, 4)),
        ("projector", (3, HEADS, 3)),
        ("token", (3, HEADS, 3)),
    ]


def test_a_local_memory_forgets_at_its_window_and_the_global_one_does_not() -> None:
    layer, x = make(windows=(4,), chunks=(2,), conv_size=0), tokens(1, 12)
    other = x.clone()
    other[:, 1] += 1
    seen: list[Tensor] = []
    local = layer.locals[0]
    original = local.read_windows
    local.read_windows = lambda *args: (seen.append(original(*args)[0]), original(*args))[1]  # type: ignore[method-assign]
    change = (layer(x)[0] - layer(other)[0]).abs().amax(-1)[0]
    assert torch.equal(seen[0][:, :, 4:], seen[1][:, :, 4:])
    assert (seen[0][:, :, 1:4] - seen[1][:, :, 1:4]).abs().amax((0, 1, 3)).min() > 1e-8
    # The global memory is read at the start of its chunk of 5.
    assert change[4] == 0 and (change[5:] > 1e-10).all()


# ------------------------------------------------------------------------------------------------------- stability


@pytest.mark.parametrize("length", [1024, pytest.param(32768, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_saturated_gates_stay_finite_forward_and_backward(length: int) -> None:
    for mode in ("open", "mixed"):
        layer = TNTConfig(local_windows=(128, 256), local_chunk_sizes=(16, 64)).build(8, 1)
        for mixer in (layer, *layer.locals):
            saturated(mixer, mode)
        assert_finite(layer, inputs(length, 1.0, 1e2, 1e4))


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_windows": ()}, "one number each"),
        ({"local_windows": (8, 8)}, "one number each"),
        ({"local_windows": (10,), "local_chunk_sizes": (4,)}, "multiple of its chunk"),
        ({"local_windows": (0,)}, "local_windows=.* at least 1"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"memory": "deltanets"}, "Did you mean 'deltanet'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TNTConfig(**options)
