"""The report of `nestlearn bench`: tables and charts."""

from __future__ import annotations

from html import escape
from pathlib import Path

from nestlearn.evals.bench.cells import Cell
from nestlearn.evals.bench.suites import Suite
from nestlearn.evals.bench.tables import (
    Summary,
    cost_table,
    mean_of,
    measured_table,
    mixers_of,
    notes,
    published_table,
    summaries,
    tasks_of,
)
from nestlearn.evals.report import page
from nestlearn.evals.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, Line, Panel, chart
from nestlearn.evals.result import EvalResult
from nestlearn.evals.tasks import Task

_COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#c2417a", "#9a7b1c", "#2aa3b8", GREY)
_STYLES = ("-", "--", ":")


def write_bench_report(path: Path, suite: Suite, cells: list[Cell], results: list[EvalResult], command: str) -> Path:
    """Write the report, under a temporary name first, and return its path."""
    mixers, tasks, seeds = mixers_of(cells, results), tasks_of(cells), len({result.seed for result in results})
    lead = (
        f"{len(mixers)} mixers, {len(tasks)} tasks, {seeds} {'seed' if seeds == 1 else 'seeds'}: {len(results)} "
        "models, trained from the same seeds on the same batches and evaluated on the same sequences."
    )
    found, looks = summaries(cells, results), _looks(mixers)
    sections = [
        page.heading("Measured accuracy"),
        page.table(*measured_table(cells, results)),
        *(page.paragraph(escape(line), "note") for line in notes(cells, results)),
        *(part for task in tasks for part in _task(task, found, results, looks)),
        *_published(cells),
        page.heading("Models and cost"),
        page.table(*cost_table(cells, results)),
    ]
    return page.write_page(path, suite.title, lead, sections, commands=[command] if command else [])


def _looks(mixers: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and line style of every mixer."""
    return {
        mixer: (_COLORS[place % len(_COLORS)], _STYLES[place // len(_COLORS) % len(_STYLES)])
        for place, mixer in enumerate(mixers)
    }


def _task(
    task: Task,
    found: dict[tuple[str, str], Summary],
    results: list[EvalResult],
    looks: dict[str, tuple[str, str]],
) -> list[str]:
    """Heading and charts of one task."""
    by_mixer = {mixer: summary for (name, mixer), summary in found.items() if name == task.name}
    if not by_mixer:
        return []
    panels, captions = [], []
    splits = list(task.splits)
    axis = splits[-1].axis
    if axis and len(splits) > 1:
        panels.append(_by_axis(task, by_mixer, results, looks))
        captions.append(f"Left: accuracy by {escape(axis)}, the band is one standard error over seeds.")
    panels.append(_learning(task, by_mixer, results, looks))
    captions.append(
        f"{'Right: accuracy' if captions else 'Accuracy'} on {escape(splits[-1].name)} during training (on a part "
        "of the sequences), one line per seed. A line ends when the model was good enough to stop."
    )
    width = 9.0 if len(panels) > 1 else 6.0
    return [page.heading(task.name), page.figure(chart(panels, width=width, height=3.6), " ".join(captions))]


def _by_axis(
    task: Task, by_mixer: dict[str, Summary], results: list[EvalResult], looks: dict[str, tuple[str, str]]
) -> Panel:
    """Accuracy by length (over ranges of lengths), or by whatever the splits vary."""
    lines, marks = [], []
    for mixer, summary in by_mixer.items():
        runs = [run for run in results if (run.task, run.config["mixer"]) == (task.name, mixer)]
        ranges = runs[0].details["by_length"]
        if ranges:
            x = [point["length"] for point in ranges]
            means = [mean_of([100 * run.details["by_length"][i]["value"] for run in runs]) for i in range(len(x))]
            marks = [(max(point["length"] for point in ranges if point["trained"]), "trained up to here")]
        else:
            x = [split.value for split in task.splits]
            means = [(mean.value, mean.stderr) for mean in (summary.scores[split.name] for split in task.splits)]
        color, style = looks[mixer]
        y, band = zip(*means, strict=True)
        lines.append(Line(mixer, x, y, color, style=style, band=band))
    return Panel(lines, list(task.splits)[-1].axis, "accuracy, %", y_range=(-3, 103), marks=marks)


def _learning(
    task: Task, by_mixer: dict[str, Summary], results: list[EvalResult], looks: dict[str, tuple[str, str]]
) -> Panel:
    lines = []
    headline = list(task.splits)[-1].name
    for mixer in by_mixer:
        color, style = looks[mixer]
        for run in results:
            if (run.task, run.config["mixer"]) == (task.name, mixer):
                curve = run.details["curve"]
                x, y = [point["step"] for point in curve], [100 * point[headline] for point in curve]
                lines.append(Line(mixer, x, y, color, style=style, width=1.4, alpha=0.8))
    return Panel(lines, "training steps", f"accuracy on {headline}, %", y_range=(-3, 103))


def _published(cells: list[Cell]) -> list[str]:
    header, rows, sources = published_table(cells)
    if not rows:
        return []
    return [
        page.heading("Published numbers, not measured here"),
        page.paragraph("Other sizes, data and training than above: shown for orientation only.", "note"),
        page.table(header, rows),
        *(page.paragraph(escape(source), "note") for source in sources),
    ]
