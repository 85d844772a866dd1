"""The benchmark of continuous thought, at tiny sizes, and its page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nestlearn.evals.report.thought import MazeThought, TickCurve, write_thought_report
from nestlearn.evals.tasks import Maze
from nestlearn.nn import ContinuousThoughtConfig

Load = Callable[[str], ModuleType]
TINY = ["--batch", "4", "--tests", "20", "--ticks", "3", "--steps", "2"]


def thought_of_a_maze() -> MazeThought:
    task = Maze(rooms=2, moves=3)
    batch = task.draw(1, torch.Generator().manual_seed(3))
    cells = batch.inputs[:, : task.cells]
    machine = ContinuousThoughtConfig(classes=5, answers=3, neurons=12, ticks=4).build(4)
    with torch.no_grad():
        thoughts, _ = machine(torch.nn.functional.one_hot(cells, 4).float())
    return MazeThought(
        cells[0].tolist(), batch.targets[0, task.cells :].tolist(), thoughts.outputs[0].argmax(-1).tolist(),
        thoughts.certainty[0].tolist(), thoughts.attention[0].mean(1).tolist(), thoughts.activity[0].tolist(),
    )  # fmt: skip


def test_a_page_has_a_picture_of_every_tick(tmp_path: Path) -> None:
    thought = thought_of_a_maze()
    curves = {"mazes": [TickCurve("thought", [0.1, 0.5, 0.9, 0.8]), TickCurve("hope", [0.7])]}
    path = write_thought_report(tmp_path / "a.html", "A < B", "lead", curves, [thought], commands=["python x"])
    text = path.read_text()
    assert "A &lt; B" in text and "<script" not in text and not re.findall(r'(?:src|href)="http', text)
    assert [f"tick {k}, certainty" in text for k in (1, 2, 3, 4, 5)] == [True] * 4 + [False]
    # 4 still pictures and a moving one, each with the same walls; the path turns on at its own tick only.
    assert text.count('fill-opacity=".55"') == 5
    shown = re.findall(r'attributeName="stroke-opacity"[^>]*values="([01;]+)"', text)
    assert shown == ["1;0;0;0", "0;1;0;0", "0;0;1;0", "0;0;0;1"]


def test_the_path_on_the_page_is_that_of_the_moves(tmp_path: Path) -> None:
    thought = thought_of_a_maze()
    said = [[2, 4, 1], [0, 4, 4], [4, 0, 1], [2, 2, 2]]
    thought = MazeThought(**{**vars(thought), "said": said})
    row, column = divmod(thought.cells.index(2), 5)
    text = write_thought_report(
        tmp_path / "a.html", "a", "b", {"m": [TickCurve("x", [0.5] * 4)]}, [thought]
    ).read_text()
    drawn = re.findall(r'<polyline points="([^"]+)"', text)[0]
    x, y = 10 * column + 5, 10 * row + 5
    assert drawn == f"{x},{y} {x},{y + 20} {x + 20},{y + 20} {x + 20},{y}"


def test_strings_of_the_test_are_not_trained_on(load_benchmark: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    script: Any = load_benchmark("thought")
    seen: list[Any] = []
    answers_of = script.answers_of

    def watched(model: Any, task: Any, batch: Any) -> Any:
        if model.training and torch.is_grad_enabled():
            seen.extend(map(tuple, batch.inputs.tolist()))
        return answers_of(model, task, batch)

    monkeypatch.setattr(script, "answers_of", watched)
    made = {"task": "parity", "bits": 3, "tests": 4, "ticks": 2, "batch": 64, "steps": 2, "lr": 1e-3, "seconds": 60}
    options = type("Options", (), {**made, "neurons": None})
    task = script.task_of(options)
    script.train(script.build("lstm", task, options, 0), task, options, 0)
    test = {tuple(row) for row in task.examples(task.splits[-1].name).inputs.tolist()}
    assert seen and not test & set(seen) and len(test | set(seen)) == 8


def test_every_row_is_trained_at_equal_size_and_the_page_is_written(load_benchmark: Load, tmp_path: Path) -> None:
    script: Any = load_benchmark("thought")
    where = ["--out", str(tmp_path / "records.jsonl"), "--keep", str(tmp_path / "kept")]
    mazes = ["--task", "mazes", "--rooms", "2", "--moves", "3"]
    script.main([*TINY, *where, *mazes, "--report", str(tmp_path / "page.html")])
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["row"] for record in records] == ["thought", "lstm", "hope"]
    sizes = [record["parameters"] for record in records]
    assert max(sizes) < 1.1 * min(sizes)
    assert [len(record["right_by_tick"]) for record in records] == [3, 3, 1]
    text = (tmp_path / "page.html").read_text()
    assert "tick 3, certainty" in text and "mazes-2-3" in text
    script.main([*TINY, *where, *mazes])  # nothing is repeated
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 3
