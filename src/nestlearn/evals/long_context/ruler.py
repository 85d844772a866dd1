"""RULER's needles in a haystack (Hsieh et al. 2024, arXiv 2404.06654), for any tokenizer and length."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nestlearn.evals.language import describe_model
from nestlearn.evals.long_context.answers import score_by_length, token_count
from nestlearn.evals.long_context.words import key_words, read_sentences
from nestlearn.evals.result import EvalResult
from nestlearn.fields import unknown_name

_ANSWER_TOKENS = 128
"""Tokens of every length that are reserved for the answer."""
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_DEPTHS = 40  # possible depths of needles in a book


@dataclass(frozen=True, kw_only=True)
class Needles:
    """The settings of one of RULER's retrieval tasks.

    Attributes:
        haystack: ``noise`` repeats five short sentences, ``book`` is the caller's text, ``needles`` consists of other
            needles.
        key: kind of the keys.
        value: kind of the values to recall.
        keys: number of hidden keys.
        values: values per key.
        queries: number of queried keys.
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
                f"keys={self.keys}, values={self.values}, queries={self.queries}: each must be at least 1, and queries "
                "at most keys."
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
"""RULER's tasks by name. The caller's book replaces its essays."""


class Sample(NamedTuple):
    """A prompt that ends where the answer begins, all values that the answer must contain, and the prompt's tokens."""

    prompt: str
    answers: tuple[str, ...]
    tokens: int


def containment(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that the prediction contains, without regard to case.

    Example:
        >>> containment("It is ABC, or 12.", ["abc", "13"])
        0.5
    """
    text = prediction.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def find_variant(name: str) -> Needles:
    """The task with this name.

    Raises:
        ValueError: the name is unknown; the message has the closest known ones.
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
    answer_tokens: int = _ANSWER_TOKENS,
) -> list[Sample]:
    """Prompts with as many haystack sentences as fit a length. Equal seeds give equal prompts.

    Args:
        needles: a task, or the name of one of RULER's.
        tokenizer: the tokenizer that counts the tokens.
        length: tokens of prompt and answer together.
        n: number of samples.
        book: the haystack of tasks that need one: a text file, a folder of text files, or sentences. It begins at its
            first sentence and starts again after its last.
        depth: place of the first queried needle, 0 for the start and 1 for the end; None for a random place. The other
            needles have random places.
        seed: seed of keys, values and places.
        answer_tokens: tokens of ``length`` that are reserved for the answer.

    Raises:
        ValueError: the task is unknown, a needed book is missing, the depth is outside [0, 1], or the length is too
            short for the prompt without haystack.

    Example:
        >>> (sample,) = ruler_samples("niah_single_1", byte_tokenizer(), length=1024, n=1)
        >>> sample.answers[0] in sample.prompt, sample.tokens <= 1024 - 128
        (True, True)
    """
    task = find_variant(needles) if isinstance(needles, str) else needles
    if n < 1:
        raise ValueError(f"n={n} samples must be at least 1.")
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
            "this task hides its needles in a book, and none was given. Give a UTF-8 text file or a folder of text "
            "files (--book PATH), or use niah_single_1, whose haystack is built in."
        )
    texts = read_sentences(book) if isinstance(book, (str, Path)) else book
    if not texts:
        raise ValueError("the book has no sentences; give at least one.")
    return texts


class _Prompt:
    """A sample with all random choices made; only the size of its haystack is open."""

    def __init__(self, task: Needles, book: Sequence[str], depth: float | None, draw: random.Random) -> None:
        self.task, self.book = task, book
        make_key, make_value = _maker(task.key, draw), _maker(task.value, draw)
        self.keys = [make_key() for _ in range(task.keys)]
        values = [[make_value() for _ in range(task.values)] for _ in self.keys]
        asked = draw.sample(range(task.keys), task.queries)
        self.queries = [self.keys[number] for number in asked]
        self.answers = tuple(value for number in asked for value in values[number])
        # The first queried needle comes first: `depth` is its place.
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
    """Places of needles as shares of the haystack, at ``levels`` distinct depths if given."""
    if levels is not None and count <= levels:
        shares = [level / (levels - 1) for level in draw.sample(range(levels), count)]
    else:
        shares = [draw.random() for _ in range(count)]
    return shares if depth is None else [depth, *shares[1:]]


def _maker(kind: str, draw: random.Random) -> Callable[[], str]:
    """A function that draws words, seven-digit numbers or uuids, none twice."""
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
    """The sample with the largest haystack that fits, found by bisection.

    Raises:
        ValueError: the needles alone do not fit.
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
    answer_tokens: int = _ANSWER_TOKENS,
    batch_size: int = 8,
    command: str = "",
) -> EvalResult:
    """Share of hidden values that a model's greedy answers contain, for each length of the context.

    Args:
        name: one of RULER's tasks (`VARIANTS`); the other arguments are those of `ruler_samples` and
            `answer_prompts`.

    Returns:
        A result whose value is the mean over the lengths, and whose ``details`` hold ``by_length`` and an example.

    Raises:
        ValueError: as in `ruler_samples`, or no length is given.
    """
    if not lengths:
        raise ValueError("No length was given. Give at least one, for example --lengths 1024,2048.")
    began = time.perf_counter()
    options: dict[str, Any] = {"n": n, "book": book, "depth": depth, "seed": seed, "answer_tokens": answer_tokens}
    if isinstance(book, (str, Path)) and find_variant(name).haystack == "book":
        options["book"] = read_sentences(book)
    # All prompts are made before the model runs, so that a bad setting fails at once.
    made = {length: ruler_samples(name, tokenizer, length=length, **options) for length in lengths}
    scores = score_by_length(
        model,
        tokenizer,
        made,
        lambda answer, sample: containment(answer, sample.answers),
        max_new_tokens=answer_tokens,
        batch_size=batch_size,
    )
    example = {"length": lengths[-1], "references": made[lengths[-1]][0].answers, "answer": scores.answer}
    settings = {"lengths": list(lengths), "book": book if book is None else str(book)[:200], "depth": depth}
    return EvalResult(
        task=f"local_{name}",
        version=1,
        metric="share of the hidden values in the answer, mean over lengths",
        value=scores.value,
        stderr=scores.stderr,
        n=scores.n,
        seed=seed,
        seconds=time.perf_counter() - began,
        command=command,
        config={**settings, "answer_tokens": answer_tokens, "samples": n, "model": describe_model(model)},
        details={"by_length": scores.by_length, "example": example},
    )
