"""Means over seeds, and the Markdown table: measured numbers first, published ones separately."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from nestlearn.atomic import write_text
from nestlearn.evals.bench.cells import Cell
from nestlearn.evals.bench.suites import Suite
from nestlearn.evals.result import EvalResult
from nestlearn.evals.tasks import Published, Task

UNCONVERGED, DIVERGED = "*", "†"


@dataclass(frozen=True)
class Mean:
    """Accuracy in percent over the seeds of one mixer on one split.

    Attributes:
        value: mean over seeds.
        stderr: standard error over seeds; with one seed, over the sequences of the split.
        seeds: how many.
        mark: ``*`` if the budget stopped one of the runs, ``†`` if one diverged.
    """

    value: float
    stderr: float
    seeds: int
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.stderr:.1f}{self.mark}"


@dataclass(frozen=True)
class Summary:
    """Results of one mixer on one task, over its seeds.

    Attributes:
        scores: per split, in the task's order.
        parameters, state_bytes: of the model; the state of one row after the longest evaluation sequence.
        steps, tokens, seconds: means over seeds.
    """

    task: str
    mixer: str
    scores: dict[str, Mean]
    parameters: int
    state_bytes: int
    steps: float
    tokens: float
    seconds: float


def tasks_of(cells: list[Cell]) -> list[Task]:
    """The different tasks of the cells, in order."""
    return list({cell.task.name: cell.task for cell in cells}.values())


def mixers_of(cells: list[Cell], results: list[EvalResult]) -> list[str]:
    """The mixers of the cells, then others that have results."""
    return list(dict.fromkeys([*(cell.mixer for cell in cells), *(result.config["mixer"] for result in results)]))


def summaries(cells: list[Cell], results: list[EvalResult]) -> dict[tuple[str, str], Summary]:
    """Per (task, mixer); pairs without any result are left out."""
    found = {}
    for task in tasks_of(cells):
        for mixer in mixers_of(cells, results):
            runs = [run for run in results if (run.task, run.config["mixer"]) == (task.name, mixer)]
            if runs:
                found[task.name, mixer] = _summary(task, mixer, runs)
    return found


def _summary(task: Task, mixer: str, runs: list[EvalResult]) -> Summary:
    def mean(key: str) -> float:
        return statistics.fmean(run.details[key] for run in runs)

    return Summary(
        task=task.name,
        mixer=mixer,
        scores={split.name: _mean(runs, split.name) for split in task.splits},
        parameters=runs[0].details["parameters"],
        state_bytes=runs[0].details["state_bytes"],
        steps=mean("steps"),
        tokens=mean("tokens"),
        seconds=mean("train_seconds"),
    )


def _mean(runs: list[EvalResult], split: str) -> Mean:
    values = [100 * run.details["scores"][split]["value"] for run in runs]
    value, stderr = mean_of(values)
    if len(runs) == 1:
        stderr = 100 * runs[0].details["scores"][split]["stderr"]
    statuses = {run.details["status"] for run in runs}
    mark = (UNCONVERGED if "unconverged" in statuses else "") + (DIVERGED if "diverged" in statuses else "")
    return Mean(value, stderr, len(runs), mark)


def mean_of(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; of one value the error is 0."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def measured_table(cells: list[Cell], results: list[EvalResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the measured accuracies: a row per mixer, a column per task, its splits joined by " / "."""
    found = summaries(cells, results)
    header = ["mixer", *(_column(task) for task in tasks_of(cells))]
    rows = []
    for mixer in mixers_of(cells, results):
        row = [mixer]
        for task in tasks_of(cells):
            summary = found.get((task.name, mixer))
            row.append(" / ".join(map(str, summary.scores.values())) if summary else "not run")
        rows.append(row)
    return header, rows


def _column(task: Task) -> str:
    return f"{task.name} ({' / '.join(split.name for split in task.splits)})"


