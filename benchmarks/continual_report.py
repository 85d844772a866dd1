"""Results of learning from a stream: as records of the benchmarks' kind, as tables, as charts."""

from __future__ import annotations

import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nestlearn.continual.result import ContinualResult
from nestlearn.evals.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, Line, Panel, chart
from nestlearn.evals.result import EvalResult

VERSION = 1
"""Increased when a change makes the same settings give other numbers."""
COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#c2417a", "#9a7b1c", "#2aa3b8", GREY)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def continual_key(row: str, seed: int, settings: Mapping[str, Any]) -> str:
    """The key of a run in the store, known before the run."""
    return _digest({"row": row, "seed": seed, "version": VERSION, **settings})


def to_eval_result(
    result: ContinualResult, *, row: str, settings: Mapping[str, Any], n: int, command: str = ""
) -> EvalResult:
    """A run as a record that `nestlearn.evals.bench.store.ResultStore` keeps.

    Args:
        result: of `ContinualLearner.fit`.
        row: of the table: the method and its changes.
        settings: of the caller, for the key.
        n: test examples behind the average accuracy.
        command: repeats the run.
    """
    measured = result.measured()
    return EvalResult(
        task=result.stream, version=VERSION, metric=f"average {result.score}", value=measured["average_accuracy"],
        stderr=None, n=n, seed=result.seed, seconds=result.seconds, command=command,
        config={"row": row, "settings": dict(settings), **result.config},
        details={
            "key": continual_key(row, result.seed, settings), "recipe": _digest({"row": row, **settings}),
            "scores": measured, "by_length": [], "status": "finished", "matrix": [list(r) for r in result.matrix],
            "initial": list(result.initial), "steps": result.steps, "examples": result.examples,
            "stored_examples": result.stored_examples, "tasks": list(result.tasks),
        },
    )  # fmt: skip


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds and its standard error; None for fewer than two seeds."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _figure(values: Sequence[float], in_bits: bool) -> str:
    if not values:
        return ""
    factor, digits = (1, 2) if in_bits else (100, 1)
    mean, error = mean_and_error([factor * value for value in values])
    return f"{mean:.{digits}f}" if error is None else f"{mean:.{digits}f} ± {error:.{digits}f}"


def _in_bits(results: Sequence[EvalResult]) -> bool:
    """Whether all results are minus bits per target (True) or accuracies.

    Raises:
        ValueError: results of both scores.
    """
    metrics = sorted({result.metric for result in results})
    if len(metrics) > 1:
        raise ValueError(f"The results are of different scores ({', '.join(metrics)}); make a table of each.")
    return metrics == ["average bits"]


COLUMNS = {
    "average_accuracy": "ACC", "learning_accuracy": "just learned", "backward_transfer": "BWT",
    "forgetting": "forgetting", "average_incremental_accuracy": "incremental",
}  # fmt: skip


def table(results: Sequence[EvalResult], rows: Sequence[str] | None = None) -> list[str]:
    """Markdown lines: a row per method, with mean ± standard error over seeds and the cost.

    In percent; runs with ``score="bits"`` in minus bits per target, as the first cell says.

    Raises:
        ValueError: results of both scores.
    """
    in_bits = _in_bits(results)
    lines = [
        f"| {'minus bits per target ' if in_bits else ''}| seeds | {' | '.join(COLUMNS.values())} | steps "
        "| gradients of examples | stored examples | seconds |",
        "|---|--:|" + "--:|" * (len(COLUMNS) + 4),
    ]
    for row in rows or list(dict.fromkeys(result.config["row"] for result in results)):
        own = [result for result in results if result.config["row"] == row]
        if not own:
            continue
        cells = [
            _figure([r.details["scores"][name] for r in own if r.details["scores"].get(name) is not None], in_bits)
            for name in COLUMNS
        ]
        used = [f"{own[0].details[name]:,}" for name in ("steps", "examples", "stored_examples")]
        seconds = sum(result.seconds for result in own) / len(own)
        lines.append(f"| {row} | {len(own)} | {' | '.join(cells)} | {' | '.join(used)} | {seconds:.0f} |")
    return lines


