"""A single token of matrix memories: what a model does at every step of generation, without the machinery of chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import Delta, Descent, DotProduct, State
from nestlearn.memory.engine import current_engine
from nestlearn.memory.kernels.products import unit_norm
from nestlearn.memory.spans.delta import step_size
from nestlearn.nn.common import full_precision, wide_dtype

from .layer import SelfModifyingState

if TYPE_CHECKING:
    from .matrix import SelfModifyingMatrix


def takes(
    layer: SelfModifyingMatrix,
    x: Tensor,
    state: SelfModifyingState | None,
    mask: Tensor | None,
    reset: Tensor | None,
    writes: bool,
) -> bool:
    """Whether this call reads one token of a rule that `read` knows, without gradients."""
    return (
        x.shape[1] == 1
        and state is not None
        and mask is None
        and reset is None
        and writes
        and not torch.is_grad_enabled()
        and current_engine() == "auto"
        and _knows(layer)
    )


def _knows(layer: SelfModifyingMatrix) -> bool:
    """Whether the rule is the presets': token reads, a dot product, learned delta retention, no momentum."""
    memory, retention = layer.memory, layer.memory.retention
    return (
        memory.read == "token"
        and isinstance(memory.objective, DotProduct)
        and isinstance(retention, Delta)
        and not retention.gated
        and layer.retention
        and type(memory.algorithm) is Descent
        and ("eta" in layer.adaptive) == ("alpha" in layer.adaptive)
    )


def read(
    layer: SelfModifyingMatrix, x: Float[Tensor, "b 1 d"], state: SelfModifyingState
) -> tuple[Float[Tensor, "b 1 d"], SelfModifyingState]:
    """`SelfModifyingMatrix.forward` of one token.

    A token that is not finite needs no care: it makes H, and with it every later output of its row, NaN.
    """
    mixed, tail = layer.streams(x), None
    mixed, tail = (F.silu(mixed), None) if layer.conv is None else layer.conv.step(mixed, state.conv)
    mixed = mixed.unflatten(-1, (-1, layer.d_head))
    if layer.center:
        mixed = mixed - mixed.mean(-1, keepdim=True)
    with full_precision(x):
        y, memory = _write(layer, mixed.to(wide_dtype(x)), state.memory)
    return layer._merge(y.view(len(x), 1, -1), x), SelfModifyingState(None, memory, tail)


def _write(
    layer: SelfModifyingMatrix, mixed: Float[Tensor, "b 1 nh d"], state: State
) -> tuple[Float[Tensor, "r 1 d"], State]:
    """Write the token, and read the memory after it: rows ``batch * heads``."""
    batch, heads, width = len(mixed), layer.num_heads, layer.d_head
    streams = mixed.view(batch, -1, heads, width).transpose(1, 2).reshape(batch * heads, -1, width)
    fast, anchor = state.params["W"].flatten(0, 1), state.anchor["W"].flatten(0, 1).mT
    maps = {name: _of_rows(weights, batch, mixed.dtype) for name, weights in layer.maps.items()}
    moved = torch.bmm(streams[:, : len(layer.moving)], anchor) if layer.moving else streams
    made = {}
    for i, name in enumerate(layer.streams_order):
        made[name] = torch.bmm(moved[:, i : i + 1], maps[name].mT) if name in layer.mapped else streams[:, i : i + 1]
    eta, alpha = _gates(layer, moved if "eta" in layer.adaptive else streams, batch)
    k, v, q = unit_norm(torch.cat([made["k"], made["v"], made["q"]], 1)).split(1, 1)
    target = unit_norm(torch.bmm(v, anchor)) if layer.self_values else v
    # H <- alpha H + eta' (u - H k) k^T; of H - I where retention goes to the initial weights.
    change, to_initial = target.mT - torch.bmm(fast, k.mT), layer.memory.retain_to == "initial"
    if to_initial:
        change = change + k.mT
    step = step_size(layer.memory.step_size_of("W"), eta, alpha, k).unsqueeze(-1)
    fast = torch.baddbmm(fast * alpha.unsqueeze(-1), change * step, k)
    if to_initial:
        fast.diagonal(dim1=1, dim2=2).add_(1 - alpha)
    y = torch.bmm(torch.bmm(q, fast.mT), maps["memory"].mT)
    position = (state.position + 1) % layer.memory.chunk_size
    weights = fast.view(batch, heads, width, width)
    anchored = torch.where((position == 0)[..., None, None], weights, state.anchor["W"])
    return y, State({"W": weights}, None, {"W": anchored}, position)


def _of_rows(weights: Float[Tensor, "h ..."], batch: int, dtype: torch.dtype) -> Float[Tensor, "r ..."]:
    weights = weights.to(dtype)
    return weights if batch == 1 else weights.repeat(batch, *[1] * (weights.ndim - 1))


def _gates(
    layer: SelfModifyingMatrix, streams: Float[Tensor, "r n d"], batch: int
) -> tuple[Float[Tensor, "r 1"], Float[Tensor, "r 1"]]:
    """eta and alpha of the token, from the keys' stream."""
    vectors = _of_rows(torch.stack([layer.eta_vector, layer.alpha_vector], -1), batch, streams.dtype)
    biases = _of_rows(torch.stack([layer.eta_bias, layer.alpha_bias], -1), batch, streams.dtype)
    i = layer.streams_order.index("k")
    opened = torch.sigmoid(torch.bmm(streams[:, i : i + 1], vectors).squeeze(1) + biases)
    eta, alpha = opened.split(1, 1)
    return layer.max_step * eta, alpha
