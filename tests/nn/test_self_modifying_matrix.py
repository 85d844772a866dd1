"""The matrix form of self-modifying Titans: its token loop, finite differences, streams, bounds, and that it writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nestlearn.memory import AssociativeMemory, Delta, Gates, Matrix
from nestlearn.memory.reference import token_step
from nestlearn.nn import SelfModifyingConfig, SelfModifyingMatrix, SelfModifyingState
from nestlearn.nn.state import tensors_of

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "static": {"adaptive": ()},
    "adaptive-q": {"adaptive": ("q", "k", "v", "eta", "alpha")},
    "static-v": {"adaptive": ("k", "eta", "alpha")},
    "static-gates": {"adaptive": ("k", "v")},
    "given-values": {"self_values": False},
    "static, given values": {"self_values": False, "adaptive": ()},
    "momentum": {"momentum": True},
    "l2": {"objective": "l2"},
    "l2-zero": {"objective": "l2", "retain_to": "zero"},
    "l2-momentum": {"objective": "l2", "momentum": True},
    "to-zero": {"retain_to": "zero"},
    "raw": {"step_size": "raw"},
    "normalized": {"step_size": "normalized", "max_step": 2.0},
    "gradient-descent": {"delta": False},
    "no-retention": {"retention": False},
    "chunk-reads": {"read": "chunk"},
    "chunk-reads-l2-momentum": {"read": "chunk", "objective": "l2", "momentum": True, "retain_to": "zero"},
    "no-convolution": {"conv_size": 0},
}


def make(variant: str = "default", d: int = 8, heads: int = 2, chunk: int = 4, seed: int = 0) -> SelfModifyingMatrix:
    torch.manual_seed(seed)
    layer = SelfModifyingConfig(architecture="matrix", chunk_size=chunk, **VARIANTS[variant]).build(d, heads).double()
    assert isinstance(layer, SelfModifyingMatrix)
    with torch.no_grad():
        # Streams of size 1 and gates away from their open start, so that all of them matter.
        layer.streams.weight.normal_(0, d**-0.5)
        layer.alpha_bias.fill_(2.0)
        for vector in (layer.alpha_vector, layer.eta_vector, layer.eta_bias):
            vector.normal_()
    return layer


def tokens(batch: int, length: int, d: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def values(state: SelfModifyingState | None) -> list[Tensor]:
    return [x for x in tensors_of(state) if x.is_floating_point()]


def error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() / max(b.abs().max().item(), 1e-30)


def outcome(layer: SelfModifyingMatrix, x: Tensor, y: Tensor, state: SelfModifyingState | None) -> list[Tensor]:
    """Outputs, final state and the gradients of a random function of both, the input's too."""
    found = [y, *values(state)]
    generator = torch.Generator().manual_seed(5)
    total = torch.stack([(z * torch.randn(z.shape, dtype=z.dtype, generator=generator)).sum() for z in found]).sum()
    leaves = [x, *layer.parameters()]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return found + [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)]


@pytest.mark.parametrize("length", [1, 3, 23])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_equals_the_token_loop(variant: str, length: int) -> None:
    layer, x = make(variant), tokens(3, length).requires_grad_()
    oracle = outcome(layer, x, *layer.loop(x))
    everyone = torch.ones(3, length, dtype=torch.bool)
    for kwargs in ({}, {"mask": everyone}):
        for mine, theirs in zip(outcome(layer, x, *layer(x, **kwargs)), oracle, strict=True):
            assert error(mine, theirs) < 1e-9


@pytest.mark.parametrize("variant", ["default", "l2", "chunk-reads", "static"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 192])
def test_chunk_sizes_equal_the_token_loop(chunk: int, variant: str) -> None:
    layer, x = make(variant, chunk=chunk, d=4, heads=1), tokens(1, 200 if chunk == 192 else 70, d=4).requires_grad_()
    for mine, theirs in zip(outcome(layer, x, *layer(x)), outcome(layer, x, *layer.loop(x)), strict=True):
        assert error(mine, theirs) < 1e-9


