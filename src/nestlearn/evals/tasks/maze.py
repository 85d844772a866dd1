"""Mazes with one path from start to goal: the moves along it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from nestlearn.data.synthetic import IGNORE, Batch
from nestlearn.evals.tasks.base import Metric, Split, Task, require_at_least

WALL, FREE, START, GOAL, ASK = range(5)
STAY, MOVES = 0, ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
"""What a move adds to (row, column) of a room: stay, up, down, left, right."""


@dataclass(frozen=True, kw_only=True)
class Maze(Task):
    """A square of ``2 rooms + 1`` cells to a side, then ``moves`` places that ask for the next move each.

    Rooms stand at odd rows and columns, and walls between two rooms are open or closed. The open ones form a random
    spanning tree (a walk that goes back where it is stuck), so exactly one path leads from start to goal, which are two
    different rooms. Cells are read row by row: 0 wall, 1 free, 2 start, 3 goal; 4 asks. The target at the i-th place
    that asks is the i-th move from room to room (1 up, 2 down, 3 left, 4 right), and 0 after the goal is reached.
    A maze counts if every move is right.

    Attributes:
        rooms: to a side.
        moves: places that ask; of a longer path the first moves count.

    Raises:
        ValueError: fewer than 2 rooms, or no move.

    Example:
        >>> batch = Maze(rooms=2, moves=3).draw(1, torch.Generator().manual_seed(3))
        >>> print(picture(batch.inputs[0], rooms=2), batch.targets[0, -3:].tolist())
        #####
        #S#.#
        #.#.#
        #..G#
        ##### [2, 4, 0]
    """

    name: ClassVar[str] = "maze"
    version: ClassVar[int] = 1
    metric: ClassVar[Metric] = "sequence accuracy"

    rooms: int = 4
    moves: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("rooms", self.rooms, 2)
        require_at_least("moves", self.moves, 1)

    @property
    def cells(self) -> int:
        """Cells of the square: the inputs before those that ask."""
        return (2 * self.rooms + 1) ** 2

    @property
    def vocab_size(self) -> int:
        return len(MOVES)

    @property
    def splits(self) -> tuple[Split, ...]:
        return (Split(f"{2 * self.rooms + 1} x {2 * self.rooms + 1}"),)

    def draw(self, n: int, generator: torch.Generator) -> Batch:
        mazes = [self._maze(generator) for _ in range(n)]
        asks, silent = [ASK] * self.moves, [IGNORE] * self.cells
        return Batch(
            torch.tensor([cells + asks for cells, _ in mazes]), torch.tensor([silent + path for _, path in mazes])
        )

    def examples(self, split: str) -> Batch:
        self.find_split(split)
        return self.draw(self.eval_examples, torch.Generator().manual_seed(self.eval_seed))

    def chance(self, split: str) -> float:
        """The probability of guessing every move of a path that is as long as it can be."""
        self.find_split(split)
        return 0.25**self.moves

    def _maze(self, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Cells, row by row, and moves."""
        side, count = 2 * self.rooms + 1, self.rooms**2
        uniform = iter(torch.rand(3 + 2 * count, generator=generator, dtype=torch.float64).tolist())
        start, origin = int(next(uniform) * count), int(next(uniform) * count)
        goal = (start + 1 + int(next(uniform) * (count - 1))) % count
        cells, stack = [WALL] * side**2, [origin]
        came: dict[int, tuple[int, int]] = {origin: (origin, STAY)}
        while stack:
            room = stack[-1]
            ways = [(move, there) for move in range(1, 5) if (there := self._beyond(room, move)) not in (None, *came)]
            if not ways:
                stack.pop()
                continue
            move, there = ways[int(next(uniform) * len(ways))]
            (down, right), place = MOVES[move], self._place(room)
            cells[place] = cells[place + down * side + right] = cells[place + 2 * (down * side + right)] = FREE
            came[there] = (room, move)
            stack.append(there)
        cells[self._place(start)], cells[self._place(goal)] = START, GOAL
        # Up from both ends to where the ways to the origin meet.
        up, below = _way(came, start), _way(came, goal)
        while up and below and up[-1] == below[-1]:
            up.pop()
            below.pop()
        path = [_BACK[move] for _, move in up] + [move for _, move in reversed(below)]
        return cells, [*path, *[STAY] * self.moves][: self.moves]

    def _place(self, room: int) -> int:
        """The cell of a room."""
        row, column = divmod(room, self.rooms)
        return (2 * row + 1) * (2 * self.rooms + 1) + 2 * column + 1

    def _beyond(self, room: int, move: int) -> int | None:
        """The room in that direction; None outside."""
        row, column = divmod(room, self.rooms)
        down, right = MOVES[move]
        row, column = row + down, column + right
        return row * self.rooms + column if 0 <= row < self.rooms and 0 <= column < self.rooms else None


_BACK = (STAY, 2, 1, 4, 3)
"""The opposite of every move."""


def _way(came: dict[int, tuple[int, int]], room: int) -> list[tuple[int, int]]:
    """Rooms, each with the move that leads into it, from a room up to where the maze began, without that one."""
    way = []
    while came[room][1] != STAY:
        way.append((room, came[room][1]))
        room = came[room][0]
    return way


def picture(cells: torch.Tensor, rooms: int) -> str:
    """A maze as text: # wall, . free, S start, G goal."""
    side = 2 * rooms + 1
    text = "".join("#.SG"[cell] for cell in cells[: side**2].tolist())
    return "\n".join(text[i : i + side] for i in range(0, side**2, side))
