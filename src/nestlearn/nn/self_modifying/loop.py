"""The definition of self-modifying Titans: a loop over tokens, inner gradients by autograd of the objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import DotProduct, Gates, State
from nestlearn.memory.reference import read_weights, token_step
from nestlearn.memory.types import Weights

from .layer import SelfModifyingState

if TYPE_CHECKING:
    from .deep import SelfModifyingMLP
    from .layer import SelfModifyingTitans
    from .matrix import SelfModifyingMatrix


def _unit(x: Tensor) -> Tensor:
    """L2 normalization, smooth at zero."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def token_loop(
    layer: SelfModifyingMLP, x: Tensor, state: SelfModifyingState | None
) -> tuple[Tensor, SelfModifyingState]:
    """Run the layer token by token, ``x: [b, t, d]``; a continued ``state`` may come from here or from `forward`."""
    names = (*layer.adaptive, "memory")
    initial: dict[str, Weights] = {
        name: {m: w.expand(len(x), *w.shape) for m, w in layer.initial[name].items()}  # type: ignore[operator]
        for name in names
    }
    memories = {name: _start(layer, name, initial[name], state) for name in names}
    streams, tail = _streams(layer, x, state)
    position = 0 if state is None else int(state.clock.position.flatten()[0])
    outputs = []
    for t, stream in enumerate(streams):
        for name in layer.adaptive:
            stream[name] = read_weights(layer.memory, memories[name].anchor, stream[name])
        q, k, v = (_unit(stream[name]) for name in ("q", "k", "v"))
        gates = _gates(layer, stream["eta"], stream["alpha"], x[:, t])
        for name in names:
            memories[name] = token_step(layer.memory, memories[name], initial[name], k, v, gates)
        main = memories["memory"]
        y = read_weights(layer.memory, main.anchor if layer.memory.read == "chunk" else main.params, q)
        outputs.append(_merge(layer, y))
        position = (position + 1) % layer.projection_chunk_size
        for name in names:
            chunk = layer.memory.chunk_size if name == "memory" else layer.projection_chunk_size
            if position % chunk == 0:
                memories[name] = memories[name]._replace(anchor=memories[name].params)
    rows = torch.full((len(x), layer.num_heads), position)
    memory = memories["memory"]._replace(position=rows % layer.memory.chunk_size, aligned=False)
    projections = [memories[name]._replace(position=rows, aligned=False) for name in layer.adaptive]
    return torch.stack(outputs, 1), SelfModifyingState(_stack(projections), memory, tail)


def matrix_token_loop(
    layer: SelfModifyingMatrix, x: Tensor, state: SelfModifyingState | None
) -> tuple[Tensor, SelfModifyingState]:
    """The same for matrix memories: the one fast matrix H of every head, ``x: [b, t, d]``."""
    start = {"W": torch.eye(layer.d_head, dtype=x.dtype).expand(len(x), layer.num_heads, -1, -1)}
    now = layer.memory.begin(start) if state is None else state.memory
    streams, tail = _streams(layer, x, state)
    position = 0 if state is None else int(state.memory.position.flatten()[0])
    outputs = []
    for t, stream in enumerate(streams):
        stream = {name: x - x.mean(-1, keepdim=True) for name, x in stream.items()}
        # The gates read the keys' stream.
        stream |= {"eta": stream["k"], "alpha": stream["k"]}
        for name in layer.adaptive:
            stream[name] = read_weights(layer.memory, now.anchor, stream[name])
            if name in layer.maps:
                stream[name] = torch.einsum("hij,bhj->bhi", layer.maps[name], stream[name])
        q, k, v = (_unit(stream[name]) for name in ("q", "k", "v"))
        now = token_step(layer.memory, now, start, k, v, _gates(layer, stream["eta"], stream["alpha"], x[:, t]))
        y = read_weights(layer.memory, now.anchor if layer.memory.read == "chunk" else now.params, q)
        outputs.append(_merge(layer, torch.einsum("hij,bhj->bhi", layer.maps["memory"], y)))
        position = (position + 1) % layer.memory.chunk_size
        if position == 0:
            now = now._replace(anchor=now.params)
    now = now._replace(position=torch.full((len(x), layer.num_heads), position), aligned=False)
    return torch.stack(outputs, 1), SelfModifyingState(None, now, tail)


