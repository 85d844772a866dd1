"""The kernel of self-modifying matrix memories equals the eager layer, on the device or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.interpreter import interpret_fla, kernel_device
from torch import Tensor

from nestlearn.memory import use_engine
from nestlearn.memory.algorithms import GRADIENT_LIMIT
from nestlearn.nn import SelfModifyingConfig
from nestlearn.nn.self_modifying import kernel
from nestlearn.nn.self_modifying.kernel import KernelSettings, Maps, kernel_refusal, walk
from nestlearn.nn.self_modifying.layer import SelfModifyingState

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def device() -> str:
    return kernel_device("triton")


def build(heads: int, width: int, device: str, **settings):
    """A layer whose gates forget and write, so that every term of every gradient counts."""
    layer = SelfModifyingConfig(architecture="matrix", **settings).build(heads * width, num_heads=heads).to(device)
    with torch.no_grad():
        layer.alpha_bias.fill_(1.5)
        layer.eta_vector.normal_(0, 0.5)
        layer.alpha_vector.normal_(0, 0.5)
    return layer


def by_kernel(layer, streams: Tensor, start: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """``H_t q_t`` through the memory's map, H after the last token and at the start of the last chunk."""
    moves = tuple(name in layer.adaptive for name in ("k", "v", "eta"))
    settings = KernelSettings(
        (0, 1, 2), layer.memory.chunk_size, layer.max_step, limit, "ieee", moves, layer.self_values
    )
    y, end, anchor = walk(streams, start, Maps.of(layer), settings)
    return torch.einsum("bthd,hed->bthe", y, layer.maps["memory"]).flatten(2), end, anchor


