"""The parts of a tick: attention over the input, synapses, and the private network of each neuron."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

_GLU_VARIANCE = 0.29
"""Variance of ``x sigmoid(y)`` for independent normal x and y of variance 1."""


class Encoded(NamedTuple):
    """Keys and values of the input tokens, computed once for all ticks."""

    k: Float[Tensor, "b h t w"]
    v: Float[Tensor, "b h t w"]
    mask: Bool[Tensor, "b t"] | None


class InputAttention(nn.Module):
    """Softmax attention of one query per row over the input tokens."""

    def __init__(self, d_input: int, d_query: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(d_input)
        self.kv = nn.Linear(d_input, 2 * width, bias=False)
        self.q = nn.Linear(d_query, width)
        self.out = nn.Linear(width, width, bias=False)

    def encode(self, x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None) -> Encoded:
        """Keys and values; masked tokens may hold anything."""
        x = x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)
        kv = self.kv(self.norm(x)).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        return Encoded(k, v, mask)

    def forward(
        self, query: Float[Tensor, "b p"], tokens: Encoded
    ) -> tuple[Float[Tensor, "b w"], Float[Tensor, "b h t"]]:
        """What attention reads, and its weights. A row without tokens reads 0."""
        q = self.q(query).unflatten(-1, (self.num_heads, 1, -1))
        scores = (q @ tokens.k.mT) * q.shape[-1] ** -0.5
        if tokens.mask is None:
            weights = scores.softmax(-1)
        else:
            # Not -inf: a row without any token would be 0 / 0.
            valid = tokens.mask[:, None, None]
            weights = scores.masked_fill(~valid, torch.finfo(scores.dtype).min).softmax(-1) * valid
        return self.out((weights @ tokens.v).flatten(1)), weights.squeeze(-2)


class Synapses(nn.Module):
    """The network from what attention read and all neurons to new pre-activations.

    Each layer is ``LayerNorm(GLU(W u + b))``.
    """

    def __init__(self, d_in: int, neurons: int, layers: int) -> None:
        super().__init__()
        sizes = [d_in, *([neurons] * (layers - 1))]
        self.maps = nn.ModuleList(nn.Linear(size, 2 * neurons) for size in sizes)
        self.norms = nn.ModuleList(nn.LayerNorm(neurons) for _ in sizes)

    def forward(self, u: Float[Tensor, "b i"]) -> Float[Tensor, "b d"]:
        """Pre-activations."""
        for linear, norm in zip(self.maps, self.norms, strict=True):
            u = norm(F.glu(linear(u)))
        return u


class NeuronNetworks(nn.Module):
    """One small network per neuron, over the last M pre-activations of that neuron alone.

        h = GLU(U_d a_d + c_d),    z_d = GLU(V_d h + e_d)

    Args:
        neurons: D.
        memory_length: M.
        width: hidden units of each network.
    """

    def __init__(self, neurons: int, memory_length: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(neurons, memory_length, 2 * width))
        self.inner_bias = nn.Parameter(torch.empty(neurons, 1, 2 * width))
        self.outer = nn.Parameter(torch.empty(neurons, width, 2))
        self.outer_bias = nn.Parameter(torch.empty(neurons, 1, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform weights with which both layers have inputs to the GLU of variance 1; biases of 0.

        With weights up to ``1 / sqrt(inputs)`` activations are 0.08, and synchronization hardly depends on the input.
        """
        for weight, variance in ((self.inner, 1.0), (self.outer, _GLU_VARIANCE)):
            reach = (3 / (weight.shape[1] * variance)) ** 0.5
            weight.uniform_(-reach, reach)
        self.inner_bias.zero_()
        self.outer_bias.zero_()

    def forward(self, history: Float[Tensor, "b d m"]) -> Float[Tensor, "b d"]:
        """Activations z."""
        hidden = F.glu(torch.baddbmm(self.inner_bias, history.transpose(0, 1), self.inner))
        return F.glu(torch.baddbmm(self.outer_bias, hidden, self.outer)).squeeze(-1).mT