def _streams(
    layer: SelfModifyingTitans, x: Tensor, state: SelfModifyingState | None
) -> tuple[list[dict[str, Tensor]], Tensor | None]:
    """The streams ``[b, heads, d]`` of every token by name, and the last inputs of the convolution."""
    taps = torch.ones(1, 1, dtype=x.dtype) if layer.conv is None else layer.conv.weight
    history = x.new_zeros(x.shape[0], len(taps) - 1, layer.streams.out_features)
    if state is not None and state.conv is not None:
        history = state.conv
    found = []
    for t in range(x.shape[1]):
        history = torch.cat([history, (x[:, t] @ layer.streams.weight.mT)[:, None]], 1)
        window = history[:, -len(taps) :]
        history = history[:, 1:]
        mixed = F.silu((window * taps).sum(1)).view(x.shape[0], len(layer.streams_order), layer.num_heads, -1)
        found.append(dict(zip(layer.streams_order, mixed.unbind(1), strict=True)))
    return found, None if layer.conv is None else history


def _merge(layer: SelfModifyingTitans, y: Tensor) -> Tensor:
    """The output of one token from what its heads answered, ``[b, heads, d]``."""
    y = y / (y.square().mean(-1, keepdim=True) + layer.norm_eps).sqrt() * layer.norm.weight
    return y.flatten(1) @ layer.out.weight.mT


def _stack(states: list[State]) -> State | None:
    """The states of several memories as one, their dimension after that of the heads."""
    if not states:
        return None

    def stack(weights: list[Weights]) -> Weights:
        return {m: torch.stack([w[m] for w in weights], 2) for m in weights[0]}

    momenta = [state.momentum for state in states if state.momentum is not None]
    params, anchor = stack([state.params for state in states]), stack([state.anchor for state in states])
    position = torch.stack([state.position for state in states], -1)
    return State(params, stack(momenta) if momenta else None, anchor, position)


def _start(layer: SelfModifyingMLP, name: str, initial: Weights, state: SelfModifyingState | None) -> State:
    """The state of one memory."""
    if state is None:
        return layer.memory.begin(initial)
    if name == "memory" or state.projections is None:
        return state.memory
    at = layer.adaptive.index(name)
    return state.projections.map(lambda x: x[:, :, at])


def _gates(layer: SelfModifyingTitans, eta: Tensor, alpha: Tensor, x: Tensor) -> Gates:
    """Step size, retention and momentum of one token, ``[b, heads]`` (bounds: see the layer)."""
    retain = torch.sigmoid((alpha * layer.alpha_vector).sum(-1) + layer.alpha_bias)
    lr = layer.max_step * torch.sigmoid((eta * layer.eta_vector).sum(-1) + layer.eta_bias)
    beta = None
    if layer.beta_gate is not None:
        beta = 0.9 * torch.sigmoid(x @ layer.beta_gate.weight.mT + layer.beta_gate.bias)
    decays = not hasattr(layer.memory.retention, "gated")
    if decays:
        lr = lr * (1 - retain)
    if beta is not None:
        lr = lr * (1 - beta)
    if not isinstance(layer.memory.objective, DotProduct):
        if "W" in layer.memory.architecture.shapes(1, 1):
            cap = torch.minimum((1 - retain) / 2, 2 * retain).clamp(min=1e-6)
            lr = cap * (1 - torch.exp(-lr / cap))
        else:
            lr = lr / layer.projection_chunk_size
    return Gates(lr, retain if layer.retention else torch.ones_like(retain), beta)
