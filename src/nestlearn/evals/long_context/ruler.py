"""RULER's needles in a haystack (Hsieh et al. 2024, arXiv 2404.06654), generated here for any tokenizer and length."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nestlearn.evals.language import describe_model
from nestlearn.evals.long_context.answers import answer_prompts, mean_over_lengths, mean_with_stderr, token_count
from nestlearn.evals.long_context.words import key_words, read_sentences
from nestlearn.evals.result import EvalResult
from nestlearn.fields import unknown_name

ANSWER_TOKENS = 128
"""Tokens of every length that are kept for the answer."""
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_DEPTHS = 40  # levels at which needles are put into a book


@dataclass(frozen=True, kw_only=True)
class Needles:
    """One of RULER's retrieval tasks: what is hidden, in what, and how much of it is asked.

    Attributes:
        haystack: ``noise`` repeats five short sentences, ``book`` is a text of the reader's, ``needles`` is made of
            other needles.
        key: what a needle is found by.
        value: what is to be recalled.
        keys: different keys hidden.
        values: values per key.
        queries: keys asked for.
    """

    haystack: Literal["noise", "book", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __post_init__(self) -> None:
        if min(self.keys, self.values, self.queries) < 1 or self.queries > self.keys:
            raise ValueError(
                f"keys={self.keys}, values={self.values}, queries={self.queries}: each must be at least 1, and no more "
                "keys can be asked for than are hidden."
            )


VARIANTS: dict[str, Needles] = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(haystack="book"),
    "niah_single_3": Needles(haystack="book", value="uuids"),
    "niah_multikey_1": Needles(haystack="book", keys=4),
    "niah_multikey_2": Needles(haystack="needles"),
    "niah_multikey_3": Needles(haystack="needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles(haystack="book", values=4),
    "niah_multiquery": Needles(haystack="book", keys=4, queries=4),
}
"""RULER's names and settings. Its essays are replaced by a book that the caller gives."""


class Sample(NamedTuple):
    """``prompt`` ends where the answer begins; ``answers`` must all be in it; ``tokens`` counts the prompt's."""

    prompt: str
    answers: tuple[str, ...]
    tokens: int


