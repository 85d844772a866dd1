"""The files of bAbI (Weston et al. 2015, arXiv 1502.05698): stories, questions, answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from nestlearn.data.text_files import read_text

BABI_TASKS: tuple[str, ...] = tuple(f"qa{number}" for number in range(1, 21))
"""The twenty tasks, by the names of their files."""
_LINE = re.compile(r"(\d+) (.*)")


class Question(NamedTuple):
    """A question of bAbI; ``facts`` are all sentences of the story before it."""

    facts: tuple[str, ...]
    question: str
    answer: str


def read_questions(path: str | Path, task: str, split: str = "test") -> list[Question]:
    """The questions of one file, each with the facts before it.

    Args:
        path: a folder with files such as ``qa1_test.txt`` or ``qa1_single-supporting-fact_test.txt``.
        task: ``"qa1"`` to ``"qa20"``.
        split: ``"train"``, ``"valid"`` or ``"test"``.

    Raises:
        ValueError: the file does not exist, or it does not have bAbI's form.
    """
    folder = Path(path)
    files = sorted({*folder.glob(f"{task}_{split}.txt"), *folder.glob(f"{task}_*_{split}.txt")})
    if not files:
        raise ValueError(
            f"{path} has no bAbI file {task}_{split}.txt or {task}_..._{split}.txt. Give the folder that holds the "
            "files of one bAbI set, for example tasks_1-20_v1-2/en."
        )
    facts: list[str] = []
    questions: list[Question] = []
    for number, line in enumerate(read_text(files[0]).splitlines(), start=1):
        parts = _LINE.fullmatch(line.rstrip())
        if parts is None:
            raise ValueError(f"{files[0]}, line {number}: {line[:60]!r} is not '<number> <sentence>', bAbI's form.")
        if parts.group(1) == "1":
            facts = []
        text, *rest = parts.group(2).split("\t")
        if rest:
            questions.append(Question(tuple(facts), text.strip(), rest[0].strip()))
        else:
            facts.append(text.strip())
    if not questions:
        raise ValueError(f"{files[0]} holds no question (a line with its answer after a tab).")
    return questions
