"""Relational questions about a few objects, told in symbols (after Sort-of-CLEVR, Santoro et al. 2017)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import torch

from nestlearn.data.synthetic import IGNORE, Batch
from nestlearn.evals.tasks.base import Metric, Split, Task, pad, require_at_least
from nestlearn.fields import unknown_name

_SHAPES = ("square", "circle")
_SIZES = ("small", "large")
KINDS: dict[str, tuple[str, ...]] = {
    "unary": ("shape of", "size of", "left half", "top half"),
    "binary": ("shape nearest to", "shape farthest from", "others of the shape of"),
    "ternary": ("others in the rectangle of", "others at an obtuse angle to", "others between the columns of"),
}
"""The questions of each kind: about one object, one and the others, two and the others."""


class Thing(NamedTuple):
    """An object: number of its colour, shape, size, column and row (row 0 is the top)."""

    colour: int
    shape: str
    size: str
    x: int
    y: int


def _squared(a: Thing, b: Thing) -> int:
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2


def _obtuse(a: Thing, b: Thing, c: Thing) -> bool:
    """Whether the largest angle of the triangle is above 90 degrees; three in a row count as 180."""
    *sides, longest = sorted((_squared(a, b), _squared(b, c), _squared(a, c)))
    return sum(sides) < longest


def answer(question: str, things: Sequence[Thing], grid: int, first: int, second: int | None = None) -> str:
    """The answer to a question of `KINDS` about the object of colour ``first`` (and that of colour ``second``).

    Halves: columns or rows below ``grid / 2``. Of equally near or far objects the one told first counts. A rectangle
    has its corners at both objects, borders included; between columns means strictly between. An obtuse angle is the
    largest one of the triangle with both objects.

    Raises:
        ValueError: no such question.

    Example:
        >>> things = [Thing(0, "square", "small", 0, 0), Thing(1, "circle", "small", 3, 1)]
        >>> answer("shape nearest to", things, 4, 0), answer("left half", things, 4, 1)
        ('circle', 'no')
    """
    by_colour = {thing.colour: thing for thing in things}
    a = by_colour[first]
    b = by_colour[first if second is None else second]
    others = [thing for thing in things if thing.colour not in (first, second)]
    columns, rows = sorted((a.x, b.x)), sorted((a.y, b.y))
    if question == "shape of":
        return a.shape
    if question == "size of":
        return a.size
    if question in ("left half", "top half"):
        place = a.x if question == "left half" else a.y
        return "yes" if 2 * place < grid else "no"
    if question == "shape nearest to":
        return min(others, key=lambda thing: _squared(a, thing)).shape
    if question == "shape farthest from":
        return max(others, key=lambda thing: _squared(a, thing)).shape
    if question == "others of the shape of":
        return str(sum(thing.shape == a.shape for thing in others))
    if question == "others in the rectangle of":
        inside = [columns[0] <= thing.x <= columns[1] and rows[0] <= thing.y <= rows[1] for thing in others]
        return str(sum(inside))
    if question == "others at an obtuse angle to":
        return str(sum(_obtuse(a, b, thing) for thing in others))
    if question == "others between the columns of":
        return str(sum(columns[0] < thing.x < columns[1] for thing in others))
    raise unknown_name("question", question, [name for kind in KINDS.values() for name in kind])


@dataclass(frozen=True, kw_only=True)
class SortOfClevr(Task):
    """Objects in random order, then questions about them; the target stands at the last token of a question.

    An object is five tokens: colour, shape, size, column, row. All colours are there once, and no two objects share a
    cell. A question is three tokens: what is asked (`KINDS`), the colour it is about, and a second colour or a blank.
    Answers are classes: a shape, a size, yes or no, a number. The published task draws pictures; here the objects are
    told, so that a sequence layer needs no eyes. Sizes and the grid are ours.

    Attributes:
        objects: of a scene, each with a colour of its own.
        grid: columns and rows.
        questions: per scene; the kinds are drawn evenly in training. A split asks one kind.
    """

    name: ClassVar[str] = "sort_of_clevr"
    version: ClassVar[int] = 1
    metric: ClassVar[Metric] = "token accuracy"

    objects: int = 6
    grid: int = 6
    questions: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("objects", self.objects, 3)
        require_at_least("questions", self.questions, 1)
        require_at_least("grid", self.grid, 2)
        if self.objects > self.grid**2:
            raise ValueError(f"objects={self.objects} do not fit the {self.grid**2} cells of grid={self.grid}.")

    def words(self) -> tuple[str, ...]:
        """What every token id stands for."""
        colours = (f"colour {number}" for number in range(self.objects))
        places = (f"{axis} {place}" for axis in ("column", "row") for place in range(self.grid))
        asked = (question for kind in KINDS.values() for question in kind)
        numbers = (str(number) for number in range(self.objects))
        return (*_SHAPES, *_SIZES, "yes", "no", *numbers, "blank", *colours, *places, *asked)

    @property
    def vocab_size(self) -> int:
        return len(self.words())

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(Split(kind) for kind in KINDS)

    def draw(self, n: int, generator: torch.Generator) -> Batch:
        return self._sequences(n, tuple(KINDS), generator)

    def examples(self, split: str) -> Batch:
        kind = self.find_split(split).name
        generator = torch.Generator().manual_seed(self.eval_seed + list(KINDS).index(kind))
        return self._sequences(self.eval_examples, (kind,), generator)

    def chance(self, split: str) -> float:
        """The score of the most frequent answer of each question."""
        return _chance(self, self.find_split(split).name)

    def scene(self, draw: random.Random) -> list[Thing]:
        """Objects in random order."""
        cells = draw.sample(range(self.grid**2), self.objects)
        colours = draw.sample(range(self.objects), self.objects)
        places = ((cell % self.grid, cell // self.grid) for cell in cells)
        return [
            Thing(colour, draw.choice(_SHAPES), draw.choice(_SIZES), x, y)
            for colour, (x, y) in zip(colours, places, strict=True)
        ]

    def ask(self, kind: str, things: Sequence[Thing], draw: random.Random) -> tuple[str, int, int | None, str]:
        """A question of a kind, the colours it is about, and its answer."""
        question = draw.choice(KINDS[kind])
        first, other = draw.sample(range(self.objects), 2)
        second = other if kind == "ternary" else None
        return question, first, second, answer(question, things, self.grid, first, second)

    def _sequences(self, n: int, kinds: tuple[str, ...], generator: torch.Generator) -> Batch:
        draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
        rows = [self._sequence(kinds, draw) for _ in range(n)]
        return pad([inputs for inputs, _ in rows], [targets for _, targets in rows])

    def _sequence(self, kinds: tuple[str, ...], draw: random.Random) -> tuple[list[int], list[int]]:
        number = {word: place for place, word in enumerate(self.words())}
        things = self.scene(draw)
        told = [
            (f"colour {thing.colour}", thing.shape, thing.size, f"column {thing.x}", f"row {thing.y}")
            for thing in things
        ]
        inputs = [number[word] for words in told for word in words]
        targets = [IGNORE] * len(inputs)
        for _ in range(self.questions):
            question, first, second, right = self.ask(draw.choice(kinds), things, draw)
            last = "blank" if second is None else f"colour {second}"
            inputs += [number[question], number[f"colour {first}"], number[last]]
            targets += [IGNORE, IGNORE, number[right]]
        return inputs, targets


@cache
def _chance(task: SortOfClevr, kind: str) -> float:
    draw, counts = random.Random(0), {question: Counter[str]() for question in KINDS[kind]}
    for _ in range(3000):
        question, _, _, right = task.ask(kind, task.scene(draw), draw)
        counts[question][right] += 1
    return sum(max(count.values()) / count.total() for count in counts.values()) / len(counts)
