"""MAD's six tasks (Poli et al. 2024, arXiv 2403.17844), with the baseline settings as defaults.

Recall tasks train on the next token of the whole sequence and are scored at the values of keys seen before; the other
three train on the targets that they are scored by. Every task has one split, ``test``, and a fixed training set.

Differences from the published generators: all random numbers are torch's, from one seed (theirs are numpy's, in
selective copying global ones); in selective copying every order of tokens and blanks is equally likely.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nestlearn.data.synthetic import IGNORE, Batch
from nestlearn.evals.tasks.base import Metric, Published, Split, Task, require_at_least
from nestlearn.evals.tasks.published import PUBLISHED


@dataclass(frozen=True, kw_only=True)
class MadTask(Task):
    """The base class of MAD's tasks.

    Attributes:
        vocabulary: number of token ids, including special tokens.
        length: tokens of a sequence.
    """

    metric: ClassVar[Metric] = "token accuracy"

    vocabulary: int = 16
    length: int = 128
    train_examples: int | None = 12_800
    eval_examples: int = 1_280

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("vocabulary", self.vocabulary, 2)
        require_at_least("length", self.length, 2)

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def splits(self) -> tuple[Split, ...]:
        return (Split("test"),)

    def draw(self, n: int, generator: torch.Generator) -> Batch:
        return self.generate(n, generator, training=True)

    def examples(self, split: str) -> Batch:
        self.find_split(split)
        generator = torch.Generator().manual_seed(self.eval_seed)
        return self.generate(self.eval_examples, generator, training=False)

    @abstractmethod
    def generate(self, n: int, generator: torch.Generator, *, training: bool) -> Batch:
        """``n`` sequences with the targets of training or of the test."""

    def _require(self, enough: bool, why: str) -> None:
        """Raise ValueError unless the settings are possible."""
        if not enough:
            raise ValueError(f"{self.name} with vocabulary={self.vocabulary}, length={self.length}: {why}.")


@dataclass(frozen=True, kw_only=True)
class InContextRecall(MadTask):
    """Key value key value ...: keys with replacement, the value of a key fixed (per sequence) at its first occurrence.

    Keys are the first half of the vocabulary, values the second. Every key seen before has a target, so the last has.
    """

    name: ClassVar[str] = "in_context_recall"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = PUBLISHED["in_context_recall"]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self._symbols() >= 2, "no tokens remain for a key and a value; raise the vocabulary")
        self._require(self.length % 2 == 0 and self.length >= 4, "length must be even and hold two pairs")

    def _symbols(self) -> int:
        """Tokens that are keys or values."""
        return self.vocabulary

    def generate(self, n: int, generator: torch.Generator, *, training: bool) -> Batch:
        pairs, keys = self.length // 2, self._symbols() // 2
        key = torch.randint(keys, (n, pairs), generator=generator)
        value_of = torch.randint(keys, self._symbols(), (n, keys), generator=generator)
        noise = self._noise(n, pairs, generator)
        # The last pair repeats one of the earlier ones.
        earlier = torch.rand(n, pairs - 1, generator=generator).masked_fill(noise[:, :-1], -1).argmax(1)
        key[:, -1] = key.gather(1, earlier[:, None])[:, 0]
        noise[:, -1] = False
        value = value_of.gather(1, key)
        both = torch.stack([key, value], 2)
        both = torch.where(noise[..., None], self._noise_tokens(n, pairs, generator), both).flatten(1)
        inputs, following = both[:, :-1], both[:, 1:]
        if training:
            return Batch(inputs, following)
        same = (key[:, :, None] == key[:, None, :]) & ~noise[:, :, None] & ~noise[:, None, :]
        seen = same.tril(-1).any(2)
        targets = torch.full_like(following, IGNORE)
        targets[:, ::2] = torch.where(seen, value, IGNORE)
        return Batch(inputs, targets)

    def _noise(self, n: int, pairs: int, generator: torch.Generator) -> Tensor:
        """Mask of the noise pairs: none here."""
        del generator
        return torch.zeros(n, pairs, dtype=torch.bool)

    def _noise_tokens(self, n: int, pairs: int, generator: torch.Generator) -> Int[Tensor, "n p 2"]:
        del generator
        return torch.zeros(n, pairs, 2, dtype=torch.long)

    def chance(self, split: str) -> float:
        """Guessing a value token."""
        self.find_split(split)
        return 1 / (self._symbols() - self._symbols() // 2)


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """In-context recall in which noise tokens replace a share of the pairs.

    Attributes:
        noise_vocabulary: number of noise tokens, the last of the vocabulary.
        noise_share: probability that a pair is noise.
    """

    name: ClassVar[str] = "noisy_recall"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = ()

    vocabulary: int = 32
    noise_vocabulary: int = 16
    noise_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("noise_vocabulary", self.noise_vocabulary, 1)
        self._require(0 <= self.noise_share < 1, f"noise_share={self.noise_share} must be in [0, 1)")

    def _symbols(self) -> int:
        return self.vocabulary - self.noise_vocabulary

    def _noise(self, n: int, pairs: int, generator: torch.Generator) -> Tensor:
        noise = torch.rand(n, pairs, generator=generator) < self.noise_share
        kept = torch.randint(pairs - 1, (n, 1), generator=generator)
        return noise.scatter(1, kept, False)

    def _noise_tokens(self, n: int, pairs: int, generator: torch.Generator) -> Int[Tensor, "n p 2"]:
        return torch.randint(self._symbols(), self.vocabulary, (n, pairs, 2), generator=generator)


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(MadTask):
    """In-context recall whose keys and values are motifs of one to ``motif`` different adjacent tokens.

    In test sequences every key has ``motif`` tokens. The last token of the vocabulary pads on the left; half of the
    others are keys. The last pair repeats an earlier key. Every token of a value whose key was seen has a target.

    Attributes:
        motif: tokens of the longest motif.
    """

    name: ClassVar[str] = "fuzzy_recall"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = PUBLISHED["fuzzy_recall"]

    motif: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("motif", self.motif, 1)
        self._require(
            (self.vocabulary - 1) // 2 >= self.motif, f"a motif of {self.motif} needs as many keys; raise vocabulary"
        )
        self._require(self.length >= 4 * self.motif, f"length must hold two pairs, at least {4 * self.motif}")

    def generate(self, n: int, generator: torch.Generator, *, training: bool) -> Batch:
        rows = [self._sequence(generator, training) for _ in range(n)]
        inputs, targets = (torch.tensor(column) for column in zip(*rows, strict=True))
        return Batch(inputs, targets)

    def _sequence(self, generator: torch.Generator, training: bool) -> tuple[list[int], list[int]]:
        """Inputs and targets of one sequence."""
        half, total = (self.vocabulary - 1) // 2, self.vocabulary - 1
        value_of: dict[tuple[int, ...], tuple[int, ...]] = {}
        tokens: list[int] = []
        judged: list[bool] = []

        def add(key: tuple[int, ...]) -> None:
            seen = key in value_of
            value = value_of.setdefault(key, _motif(generator, half, total, 1, self.motif))
            tokens.extend((*key, *value))
            judged.extend([False] * len(key) + [seen] * len(value))

        while not tokens or len(tokens) + 4 * self.motif <= self.length + 1:
            add(_motif(generator, 0, half, 1 if training else self.motif, self.motif))
        known = list(value_of)
        add(known[int(torch.randint(len(known), (), generator=generator))])
        padding = self.length + 1 - len(tokens)
        tokens, judged = [self.vocabulary - 1] * padding + tokens, [False] * padding + judged
        following = tokens[1:]
        if training:
            return tokens[:-1], following
        return tokens[:-1], [t if asked else IGNORE for t, asked in zip(following, judged[1:], strict=True)]

    def chance(self, split: str) -> float:
        """Guessing a value token."""
        self.find_split(split)
        return 1 / (self.vocabulary - 1 - (self.vocabulary - 1) // 2)


def _motif(generator: torch.Generator, low: int, high: int, shortest: int, longest: int) -> tuple[int, ...]:
    """``shortest .. longest`` different tokens of ``low .. high - 1`` in random order."""
    size = int(torch.randint(shortest, longest + 1, (), generator=generator))
    return tuple((torch.randperm(high - low, generator=generator)[:size] + low).tolist())


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(MadTask):
    """Tokens among blanks, then a copy token, then blanks whose targets are the tokens in order.

    The last token of the vocabulary is the copy token, the one before it the blank.

    Attributes:
        copied: number of tokens to copy.
    """

    name: ClassVar[str] = "selective_copying"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = PUBLISHED["selective_copying"]

    length: int = 256
    copied: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("copied", self.copied, 1)
        self._require(self.vocabulary >= 3, "the vocabulary needs blank, copy token and a token to copy")
        self._require(self.length > 2 * self.copied, f"copied={self.copied} needs length above {2 * self.copied}")

    def generate(self, n: int, generator: torch.Generator, *, training: bool) -> Batch:
        del training
        blank, copy = self.vocabulary - 2, self.vocabulary - 1
        context = self.length - self.copied - 1
        tokens = torch.randint(blank, (n, self.copied), generator=generator)
        places = torch.rand(n, context, generator=generator).argsort(1)[:, : self.copied].sort(1).values
        inputs = torch.full((n, self.length), blank)
        inputs.scatter_(1, places, tokens)
        inputs[:, context] = copy
        targets = torch.full_like(inputs, IGNORE)
        targets[:, context + 1 :] = tokens
        return Batch(inputs, targets)

    def chance(self, split: str) -> float:
        self.find_split(split)
        return 1 / (self.vocabulary - 2)


@dataclass(frozen=True, kw_only=True)
class Compression(MadTask):
    """Random tokens and a special last one, whose hidden state must hold all of them.

    `AggregateDecoder` answers from the hidden state of the last position alone. As in MAD the special token also has a
    target.
    """

    name: ClassVar[str] = "compression"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = PUBLISHED["compression"]

    length: int = 32

    def generate(self, n: int, generator: torch.Generator, *, training: bool) -> Batch:
        del training
        inputs = torch.randint(self.vocabulary - 1, (n, self.length), generator=generator)
        inputs[:, -1] = self.vocabulary - 1
        return Batch(inputs, inputs.clone())

    def chance(self, split: str) -> float:
        self.find_split(split)
        return (1 + (self.length - 1) / (self.vocabulary - 1)) / self.length

    def head(self, hidden_size: int) -> nn.Module:
        return AggregateDecoder(hidden_size, self.vocabulary)


class AggregateDecoder(nn.Module):
    """``logits_i = W_2 gelu(W_1 (h_T + p_i))``: every token from the last hidden state h_T and a sinusoidal position.

    Args:
        hidden_size: width d of the hidden states.
        vocabulary: number of logits v.

    Example:
        >>> AggregateDecoder(8, 16)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, hidden_size: int, vocabulary: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, vocabulary)
        )

    def forward(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """Logits of all positions."""
        positions = sinusoids(hidden.shape[1], hidden.shape[2]).to(hidden)
        return self.network(hidden[:, -1:] + positions)


def sinusoids(length: int, width: int) -> Float[Tensor, "t d"]:
    """Sinusoidal positions (Vaswani et al. 2017): sine in the first half of the channels, cosine in the second."""
    half = (width + 1) // 2
    rates = torch.exp(-math.log(10_000.0) * torch.arange(half) / half)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]


