"""The kernel of self-modifying matrix memories equals the eager layer, on the device or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.interpreter import kernel_device
from torch import Tensor

from nestlearn.nn import SelfModifyingConfig
from nestlearn.nn.self_modifying.config import GRADIENT_LIMIT
from nestlearn.nn.self_modifying.kernel import Maps, Settings, refusal, walk
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
    maps = Maps(
        layer.maps["k"], layer.maps["v"], layer.eta_vector, layer.alpha_vector, layer.eta_bias, layer.alpha_bias
    )
    settings = Settings((0, 1, 2), layer.memory.chunk_size, layer.max_step, limit, "ieee")
    y, end, anchor = walk(streams, start, maps, settings)
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
    names = ("maps.k", "maps.v", "maps.memory", "eta_vector", "alpha_vector", "eta_bias", "alpha_bias")
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
        assert error < 2e-5, (name, error)


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


def test_a_second_derivative_raises(device: str):
    layer = build(1, 16, device, chunk_size=16)
    streams = torch.randn(1, 5, 3, 1, 16, device=device, requires_grad=True)
    y, _, _ = by_kernel(layer, streams, torch.eye(16, device=device).expand(1, 1, 16, 16), 1e6)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), streams, create_graph=True)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"objective": "l2", "retain_to": "zero", "step_size": "raw"}, "objective is L2"),
        ({"read": "chunk"}, "read is 'chunk'"),
        ({"adaptive": ("k",)}, "adaptive is"),
        ({"self_values": False}, "values is 'given'"),
        ({"chunk_size": 48}, "chunk_size is 48"),
        ({"momentum": True}, "algorithm is"),
    ],
)
def test_other_layers_are_not_taken(settings: dict, reason: str):
    layer = SelfModifyingConfig(architecture="matrix", **settings).build(32, num_heads=2)
    assert reason in str(refusal(layer))
