"""What layers with fast weights share: per-token gates, and the precision they run in."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.memory import AssociativeMemory
from nestlearn.memory.clock import beyond, known_empty
from nestlearn.memory.kernels.products import unit_norm
from nestlearn.memory.types import Weights

NORM_EPSILON = 1e-6


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of gates and fast weights: at least float32, since bfloat16 rounds a retention of 0.9997 to 1."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, which would run the recurrence's matrix products in half precision."""
    # The meta device (shapes without data, for counting) has no autocast.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def unit(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """L2 normalization of vectors of any size, smooth at zero; the norm of the result is below 1."""
    return unit_norm(x, NORM_EPSILON, any_size=True)


def check_tokens(x: Tensor, d_model: int) -> None:
    """Raise unless ``x`` is a floating-point ``[batch, tokens >= 1, d_model]``."""
    if x.dim() != 3 or x.shape[-1] != d_model or x.shape[1] == 0:
        raise ValueError(f"expected x of shape [batch, tokens >= 1, {d_model}], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}; pass embeddings, not token ids")


class Mixer(nn.Module):
    """A sequence layer. All have one protocol, ``y, state = layer(x, state, mask, reset)``.

    Args of ``forward``:
        x: inputs ``[b, t, d]``; masked tokens may hold anything.
        state: from an earlier call; None starts fresh.
        mask: ``[b, t]``; False marks padding: it changes nothing and its output is 0.
        reset: ``[b, t]``; True forgets everything of the row before that token.
        writes: False computes the same with step size 0.
        return_state: False skips the work that only the next call needs.

    It returns the outputs ``[b, t, d]`` and the state after the last token (None if not asked for). A text read in any
    pieces gives the same outputs. A non-finite token makes the outputs of its row NaN from there to the next reset.
    ``flops_per_token(context_length)`` counts the forward FLOPs, writes included; a multiply-add is 2.
    """

    def reset_parameters(self) -> None:
        """The initial values of every part."""
        for module in self.children():
            for part in module if isinstance(module, nn.ModuleList) else (module,):
                part.reset_parameters()  # type: ignore[operator]


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * w`` in the dtype of x, which may be narrower or wider than the weights.

    The fast weights run in float32 or wider whatever the dtype of the model, and autocast makes activations narrower.
    """

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def admit(
    x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None, largest: float = math.inf
) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
    """Tokens that products over tokens can hold (the others as zeros), and which real tokens they cannot.

    A later token that is not finite would reach earlier outputs as ``0 * NaN``; so would one whose products overflow,
    which are those of entries beyond ``largest``.
    """
    bad = beyond(x, min(largest, torch.finfo(x.dtype).max))
    drop = bad if mask is None else bad | ~mask
    bad = bad if mask is None else bad & mask
    return x if known_empty(drop) else torch.where(drop.unsqueeze(-1), 0, x), bad


def largest_factor(x: Tensor) -> float:
    """The largest entry of which products of three stay finite."""
    return torch.finfo(x.dtype).max ** (1 / 3)


def poison(x: Float[Tensor, "b t d"], bad: Bool[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
    """NaN at the tokens that `admit` refused."""
    return x if known_empty(bad) else torch.where(bad.unsqueeze(-1), torch.nan, x)


class HeadNorm(RMSNorm):
    """The RMS norm as a unit norm: one pass instead of six where torch has no fused kernel."""

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        width = self.normalized_shape[0]
        assert self.eps is not None
        return unit_norm(x, self.eps * width) * (self.weight.to(x.dtype) * width**0.5)


class InitialWeights(nn.Module):
    """Meta-learned initial fast weights ``{map: [*rows, out, in]}``; the outer loop trains them.

    A layer calls the module, so that hooks run (which bring offloaded weights to the device, for example). Indexing
    gives the parameter itself.
    """

    def __init__(self, memory: AssociativeMemory, rows: tuple[int, ...], d_key: int, d_value: int) -> None:
        super().__init__()
        self.memory = memory
        shapes = memory.architecture.shapes(d_key, d_value)
        self.maps = tuple(sorted(shapes))
        for name in self.maps:
            # Maps are called "in" and "out"; `module.in` is not Python, and torch.export generates such code.
            self.register_parameter(f"map_{name}", nn.Parameter(torch.empty(*rows, *shapes[name])))
        self.reset_parameters()

    def __getitem__(self, name: str) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self, f"map_{name}"))

    def items(self) -> list[tuple[str, nn.Parameter]]:
        """``[(map, parameter), ...]``."""
        return [(name, self[name]) for name in self.maps]

    def values(self) -> list[nn.Parameter]:
        """The parameters in the order of the maps."""
        return [self[name] for name in self.maps]

    def forward(self, dtype: torch.dtype) -> Weights:
        """The weights in a dtype."""
        return {name: weight.to(dtype) for name, weight in self.items()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The architecture's own initial values, random for an MLP and zero for a matrix, as accumulators."""
        for name, weight in self.items():
            start = self.memory.architecture.init(name, tuple(weight.shape), None)
            weight.copy_(self.memory.retention.start(start))


class GateProjection(nn.Module):
    """One logit per token, gate and head, ``z = W x + b``, computed in float32 or wider.

    Args:
        d_model: width of the input.
        biases: initial bias of every gate and head, ``{gate: (value per head, ...)}``.
        std: standard deviation of the initial weights.
    """

    def __init__(self, d_model: int, biases: dict[str, tuple[float, ...]], std: float = 0.02) -> None:
        super().__init__()
        self.biases, self.std = dict(biases), std
        count = sum(len(values) for values in biases.values())
        self.weight = nn.Parameter(torch.empty(count, d_model))
        self.bias = nn.Parameter(torch.empty(count))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Nearly constant gates at the given biases."""
        self.weight.normal_(0, self.std)
        self.bias.copy_(torch.tensor([b for values in self.biases.values() for b in values]))

    def forward(self, x: Float[Tensor, "b t d"]) -> dict[str, Float[Tensor, "b h t"]]:
        """``{gate: logits}``."""
        wide = wide_dtype(x)
        logits = F.linear(x.to(wide), self.weight.to(wide), self.bias.to(wide)).mT
        return dict(zip(self.biases, logits.split([len(v) for v in self.biases.values()], 1), strict=True))


def horizon_bias(first: float, last: float, heads: int) -> tuple[float, ...]:
    """Logits whose sigmoid keeps for ``1 / (1 - retain)`` tokens, spread geometrically over the heads."""
    steps = [i / (heads - 1) for i in range(heads)] if heads > 1 else [0.5]
    return tuple(math.log(first * (last / first) ** s - 1) for s in steps)
