"""Copies the results of a benchmark to docs/results and draws accuracy by length, or by what else the splits vary.

    python benchmarks/result_plot.py runs/formal docs/results/formal-languages

writes docs/results/formal-languages.jsonl and docs/results/formal-languages.svg.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from nestlearn.evals.bench.tables import mean_of
from nestlearn.evals.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, Line, Panel, chart

_COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#c2417a", "#9a7b1c", "#2aa3b8", GREY)


def points(run: dict[str, Any]) -> list[tuple[float, float]]:
    """(length or number of pairs, accuracy in percent) of one run."""
    if run["details"]["by_length"] and run["task"] != "niah_single_1":
        return [(point["length"], 100 * point["value"]) for point in run["details"]["by_length"]]
    scores = run["details"]["scores"].items()
    return [(float(re.findall(r"\d+", name)[-1]), 100 * score["value"]) for name, score in scores]


def panel(runs: list[dict[str, Any]], task: str, colors: dict[str, str]) -> Panel:
    """Mean over seeds by mixer; the band is one standard error."""
    lines = []
    for mixer, color in colors.items():
        seeds = [points(run) for run in runs if (run["task"], run["config"]["mixer"]) == (task, mixer)]
        if seeds:
            means = [mean_of([values[place][1] for values in seeds]) for place in range(len(seeds[0]))]
            y, band = zip(*means, strict=True)
            lines.append(Line(mixer, [x for x, _ in seeds[0]], y, color, band=band))
    axis = "pairs" if task == "mqar" else "length"
    return Panel(lines, f"{task}: {axis}", "accuracy, %", x_log=task == "niah_single_1", y_range=(-3, 103))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="The --out folder of nestlearn bench.")
    parser.add_argument("target", type=Path, help="Where to write, without the ending.")
    arguments = parser.parse_args()
    source = arguments.folder / "results.jsonl"
    runs = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    mixers = list(dict.fromkeys(run["config"]["mixer"] for run in runs))
    colors = {mixer: _COLORS[place % len(_COLORS)] for place, mixer in enumerate(mixers)}
    tasks = dict.fromkeys(run["task"] for run in runs)
    svg = chart([panel(runs, task, colors) for task in tasks], width=3.2 * len(tasks) + 2.0, height=3.4)
    # A file of its own is shown on whatever the reader's page has: give it paper.
    svg = svg.replace("<svg ", '<svg style="background:white" ', 1)
    arguments.target.parent.mkdir(parents=True, exist_ok=True)
    arguments.target.with_suffix(".svg").write_text(svg, encoding="utf-8")
    shutil.copyfile(source, arguments.target.with_suffix(".jsonl"))


if __name__ == "__main__":
    main()