def eagerly(layer, streams: Tensor, start: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same without the kernel; the gates read the stream of the keys."""
    layer.memory = replace(layer.memory, gradient_limit=limit)
    state = SelfModifyingState(None, layer.memory.begin({"W": start}), None)
    order = [{"q": 0, "v": 2}.get(name, 1) for name in layer.streams_order]
    y, new, _ = layer._read(streams[:, :, order], None, state, None, None, True, True)
    return y, new.memory.params["W"], new.memory.anchor["W"]


def compare(layer, tokens: int, rows: int, heads: int, width: int, device: str, limit: float = GRADIENT_LIMIT) -> None:
    """Outputs, both states and the gradients of a random function of them to everything that has one."""
    streams = torch.randn(rows, tokens, 3, heads, width, device=device, requires_grad=True)
    eye = torch.eye(width, device=device)
    start = (eye + 0.2 * torch.randn(rows, heads, width, width, device=device)).requires_grad_()
    leaves = {"streams": streams, "start": start}
    names = [f"maps.{name}" for name in layer.maps]
    names += ["eta_vector", "alpha_vector", "eta_bias", "alpha_bias"]
    leaves |= {name: layer.get_parameter(name) for name in names}
    found = []
    for run in (eagerly, by_kernel):
        y, end, anchor = run(layer, streams, start, limit)
        if tokens % layer.memory.chunk_size == 0:
            anchor = end  # a new chunk begins at once
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator).to(device) for x in (y, end, anchor)]
        loss = sum((x * w).sum() for x, w in zip((y, end, anchor), weights, strict=True))
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        found.append({"y": y, "end": end, "anchor": anchor, **dict(zip(leaves, gradients, strict=True))})
    want, have = found
    for name, x in want.items():
        error = ((have[name] - x).norm() / x.norm()).item()
        # That of a bias is one number a head, a sum over tokens that cancels.
        assert error < (1e-3 if name.endswith("_bias") else 2e-5), (name, error)


SIZES = [
    # tokens, chunk, width of a head, rows, heads
    (37, 16, 16, 2, 2),
    (64, 64, 32, 1, 2),
    (100, 64, 16, 1, 1),
    (33, 32, 24, 1, 2),
    (7, 16, 64, 1, 1),
    (130, 128, 16, 1, 1),
]


@pytest.mark.parametrize(("tokens", "chunk", "width", "rows", "heads"), SIZES)
def test_outputs_states_and_all_gradients(tokens: int, chunk: int, width: int, rows: int, heads: int, device: str):
    layer = build(heads, width, device, chunk_size=chunk, max_step=2.0)
    compare(layer, tokens, rows, heads, width, device)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("adaptive", [(), ("k",), ("v",), ("k", "v"), ("eta", "alpha"), ("v", "eta", "alpha")])
def test_streams_that_do_not_adapt_and_given_values(adaptive: tuple[str, ...], own: bool, device: str):
    layer = build(2, 16, device, chunk_size=16, max_step=2.0, adaptive=adaptive, self_values=own)
    compare(layer, 37, 2, 2, 16, device)


def test_gradients_between_chunks_are_limited(device: str):
    compare(build(1, 16, device, chunk_size=16), 37, 2, 1, 16, device, limit=0.5)


@pytest.mark.parametrize(("alpha", "eta"), [(30.0, 30.0), (-30.0, 30.0), (30.0, -30.0), (-30.0, -30.0)])
def test_saturated_gates_and_repeated_keys_stay_exact(alpha: float, eta: float, device: str):
    """One key for all tokens: the triangular system is as far from diagonal as it can be."""
    layer = build(1, 16, device, chunk_size=64)
    with torch.no_grad():
        layer.alpha_bias.fill_(alpha)
        layer.eta_bias.fill_(eta)
    streams = torch.randn(1, 1, 3, 1, 16, device=device).expand(1, 130, 3, 1, 16)
    start = torch.eye(16, device=device).expand(1, 1, 16, 16)
    with torch.no_grad():
        for want, have in zip(*(run(layer, streams, start, 1e6) for run in (eagerly, by_kernel)), strict=True):
            assert torch.allclose(have.reshape(want.shape), want, atol=1e-5)


@pytest.mark.gpu  # The interpreter multiplies the bits of bfloat16 numbers, and rounds nothing to TF32.
@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "ieee"), (torch.float32, "tf32")])
def test_narrow_products_on_the_device(dtype: torch.dtype, precision: str, device: str):
    """State and gates stay in float32: the error is that of rounded factors."""
    layer = build(2, 64, device, chunk_size=64)
    streams = torch.randn(2, 300, 3, 2, 64, device=device).to(dtype)
    start = torch.eye(64, device=device).expand(2, 2, 64, 64)
    with torch.no_grad():
        y, end, _ = walk(streams, start, Maps.of(layer), KernelSettings((0, 1, 2), 64, layer.max_step, 1e6, precision))
        _, want, _ = eagerly(layer, streams.float(), start, 1e6)
    assert y.dtype == dtype and end.dtype == torch.float32
    assert 1e-7 < (end - want).norm() / want.norm() < 2e-2


def test_a_second_derivative_raises(device: str):
    layer = build(1, 16, device, chunk_size=16)
    streams = torch.randn(1, 5, 3, 1, 16, device=device, requires_grad=True)
    y, _, _ = by_kernel(layer, streams, torch.eye(16, device=device).expand(1, 1, 16, 16), 1e6)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), streams, create_graph=True)


def test_a_layer_takes_the_kernel_where_it_can(device: str, monkeypatch: pytest.MonkeyPatch):
    """Whole chunks and a rest, then single tokens and padding, which the eager way goes on with."""
    monkeypatch.setattr(kernel, "runs_here", lambda x: True)
    calls, own = [], kernel.walk
    monkeypatch.setattr(kernel, "walk", lambda *args: calls.append(args[0].shape[1]) or own(*args))
    layer = build(2, 16, device, chunk_size=16)
    x = torch.randn(2, 60, 32, device=device)
    mask = torch.ones(2, 7, dtype=torch.bool, device=device)
    mask[0, 3:] = False
    found = []
    for engine in ("chunked", "auto"):
        with use_engine(engine):
            first, state = layer(x[:, :32])
            second, state = layer(x[:, 32:53], state)
            third, state = layer(x[:, 53:], state, mask=mask)
        gradient = torch.autograd.grad(third[:, :3].square().sum() + second.sum(), layer.streams.weight)[0]
        found.append((first, second, third, state.memory.params["W"], state.memory.anchor["W"], gradient))
        assert state.memory.position[:, 0].tolist() == [8, 12]
    assert calls == [32, 21]
    for want, have in zip(*found, strict=True):
        assert torch.allclose(have, want, atol=1e-5 * want.norm().item())


@pytest.mark.parametrize("adaptive", [("k", "v", "eta", "alpha"), ()], ids=["adaptive", "static"])
def test_a_layer_on_the_kernels_of_fla(adaptive: tuple, monkeypatch: pytest.MonkeyPatch):
    """One call a chunk: its own values, masks and resets included."""
    device = kernel_device("fla")
    if device == "cpu":
        interpret_fla(monkeypatch)
    layer = build(2, 16, device, chunk_size=16, adaptive=adaptive)
    x = torch.randn(2, 37, 32, device=device)
    mask = torch.ones(2, 37, dtype=torch.bool, device=device)
    mask[0, 30:] = False
    reset = torch.zeros_like(mask)
    reset[1, 20] = True
    found = []
    for engine in ("chunked", "fla"):
        with use_engine(engine):
            y, state = layer(x, mask=mask, reset=reset)
        gradient = torch.autograd.grad(y.square().sum(), layer.streams.weight)[0]
        found.append((y, state.memory.params["W"], gradient))
    assert not torch.equal(found[0][0], found[1][0])
    for want, have in zip(*found, strict=True):
        assert torch.allclose(have, want, atol=1e-4 * want.norm().item())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"objective": "l2", "retain_to": "zero", "step_size": "raw"}, "objective is L2"),
        ({"read": "chunk"}, "read is 'chunk'"),
        ({"adaptive": ("q", "k", "v", "eta", "alpha")}, "adaptive names q"),
        ({"adaptive": ("eta",)}, "adaptive is"),
        ({"chunk_size": 48}, "chunk_size is 48"),
        ({"momentum": True}, "algorithm is"),
    ],
)
def test_other_layers_are_not_taken(settings: dict, reason: str):
    layer = SelfModifyingConfig(architecture="matrix", **settings).build(32, num_heads=2)
    assert reason in str(kernel_refusal(layer))


@pytest.mark.parametrize("size", ["small", "340m", "760m", "1.3b"])
def test_the_presets_of_hope_are_taken(size: str):
    from nestlearn import HopeConfig  # loads transformers

    config = HopeConfig.from_preset(f"hope-{size}")
    with torch.device("meta"):
        layer = config.mixers[0].build(config.hidden_size, config.num_attention_heads)
    assert kernel_refusal(layer) is None
