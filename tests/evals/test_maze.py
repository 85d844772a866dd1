"""Mazes against a search that knows nothing of how they were made."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from tests.evals import test_tasks

from nestlearn.evals.tasks import Maze
from nestlearn.evals.tasks.maze import ASK, FREE, GOAL, MOVES, START, WALL, picture

STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def searched(rows: list[str]) -> tuple[list[str], int, int]:
    """Moves of one cell on the shortest path, and how many cells are reached and how many openings join them."""
    start = next((r, c) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell == "S")
    came: dict[tuple[int, int], tuple[tuple[int, int], str]] = {start: (start, "")}
    queue = deque([start])
    joins = 0
    while queue:
        here = queue.popleft()
        for name, (down, right) in STEPS.items():
            there = (here[0] + down, here[1] + right)
            if rows[there[0]][there[1]] == "#":
                continue
            joins += 1
            if there not in came:
                came[there] = (here, name)
                queue.append(there)
    place = next((r, c) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell == "G")
    path: list[str] = []
    while place != start:
        place, name = came[place]
        path.append(name)
    return path[::-1], len(came), joins // 2


@pytest.mark.parametrize("rooms", [2, 3, 5])
def test_the_moves_are_those_of_a_search_and_there_is_no_other_path(rooms: int) -> None:
    task = Maze(rooms=rooms, moves=7)
    batch = task.draw(40, torch.Generator().manual_seed(rooms))
    names = ["stay", *STEPS]
    for cells, targets in zip(batch.inputs, batch.targets, strict=True):
        path, reached, joins = searched(picture(cells, rooms).splitlines())
        assert reached == 2 * rooms**2 - 1 and joins == reached - 1  # every room, and a tree
        assert path[::2] == path[1::2]  # two cells a move
        told = [names[move] for move in targets[task.cells :].tolist()]
        assert told == [*path[::2], *["stay"] * 7][:7]
        assert (targets[: task.cells] == -100).all() and (cells[task.cells :] == ASK).all()
    inside = batch.inputs[:, : task.cells]
    assert [(inside == kind).sum(1).unique().tolist() for kind in (START, GOAL)] == [[1], [1]]
    assert (inside == WALL).sum(1).unique().tolist() == [task.cells - 2 * rooms**2 + 1]
    assert set(inside.unique().tolist()) == {WALL, FREE, START, GOAL}


def test_the_contract_of_tasks() -> None:
    test_tasks.test_every_task_keeps_the_contract(Maze(rooms=3, moves=4, eval_examples=20))


def test_trees_and_places_are_many() -> None:
    """2 x 2 rooms have 4 spanning trees and 12 pairs of places: all 48 mazes come."""
    batch = Maze(rooms=2, moves=1).draw(600, torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in batch.inputs.tolist()}) == 48


def test_a_move_names_its_direction() -> None:
    assert [MOVES[1 + i] for i in range(4)] == list(STEPS.values()) and MOVES[0] == (0, 0)


@pytest.mark.parametrize(("settings", "message"), [({"rooms": 1}, "rooms=1 .* at least 2"), ({"moves": 0}, "moves=0")])
def test_bad_sizes(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Maze(**settings)