def cost_table(cells: list[Cell], results: list[EvalResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the size of every model and the cost of its training."""
    header = ["task", "mixer", "seeds", "parameters", "state, bytes per row", "steps", "tokens", "seconds"]
    rows = []
    for (task, mixer), summary in summaries(cells, results).items():
        seeds = next(iter(summary.scores.values())).seeds
        rows.append([
            task, mixer, str(seeds), f"{summary.parameters:,}", f"{summary.state_bytes:,}", f"{summary.steps:,.0f}",
            f"{summary.tokens:,.0f}", f"{summary.seconds:.0f}",
        ])  # fmt: skip
    return header, rows


def published_table(cells: list[Cell]) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows and sources of published numbers for these tasks; no rows where there are none."""
    tasks = [task for task in tasks_of(cells) if task.published]
    numbers = [number for task in tasks for number in task.published]
    rows = [
        [model, *(_published_cell(task.published, model, task) for task in tasks)]
        for model in dict.fromkeys(number.model for number in numbers)
    ]
    header = ["published model", *(f"{task.name} ({' / '.join(_splits(task))})" for task in tasks)]
    return header, rows, list(dict.fromkeys(number.source for number in numbers))


def _splits(task: Task) -> list[str]:
    return list(dict.fromkeys(number.split for number in task.published))


def _published_cell(numbers: tuple[Published, ...], model: str, task: Task) -> str:
    values = {number.split: number.value for number in numbers if number.model == model}
    return " / ".join(f"{values[split]:.1f}" if split in values else "-" for split in _splits(task))


def notes(cells: list[Cell], results: list[EvalResult]) -> list[str]:
    """Notes that a reader needs to judge the numbers."""
    metrics = {task.name: task.metric for task in tasks_of(cells)}
    lines = [f"Accuracy in percent ({metric}) on {', '.join(name for name in metrics if metrics[name] == metric)}."
             for metric in dict.fromkeys(metrics.values())]  # fmt: skip
    lines.append("± is the standard error over seeds; with one seed, over the sequences of the split.")
    marks = {mark for summary in summaries(cells, results).values() for m in summary.scores.values() for mark in m.mark}
    if UNCONVERGED in marks:
        lines.append(f"{UNCONVERGED} a run was stopped by the time budget before it had done all its steps.")
    if DIVERGED in marks:
        lines.append(f"{DIVERGED} the loss of a run stopped being a number.")
    finished = {result.details["key"] for result in results}
    missing = [cell for cell in cells if cell.key not in finished]
    if missing:
        lines.append(f"{len(missing)} of {len(cells)} runs are missing: " + ", ".join(
            f"{cell.task.name} {cell.mixer} seed {cell.seed}" for cell in missing) + ".")  # fmt: skip
    lines.append(parameter_note(cells, results))
    return lines


def parameter_note(cells: list[Cell], results: list[EvalResult]) -> str:
    """How much the models of each task differ in parameters."""
    found = summaries(cells, results)
    spread = {}
    for task in tasks_of(cells):
        counts = [summary.parameters for (name, _), summary in found.items() if name == task.name]
        if counts:
            spread[task.name] = 100 * (max(counts) - min(counts)) / min(counts)
    apart = {name: value for name, value in spread.items() if value > 5}
    if apart:
        return "Parameter counts differ by more than 5 % on " + ", ".join(
            f"{name} ({value:.0f} %)" for name, value in apart.items()) + "."  # fmt: skip
    return "Parameter counts of the models of a task are within 5 % (by the width of the feed-forward network)."


def markdown(header: list[str], rows: list[list[str]], numeric_from: int = 1) -> str:
    """A Markdown table; columns from ``numeric_from`` on are aligned right."""
    rule = ["---" if column < numeric_from else "--:" for column in range(len(header))]
    cells = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in [header, rule, *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


def write_table(path: Path, suite: Suite, cells: list[Cell], results: list[EvalResult], command: str) -> Path:
    """Write table.md, under a temporary name first, and return its path."""
    parts = [f"# {suite.title}\n", "## Measured\n", markdown(*measured_table(cells, results))]
    parts.append("\n".join(f"- {line}" for line in notes(cells, results)).replace("*", "\\*") + "\n")
    header, rows, sources = published_table(cells)
    if rows:
        parts += ["## Published, not measured here\n", markdown(header, rows)]
        parts.append("".join(f"- {source}\n" for source in sources))
    parts += ["## Models and cost\n", markdown(*cost_table(cells, results), numeric_from=2)]
    if command:
        parts.append(f"Repeat with:\n\n```bash\n{command}\n```\n")
    write_text(path, "\n".join(parts))
    return path
