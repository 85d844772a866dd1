"""Synchronization: how alike two neurons have been over the ticks, a Hebbian memory with one decay per pair."""

from __future__ import annotations

import random
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nestlearn.nn.common import horizon_bias, wide_dtype
from nestlearn.nn.state import record


@record("thought.synchronization")
class SynchronizationState(NamedTuple):
    """The decayed sums of products, A, and of ones, B, of every pair, in float32 or wider."""

    products: Float[Tensor, "b p"]
    ticks: Float[Tensor, "b p"]


def draw_pairs(neurons: int, pairs: int, seed: int) -> list[tuple[int, int]]:
    """Different pairs ``i <= j`` of neurons.

    Python's generator gives the same numbers in every version, so a saved machine finds its pairs again.

    Example:
        >>> draw_pairs(neurons=3, pairs=6, seed=0)
        [(1, 1), (2, 2), (0, 2), (1, 2), (0, 1), (0, 0)]
    """
    uniform = random.Random(seed)
    every = list(combinations_with_replacement(range(neurons), 2))
    return sorted(every, key=lambda _: uniform.random())[:pairs]


class Synchronization(nn.Module):
    r"""Synchronization of pairs (i, j) of neurons (arXiv 2505.05522):

        A ← r A + z_i z_j,    B ← r B + 1,    S = A / √B

    Each pair is a memory of one number: key z_i, value z_j, the dot-product objective and decay r. B is the same memory
    of a neuron that is always 1. `nestlearn.memory.scan` with `catalog["retnet"]` computes the same numbers, in ten
    times the time (docs/decisions.md, 92).

    Args:
        pairs: the pairs.
        longest: horizons ``1 / (1 - r)`` start between 2 ticks and this many.
    """

    def __init__(self, pairs: list[tuple[int, int]], longest: float) -> None:
        super().__init__()
        self.left, self.right = [i for i, _ in pairs], [j for _, j in pairs]
        self.longest = longest
        self.decay = nn.Parameter(torch.empty(len(pairs)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Horizons spread over the pairs."""
        self.decay.copy_(torch.tensor(horizon_bias(2.0, self.longest, len(self.left))))

    def retained(self, dtype: torch.dtype) -> Float[Tensor, " p"]:
        """r of every pair, in (0, 1)."""
        return torch.sigmoid(self.decay.to(dtype))

    def places(self, device: torch.device) -> Int[Tensor, "2 p"]:
        """The neurons of the pairs."""
        return torch.tensor([self.left, self.right], device=device)

    def init_state(self, z: Float[Tensor, "b d"]) -> SynchronizationState:
        """No tick has passed; rows, device and dtype are those of z."""
        empty = z.new_zeros(len(z), len(self.left), dtype=wide_dtype(z))
        return SynchronizationState(empty, empty)

    def forward(
        self, state: SynchronizationState, z: Float[Tensor, "b d"], places: Int[Tensor, "2 p"]
    ) -> tuple[Float[Tensor, "b p"], SynchronizationState]:
        """S after one more tick with the activations z, and the new state."""
        wide = wide_dtype(z)
        r, (left, right) = self.retained(wide), z.to(wide)[:, places].unbind(1)
        state = SynchronizationState(r * state.products + left * right, r * state.ticks + 1)
        return self.read(state).to(z.dtype), state

    @staticmethod
    def read(state: SynchronizationState) -> Float[Tensor, "b p"]:
        """S of a state with at least one tick."""
        return state.products / state.ticks.sqrt()
