"""Tables and curves of benchmarks/optimizers.py, from its records alone.

    python benchmarks/optimizer_report.py runs/optimizers docs/results/optimizers

writes docs/results/optimizers.jsonl (all records), docs/results/optimizers.svg, and prints the tables.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import common
from common import Record, Records, save_chart
from nestlearn.evals.report.plots import BLUE, GREEN, GREY, ORANGE, Line, Panel

TUNED = 100
"""The seed on which rates are chosen; it is in no table."""

MEASURES = {
    "vit": "held-out loss",
    "language": "held-out bits per token",
    "small-language": "held-out bits per token",
    "permuted": "errors in all tasks, %",
}
DRAWN = {"adamw": GREY, "muon": BLUE, "m3": ORANGE, "m3, no slow memory, damping 0": GREEN}

FIRST = ("adamw", "muon", "m3")
"""First in the tables."""


def final(record: Record) -> float:
    """The task's measure at the end; infinite for a run that diverged."""
    return float("inf") if record["diverged"] else record["curve"][-1][MEASURES[record["task"]]]


def chosen(records: Sequence[Record], name: str) -> float:
    """The best rate on the seed of the choice."""
    tried = [record for record in records if record["optimizer"] == name and record["seed"] == TUNED]
    return min(tried, key=final)["lr"] if tried else float("nan")


def finished(records: Sequence[Record], name: str) -> dict[int, list[Record]]:
    """Runs at the chosen rate, other seeds, by their number of steps, most first."""
    rate = chosen(records, name)
    runs = [r for r in records if r["optimizer"] == name and r["lr"] == rate and r["seed"] != TUNED]
    by_steps: dict[int, list[Record]] = {}
    for record in sorted(runs, key=lambda r: (-r["steps"], r["seed"])):
        by_steps.setdefault(record["steps"], []).append(record)
    return by_steps


def cell(values: Sequence[float]) -> str:
    """Mean and standard deviation, with three digits of the mean."""
    mean = statistics.mean(values)
    digits = 3 if mean < 10 else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}" if mean >= 0.01 else f"{mean:.1e}"


def table(records: Sequence[Record]) -> str:
    """One line per optimizer: measures at equal steps and at equal time, and what a step costs."""
    names = [name for name in dict.fromkeys([*FIRST, *(r["optimizer"] for r in records)]) if finished(records, name)]
    measure = MEASURES[records[0]["task"]]
    steps = max(finished(records, "adamw"))
    seconds = statistics.mean(r["cpu_seconds"] for r in finished(records, "adamw")[steps])
    some = finished(records, "adamw")[steps][0]["curve"][-1]
    others = [key for key in some if key not in ("step", "seconds", measure)]
    head = ["optimizer", "rate", "seeds", measure, *others, "the first at equal time", "time", "in the optimizer"]
    rows = []
    for name in names:
        runs = finished(records, name)
        full, rate = runs.get(steps, []), f"{chosen(records, name):g}"
        if not full or any(record["diverged"] for record in full):
            rows.append([name, rate, str(len(full)), "diverged", *[""] * (len(head) - 4)])
            continue
        ends = [record["curve"][-1] for record in full]
        own = statistics.mean(record["cpu_seconds"] for record in full)
        fewer = next((some for some in runs if some < steps), None)
        timed = f"{cell([final(r) for r in runs[fewer]])} ({fewer} steps)" if fewer else ""
        timed = timed or (cell([final(r) for r in full]) if own <= 1.02 * seconds else "")
        share = statistics.mean(r["optimizer_cpu_seconds"] / r["cpu_seconds"] for r in full)
        measured = [cell([end[key] for end in ends]) for key in (measure, *others)]
        rows.append([name, rate, str(len(full)), *measured, timed, f"{own / seconds:.2f}", f"{100 * share:.0f} %"])
    return common.table(head, rows)


def panel(records: Sequence[Record], x: str) -> Panel:
    """Mean curves of the measure, by step or by seconds of a core."""
    measure = MEASURES[records[0]["task"]]
    lines = []
    for name, color in DRAWN.items():
        if not any(r["optimizer"] == name and r["seed"] != TUNED for r in records):
            continue
        runs = next(iter(finished(records, name).values()))
        curves = [record["curve"] for record in runs if not record["diverged"]]
        points = list(zip(*curves, strict=True))
        means = {key: [statistics.mean(p[key] for p in point) for point in points] for key in (x, measure)}
        lines.append(Line(name, means[x], means[measure], color))
    logarithmic = records[0]["task"] == "vit"
    label = {"step": "steps", "seconds": "seconds of one core"}[x]
    return Panel(lines, f"{records[0]['task']}: {label}", measure, y_log=logarithmic)


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables, draw the curves, and copy the records."""
    made = common.parser(__doc__)
    made.add_argument("folder", type=Path, help="--out of benchmarks/optimizers.py")
    made.add_argument("target", type=Path, help="where to write, without suffix")
    options = common.parse(made, words)
    tasks = {task: Records(options.folder / task / "results.jsonl").all for task in MEASURES}
    # Without runs of AdamW there is nothing to compare with.
    tasks = {task: records for task, records in tasks.items() if finished(records, "adamw")}
    for task, records in tasks.items():
        print(f"{task}\n\n{table(records)}\n")
    shown = [
        panel(records, x) for task, records in tasks.items() if task in ("vit", "language") for x in ("step", "seconds")
    ]
    save_chart(options.target.with_suffix(".svg"), shown, width=3.6 * len(shown))
    lines = [json.dumps(record) + "\n" for records in tasks.values() for record in records]
    options.target.with_suffix(".jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