def accuracy_chart(results: Sequence[EvalResult], rows: Sequence[str]) -> str:
    """Mean accuracy on the tasks learned so far, and on the first task, after each task; an `<svg>` element.

    The band is one standard error over seeds.

    Raises:
        ValueError: runs with ``score="bits"``, or no run of these rows.
    """
    if _in_bits(results):
        raise ValueError(
            "The results are minus bits per target, which no axis in percent can show; use `table`, or learn with "
            "score='accuracy'."
        )

    def curve(row: str, place: int, first_only: bool) -> Line:
        seeds = [_rows(result) for result in results if result.config["row"] == row]
        count = len(seeds[0])
        values = [
            [100 * (matrix[i][0] if first_only else sum(matrix[i][: i + 1]) / (i + 1)) for matrix in seeds]
            for i in range(count)
        ]
        means, errors = zip(*(mean_and_error(at) for at in values), strict=True)
        return Line(row, range(1, count + 1), means, COLORS[place % len(COLORS)], band=errors)

    shown = [row for row in rows if any(result.config["row"] == row for result in results)]
    if not shown:
        raise ValueError(
            f"No result is of the rows {list(rows)}; there are {sorted({r.config['row'] for r in results})}."
        )
    panels = [
        Panel([curve(row, place, first) for place, row in enumerate(shown)], "tasks learned", label, y_range=(-3, 103))
        for first, label in ((False, "accuracy on tasks so far, %"), (True, "accuracy on the first task, %"))
    ]
    return chart(panels, height=4.2)


def _rows(result: EvalResult) -> list[list[float]]:
    return [[math.nan if value is None else value for value in row] for row in result.details["matrix"]]


def matrix_chart(matrices: Mapping[str, Sequence[Sequence[float | None]]], *, cell: int = 22) -> str:
    """Heat maps of R side by side as one `<svg>` element: a row per task learned, a column per task tested, percent.

    Args:
        matrices: R by title, larger is better, between 0 and 1; NaN or None where nothing was measured.
        cell: size of a cell in points.

    Raises:
        ValueError: no matrix, or a value outside [0, 1], such as minus bits.
    """
    if not matrices:
        raise ValueError("There is no matrix to show; give at least one by its title.")
    gap, top = 24, 30
    parts, left = [], 40
    for title, matrix in matrices.items():
        wrong = [value for row in matrix for value in row if value is not None and (value < 0.0 or value > 1.0)]
        if wrong:
            raise ValueError(
                f"The matrix {title!r} has the value {wrong[0]}; accuracies in [0, 1] can be shown as percent, minus "
                "bits per target (score='bits') cannot: use `table`."
            )
        parts.append(f'<text x="{left}" y="16" font-weight="bold">{html.escape(title)}</text>')
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                parts.append(_cell(value, left + j * cell, top + i * cell, cell, outlined=i == j))
        left += max(len(matrix) * cell, 7 * len(title)) + gap
    height = top + max(len(matrix) for matrix in matrices.values()) * cell + 24
    middle = top + (height - top - 24) / 2
    parts.append(
        f'<text x="14" y="{middle}" transform="rotate(-90 14 {middle})" text-anchor="middle">after task</text>'
    )
    parts.append(f'<text x="40" y="{height - 8}">accuracy on task, %</text>')
    return (
        f'<svg viewBox="0 0 {left} {height}" role="img" xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" '
        f'font-size="11" fill="currentColor">{"".join(parts)}</svg>'
    )


def _cell(value: float | None, x: float, y: float, size: int, *, outlined: bool) -> str:
    if value is None or math.isnan(value):
        return f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="none" stroke="{GREY}" stroke-width="0.3"/>'
    share = min(max(value, 0.0), 1.0)
    border = f' stroke="{ORANGE}" stroke-width="1.2"' if outlined else ""
    ink = "#ffffff" if share > 0.55 else "currentColor"
    return (
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{BLUE}" fill-opacity="{share:.3f}"{border}/>'
        f'<text x="{x + size / 2}" y="{y + size / 2 + 3.5}" text-anchor="middle" font-size="9" fill="{ink}">'
        f"{100 * value:.0f}</text>"
    )
