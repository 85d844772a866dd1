"""Retrieval from long contexts at a size that can be trained: S-NIAH-1 on bytes, BABILong's qa1 on words."""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from nestlearn.data.synthetic import IGNORE, Batch
from nestlearn.evals.long_context.ruler import NOISE
from nestlearn.evals.long_context.words import key_nouns, sentences
from nestlearn.evals.tasks.base import Metric, Published, Split, Task, pad, require_at_least
from nestlearn.evals.tasks.published import PUBLISHED

_NOISE = tuple(sentences(NOISE))
_NAMES = 4
_ROOMS = 6
_VERBS = 4  # "went to", "moved to", "travelled to", "journeyed to", a token each
_SPECIAL = 3  # full stop, "where is", question mark


@dataclass(frozen=True, kw_only=True)
class LongContext(Task):
    """A task trained at one length of context and evaluated at several.

    Attributes:
        length: tokens of a training sequence.
        eval_lengths: tokens of the splits.
    """

    metric: ClassVar[Metric] = "sequence accuracy"

    length: int = 256
    eval_lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    eval_examples: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eval_lengths:
            raise ValueError("eval_lengths is empty; give at least one length.")
        for name, length in (("length", self.length), *(("eval_lengths", length) for length in self.eval_lengths)):
            require_at_least(name, length, self.shortest())

    @abstractmethod
    def shortest(self) -> int:
        """Tokens of the longest sequence without haystack."""

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(Split(f"length {length}", "length", length) for length in self.eval_lengths)

    def draw(self, n: int, generator: torch.Generator) -> Batch:
        return self._sequences(n, self.length, generator)

    def examples(self, split: str) -> Batch:
        length = int(self.find_split(split).value)
        return self._sequences(self.eval_examples, length, torch.Generator().manual_seed(self.eval_seed + length))

    def _sequences(self, n: int, length: int, generator: torch.Generator) -> Batch:
        draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
        rows = [self.sequence(length, draw) for _ in range(n)]
        return pad([inputs for inputs, _ in rows], [targets for _, targets in rows])

    @abstractmethod
    def sequence(self, length: int, draw: random.Random) -> tuple[list[int], list[int]]:
        """One sequence of at most ``length`` tokens, and its targets, `IGNORE` at a token without one."""


@dataclass(frozen=True, kw_only=True)
class NeedleInNoise(LongContext):
    """RULER's S-NIAH-1 on bytes: recall of a number that occurs once, anywhere in repeated noise sentences.

    A sequence is ``<noise> One of the special magic numbers for <key> is: <number>. <noise> The special magic number
    for <key> mentioned in the provided text is <number>``. RULER's instruction and question are left out, so that
    prompt and noise fit 256 bytes; numbers are shorter and keys are single words. The targets are the digits of the
    number. All must be right, each after the right ones before it, as in greedy decoding.

    Attributes:
        digits: digits of a number.
        keys: number of words that keys are drawn from.

    Raises:
        ValueError: a length is too short for needle and question, or there are more keys than words.

    Example:
        >>> task = NeedleInNoise(length=256, eval_examples=2)
        >>> inputs, targets = next(task.batches(batch_size=1, seed=0))
        >>> answer = bytes(targets[targets != -100].tolist())
        >>> b" is: " + answer + b"." in bytes(inputs[0].tolist())
        True
    """

    name: ClassVar[str] = "niah_single_1"
    version: ClassVar[int] = 1
    published: ClassVar[tuple[Published, ...]] = PUBLISHED["niah_single_1"]

    digits: int = 4
    keys: int = 120

    def __post_init__(self) -> None:
        require_at_least("digits", self.digits, 1)
        require_at_least("keys", self.keys, 1)
        if self.keys > len(key_nouns()):
            raise ValueError(f"keys={self.keys} must be at most {len(key_nouns())}, the number of words for keys.")
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        return 256

    def chance(self, split: str) -> float:
        """The probability of guessing the number."""
        self.find_split(split)
        return 1 / (9 * 10 ** (self.digits - 1))

    def shortest(self) -> int:
        key = max(key_nouns()[: self.keys], key=len)
        needle, question = _needle(key, "0" * self.digits)
        return len(needle) + len(question) + self.digits

    def sequence(self, length: int, draw: random.Random) -> tuple[list[int], list[int]]:
        """Noise, needle, noise, question and number, in bytes."""
        number = str(draw.randrange(10 ** (self.digits - 1), 10**self.digits))
        needle, question = _needle(draw.choice(key_nouns()[: self.keys]), number)
        room = length - len(needle) - len(question) - self.digits
        noise: list[str] = []
        while (room := room - len(_NOISE[len(noise) % len(_NOISE)]) - 1) >= 0:
            noise.append(_NOISE[len(noise) % len(_NOISE)])
        noise.insert(draw.randint(0, len(noise)), needle)
        text = " ".join(noise) + question
        inputs = [*text.encode(), *number.encode()[:-1]]
        targets = [IGNORE] * (len(text) - 1) + list(number.encode())
        return inputs, targets


