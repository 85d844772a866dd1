"""Self-modifying Titans in both forms: the token loop, finite differences, streams, and that a memory writes.

What every layer keeps to (splits, padding, rows, resets) is tested on the default settings in tests/contracts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.largest import LargestTensor
from torch import Tensor

from nestlearn.memory import AssociativeMemory, Delta, Gates, Matrix
from nestlearn.memory.reference import token_step
from nestlearn.nn import SelfModifyingConfig, SelfModifyingMatrix, SelfModifyingState, SelfModifyingTitans
from nestlearn.nn.self_modifying import token
from nestlearn.nn.state import tensors_of

ALL = ("q", "k", "v", "eta", "alpha")
BOTH: dict[str, dict[str, Any]] = {
    "default": {},
    "static": {"adaptive": ()},
    "adaptive-q": {"adaptive": ALL},
    "static-v": {"adaptive": ("k", "eta", "alpha")},
    "momentum": {"momentum": True},
    "l2": {"objective": "l2"},
    "l2-momentum": {"objective": "l2", "momentum": True},
    "gradient-descent": {"delta": False},
    "no-retention": {"retention": False},
    "normalized": {"step_size": "normalized", "max_step": 2.0},
    "no-convolution": {"conv_size": 0},
    "chunk-reads": {"read": "chunk"},
    "chunk-reads-l2-momentum": {"read": "chunk", "objective": "l2", "momentum": True, "adaptive": ALL},
    "as-printed": {"read": "chunk", "objective": "l2", "momentum": True, "retain_to": "zero"},
    "given-values": {"self_values": False},
    "to-zero": {"retain_to": "zero"},
}
ONE: dict[str, dict[str, dict[str, Any]]] = {
    "mlp": {
        "gradient-descent-momentum": {"delta": False, "momentum": True},
        "per-map": {"step_size": {"in": "normalized", "out": "proximal"}, "max_step": 2.0},
        "silu": {"activation": "silu"},
        "given-values-l2": {"self_values": False, "objective": "l2"},
    },
    "matrix": {
        "static-gates": {"adaptive": ("k", "v")},
        "static-given-values": {"self_values": False, "adaptive": ()},
        "l2-to-zero": {"objective": "l2", "retain_to": "zero"},
        "raw": {"step_size": "raw"},
    },
}
VARIANTS = [(form, name) for form in ONE for name in (*BOTH, *ONE[form])]


def variants(*names: str, mlp: tuple[str, ...] = (), matrix: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """A test of these variants of both forms, and of some of one form; of all by default."""
    own = {"mlp": mlp, "matrix": matrix}
    chosen = [(form, name) for form in ONE for name in (*names, *own[form])] or VARIANTS
    return pytest.mark.parametrize(("form", "variant"), chosen)


def make(
    form: str, variant: str = "default", d: int = 8, heads: int = 2, chunk: int = 4, outer: int = 8
) -> SelfModifyingTitans:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"expansion": 2, "projection_chunk_size": outer} if form == "mlp" else {}
    settings |= {**BOTH, **ONE[form]}[variant]
    layer = SelfModifyingConfig(form, chunk_size=chunk, **settings).build(d, heads).double()  # type: ignore[arg-type]
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


def outcome(layer: SelfModifyingTitans, x: Tensor, y: Tensor, state: SelfModifyingState | None) -> list[Tensor]:
    """Outputs, final state and the gradients of a random function of both, the input's too."""
    found = [y, *values(state)]
    generator = torch.Generator().manual_seed(5)
    total = torch.stack([(z * torch.randn(z.shape, dtype=z.dtype, generator=generator)).sum() for z in found]).sum()
    leaves = [x, *layer.parameters()]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return found + [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    assert all(error(mine, theirs) < tolerance for mine, theirs in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------ the token loop


@variants()
def test_forward_equals_the_token_loop(form: str, variant: str) -> None:
    layer = make(form, variant)
    for length in (1, 3, 21):
        x = tokens(2, length).requires_grad_()
        oracle = outcome(layer, x, *layer.loop(x))
        assert_same(outcome(layer, x, *layer(x)), oracle)
    assert_same(outcome(layer, x, *layer(x, mask=torch.ones(2, length, dtype=torch.bool))), oracle)


@pytest.mark.parametrize(
    ("form", "chunk", "outer", "length"),
    [
        ("mlp", 1, 1, 12), ("mlp", 1, 4, 12), ("mlp", 4, 4, 21), ("mlp", 16, 64, 40),
        ("matrix", 1, 1, 12), ("matrix", 7, 7, 30), ("matrix", 64, 64, 70), ("matrix", 192, 192, 200),
    ],
)  # fmt: skip
@pytest.mark.parametrize("variant", ["default", "chunk-reads"])
def test_chunk_sizes_equal_the_token_loop(form: str, chunk: int, outer: int, length: int, variant: str) -> None:
    layer, x = make(form, variant, d=4, heads=1, chunk=chunk, outer=outer), tokens(1, length, d=4).requires_grad_()
    assert_same(outcome(layer, x, *layer(x)), outcome(layer, x, *layer.loop(x)))


def test_a_chunk_of_many_tokens_is_read_in_spans() -> None:
    """The tokens of a chunk of 512 meet 128 at a time, and so no tensor has 512 x 512 elements."""
    layer, x = make("matrix", "default", d=4, heads=1, chunk=512), tokens(1, 520, d=4)
    with LargestTensor() as largest:
        layer(x)
    assert largest.elements <= 128 * 128


@pytest.mark.parametrize(
    ("variant", "chunk", "outer"), [("default", 32, 96), ("momentum", 16, 96), ("gradient-descent", 32, 128)]
)
def test_projection_chunks_longer_than_a_span_equal_the_token_loop(variant: str, chunk: int, outer: int) -> None:
    """Projection memories learn a long chunk in several spans; the tokens behind it read what all of them wrote."""
    layer = make("mlp", variant, d=4, heads=1, chunk=chunk, outer=outer)
    x = tokens(1, outer + 9, d=4).requires_grad_()
    oracle = outcome(layer, x, *layer.loop(x))
    first, state = layer(x[:, :outer])
    second, end = layer(x[:, outer:], state)
    assert_same(outcome(layer, x, *layer(x)), oracle)
    assert_same(outcome(layer, x, torch.cat([first, second], 1), end), oracle)


@variants("adaptive-q", "chunk-reads", matrix=("default", "l2", "momentum", "normalized"))
def test_every_parameter_has_the_gradient_of_finite_differences(form: str, variant: str) -> None:
    layer, x, coefficients = make(form, variant), tokens(2, 21), tokens(2, 21, seed=9)

    def objective() -> Tensor:
        return (layer(x, return_state=False)[0] * coefficients).sum()

    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(objective(), parameters)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        assert gradient.abs().max() > 1e-6, name
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        # Small beside the norm of a centered stream, 1e-3 at some tokens.
        found, step = [], 1e-7
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * step * direction
                found.append(objective())
            parameter += step * direction
        slope = (found[0] - found[1]) / (2 * step)
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-5, atol=1e-7, msg=name)


# ------------------------------------------------------------------------------------------------------- streams


@variants("static", "momentum", "chunk-reads", mlp=("adaptive-q", "normalized"), matrix=("l2", "given-values"))
def test_any_split_equals_one_call(form: str, variant: str) -> None:
    layer, x = make(form, variant), tokens(2, 13)
    with torch.inference_mode():
        whole, end = layer(x)
        for cut in range(1, 13):
            first, state = layer(x[:, :cut])
            second, state = layer(x[:, cut:], state)
            assert_same([torch.cat([first, second], 1), *values(state)], [whole, *values(end)], 1e-10)


@variants("momentum", "l2", "chunk-reads", "to-zero", mlp=("given-values",), matrix=("static",))
def test_padding_phases_and_resets_equal_separate_runs(form: str, variant: str) -> None:
    layer, x = make(form, variant), tokens(3, 30)
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
            assert_same([mine[row : row + 1] for mine in values(state)], values(end), 1e-10)
            assert end is not None
            for mine, theirs in ((state.memory, end.memory), (state.projections, end.projections)):
                assert mine is theirs is None or torch.equal(mine.position[row], theirs.position[0])


@pytest.mark.parametrize(("variant", "dtype"), [("chunk-reads", torch.float32), ("static", torch.float64)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ONE)
def test_the_past_and_other_rows_are_bit_identical(form: str, variant: str, masked: bool, dtype: torch.dtype) -> None:
    layer, inserted = make(form, variant).to(dtype), (0.5, 1e30, float("nan"), float("inf"))
    x = tokens(1, 21).to(dtype).repeat(1 + len(inserted), 1, 1)
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if masked else None
    changed = x.clone()
    changed[1:, 10] = torch.tensor(inserted, dtype=dtype)[:, None]
    before, after = layer(x, mask=mask)[0], layer(changed, mask=mask)[0]
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[:, :10], after[:, :10])
    for row, value in enumerate(inserted, 1):
        assert not torch.equal(before[row, 10:], after[row, 10:])
        assert torch.isfinite(after[row, 10:]).all() == torch.isfinite(torch.tensor(value))


@pytest.mark.parametrize("form", ONE)
def test_a_reset_clears_what_a_nan_destroyed(form: str) -> None:
    layer, x = make(form, chunk=8, outer=16), tokens(2, 30)
    broken = x.clone()
    broken[0, 5] = float("nan")
    for start in (17, 19):
        reset = torch.zeros(2, 30, dtype=torch.bool)
        reset[0, start] = True
        clean = layer(x, reset=reset)[0]
        for split in (9, 12, 16, 30):
            lost, state = layer(broken[:, :split], reset=reset[:, :split])
            if split < 30:
                lost = torch.cat([lost, layer(broken[:, split:], state, reset=reset[:, split:])[0]], 1)
            assert lost[0, 5:start].isnan().all()
            torch.testing.assert_close(lost[0, start:], clean[0, start:])
            torch.testing.assert_close(lost[1], clean[1])


@pytest.mark.parametrize("form", ONE)
def test_a_single_head_that_is_lost_spoils_its_text_until_the_reset(form: str) -> None:
    layer, x, reset = make(form), tokens(2, 12), torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 6] = True
    _, state = layer(x)
    clean = layer(x, state, reset=reset)[0]
    for w in state.memory.params.values():
        w.data[0, 1] = float("nan")
    lost = layer(x, state, reset=reset)[0]
    assert lost[0, :6].isnan().all()
    torch.testing.assert_close(lost[0, 6:], clean[0, 6:])
    torch.testing.assert_close(lost[1], clean[1])