@pytest.mark.parametrize("variant", ["default", "l2", "momentum", "adaptive-q", "chunk-reads", "normalized"])
def test_every_parameter_has_the_gradient_of_finite_differences(variant: str) -> None:
    layer, x, coefficients = make(variant), tokens(2, 21), tokens(2, 21, seed=9)

    def objective() -> Tensor:
        return (layer(x, return_state=False)[0] * coefficients).sum()

    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(objective(), parameters)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        assert gradient.abs().max() > 1e-6, name
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        found, step = [], 1e-6
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * step * direction
                found.append(objective())
            parameter += step * direction
        slope = (found[0] - found[1]) / (2 * step)
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("variant", ["default", "static", "l2", "momentum", "chunk-reads", "given-values"])
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


@pytest.mark.parametrize("variant", ["default", "static", "momentum", "l2", "chunk-reads", "to-zero"])
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
            documents: list[list[int]] = [[]]
            for t in mask[row].nonzero().flatten().tolist():
                if reset[row, t]:
                    documents.append([])
                documents[-1].append(t)
            end = None
            for document in filter(None, documents):
                alone, end = layer(x[row : row + 1, document])
                assert error(got[row : row + 1, document], alone) < 1e-10
            for mine, theirs in zip(values(state), values(end), strict=True):
                assert error(mine[row : row + 1], theirs) < 1e-10


