"""What a session practises: windows of the documents, and questions made from them, in batches of rows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nestlearn.data.clozes import Cloze, clozes, title_of
from nestlearn.data.control_tokens import LiteralText
from nestlearn.models.stacking.practice import PracticeRows

WINDOW = 256
"""Tokens of a window of text."""

WINDOWS = 4
"""Windows of one step."""

QUESTIONS = 8
"""Questions of one step."""

QUESTION_WEIGHT = 0.5
"""Weight of the loss of questions beside that of text, both per learned token."""

PROMPT = "{topic}Fill in the blank: {sentence} Answer in a few words."
"""The question of a cloze; ``{topic}`` is ``Topic: TITLE. `` where the document has a title, and else nothing."""

ROW_TOKENS = 1_024
"""Tokens of one forward pass: more rows are read in several, so that logits stay small."""


@dataclass
class PracticeReport:
    """What `MemorySession.practice` has done so far.

    Args:
        steps: taken.
        total: steps of the whole.
        text: mean loss of the windows in each step, nats per token.
        answers: mean loss of the answers in each step, nats per token; empty where the text gave no question.
        questions: number of different questions.
        seconds: wall time.
    """

    total: int
    questions: int
    steps: int = 0
    text: list[float] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def add(
        self, text: Sequence[PracticeRows], asked: Sequence[PracticeRows], losses: Sequence[float], seconds: float
    ) -> None:
        """Count a step with the loss of each of its batches, of text and then of questions."""
        self.steps, self.seconds = self.steps + 1, seconds
        self.text.append(mean_loss(text, losses[: len(text)]))
        if asked:
            self.answers.append(mean_loss(asked, losses[len(text) :]))

    def __str__(self) -> str:
        answers = f", answers {self.answers[-1]:.2f}" if self.answers else ""
        left = self.seconds / self.steps * (self.total - self.steps)
        losses = f"text {self.text[-1]:.2f}{answers} nats per token"
        return f"step {self.steps} of {self.total}: {losses}; at most {left:.0f} s left"


OnPractice = Callable[[PracticeReport], None]


class Practice:
    """Draws from documents the batches of every step: those of text, and those of questions.

    Args:
        tokenizer: of the model. With a chat template, questions are turns of a conversation.
        documents: texts.
        start: tokens before every window and every question without a template.
        passes: how often every window comes, each time in another order.
        questions: of one step; 0 reads the text only.
        prompt: see `PROMPT`.
        seed: of all draws.
        lr, minutes: of `MemorySession.practice`, to be checked.

    Raises:
        ValueError: documents without text, a prompt without ``{sentence}``, or numbers out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        documents: Sequence[str],
        start: Sequence[int],
        *,
        passes: int = 1,
        questions: int = QUESTIONS,
        prompt: str = PROMPT,
        seed: int = 0,
        lr: float = 1.0,
        minutes: float | None = None,
    ) -> None:
        if passes < 1 or questions < 0:
            raise ValueError(
                f"practice needs passes >= 1 and questions >= 0, got passes={passes}, questions={questions}."
            )
        if not lr > 0:
            raise ValueError(f"lr={lr} must be positive; 1 is a step as large as that of a segment.")
        if minutes is not None and not minutes > 0:
            raise ValueError(f"minutes={minutes} must be positive; leave it out for no limit.")
        if "{sentence}" not in prompt:
            raise ValueError(f"prompt={prompt!r} has no {{sentence}}, the place of the sentence with the blank.")
        self._literal, self._start, self._prompt = LiteralText(tokenizer), tuple(start), prompt
        self._template = bool(getattr(tokenizer, "chat_template", None))
        end = tokenizer.eos_token_id
        self._end = [] if end is None else [int(end)]
        self._random, self._passes, self._asked = random.Random(seed), passes, questions
        self.windows = [window for text in documents for window in self._windows(text)]
        if not self.windows:
            raise ValueError("there is no text to practise: the documents are empty.")
        made = [(text, cloze) for text in documents for cloze in clozes(text)] if questions else []
        self.questions = [self._question(title_of(text), cloze) for text, cloze in made]

    @property
    def steps(self) -> int:
        """All steps."""
        return self._passes * math.ceil(len(self.windows) / WINDOWS)

    def __iter__(self) -> Iterator[tuple[list[PracticeRows], list[PracticeRows]]]:
        for _ in range(self._passes):
            order = self._random.sample(self.windows, len(self.windows))
            for at in range(0, len(order), WINDOWS):
                asked = self._random.sample(self.questions, min(self._asked, len(self.questions)))
                yield batches(order[at : at + WINDOWS], 1.0), batches(asked, QUESTION_WEIGHT)

    def _windows(self, text: str) -> list[tuple[list[int], int]]:
        """Rows of the text, and the number of tokens at the start of each that are not learned."""
        ids, room = self._literal.ids(text.strip()), WINDOW - len(self._start)
        parts = [ids[at : at + room] for at in range(0, len(ids), room)]
        return [([*self._start, *part], len(self._start) or 1) for part in parts if len(part) + len(self._start) > 1]

    def _question(self, title: str | None, cloze: Cloze) -> tuple[list[int], int]:
        topic = "" if title is None else f"Topic: {title}. "
        asked = self._prompt.replace("{topic}", topic).replace("{sentence}", cloze.sentence)
        if self._template:
            before, answer = self._literal.conversation([{"role": "user", "content": asked}]), cloze.answer
        else:
            before, answer = [*self._start, *self._literal.ids(f"{asked}\n")], cloze.answer
        return [*before, *self._literal.ids(answer), *self._end], len(before)


def batches(rows: Sequence[tuple[list[int], int]], weight: float) -> list[PracticeRows]:
    """Rows of similar length together, at most `ROW_TOKENS` a batch; weights add up to ``weight`` by learned tokens.

    Example:
        >>> [made] = batches([([5, 6, 7], 1), ([5, 6], 1)], 1.0)
        >>> made.ids.tolist(), made.learned.tolist()
        ([[5, 6, 0], [5, 6, 7]], [[False, True, False], [False, True, True]])
    """
    groups: list[list[tuple[list[int], int]]] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if not groups or (len(groups[-1]) + 1) * len(row[0]) > ROW_TOKENS:
            groups.append([])
        groups[-1].append(row)
    learned = sum(len(ids) - known for ids, known in rows)
    made = []
    for group in groups:
        width = max(len(ids) for ids, _ in group)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in group])
        marks = torch.tensor([[known <= t < len(row) for t in range(width)] for row, known in group])
        made.append(PracticeRows(ids, marks, weight * int(marks.sum()) / learned))
    return made


def share(text: Sequence[PracticeRows]) -> float:
    """The part of a whole step that so many windows are worth, at most 1.

    A step of a normalized or orthogonalized level is as long for one window as for four. Without this, texts practised
    one by one would move the weights four times as far as the same texts together, and harm other text accordingly.
    """
    return min(1.0, sum(len(batch.ids) for batch in text) / WINDOWS)


def mean_loss(rows: Sequence[PracticeRows], losses: Sequence[float]) -> float:
    """Mean loss per learned token over several batches."""
    total = sum(batch.weight for batch in rows)
    return sum(batch.weight * loss for batch, loss in zip(rows, losses, strict=True)) / total
