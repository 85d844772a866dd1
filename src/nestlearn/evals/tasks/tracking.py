"""State tracking: the running product in a group after every element."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from nestlearn.data.synthetic import Batch
from nestlearn.evals.tasks.base import Metric, Split, Task, require_at_least


@dataclass(frozen=True, kw_only=True)
class GroupProduct(Task):
    """Elements ``g_1 g_2 ...`` drawn uniformly from a group; the target at t is their product up to t.

    The training sequences of a batch have one length, uniform in ``shortest .. longest``; splits have fixed lengths. A
    sequence counts if all its answers are right.

    Attributes:
        shortest, longest: lengths of training.
        eval_lengths: lengths of the splits; by default half the longest, the longest and twice the longest.
    """

    metric: ClassVar[Metric] = "sequence accuracy"

    shortest: int = 2
    longest: int = 50
    eval_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("shortest", self.shortest, 1)
        if self.longest < self.shortest:
            raise ValueError(f"lengths must satisfy shortest <= longest, got {self.shortest} and {self.longest}.")
        for length in self.eval_lengths:
            require_at_least("eval_lengths", length, 1)

    @property
    def splits(self) -> tuple[Split, ...]:
        lengths = self.eval_lengths or (max(1, self.longest // 2), self.longest, 2 * self.longest)
        return tuple(Split(f"length {length}", "length", length) for length in lengths)

    @abstractmethod
    def products(self, elements: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
        """The running product of every sequence."""

    def draw(self, n: int, generator: torch.Generator) -> Batch:
        length = int(torch.randint(self.shortest, self.longest + 1, (), generator=generator))
        return self._sequences(n, length, generator)

    def examples(self, split: str) -> Batch:
        length = int(self.find_split(split).value)
        return self._sequences(self.eval_examples, length, torch.Generator().manual_seed(self.eval_seed + length))

    def _sequences(self, n: int, length: int, generator: torch.Generator) -> Batch:
        elements = torch.randint(self.vocab_size, (n, length), generator=generator)
        return Batch(elements, self.products(elements))

    def chance(self, split: str) -> float:
        """The probability of guessing all answers but the first, which is given."""
        return self.vocab_size ** (1 - self.find_split(split).value)


@dataclass(frozen=True, kw_only=True)
class ModularSum(GroupProduct):
    """The running sum of numbers ``0 .. modulus - 1``, modulo ``modulus``."""

    name: ClassVar[str] = "modular_sum"
    version: ClassVar[int] = 1

    modulus: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("modulus", self.modulus, 2)

    @property
    def vocab_size(self) -> int:
        return self.modulus

    def products(self, elements: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
        return elements.cumsum(1) % self.modulus


@dataclass(frozen=True, kw_only=True)
class _WordProblem(GroupProduct):
    """The word problem of a symmetric group: every token is a permutation, the target their composition so far.

    Tokens number the permutations of ``0 .. degree - 1`` in lexicographic order. The target at t is the permutation
    that takes i to ``g_t(... g_1(i))``.
    """

    degree: ClassVar[int]

    @property
    def vocab_size(self) -> int:
        return len(compositions(self.degree))

    def products(self, elements: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
        table = compositions(self.degree)
        state, states = elements[:, 0], [elements[:, 0]]
        for t in range(1, elements.shape[1]):
            state = table[elements[:, t], state]
            states.append(state)
        return torch.stack(states, 1)


@dataclass(frozen=True, kw_only=True)
class S3(_WordProblem):
    """The word problem of S3, 6 permutations: solvable, not commutative."""

    name: ClassVar[str] = "s3"
    version: ClassVar[int] = 1
    degree: ClassVar[int] = 3

    longest: int = 32


@dataclass(frozen=True, kw_only=True)
class S5(_WordProblem):
    """The word problem of S5, 120 permutations: not solvable, hence complete for NC1 (Merrill et al. 2024)."""

    name: ClassVar[str] = "s5"
    version: ClassVar[int] = 1
    degree: ClassVar[int] = 5

    longest: int = 16


@cache
def compositions(degree: int) -> Int[Tensor, "n n"]:
    """Products: entry ``[g, h]`` is the number of the permutation ``g`` after ``h``, in lexicographic order."""
    elements = list(itertools.permutations(range(degree)))
    number = {element: place for place, element in enumerate(elements)}
    return torch.tensor([[number[tuple(g[h[i]] for i in range(degree))] for h in elements] for g in elements])