# -------------------------------------------------------------------------------------------------- what it writes


@variants()
def test_it_writes(form: str, variant: str) -> None:
    """Earlier tokens change later outputs beyond the convolution; without writes they do not."""
    layer, x = make(form, variant), tokens(2, 21)
    other = x.clone()
    other[:, 0] += 1
    with torch.no_grad():
        assert (layer(x)[0][:, 8:] - layer(other)[0][:, 8:]).abs().amax() > 1e-4
        still, state = layer(x, writes=False)
        assert (layer(x)[0] - still).abs().amax() > 1e-3
        if layer.memory.retain_to == "initial":
            fresh = layer(x[:, :1], writes=False)[1]
            assert fresh is not None and state is not None
            for name, w in fresh.memory.params.items():
                torch.testing.assert_close(state.memory.params[name], w, atol=1e-14, rtol=0)
            # Each output then depends on the window of the convolution alone.
            torch.testing.assert_close(layer(x[:, 10:], writes=False)[0][:, 3:], still[:, 13:], atol=1e-12, rtol=0)


def test_projections_of_mlp_memories_learn_while_they_read() -> None:
    layer, x = make("mlp", "no-convolution"), tokens(1, 12)
    with torch.no_grad():
        state, begun = layer(x[:, :8])[1], layer(x[:, :1], writes=False)[1].projections
        fresh = state.projections._replace(params=begun.params, anchor=begun.anchor)
        learned, unlearned = (layer(x[:, 8:], state._replace(projections=p))[0] for p in (state.projections, fresh))
    assert (learned - unlearned).abs().amax() > 1e-3