def _needle(key: str, number: str) -> tuple[str, str]:
    """The sentence with the number, and the beginning of the sentence that recalls it."""
    told = f"One of the special magic numbers for {key} is: {number}."
    return told, f" The special magic number for {key} mentioned in the provided text is "


@dataclass(frozen=True, kw_only=True)
class WhereIs(LongContext):
    """BABILong's qa1 on words: facts about moves between rooms, among noise sentences; in which room is a person?

    Every word is a token: 4 names, 6 rooms, 4 verbs, full stop, "where is", question mark, and ``words`` words of the
    haystack, drawn by Zipf's law. Facts ``<name> <verb> <room> .`` keep their order, at random gaps between sentences
    of 5 to 15 words. The target, at the question mark, is the room of the last fact about the person.

    Attributes:
        most_facts: the number of facts of a sequence is uniform in 1 .. most_facts.
        words: distinct words of the haystack.

    Raises:
        ValueError: a length is too short for facts and question.

    Example:
        >>> task = WhereIs(length=64, eval_examples=2)
        >>> inputs, targets = next(task.batches(batch_size=4, seed=0))
        >>> inputs.shape, (targets != -100).sum(1).tolist()
        (torch.Size([4, 64]), [1, 1, 1, 1])
    """

    name: ClassVar[str] = "babilong_qa1"
    version: ClassVar[int] = 1

    most_facts: int = 6
    words: int = 1000

    def __post_init__(self) -> None:
        require_at_least("most_facts", self.most_facts, 1)
        require_at_least("words", self.words, 1)
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        return _NAMES + _ROOMS + _VERBS + _SPECIAL + self.words

    def chance(self, split: str) -> float:
        """The probability of guessing the room."""
        self.find_split(split)
        return 1 / _ROOMS

    def shortest(self) -> int:
        return 4 * self.most_facts + 3

    def sequence(self, length: int, draw: random.Random) -> tuple[list[int], list[int]]:
        """Facts between sentences, and the question; exactly ``length`` tokens."""
        rooms, verbs = _NAMES, _NAMES + _ROOMS
        stop = verbs + _VERBS
        facts, place_of = [], {}
        for _ in range(draw.randint(1, self.most_facts)):
            name, room = draw.randrange(_NAMES), rooms + draw.randrange(_ROOMS)
            facts.append([name, verbs + draw.randrange(_VERBS), room, stop])
            place_of[name] = room
        noise = self._haystack(length - 4 * len(facts) - 3, stop, draw)
        gaps = sorted(draw.randint(0, len(noise)) for _ in facts)
        for gap, fact in zip(reversed(gaps), reversed(facts), strict=True):
            noise.insert(gap, fact)
        asked = draw.choice(sorted(place_of))
        inputs = [token for sentence in noise for token in sentence] + [stop + 1, asked, stop + 2]
        return inputs, [IGNORE] * (len(inputs) - 1) + [place_of[asked]]

    def _haystack(self, room: int, stop: int, draw: random.Random) -> list[list[int]]:
        """Sentences with exactly ``room`` tokens in total."""
        first, found = stop + _SPECIAL, []
        while room > 0:
            size = min(room, draw.randint(6, 16))
            # The exponential of a uniform number follows Zipf's law: p(rank) ~ 1 / rank.
            words = [first + int((self.words + 1) ** draw.random()) - 1 for _ in range(size - 1)]
            found.append([*words, stop])
            room -= size
        return found