@pytest.mark.parametrize("value", [0.5, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", ["default", "static"])
def test_the_past_and_other_rows_are_bit_identical(value: float, masked: bool, variant: str) -> None:
    layer, x = make(variant).float(), tokens(3, 21).float()
    mask = torch.ones(3, 21, dtype=torch.bool) if masked else None
    changed = x.clone()
    changed[1, 10] = value
    before, after = layer(x, mask=mask)[0], layer(changed, mask=mask)[0]
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert torch.equal(before[1, :10], after[1, :10])
    assert not torch.equal(before[1, 10:], after[1, 10:])
    assert torch.isfinite(after[1, 10:]).all() == torch.isfinite(torch.tensor(value))


def test_a_reset_clears_what_a_nan_destroyed() -> None:
    layer, x = make(), tokens(2, 30)
    reset = torch.zeros(2, 30, dtype=torch.bool)
    reset[0, 17] = True
    broken = x.clone()
    broken[0, 5] = float("nan")
    clean = layer(x, reset=reset)[0]
    first, state = layer(broken[:, :11], reset=reset[:, :11])
    second, _ = layer(broken[:, 11:], state, reset=reset[:, 11:])
    lost = torch.cat([first, second], 1)
    assert lost[0, 5:17].isnan().all()
    torch.testing.assert_close(lost[0, 17:], clean[0, 17:])
    torch.testing.assert_close(lost[1], clean[1])


@pytest.mark.parametrize("architecture", ["mlp", "matrix"])
def test_a_single_head_that_is_lost_spoils_its_text_until_the_reset(architecture: str) -> None:
    layer = SelfModifyingConfig(architecture=architecture, chunk_size=4).build(8, 2).double()
    x, reset = tokens(2, 12), torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 6] = True
    _, state = layer(x)
    clean = layer(x, state, reset=reset)[0]
    for w in state.memory.params.values():
        w.data[0, 1] = float("nan")
    lost = layer(x, state, reset=reset)[0]
    assert lost[0, :6].isnan().all()
    torch.testing.assert_close(lost[0, 6:], clean[0, 6:])
    torch.testing.assert_close(lost[1], clean[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_writes(variant: str) -> None:
    """Earlier tokens change later outputs beyond the convolution; without writes they do not, and H stays I."""
    layer, x = make(variant), tokens(2, 21)
    other = x.clone()
    other[:, 0] += 1
    assert (layer(x)[0][:, 8:] - layer(other)[0][:, 8:]).abs().amax() > 1e-4
    still, state = layer(x, writes=False)
    if layer.memory.retain_to == "initial":
        assert state is not None
        torch.testing.assert_close(
            state.memory.params["W"], torch.eye(4).double().expand(2, 2, 4, 4), atol=1e-14, rtol=0
        )
        assert torch.allclose(layer(x[:, 10:], writes=False)[0][:, 3:], still[:, 13:], atol=1e-12)
    assert (layer(x)[0] - still).abs().amax() > 1e-3


def test_projections_change_while_it_reads() -> None:
    """Adaptive streams differ from static ones exactly from the second chunk on."""
    layer, x = make("no-convolution"), tokens(1, 12)
    with torch.no_grad():
        streams = layer._streams(x, None, None, None)[0].permute(2, 0, 3, 1, 4).flatten(1, 2)
        named = dict(zip(layer.streams_order, streams, strict=True))
        _, state = layer(x[:, :8])
        start = torch.eye(layer.d_head, dtype=x.dtype).expand(layer.num_heads, -1, -1)
        before, after = (
            layer._project(named, layer._of_rows(1, x.dtype), {"W": matrix}, {"W": start}, None)
            for matrix in (start, state.memory.params["W"].flatten(0, 1))
        )
    assert torch.equal(before[0], after[0])
    for one, other in zip((*before[1:3], *before[3]), (*after[1:3], *after[3]), strict=True):
        assert (one - other).abs().amax() > 1e-3


def test_one_fast_matrix_serves_all_memories() -> None:
    """Five matrices that absorb the same keys, each with its own target ``M_m u``, are ``M_m H`` at every token."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 4, 4, generator=generator, dtype=torch.float64)
    k, v = torch.nn.functional.normalize(torch.randn(2, 20, 4, generator=generator, dtype=torch.float64), dim=-1)
    gates = Gates(*torch.rand(2, 20, generator=generator, dtype=torch.float64))
    memory = AssociativeMemory(Matrix(), retention=Delta(), retain_to="initial", step_size="raw")
    eye = torch.eye(4, dtype=torch.float64)
    many, one = memory.begin({"W": start}), memory.begin({"W": eye})
    for t in range(20):
        if t % 5 == 0:
            many, one = (state._replace(anchor=state.params) for state in (many, one))
        here = gates.map(lambda g, t=t: g[t])
        value = one.anchor["W"] @ v[t]
        five = here.map(lambda g: g.expand(5))
        many = token_step(memory, many, {"W": start}, k[t].expand(5, 4), start @ value, five)
        one = token_step(memory, one, {"W": eye}, k[t], value, here)
        torch.testing.assert_close(many.params["W"], start @ one.params["W"], rtol=1e-12, atol=1e-12)
    assert (one.params["W"] - eye).norm() > 0.1


LENGTHS = [1024, pytest.param(32768, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", ["random", "constant", "alternating"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saturated_gates_stay_finite_forward_and_backward(variant: str, kind: str, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        x = torch.randn(1, length, 8, generator=generator)
    elif kind == "constant":
        x = torch.randn(1, 1, 8, generator=generator).expand(1, length, 8)
    else:
        x = torch.randn(1, 2, 8, generator=generator).repeat(1, length // 2, 1)
    x = (100 * x).clone().requires_grad_()
    for by in ("inputs", "open gates"):
        layer = make(variant, chunk=64).float()
        with torch.no_grad():
            if by == "inputs":
                layer.eta_vector.normal_(std=3)
                layer.alpha_vector.normal_(std=3)
            else:
                layer.eta_bias.fill_(50)
                layer.alpha_bias.fill_(50 if VARIANTS[variant].get("delta", True) else 3)
            if layer.beta_gate is not None:
                layer.beta_gate.bias.fill_(20)
        y, state = layer(x)
        assert torch.isfinite(y).all() and state is not None
        assert state.memory.params["W"].abs().max() < 1e4
        gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)
        assert all(torch.isfinite(g).all() for g in gradients if g is not None)


@pytest.mark.parametrize("alpha", [0.0, 2.0, 6.0])
def test_the_printed_rule_never_makes_the_matrix_longer(alpha: float) -> None:
    """L2, retention to zero: the operator norm of H stays at most 1 whatever the gates."""
    layer, x = make("l2-zero", chunk=16), tokens(2, 400)
    with torch.no_grad():
        layer.alpha_bias.fill_(alpha)
        layer.eta_bias.fill_(50.0)
        _, state = layer(x)
    assert torch.linalg.matrix_norm(state.memory.params["W"], 2).max() <= 1 + 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expansion": 2}, "expansion"),
        ({"projection_chunk_size": 128}, "projection_chunk_size"),
        ({"activation": "silu"}, "activation"),
        ({"step_size": "raw", "max_step": 1.5}, "max_step"),
        ({"step_size": "normalized", "max_step": 2.5}, "max_step"),
        ({"step_size": {"in": "raw", "out": "raw"}}, "step_size"),
        ({"architecture": "cube"}, "architecture"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SelfModifyingConfig(architecture="matrix"), **settings)