@dataclass(frozen=True, kw_only=True)
class Memorization(MadTask):
    """Key, insert token, key, insert token, ...: the target at an insert token is the key's value in a fixed map.

    The map is the same in all sequences, so the weights must hold it. Keys are the first half of the vocabulary without
    its last token, the insert token.

    Attributes:
        map_seed: seed of the fixed map.
    """

    name: ClassVar[str] = "memorization"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = PUBLISHED["memorization"]

    vocabulary: int = 256
    length: int = 32
    train_examples: int | None = 256
    map_seed: int = 12_345

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.vocabulary >= 3, "the vocabulary needs the insert token, a key and a value")
        self._require(self.length % 2 == 0, "length must be even")

    def generate(self, n: int, generator: torch.Generator, *, training: bool) -> Batch:
        del training
        keys = (self.vocabulary - 1) // 2
        key = torch.randint(keys, (n, self.length // 2), generator=generator)
        inputs = torch.stack([key, torch.full_like(key, self.vocabulary - 1)], 2).flatten(1)
        targets = torch.full_like(inputs, IGNORE)
        targets[:, 1::2] = self.values()[key]
        return Batch(inputs, targets)

    def values(self) -> Int[Tensor, " k"]:
        """The value of every key."""
        keys = (self.vocabulary - 1) // 2
        shuffled = torch.randperm(self.vocabulary - 1 - keys, generator=torch.Generator().manual_seed(self.map_seed))
        return shuffled[:keys] + keys

    def chance(self, split: str) -> float:
        self.find_split(split)
        return 1 / (self.vocabulary - 1 - (self.vocabulary - 1) // 2)
