"""The fast state of self-modifying Titans, and the checks of its inputs and settings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.memory import State
from nestlearn.memory.clock import known_empty, poisoned_from
from nestlearn.nn.state import record

STREAMS = ("q", "k", "v", "eta", "alpha")
"""What a token is projected to; all but q adapt by default."""


@record("self_modifying")
class SelfModifyingState(NamedTuple):
    """Fast state of the layer: its projection memories, its main memory, and the tail of the convolution.

    Rows of the projections are ``[B, heads, streams]`` (None without an adaptive one), those of the memory
    ``[B, heads]``.
    """

    projections: State | None
    memory: State
    conv: Float[Tensor, "b w ch"] | None

    @property
    def clock(self) -> State:
        """The group whose chunks are the longest."""
        return self.memory if self.projections is None else self.projections


def quarantine(x: Tensor, mask: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zero the tokens that are masked or not finite, and say which outputs non-finite tokens poison.

    Matrix products over tokens would carry a NaN into the past (0 * NaN); a token loop would not.
    """
    bad = ~torch.isfinite(x).all(-1)
    if mask is not None:
        bad = bad & mask
    drop = bad if mask is None else bad | ~mask
    if not known_empty(drop):
        x = torch.where(drop.unsqueeze(-1), 0, x)
    return x, poisoned_from(bad, mask, reset)


def per_head(x: Tensor, heads: int) -> Tensor:
    """Flags of texts ``[b, ...]`` as those of rows ``[b * heads, ...]``."""
    return x.repeat_interleave(heads, 0)
