"""Copies the results of a benchmark to docs/results and draws accuracy by length, or by the number of pairs.

    python benchmarks/result_plot.py runs/formal docs/results/formal-languages

writes docs/results/formal-languages.jsonl and docs/results/formal-languages.svg.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Records, parse, parser, save_chart
from nestlearn.evals.bench.tables import mean_of
from nestlearn.evals.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, Line, Panel

_COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#c2417a", "#9a7b1c", "#2aa3b8", GREY, "#111111")


def points(run: dict[str, Any]) -> list[tuple[float, float]]:
    """(length or number of pairs, accuracy in percent) of one run."""
    scores, ranges = run["details"]["scores"], run["details"]["by_length"]
    # As many ranges as splits: every split has one length, which its name says exactly.
    if len(ranges) > len(scores):
        return [(point["length"], 100 * point["value"]) for point in ranges]
    return [(float(re.findall(r"\d+", name)[-1]), 100 * score["value"]) for name, score in scores.items()]


def label(run: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """The mixer, and how it was trained if the task has several ways of training it."""
    mixer, training = run["config"]["mixer"], run["config"]["training"]
    same = [other for other in runs if (other["task"], other["config"]["mixer"]) == (run["task"], mixer)]
    if len({other["details"]["recipe"] for other in same}) == 1:
        return mixer
    return f"{mixer}, {training['steps']} steps at {training['learning_rate']:g}"


def panel(runs: list[dict[str, Any]], task: str, colors: dict[str, str]) -> Panel:
    """Mean over seeds by mixer and training; the band is one standard error."""
    lines = []
    for name, color in colors.items():
        seeds = [points(run) for run in runs if run["task"] == task and label(run, runs) == name]
        if seeds:
            means = [mean_of([values[place][1] for values in seeds]) for place in range(len(seeds[0]))]
            y, band = zip(*means, strict=True)
            lines.append(Line(name, [x for x, _ in seeds[0]], y, color, band=band))
    axis = "pairs" if task == "mqar" else "length"
    lowest = min(y for line in lines for y in line.y if y is not None)
    y_range = (-3.0, 103.0) if lowest < 50 else (5 * (lowest // 5 - 1), 100.5)
    return Panel(lines, f"{task}: {axis}", "accuracy, %", x_log=task == "niah_single_1", y_range=y_range)


def main(words: Sequence[str] | None = None) -> None:
    """Copy the records and draw the chart."""
    made = parser(__doc__)
    made.add_argument("folder", type=Path, help="The --out folder of nestlearn bench.")
    made.add_argument("target", type=Path, help="Where to write, without the ending.")
    options = parse(made, words)
    runs = Records(options.folder / "results.jsonl").all
    names = list(dict.fromkeys(label(run, runs) for run in runs))
    colors = {name: _COLORS[place % len(_COLORS)] for place, name in enumerate(names)}
    tasks = dict.fromkeys(run["task"] for run in runs)
    legend = 0.07 * sum(map(len, names)) + 0.5 * len(names)
    width = max(3.2 * len(tasks) + 2.0, min(9.0, legend))
    options.target.parent.mkdir(parents=True, exist_ok=True)
    panels = [panel(runs, task, colors) for task in tasks]
    save_chart(options.target.with_suffix(".svg"), panels, width=width, height=3.4)
    shutil.copyfile(options.folder / "results.jsonl", options.target.with_suffix(".jsonl"))


if __name__ == "__main__":
    main()
