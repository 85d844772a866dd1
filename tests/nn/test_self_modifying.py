"""Self-modifying Titans against its own token loop, finite differences, and the properties a stream needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nestlearn.nn import SelfModifyingConfig, SelfModifyingState, SelfModifyingTitans
from nestlearn.nn.state import tensors_of

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "static-projections": {"adaptive": ()},
    "adaptive-q": {"adaptive": ("q", "k", "v", "eta", "alpha")},
    "static-v": {"adaptive": ("k", "eta", "alpha")},
    "momentum": {"momentum": True},
    "l2": {"objective": "l2"},
    "l2-momentum": {"objective": "l2", "momentum": True},
    "gradient-descent": {"delta": False},
    "gradient-descent-momentum": {"delta": False, "momentum": True},
    "no-retention": {"retention": False},
    "normalized": {"step_size": "normalized", "max_step": 2.0},
    "per-map": {"step_size": {"in": "normalized", "out": "proximal"}, "max_step": 2.0},
    "silu": {"activation": "silu"},
    "no-convolution": {"conv_size": 0},
    "chunk-reads": {"read": "chunk"},
    "chunk-reads-l2": {
        "read": "chunk",
        "objective": "l2",
        "momentum": True,
        "adaptive": ("q", "k", "v", "eta", "alpha"),
    },
    "given-values": {"self_values": False},
    "to-zero": {"retain_to": "zero"},
    "to-zero-l2-momentum": {"retain_to": "zero", "objective": "l2", "momentum": True, "read": "chunk"},
    "given-values-l2": {"self_values": False, "objective": "l2"},
}


def make(variant: str = "default", d: int = 8, heads: int = 2, chunk: int = 4, outer: int = 8) -> SelfModifyingTitans:
    torch.manual_seed(0)
    config = SelfModifyingConfig(expansion=2, chunk_size=chunk, projection_chunk_size=outer, **VARIANTS[variant])
    layer = config.build(d, heads).double()
    with torch.no_grad():
        # Gates away from their open start, so that every gate matters.
        layer.alpha_bias.fill_(2.0)
        for vector in (layer.alpha_vector, layer.eta_vector, layer.eta_bias):
            vector.normal_()
    return layer


def tokens(batch: int, length: int, d: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def values(state: SelfModifyingState) -> list[Tensor]:
    return [x for x in tensors_of(state) if x.is_floating_point()]


def error(a: Tensor, b: Tensor) -> float:
    scale = max(b.abs().max().item(), 1e-30)
    return (a - b).abs().max().item() / scale


def outcome(layer: SelfModifyingTitans, y: Tensor, state: SelfModifyingState) -> list[Tensor]:
    """Outputs, final state and the gradients of a random function of both."""
    found = [y, *values(state)]
    generator = torch.Generator().manual_seed(5)
    total = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in found)
    assert isinstance(total, Tensor)
    parameters = list(layer.parameters())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return found + [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


@pytest.mark.parametrize("length", [1, 3, 23])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_equals_the_token_loop(variant: str, length: int) -> None:
    layer, x = make(variant), tokens(3, length)
    oracle = outcome(layer, *layer.loop(x))
    everyone = torch.ones(3, length, dtype=torch.bool)
    for kwargs in ({}, {"mask": everyone}):
        y, state = layer(x, **kwargs)
        for mine, theirs in zip(outcome(layer, y, state), oracle, strict=True):
            assert error(mine, theirs) < 1e-9


@pytest.mark.parametrize("variant", ["default", "chunk-reads"])
@pytest.mark.parametrize(("chunk", "outer"), [(1, 1), (1, 4), (4, 4), (16, 64), (64, 192)])
def test_chunk_sizes_equal_the_token_loop(chunk: int, outer: int, variant: str) -> None:
    layer, x = make(variant, chunk=chunk, outer=outer), tokens(1, 40)
    for mine, theirs in zip(outcome(layer, *layer(x)), outcome(layer, *layer.loop(x)), strict=True):
        assert error(mine, theirs) < 1e-9


@pytest.mark.parametrize("variant", ["default", "momentum", "gradient-descent"])
@pytest.mark.parametrize(("chunk", "outer"), [(32, 128), (16, 192)])
def test_projection_chunks_longer_than_a_span_equal_the_token_loop(variant: str, chunk: int, outer: int) -> None:
    """Projection memories learn a long chunk in several spans; the tokens behind it read what all of them wrote."""
    layer, x = make(variant, d=4, heads=1, chunk=chunk, outer=outer), tokens(1, outer + 9, d=4)
    first, state = layer(x[:, :outer])
    second, end = layer(x[:, outer:], state)
    oracle = outcome(layer, *layer.loop(x))
    for mine, theirs in zip(outcome(layer, *layer(x)), oracle, strict=True):
        assert error(mine, theirs) < 1e-9
    for mine, theirs in zip(outcome(layer, torch.cat([first, second], 1), end), oracle, strict=True):
        assert error(mine, theirs) < 1e-9


@pytest.mark.parametrize("memory", ["q", "k", "v", "eta", "alpha", "memory"])
@pytest.mark.parametrize("linear", ["in", "out"])
def test_initial_state_gets_the_outer_gradient_of_finite_differences(memory: str, linear: str) -> None:
    layer, x = make("adaptive-q"), tokens(2, 21)
    weight = layer.initial[memory][linear]  # type: ignore[index]
    coefficients = tokens(2, 21, seed=9)

    def objective() -> Tensor:
        return (layer(x, return_state=False)[0] * coefficients).sum()

    gradient = torch.autograd.grad(objective(), weight)[0]
    assert gradient.abs().max() > 1e-4
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    values, step = [], 1e-5
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * step * direction
            values.append(objective())
        weight += step * direction
    slope = (values[0] - values[1]) / (2 * step)
    assert torch.allclose(slope, (gradient * direction).sum(), rtol=1e-6)


@pytest.mark.parametrize(
    "variant", ["default", "adaptive-q", "momentum", "static-projections", "normalized", "chunk-reads"]
)
def test_any_split_equals_one_call(variant: str) -> None:
    layer, x = make(variant), tokens(2, 19)
    with torch.inference_mode():
        whole, end = layer(x)
        for cut in range(1, 19):
            first, state = layer(x[:, :cut])
            second, state = layer(x[:, cut:], state)
            assert error(torch.cat([first, second], 1), whole) < 1e-10
            assert all(error(a, b) < 1e-10 for a, b in zip(values(state), values(end), strict=True))
        pieces, state = [], None
        for t in range(19):
            y, state = layer(x[:, t : t + 1], state)
            pieces.append(y)
        assert error(torch.cat(pieces, 1), whole) < 1e-10


@pytest.mark.parametrize("variant", ["default", "momentum", "l2", "chunk-reads", "given-values", "to-zero"])
def test_padding_phases_and_resets_equal_separate_runs(variant: str) -> None:
    layer, x = make(variant), tokens(3, 30)
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[0, :7] = False  # left padding
    mask[1, 20:] = False  # right padding
    mask[2, 5:9] = False  # a hole
    x = torch.where(mask.unsqueeze(-1), x, float("nan"))
    reset = torch.zeros_like(mask)
    reset[0, 18], reset[1, 3], reset[1, 11], reset[2, 6] = True, True, True, True  # the last is masked: no effect
    with torch.inference_mode():
        got, state = layer(x[:, :13], None, mask[:, :13], reset[:, :13])
        rest, state = layer(x[:, 13:], state, mask[:, 13:], reset[:, 13:])
        got = torch.cat([got, rest], 1)
        assert (got[~mask] == 0).all()
        for row in range(3):
            real = mask[row].nonzero().flatten()
            documents: list[list[int]] = [[]]
            for t in real.tolist():
                if reset[row, t]:
                    documents.append([])
                documents[-1].append(t)
            for document in filter(None, documents):
                alone, end = layer(x[row : row + 1, document])
                assert error(got[row : row + 1, document], alone) < 1e-10
            for mine, theirs in zip(values(state), values(end), strict=True):
                assert error(mine[row : row + 1], theirs) < 1e-10
            for mine, theirs in ((state.memory, end.memory), (state.projections, end.projections)):
                assert torch.equal(mine.position[row], theirs.position[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.5, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", ["default", "chunk-reads"])
def test_the_past_and_other_rows_are_bit_identical(
    dtype: torch.dtype, value: float, masked: bool, variant: str
) -> None:
    layer, x = make(variant).to(dtype), tokens(3, 21).to(dtype)
    mask = torch.ones(3, 21, dtype=torch.bool) if masked else None
    changed = x.clone()
    changed[1, 10] = value
    before, after = layer(x, mask=mask)[0], layer(changed, mask=mask)[0]
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert torch.equal(before[1, :10], after[1, :10])
    assert not torch.equal(before[1, 10:], after[1, 10:])
    assert torch.isfinite(after[1, 10:]).all() == torch.isfinite(torch.tensor(value))


def test_a_reset_clears_what_a_nan_destroyed() -> None:
    layer, x = make(), tokens(2, 20)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[0, 12] = True
    broken = x.clone()
    broken[0, 5] = float("nan")
    clean, lost = layer(x, reset=reset)[0], layer(broken, reset=reset)[0]
    assert lost[0, 5:12].isnan().all()
    assert torch.equal(lost[0, 12:], clean[0, 12:])


@pytest.mark.parametrize("split", [9, 12, 16])
@pytest.mark.parametrize("start", [17, 19])
def test_a_reset_clears_a_nan_that_an_earlier_call_left(split: int, start: int) -> None:
    layer, x = make(chunk=8, outer=16), tokens(2, 30)
    reset = torch.zeros(2, 30, dtype=torch.bool)
    reset[0, start] = True
    broken = x.clone()
    broken[0, 5] = float("nan")
    clean = layer(x, reset=reset)[0]
    first, state = layer(broken[:, :split], reset=reset[:, :split])
    second, _ = layer(broken[:, split:], state, reset=reset[:, split:])
    lost = torch.cat([first, second], 1)
    assert lost[0, 5:start].isnan().all()
    assert torch.allclose(lost[0, start:], clean[0, start:])
    assert torch.allclose(lost[1], clean[1])


def test_without_writes_nothing_is_learned() -> None:
    layer, x = make(), tokens(2, 21)
    y, state = layer(x, writes=False)
    fresh = layer(x[:, :1], writes=False)[1]
    for group, start in ((state.memory, fresh.memory), (state.projections, fresh.projections)):
        for name in group.params:
            assert torch.allclose(group.params[name], start.params[name], atol=1e-14)
    assert not torch.allclose(y, layer(x)[0])
    # Each output then depends on the convolution window alone.
    assert torch.allclose(layer(x[:, 10:], writes=False)[0][:, 3:], y[:, 13:], atol=1e-12)


def test_reading_earlier_tokens_changes_later_outputs_beyond_the_convolution() -> None:
    layer, x = make(), tokens(1, 21)
    other = x.clone()
    other[:, 0] += 1
    assert (layer(x)[0][:, 4:] - layer(other)[0][:, 4:]).abs().amax(-1).min() > 1e-8


def test_chunk_reads_see_nothing_of_their_own_chunk() -> None:
    """Static projections without a convolution: in chunk reads a token changes no other output of its chunk of 4."""
    x = tokens(1, 12)
    other = x.clone()
    other[:, 4] += 1
    for read, first in (("token", 5), ("chunk", 8)):
        torch.manual_seed(0)
        layer = (
            SelfModifyingConfig(expansion=2, chunk_size=4, projection_chunk_size=8, adaptive=(), conv_size=0, read=read)
            .build(8, 2)
            .double()
        )
        changed = (layer(x)[0] - layer(other)[0]).abs().amax(-1)[0] > 1e-10
        assert changed.tolist() == [t == 4 or t >= first for t in range(12)]


def test_low_precision_inputs_keep_wide_fast_weights() -> None:
    layer = make().to(torch.bfloat16)
    y, state = layer(tokens(2, 9).bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.memory.params["in"].dtype == torch.float32


def test_return_state_false_changes_no_output_and_no_gradient() -> None:
    layer, x = make(), tokens(2, 21)
    kept, dropped = layer(x)[0], layer(x, return_state=False)
    assert dropped[1] is None
    assert torch.equal(kept, dropped[0])
    for a, b in zip(
        torch.autograd.grad(kept.sum(), list(layer.parameters())),
        torch.autograd.grad(dropped[0].sum(), list(layer.parameters())),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": 8, "projection_chunk_size": 12}, "multiple"),
        ({"adaptive": ("k", "beta")}, "adaptive"),
        ({"adaptive": ("k", "k")}, "adaptive"),
        ({"objective": "huber"}, "objective"),
        ({"step_size": "raw"}, "overflows"),
        ({"step_size": "normalized", "max_step": 2.5}, "max_step"),
        ({"objective": "l2", "max_step": 1.5}, "max_step"),
        ({"max_step": 0.0}, "max_step"),
        ({"delta": False, "retention": False}, "retention"),
        ({"expansion": 0}, "expansion"),
        ({"read": "segment"}, "read"),
        ({"activation": "tanh"}, "activation"),
    ],
)
def test_contradictions_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfModifyingConfig(**kwargs)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible"):
        SelfModifyingConfig().build(8, 3)


def test_bad_inputs_are_refused() -> None:
    layer = make()
    with pytest.raises(ValueError, match="tokens >= 1"):
        layer(tokens(1, 0))
    with pytest.raises(ValueError, match="expected x"):
        layer(torch.zeros(1, 3, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match="floating"):
        layer(torch.zeros(1, 3, 8, dtype=torch.long))
