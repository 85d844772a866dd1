"""Synthetic tasks with deterministic generators, after the protocols of the literature."""

from nestlearn.evals.tasks.babi import Babi
from nestlearn.evals.tasks.base import Published, Score, Split, Task
from nestlearn.evals.tasks.clevr import SortOfClevr
from nestlearn.evals.tasks.formal import Counter2, Counter3, EvenA, FormalLanguage, Parity, RepeatedAbab, Shuffle2
from nestlearn.evals.tasks.mad import (
    Compression,
    FuzzyRecall,
    InContextRecall,
    MadTask,
    Memorization,
    NoisyRecall,
    SelectiveCopying,
)
from nestlearn.evals.tasks.maze import Maze
from nestlearn.evals.tasks.needle import NeedleInNoise, WhereIs
from nestlearn.evals.tasks.recall import Mqar, RewrittenMqar
from nestlearn.evals.tasks.tracking import S3, S5, GroupProduct, ModularSum

__all__ = [
    "S3",
    "S5",
    "Babi",
    "Compression",
    "Counter2",
    "Counter3",
    "EvenA",
    "FormalLanguage",
    "FuzzyRecall",
    "GroupProduct",
    "InContextRecall",
    "MadTask",
    "Maze",
    "Memorization",
    "ModularSum",
    "Mqar",
    "NeedleInNoise",
    "NoisyRecall",
    "Parity",
    "Published",
    "RepeatedAbab",
    "RewrittenMqar",
    "Score",
    "SelectiveCopying",
    "Shuffle2",
    "SortOfClevr",
    "Split",
    "Task",
    "WhereIs",
]