KNOWN = ("default", "static", "adaptive-q", "static-v", "normalized", "no-convolution", "given-values", "to-zero",
         "static-gates", "static-given-values", "raw")  # fmt: skip
"""Variants that have a step of their own for a single token."""


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("variant", [name for form, name in VARIANTS if form == "matrix"])
def test_a_single_token_gives_what_the_chunk_gives(variant: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, own = make("matrix", variant), tokens(batch, 17), 0
    read = token.read

    def counted(*given: Any) -> Any:
        nonlocal own
        own += 1
        return read(*given)

    monkeypatch.setattr(token, "read", counted)
    with torch.no_grad():
        y, state = layer(x[:, :6])
        for t in range(6, 17):
            here, state = layer(x[:, t : t + 1], state)
            y = torch.cat([y, here], 1)
    whole, end = layer(x)
    assert own == (11 if variant in KNOWN else 0)
    torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-12)
    for mine, other in zip(tensors_of(state), tensors_of(end), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_single_token_that_may_not_write_leaves_the_memory_as_the_chunk_does() -> None:
    layer, x = make("matrix"), tokens(2, 6)
    state = layer(x[:, :5])[1]
    with torch.enable_grad():  # the chunk
        expected, kept = layer(x[:, 5:], state, writes=False)
    y, end = layer(x[:, 5:], state, writes=False)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(end.memory.params, kept.memory.params)
    assert not torch.allclose(y, layer(x[:, 5:], state)[0])


@torch.no_grad()
def test_a_single_token_that_is_not_finite_spoils_its_row_until_a_reset() -> None:
    layer, x = make("matrix"), tokens(2, 12)
    clean, bad, start = x.clone(), torch.zeros(2, 1, dtype=torch.bool), layer(x[:, :3])[1]
    x[0, 4, 3] = torch.inf
    outputs, states = [], [start, start]
    for t in range(3, 12):
        bad[0] = t == 9
        reset = bad if t == 9 else None
        parts = []
        for i, text in enumerate((x, clean)):
            y, states[i] = layer(text[:, t : t + 1], states[i], reset=reset)
            parts.append(y)
        outputs.append(parts)
    for t, (y, whole) in enumerate(outputs, 3):
        torch.testing.assert_close(y[1], whole[1], rtol=1e-12, atol=1e-12)
        assert y[0].isnan().all() if 4 <= t < 9 else torch.allclose(y[0], whole[0], atol=1e-12)


def test_projections_of_matrix_memories_learn_while_they_read() -> None:
    layer, x = make("matrix", "no-convolution"), tokens(1, 12)
    assert isinstance(layer, SelfModifyingMatrix)
    with torch.no_grad():
        streams = layer._streams(x, None, None, None)[0].permute(2, 0, 3, 1, 4).flatten(1, 2)
        named = dict(zip(layer.streams_order, streams, strict=True))
        start = torch.eye(layer.d_head, dtype=x.dtype).expand(layer.num_heads, -1, -1)
        before, after = (
            layer._project(named, layer._of_rows(1, x.dtype), {"W": matrix}, {"W": start}, None)
            for matrix in (start, layer(x[:, :8])[1].memory.params["W"].flatten(0, 1))
        )
    assert torch.equal(before[0], after[0])
    for one, other in zip((*before[1:3], *before[3]), (*after[1:3], *after[3]), strict=True):
        assert (one - other).abs().amax() > 1e-3


@pytest.mark.parametrize("form", ONE)
@pytest.mark.parametrize(("read", "first"), [("token", 5), ("chunk", 8)])
def test_chunk_reads_see_nothing_of_their_own_chunk(form: str, read: str, first: int) -> None:
    """Static projections without a convolution: in chunk reads a token changes no other output of its chunk of 4."""
    torch.manual_seed(0)
    x = tokens(1, 12)
    other = x.clone()
    other[:, 4] += 1
    config = SelfModifyingConfig(form, chunk_size=4, adaptive=(), conv_size=0, read=read)  # type: ignore[arg-type]
    layer = config.build(8, 2).double()
    changed = (layer(x)[0] - layer(other)[0]).abs().amax(-1)[0] > 1e-10
    assert changed.tolist() == [t == 4 or t >= first for t in range(12)]


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


# ----------------------------------------------------------------------------------------- precision, options, input


@pytest.mark.parametrize("form", ONE)
def test_low_precision_inputs_keep_wide_fast_weights(form: str) -> None:
    y, state = make(form).to(torch.bfloat16)(tokens(2, 9).bfloat16())
    assert y.dtype == torch.bfloat16
    assert {w.dtype for w in state.memory.params.values()} == {torch.float32}


@pytest.mark.parametrize("form", ONE)
def test_return_state_false_changes_no_output_and_no_gradient(form: str) -> None:
    layer, x = make(form), tokens(2, 21)
    kept, dropped = layer(x)[0], layer(x, return_state=False)
    assert dropped[1] is None
    assert torch.equal(kept, dropped[0])
    gradients = [torch.autograd.grad(y.sum(), list(layer.parameters())) for y in (kept, dropped[0])]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        ("mlp", {"chunk_size": 0}, "chunk_size"),
        ("mlp", {"chunk_size": 8, "projection_chunk_size": 12}, "multiple"),
        ("mlp", {"adaptive": ("k", "beta")}, "adaptive"),
        ("mlp", {"adaptive": ("k", "k")}, "adaptive"),
        ("mlp", {"objective": "huber"}, "objective"),
        ("mlp", {"step_size": "raw"}, "overflows"),
        ("mlp", {"step_size": "normalized", "max_step": 2.5}, "max_step"),
        ("mlp", {"objective": "l2", "max_step": 1.5}, "max_step"),
        ("mlp", {"max_step": 0.0}, "max_step"),
        ("mlp", {"delta": False, "retention": False}, "retention"),
        ("mlp", {"expansion": 0}, "expansion"),
        ("mlp", {"read": "segment"}, "read"),
        ("mlp", {"activation": "tanh"}, "activation"),
        ("matrix", {"expansion": 2}, "expansion"),
        ("matrix", {"projection_chunk_size": 128}, "projection_chunk_size"),
        ("matrix", {"activation": "silu"}, "activation"),
        ("matrix", {"step_size": "raw", "max_step": 1.5}, "max_step"),
        ("matrix", {"step_size": "normalized", "max_step": 2.5}, "max_step"),
        ("matrix", {"step_size": {"in": "raw", "out": "raw"}}, "step_size"),
        ("cube", {}, "architecture"),
    ],
)
def test_contradictions_are_refused(form: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfModifyingConfig(form, **settings)


@pytest.mark.parametrize("form", ONE)
def test_impossible_sizes_and_bad_inputs_are_refused(form: Any) -> None:
    with pytest.raises(ValueError, match="leaves one channel per head"):
        SelfModifyingConfig(architecture="matrix").build(4, num_heads=4)
    with pytest.raises(ValueError, match="divisible"):
        SelfModifyingConfig(form).build(8, 3)
    layer = make(form)
    with pytest.raises(ValueError, match="tokens >= 1"):
        layer(tokens(1, 0))
    with pytest.raises(ValueError, match="expected x"):
        layer(torch.zeros(1, 3, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match="floating"):
        layer(torch.zeros(1, 3, 8, dtype=torch.long))
