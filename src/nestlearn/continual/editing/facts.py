"""Facts to be edited, and the rows of tokens by which a model is asked about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Int
from torch import Tensor

from nestlearn.data.clozes import names
from nestlearn.data.control_tokens import LiteralText

ROW_TOKENS = 1_024
"""Tokens of one forward pass."""

TokensOf = Callable[[str], list[tuple[int, float]]]
"""The tokens of a text, each with its number of bytes."""


@dataclass(frozen=True)
class Fact:
    """What a model should say after a prompt.

    Args:
        prompt: the beginning of a sentence, or a question.
        target: its continuation. A blank comes before it, unless the prompt ends with white space.
        subject: what the fact is about, a part of the prompt. The model is changed where it reads the last token of it
            (the last occurrence). By default the last name or number in the prompt (`nestlearn.data.clozes.names`).

    Raises:
        ValueError: an empty prompt or target, a subject that is not in the prompt, or no subject where none is found.
        TypeError: something that is no text.

    Example:
        >>> Fact("The capital of France is", "Rome").subject
        'France'
        >>> Fact("The capital of France is", "Rome", subject="Spain")
        Traceback (most recent call last):
        ValueError: the subject 'Spain' is not in the prompt 'The capital of France is'. ...
    """

    prompt: str
    target: str
    subject: str | None = None

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("target", self.target)):
            if not isinstance(text, str):
                raise TypeError(f"the {name} of a fact is a text, got {type(text).__name__}: {text!r}.")
            if not text.strip():
                raise ValueError(
                    f"the {name} of a fact is empty: Fact(prompt={self.prompt!r}, target={self.target!r})."
                )
        if self.subject is None:
            found = names(self.prompt)
            if not found:
                raise ValueError(
                    f"the prompt {self.prompt!r} holds no name or number that could be its subject. Name the words "
                    "that the fact is about: Fact(prompt, target, subject=...)."
                )
            object.__setattr__(self, "subject", found[-1])
        elif not isinstance(self.subject, str):
            raise TypeError(f"the subject of a fact is a text, got {type(self.subject).__name__}: {self.subject!r}.")
        elif not self.subject.strip() or self.subject not in self.prompt:
            raise ValueError(
                f"the subject {self.subject!r} is not in the prompt {self.prompt!r}. Give the words of the prompt that "
                "the fact is about, spelled as there."
            )

    @property
    def continuation(self) -> str:
        """The target as it follows the prompt."""
        return self.target if self.prompt[-1].isspace() or self.target[0].isspace() else f" {self.target}"


class Row(NamedTuple):
    """Tokens of one fact in one context.

    Attributes:
        fact: its number.
        ids: context, prompt and target.
        subject: the first and the last token of the subject.
        prompt: tokens before the target.
    """

    fact: int
    ids: list[int]
    subject: tuple[int, int]
    prompt: int


class FactRows:
    """Makes the rows of facts.

    Args:
        tokenizer: of the model.
        tokens_of: tokens of a text without control tokens.
        start: tokens before every text.
        contexts: texts before a prompt, so that a fact holds wherever it is asked.
    """

    def __init__(self, tokenizer: Any, tokens_of: TokensOf, start: Sequence[int], contexts: Sequence[str] = ()) -> None:
        self._tokens_of, self._literal, self._start = tokens_of, LiteralText(tokenizer), list(start)
        self._template = bool(getattr(tokenizer, "chat_template", None))
        self._contexts = [self._ids(text) for text in contexts]

    def _ids(self, text: str) -> list[int]:
        return [token for token, _ in self._tokens_of(text)]

    def plain(self, number: int, fact: Fact) -> Row:
        """The prompt and its target."""
        return self._row(number, fact, self._start, [], self._ids(fact.continuation))

    def all(self, number: int, fact: Fact) -> list[Row]:
        """The plain row, the same after each context, and the prompt as a turn of a conversation whose answer is the
        target (with a chat template)."""
        target = self._ids(fact.continuation)
        rows = [self._row(number, fact, [*self._start, *context], [], target) for context in ([], *self._contexts)]
        if self._template:
            whole, asked = (
                self._literal.conversation([{"role": "user", "content": fact.prompt}]),
                self._ids(fact.prompt),
            )
            at = next((i for i in range(len(whole)) if whole[i : i + len(asked)] == asked), None)
            # A template may change what it is given, and then has no place for the subject.
            if at is not None:
                after = whole[at + len(asked) :]
                rows.append(self._row(number, fact, whole[:at], after, self._ids(fact.target.strip())))
        return rows

    def neutral(self, number: int, fact: Fact) -> Row:
        """``SUBJECT is a``: what the model says about the subject otherwise."""
        return self._row(number, Fact(f"{fact.subject} is a", "-", fact.subject), self._start, [], [], at=0)

    def _row(
        self, number: int, fact: Fact, before: list[int], after: list[int], target: list[int], at: int | None = None
    ) -> Row:
        pairs, subject = self._tokens_of(fact.prompt), cast(str, fact.subject)
        at = fact.prompt.rindex(subject) if at is None else at
        first = _token_at(pairs, len(fact.prompt[:at].encode()))
        last = _token_at(pairs, len(fact.prompt[: at + len(subject.rstrip())].encode()) - 1)
        ids = [*before, *(token for token, _ in pairs), *after]
        return Row(number, [*ids, *target], (len(before) + first, len(before) + last), len(ids))


def _token_at(pairs: Sequence[tuple[int, float]], byte: int) -> int:
    """The token that holds a byte of the text."""
    end = 0.0
    for i, (_, size) in enumerate(pairs):
        end += size
        if end > byte:
            return i
    return len(pairs) - 1


def batched(rows: Sequence[Row]) -> Iterator[tuple[list[int], list[Row], Int[Tensor, "b t"]]]:
    """Rows of similar length together: their numbers, the rows, and their tokens, filled up at the right."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    while order:
        taken = 1
        while taken < len(order) and (taken + 1) * len(rows[order[taken]].ids) <= ROW_TOKENS:
            taken += 1
        numbers, order = order[:taken], order[taken:]
        chosen = [rows[i] for i in numbers]
        width = max(len(row.ids) for row in chosen)
        yield numbers, chosen, torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in chosen])
