"""bAbI's twenty tasks, learned jointly from the official files (Weston et al. 2015, arXiv 1502.05698)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from nestlearn.data.synthetic import IGNORE, Batch
from nestlearn.evals.long_context.babi_files import BABI_TASKS, Question, read_questions
from nestlearn.evals.tasks.base import Metric, Split, Task, pad, require_at_least
from nestlearn.fields import unknown_name

_UNKNOWN = "<unknown>"
_WORD = re.compile(r"[a-z']+|[0-9]+|[.?,]")
ALL = "all"
"""The name of the split of all tasks together."""


def words_of(text: str) -> list[str]:
    """Lower-case words and punctuation marks.

    Example:
        >>> words_of("Where is Mary?")
        ['where', 'is', 'mary', '?']
    """
    return _WORD.findall(text.lower())


class Files(NamedTuple):
    """The questions of every task for training and for evaluation, and a digest of both."""

    train: dict[str, list[Question]]
    test: dict[str, list[Question]]
    digest: str


@cache
def read_files(folder: str) -> Files:
    """All files of the twenty tasks."""
    train, test = ({task: read_questions(folder, task, split) for task in BABI_TASKS} for split in ("train", "test"))
    digest = hashlib.blake2b(repr((train, test)).encode(), digest_size=8).hexdigest()
    return Files(train, test, digest)


@dataclass(frozen=True, kw_only=True)
class Babi(Task):
    """bAbI's tasks 1 to 20 from the files of a folder: facts, a question, and the answer at its question mark.

    Tokens are the words of the training files, in lower case, and full stops, commas and question marks. An answer of
    several words is one class, as in the literature ("apple,milk", "s,e"). Words and answers that training does not
    know are one token, which training never asks for. A story that is too long keeps its last whole facts. Each task is
    a split; the error that the literature reports is 100 % minus its accuracy. The last split has all tasks together.

    The package ships no data: `with_data` names the folder, as ``nestlearn bench babi --data FOLDER`` does.

    Attributes:
        folder: folder with files such as ``qa1_train.txt`` and ``qa1_test.txt``.
        tasks: the tasks that are learned, all of them by default.
        longest: tokens of a story with its question.
        train_examples: questions of all tasks that are trained on.
        eval_examples: questions per task.
    """

    name: ClassVar[str] = "babi"
    version: ClassVar[int] = 1
    metric: ClassVar[Metric] = "token accuracy"

    folder: str = ""
    tasks: tuple[str, ...] = BABI_TASKS
    longest: int = 256
    train_examples: int | None = 18_000
    eval_examples: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("longest", self.longest, 32)
        for task in self.tasks:
            if task not in BABI_TASKS:
                raise unknown_name("task of bAbI", task, BABI_TASKS)
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one, for example qa1.")

    def with_data(self, folder: str | None) -> Babi:
        if folder is None and not self.folder:
            raise ValueError(
                "the suite reads the official files of bAbI, which the package does not have. Give their folder, for "
                "example --data tasks_1-20_v1-2/en, with files such as qa1_train.txt and qa1_test.txt."
            )
        return self if folder is None else replace(self, folder=folder)

    def config(self) -> dict[str, Any]:
        """The settings. Files are known by what they hold, not by where they lie."""
        return super().config() | {"folder": Path(self.folder).name, "files": read_files(self.folder).digest}

    @property
    def vocab_size(self) -> int:
        return len(_numbers(self.folder))

    @property
    def splits(self) -> tuple[Split, ...]:
        return (*map(Split, self.tasks), Split(ALL))

    def draw(self, n: int, generator: torch.Generator) -> Batch:
        """Questions in random order; all have come before one comes again."""
        files = read_files(self.folder).train
        questions = [question for task in self.tasks for question in files[task]]
        order: list[int] = []
        while len(order) < n:
            order += torch.randperm(len(questions), generator=generator).tolist()
        return self._batch([questions[place] for place in order[:n]])

    def examples(self, split: str) -> Batch:
        name, files = self.find_split(split).name, read_files(self.folder).test
        return self._batch([q for task in (self.tasks if name == ALL else (name,)) for q in self._some(files[task])])

    def chance(self, split: str) -> float:
        """The score of each task's most frequent answer in training."""
        name, files = self.find_split(split).name, read_files(self.folder)
        right = []
        for task in self.tasks if name == ALL else (name,):
            answers = [question.answer for question in files.train[task]]
            best = max(sorted(set(answers)), key=answers.count)
            right += [question.answer == best for question in self._some(files.test[task])]
        return sum(right) / len(right)

    def _some(self, questions: list[Question]) -> list[Question]:
        """As many as are evaluated, spread evenly over the file."""
        count = min(self.eval_examples, len(questions))
        return [questions[place * len(questions) // count] for place in range(count)]

    def _batch(self, questions: Sequence[Question]) -> Batch:
        rows = [self.sequence(question) for question in questions]
        return pad([inputs for inputs, _ in rows], [targets for _, targets in rows])

    def sequence(self, question: Question) -> tuple[list[int], list[int]]:
        """The tokens of a story and its question, and the targets: the answer at the last token alone."""
        parts = [_ids(self.folder, question.question)]
        for fact in reversed(question.facts):
            told = _ids(self.folder, fact)
            if len(told) + sum(map(len, parts)) > self.longest:
                break
            parts.append(told)
        inputs = [token for part in reversed(parts) for token in part]
        right = _numbers(self.folder).get(question.answer.lower(), 0)
        return inputs, [IGNORE] * (len(inputs) - 1) + [right]


@cache
def _ids(folder: str, text: str) -> tuple[int, ...]:
    """The tokens of a sentence."""
    number = _numbers(folder)
    return tuple(number.get(word, 0) for word in words_of(text))


@cache
def _numbers(folder: str) -> dict[str, int]:
    """The token id of every word and answer of the training files."""
    known = {_UNKNOWN}
    for questions in read_files(folder).train.values():
        for question in questions:
            known.update(*map(words_of, question.facts), words_of(question.question), [question.answer.lower()])
    return {word: place for place, word in enumerate([_UNKNOWN, *sorted(known - {_UNKNOWN})])}