def containment(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that the prediction contains, letter case aside.

    Example:
        >>> containment("It is ABC, or 12.", ["abc", "13"])
        0.5
    """
    text = prediction.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def find_variant(name: str) -> Needles:
    """The task of that name.

    Raises:
        ValueError: unknown name; the message has the closest known ones.
    """
    if name not in VARIANTS:
        raise unknown_name("RULER task", name, VARIANTS)
    return VARIANTS[name]


def ruler_samples(
    needles: Needles | str,
    tokenizer: Any,
    *,
    length: int,
    n: int,
    book: str | Path | Sequence[str] | None = None,
    depth: float | None = None,
    seed: int = 0,
    answer_tokens: int = ANSWER_TOKENS,
) -> list[Sample]:
    """Prompts of as many haystack sentences as fit a length, the same for the same seed.

    Args:
        needles: a task, or the name of one of RULER's.
        tokenizer: counts the tokens.
        length: tokens of prompt and answer together.
        n: samples.
        book: the haystack of tasks that need one: a text file, a folder of them, or sentences. It begins at its
            first sentence and is read again where it ends.
        depth: where the first needle asked for goes, 0 the start and 1 the end; None for a random place. The other
            needles go to random places.
        seed: of keys, values and places.
        answer_tokens: of ``length``, kept for the answer.

    Raises:
        ValueError: an unknown task, no book where one is needed, a depth outside [0, 1], or a length that the prompt
            without haystack does not fit.

    Example:
        >>> (sample,) = ruler_samples("niah_single_1", byte_tokenizer(), length=1024, n=1)
        >>> sample.answers[0] in sample.prompt, sample.tokens <= 1024 - 128
        (True, True)
    """
    task = find_variant(needles) if isinstance(needles, str) else needles
    if n < 1:
        raise ValueError(f"{n} samples were asked for; at least 1 is needed.")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must be between 0 (the start of the haystack) and 1 (its end).")
    texts = _book(task, book)
    samples = []
    for number in range(n):
        # Each sample has its own generator: sample 7 is the same whether 10 or 500 are made.
        draw = random.Random(f"{seed} {number}")
        prompt = _Prompt(task, texts, depth, draw)
        samples.append(_fitted(prompt, tokenizer, length, answer_tokens))
    return samples


def _book(task: Needles, book: str | Path | Sequence[str] | None) -> Sequence[str]:
    if task.haystack != "book":
        return ()
    if book is None:
        raise ValueError(
            "this task hides its needles in a book, and none was given. Give a UTF-8 text file or a folder of them "
            "(--book PATH), or take niah_single_1, whose haystack is built in."
        )
    texts = read_sentences(book) if isinstance(book, (str, Path)) else book
    if not texts:
        raise ValueError("the book has no sentences; give at least one.")
    return texts


class _Prompt:
    """A sample with everything drawn but the amount of haystack."""

    def __init__(self, task: Needles, book: Sequence[str], depth: float | None, draw: random.Random) -> None:
        self.task, self.book = task, book
        make_key, make_value = _maker(task.key, draw), _maker(task.value, draw)
        self.keys = [make_key() for _ in range(task.keys)]
        values = [[make_value() for _ in range(task.values)] for _ in self.keys]
        asked = draw.sample(range(task.keys), task.queries)
        self.queries = [self.keys[number] for number in asked]
        self.answers = tuple(value for number in asked for value in values[number])
        # The first needle asked for comes first: `depth` is its place.
        order = [*asked, *(number for number in range(task.keys) if number not in asked)]
        self.needles = [self._needle(self.keys[number], value) for number in order for value in values[number]]
        self.shares = _shares(len(self.needles), depth, draw, _DEPTHS if task.haystack == "book" else None)
        self._make = make_key, make_value
        self._others: list[str] = []

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.task.value, key=key, value=value)

    def _haystack(self, size: int) -> list[str]:
        if self.task.haystack == "noise":
            return [NOISE] * size
        if self.task.haystack == "book":
            return [self.book[number % len(self.book)] for number in range(size)]
        make_key, make_value = self._make
        while len(self._others) < size:
            self._others.append(self._needle(make_key(), make_value()))
        return self._others[:size]

    def text(self, size: int) -> str:
        """The prompt with ``size`` sentences of haystack."""
        sentences = self._haystack(size)
        places = [round(share * size) for share in self.shares]
        # From the last place to the first, so that a needle does not move the places of others.
        for place, needle in sorted(zip(places, self.needles, strict=True), reverse=True):
            sentences.insert(place, needle)
        context = (" " if self.task.haystack == "book" else "\n").join(sentences)
        kind, first, rest = self.task.value, self.queries[0], self.queries[1:]
        query = ", ".join([first, *rest[:-1]]) + (f", and {rest[-1]}" if rest else "")
        if len(self.answers) == 1:
            kind = kind.removesuffix("s")
            start, ask, they = f"A special magic {kind} is", "What is the", "is"
        else:
            start, ask, they = f"Some special magic {kind} are", "What are all the", "are"
        return (
            f"{start} hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} "
            f"afterwards.\n{context}\n{ask} special magic {kind} for {query} mentioned in the provided text? The "
            f"special magic {kind} for {query} mentioned in the provided text {they}"
        )


def _shares(count: int, depth: float | None, draw: random.Random, levels: int | None) -> list[float]:
    """Places of needles as shares of the haystack; of ``levels`` different ones, or anywhere."""
    if levels is not None and count <= levels:
        shares = [level / (levels - 1) for level in draw.sample(range(levels), count)]
    else:
        shares = [draw.random() for _ in range(count)]
    return shares if depth is None else [depth, *shares[1:]]


def _maker(kind: str, draw: random.Random) -> Callable[[], str]:
    """Draws words, seven-digit numbers or uuids, no one twice."""
    seen: set[str] = set()

    def make() -> str:
        while True:
            if kind == "words":
                made = draw.choice(key_words())
            elif kind == "numbers":
                made = str(draw.randrange(1_000_000, 10_000_000))
            else:
                made = str(uuid.UUID(int=draw.getrandbits(128), version=4))
            if made not in seen:
                seen.add(made)
                return made

    return make


def _fitted(prompt: _Prompt, tokenizer: Any, length: int, answer_tokens: int) -> Sample:
    """The largest haystack that fits, found by doubling and halving.

    Raises:
        ValueError: not even the needles alone fit.
    """
    room = length - answer_tokens
    least = token_count(tokenizer, prompt.text(0))
    if least > room:
        raise ValueError(
            f"length={length} is too small: the prompt without haystack takes {least} tokens of this tokenizer and "
            f"the answer {answer_tokens}. Use at least {least + answer_tokens}, or fewer answer tokens."
        )
    low, high, tokens = 0, 1, least
    while (count := token_count(tokenizer, prompt.text(high))) <= room:
        low, high, tokens = high, 2 * high, count
    while high - low > 1:
        middle = (low + high) // 2
        count = token_count(tokenizer, prompt.text(middle))
        if count <= room:
            low, tokens = middle, count
        else:
            high = middle
    return Sample(prompt.text(low), prompt.answers, tokens)


def evaluate_ruler(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    lengths: Sequence[int],
    n: int = 100,
    book: str | Path | Sequence[str] | None = None,
    depth: float | None = None,
    seed: int = 0,
    answer_tokens: int = ANSWER_TOKENS,
    batch_size: int = 8,
    command: str = "",
) -> EvalResult:
    """Share of hidden values that a model's greedy answers contain, by length of the context.

    Args:
        name: one of RULER's tasks (`VARIANTS`); the other arguments are those of `ruler_samples` and
            `answer_prompts`.

    Returns:
        A result whose value is the mean over the lengths, and whose ``details`` hold ``by_length`` and an example.

    Raises:
        ValueError: as `ruler_samples`, and for no lengths.
    """
    if not lengths:
        raise ValueError("No length was given. Give some, for example --lengths 1024,2048.")
    began = time.perf_counter()
    options: dict[str, Any] = {"n": n, "book": book, "depth": depth, "seed": seed, "answer_tokens": answer_tokens}
    if isinstance(book, (str, Path)) and find_variant(name).haystack == "book":
        options["book"] = read_sentences(book)
    # All prompts are made first: what cannot be made is said before a model runs.
    made = {length: ruler_samples(name, tokenizer, length=length, **options) for length in lengths}
    by_length, example = {}, {}
    for length, samples in made.items():
        prompts = [sample.prompt for sample in samples]
        answers = answer_prompts(model, tokenizer, prompts, max_new_tokens=answer_tokens, batch_size=batch_size)
        scores = [containment(answer, sample.answers) for answer, sample in zip(answers, samples, strict=True)]
        by_length[str(length)] = mean_with_stderr(scores)
        example = {"length": length, "references": samples[0].answers, "answer": answers[0]}
    value, stderr, count = mean_over_lengths(by_length)
    settings = {"lengths": list(lengths), "book": book if book is None else str(book)[:200], "depth": depth}
    return EvalResult(
        task=f"local_{name}",
        version=1,
        metric="share of the hidden values in the answer, mean over lengths",
        value=value,
        stderr=stderr,
        n=count,
        seed=seed,
        seconds=time.perf_counter() - began,
        command=command,
        config={**settings, "answer_tokens": answer_tokens, "samples": n, "model": describe_model(model)},
        details={"by_length": by_length, "example": example},
    )
