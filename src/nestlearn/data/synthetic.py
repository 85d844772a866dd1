"""Synthetic sequence tasks: batches from a random generator, nothing is stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position without a loss."""


class Batch(NamedTuple):
    """``inputs`` Long[b, t] and ``targets`` Long[b, t]: the answer at each position (not shifted), or -100."""

    inputs: Tensor
    targets: Tensor


def multi_query_recall(
    batch: int,
    generator: torch.Generator,
    *,
    vocabulary: int = 64,
    length: int = 64,
    pairs: int = 16,
    power: float = 0.01,
    random_non_queries: bool = True,
    writes: int = 1,
) -> Batch:
    """Multi-query associative recall, Zoology's layout (Arora et al. 2023, arXiv 2312.04927).

    ``pairs`` key-value pairs fill the first ``2 * pairs`` positions. Then every key is queried once, at even positions
    drawn with weight ``gap ** (power - 1)``; other positions hold random tokens, or token 0. Keys are
    ``1 .. vocabulary/2 - 1``, values the upper half, both without repetition. The target at a query is its value. With
    ``writes`` above 1 (not in Zoology) every key is written that many times, in a new order each time. The last value
    is the target; earlier ones differ from it and may repeat.

    Raises:
        ValueError: if the pairs do not fit the vocabulary or the length.
    """
    half = vocabulary // 2
    if pairs < 1 or writes < 1:
        raise ValueError(f"{pairs=} and {writes=} must be at least 1")
    if pairs > half - 1:
        raise ValueError(f"{pairs} pairs need more than {half - 1} keys; raise vocabulary above {2 * pairs + 2}")
    told = 2 * pairs * writes
    if length < told + 2 * pairs:
        raise ValueError(
            f"{pairs} pairs, each written {writes} times, and their queries need length >= {told + 2 * pairs}, "
            f"got {length}"
        )
    keys = torch.rand(batch, half - 1, generator=generator).argsort(1)[:, :pairs] + 1
    values = torch.rand(batch, vocabulary - half, generator=generator).argsort(1)[:, :pairs] + half
    inputs = torch.zeros(batch, length, dtype=torch.long)
    if random_non_queries:
        inputs = torch.randint(vocabulary, (batch, length), generator=generator)
    targets = torch.full((batch, length), IGNORE)
    inputs[:, told - 2 * pairs : told : 2], inputs[:, told - 2 * pairs + 1 : told : 2] = keys, values
    for write in range(writes - 1):
        order = torch.rand(batch, pairs, generator=generator).argsort(1)
        # An offset from the last value, never 0, so that earlier values differ from it.
        steps = torch.randint(1, vocabulary - half, (batch, pairs), generator=generator)
        begin = 2 * pairs * write
        inputs[:, begin : begin + 2 * pairs : 2] = keys.gather(1, order)
        old = half + (values - half + steps) % (vocabulary - half)
        inputs[:, begin + 1 : begin + 2 * pairs : 2] = old.gather(1, order)
    slots = (length - told) // 2
    weights = torch.arange(1, slots + 1, dtype=torch.float).pow(power - 1).expand(batch, slots)
    gaps = torch.multinomial(weights, pairs, generator=generator)
    places = told + 2 * gaps
    inputs.scatter_(1, places, keys)
    targets.scatter_(1, places, values)
    return Batch(inputs, targets)


def parity(batch: int, generator: torch.Generator, *, shortest: int = 2, longest: int = 50) -> Batch:
    """Running parity of random bits (Irie et al. 2023): the target at every position is the parity of the prefix.

    All strings of a batch have one length, drawn from ``shortest .. longest``.
    """
    if not 1 <= shortest <= longest:
        raise ValueError(f"lengths must satisfy 1 <= shortest <= longest, got {shortest} and {longest}")
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    bits = torch.randint(2, (batch, length), generator=generator)
    return Batch(bits, bits.cumsum(1) % 2)
