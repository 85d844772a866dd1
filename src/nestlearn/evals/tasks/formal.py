"""Formal languages, one answer per position: the protocol of Bhattamishra et al. 2020 as run by Irie et al. 2023.

A string counts only if every answer is right. Models train on strings of the first bin of lengths and are evaluated on
unseen strings of that bin and of longer ones. Every set of possible next symbols (a multi-label target of Bhattamishra)
is one class, as in Irie, so one softmax is enough.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from nestlearn.data.synthetic import Batch
from nestlearn.evals.tasks.base import Metric, Published, Split, Task, pad
from nestlearn.evals.tasks.published import PUBLISHED

_BLOCK = 4096
_MAX_REPEATS = 2000


def uniforms(generator: torch.Generator) -> Iterator[float]:
    """Endless numbers in [0, 1) from the generator."""
    while True:
        yield from torch.rand(_BLOCK, generator=generator, dtype=torch.float64).tolist()


def _whole(uniform: Iterator[float], low: int, high: int) -> int:
    """An integer in ``low .. high``."""
    return low + int(next(uniform) * (high - low + 1))


@dataclass(frozen=True, kw_only=True)
class FormalLanguage(Task):
    """A language, with an answer after every prefix of its strings.

    Attributes:
        bins: (shortest, longest) of every split, the training lengths first. In the counter languages these are n of
            a^n b^n, not lengths.

    Raises:
        ValueError: there is no bin, or a bin has no string.
    """

    metric: ClassVar[Metric] = "sequence accuracy"
    symbols: ClassVar[int]
    classes: ClassVar[int]

    bins: tuple[tuple[int, int], ...] = ((2, 50), (51, 100))
    train_examples: int | None = 10_000
    eval_examples: int = 2_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bins:
            raise ValueError("bins is empty; give at least the training lengths, such as ((2, 50), (51, 100)).")
        for low, high in self.bins:
            if not 1 <= low <= high:
                raise ValueError(f"bin ({low}, {high}) must satisfy 1 <= shortest <= longest.")
            if not self.admits(low, high):
                raise ValueError(f"{self.name} has no string in the bin ({low}, {high}); widen it.")

    @property
    def vocab_size(self) -> int:
        return max(self.symbols, self.classes)

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(Split(f"{low}-{high}", "length", high) for low, high in self.bins)

    @abstractmethod
    def sample(self, low: int, high: int, uniform: Iterator[float]) -> list[int] | None:
        """A random string of the bin; None if the draw left the bin."""

    @abstractmethod
    def answers(self, string: list[int]) -> list[int]:
        """The class after every prefix of a string of the language."""

    def admits(self, low: int, high: int) -> bool:
        """Whether the language has a string in the bin."""
        return high >= 2 and low <= high

    def draw(self, n: int, generator: torch.Generator) -> Batch:
        uniform = uniforms(generator)
        strings = list(self._strings(n, *self.bins[0], uniform, distinct=False))
        return pad(strings, [self.answers(string) for string in strings])

    def examples(self, split: str) -> Batch:
        place = self.splits.index(self.find_split(split))
        uniform = uniforms(torch.Generator().manual_seed(self.eval_seed + place))
        strings = list(self._strings(self.eval_examples, *self.bins[place], uniform, distinct=True))
        return pad(strings, [self.answers(string) for string in strings])

    def _strings(self, n: int, low: int, high: int, uniform: Iterator[float], distinct: bool) -> Iterator[list[int]]:
        """``n`` strings of the bin, or all of them if it has fewer distinct ones."""
        seen: set[tuple[int, ...]] = set()
        found = failures = 0
        while found < n and failures < _MAX_REPEATS:
            string = self.sample(low, high, uniform)
            if string is None or (distinct and tuple(string) in seen):
                failures += 1
                continue
            found, failures = found + 1, 0
            seen.add(tuple(string))
            yield string

    def chance(self, split: str) -> float:
        """0: a whole string cannot be guessed."""
        self.find_split(split)
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Parity(FormalLanguage):
    """Bit strings with an even number of ones; after every prefix: 1 if it has an even number of ones, else 0.

    Each bit is drawn with probability ``L / (2 (1 + L))``, with L the middle of the bin; otherwise the string ends. A
    string with an odd number of ones gets one more.
    """

    name: ClassVar[str] = "parity"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = PUBLISHED["parity"]
    symbols: ClassVar[int] = 2
    classes: ClassVar[int] = 2

    def sample(self, low: int, high: int, uniform: Iterator[float]) -> list[int] | None:
        middle = (low + high) // 2
        each = middle / (2 * (1 + middle))
        string: list[int] = []
        while (u := next(uniform)) < 2 * each and len(string) <= high:
            string.append(int(u >= each))
        string += [1] * (sum(string) % 2)
        return string if low <= len(string) <= high else None

    def answers(self, string: list[int]) -> list[int]:
        even, answers = 1, []
        for bit in string:
            even ^= bit
            answers.append(even)
        return answers


@dataclass(frozen=True, kw_only=True)
class _Repeated(FormalLanguage):
    """A repeated word; after every prefix: 1 if the prefix is a repetition of the word, else 0.

    A bin has few such strings (25 and 12 of lengths 2-50), so accuracies are coarse: mostly 0 or 100 %.
    """

    word: ClassVar[tuple[int, ...]]
    classes: ClassVar[int] = 2

    def admits(self, low: int, high: int) -> bool:
        return high // len(self.word) * len(self.word) >= low

    def sample(self, low: int, high: int, uniform: Iterator[float]) -> list[int] | None:
        length = len(self.word)
        return list(self.word) * _whole(uniform, -(-low // length), high // length)

    def answers(self, string: list[int]) -> list[int]:
        return [int((position + 1) % len(self.word) == 0) for position in range(len(string))]


@dataclass(frozen=True, kw_only=True)
class EvenA(_Repeated):
    """(aa)*: strings of an even number of a; the answer is whether the prefix has even length."""

    name: ClassVar[str] = "aa"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = PUBLISHED["aa"]
    symbols: ClassVar[int] = 1
    word: ClassVar[tuple[int, ...]] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class RepeatedAbab(_Repeated):
    """(abab)*: the answer is whether the prefix is a repetition of abab."""

    name: ClassVar[str] = "abab"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = PUBLISHED["abab"]
    symbols: ClassVar[int] = 2
    word: ClassVar[tuple[int, ...]] = (0, 1, 0, 1)


@dataclass(frozen=True, kw_only=True)
class _Counter(FormalLanguage):
    """a^n b^n ...: every symbol n times, n uniform in the bin.

    The answer is the set of symbols that may follow. Class 0 is {a, b} (after every a), class i the i-th further symbol
    alone, and the last class the end of the string.
    """

    def sample(self, low: int, high: int, uniform: Iterator[float]) -> list[int] | None:
        n = _whole(uniform, low, high)
        return [symbol for symbol in range(self.symbols) for _ in range(n)]

    def answers(self, string: list[int]) -> list[int]:
        n = string.count(0)
        answers = [0] * n
        for symbol in range(1, self.symbols):
            answers += [symbol] * (n - 1) + [symbol + 1]
        return answers


@dataclass(frozen=True, kw_only=True)
class Counter2(_Counter):
    """a^n b^n."""

    name: ClassVar[str] = "anbn"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = PUBLISHED["anbn"]
    symbols: ClassVar[int] = 2
    classes: ClassVar[int] = 3


@dataclass(frozen=True, kw_only=True)
class Counter3(_Counter):
    """a^n b^n c^n."""

    name: ClassVar[str] = "anbncn"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = PUBLISHED["anbncn"]
    symbols: ClassVar[int] = 3
    classes: ClassVar[int] = 4


@dataclass(frozen=True, kw_only=True)
class Shuffle2(FormalLanguage):
    """Two Dyck-1 words, over ``()`` and over ``[]``, in a uniformly random shuffle.

    Each word is drawn from the grammar ``S -> ( S ) [1/2] | S S [1/4] | empty [1/4]``. The answer says which brackets
    are open: 1 for ``(``, plus 2 for ``[``. Symbols 0 to 3 are ``( ) [ ]``.
    """

    name: ClassVar[str] = "shuffle2"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = PUBLISHED["shuffle2"]
    symbols: ClassVar[int] = 4
    classes: ClassVar[int] = 4

    def admits(self, low: int, high: int) -> bool:
        return high // 2 * 2 >= low

    def sample(self, low: int, high: int, uniform: Iterator[float]) -> list[int] | None:
        words: list[list[int]] = []
        for opening in (0, 2):
            word = _dyck(opening, high, uniform)
            if word is None:
                return None
            words.append(word)
        first, second = words
        if not low <= len(first) + len(second) <= high:
            return None
        string: list[int] = []
        i = j = 0
        while i < len(first) or j < len(second):
            left, right = len(first) - i, len(second) - j
            if next(uniform) * (left + right) < left:
                string.append(first[i])
                i += 1
            else:
                string.append(second[j])
                j += 1
        return string

    def answers(self, string: list[int]) -> list[int]:
        open_round = open_square = 0
        answers = []
        for symbol in string:
            open_round += (symbol == 0) - (symbol == 1)
            open_square += (symbol == 2) - (symbol == 3)
            answers.append(int(open_round > 0) + 2 * int(open_square > 0))
        return answers


def _dyck(opening: int, longest: int, uniform: Iterator[float]) -> list[int] | None:
    """A Dyck-1 word of the grammar of `Shuffle2`; None if it is longer than ``longest``."""
    variable = -1
    pending, word = [variable], []
    while pending:
        symbol = pending.pop()
        if symbol != variable:
            word.append(symbol)
            if len(word) > longest:
                return None
            continue
        u = next(uniform)
        if u < 0.5:
            pending += [opening + 1, variable, opening]
        elif u < 0.75:
            pending += [variable, variable]
    return word
