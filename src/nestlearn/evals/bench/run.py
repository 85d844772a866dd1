"""A benchmark run: train the missing cells, then write the table and the report."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from nestlearn.evals.bench.cells import Cell, plan
from nestlearn.evals.bench.pool import WorkerSettings, run_jobs
from nestlearn.evals.bench.store import ResultStore
from nestlearn.evals.bench.suites import Suite
from nestlearn.evals.bench.tables import write_table
from nestlearn.evals.bench.training import CellProgress
from nestlearn.evals.report import bench as html_report
from nestlearn.evals.result import EvalResult

# Part of a cell's share of the budget that is for training; evaluation and the start of workers take the rest.
_TRAINING_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to run, and where.

    Attributes:
        mixers, seeds, tasks, steps, learning_rate, first_seed, data: see `nestlearn.evals.bench.plan`.
        out: folder of results.jsonl, table.md and report.html.
        budget: seconds for the whole run, divided over the missing cells; None for no limit.
        workers: processes; None for one per core.
        threads: threads per worker.
        device: where to train.
        retry_unconverged: repeat cells that an earlier budget stopped.
        command: the command that repeats the run, for results and report.
    """

    out: Path
    mixers: list[str] | None = None
    seeds: int = 1
    tasks: list[str] | None = None
    steps: int | None = None
    learning_rate: float | None = None
    first_seed: int = 0
    data: str | None = None
    budget: float | None = None
    workers: int | None = None
    threads: int = 1
    device: str = "cpu"
    retry_unconverged: bool = False
    command: str = ""


@dataclass(frozen=True)
class BenchOutcome:
    """The results of a run's recipes, the cells that the budget left out, and the files written."""

    results: list[EvalResult]
    left_out: list[Cell]
    table: Path
    report: Path


def run_bench(suite: Suite, options: BenchOptions, console: Console | None = None) -> BenchOutcome:
    """Train and evaluate every mixer on every task from every seed, except cells already in the folder.

    Results are written one by one. The table and the report are written at the end, even of an interrupted run.

    Raises:
        ValueError: an unknown name, or a folder with results of another version.
        CellError: a cell failed; finished ones are kept.

    Example:
        >>> from nestlearn.evals.bench import find_suite
        >>> options = BenchOptions(out=Path("runs/q"), mixers=["deltanet"], tasks=["mqar"], workers=1)
        >>> outcome = run_bench(find_suite("quick"), options, Console(quiet=True))
        >>> outcome.results[0].task
        'mqar'
    """
    console = console or Console()
    cells = plan(
        suite,
        options.mixers,
        options.seeds,
        options.tasks,
        options.steps,
        options.learning_rate,
        options.first_seed,
        options.data,
    )
    store = ResultStore(options.out)
    store.of(cells)
    finished = store.finished(options.retry_unconverged)
    missing = [cell for cell in cells if cell.key not in finished]
    done = len(cells) - len(missing)
    console.print(f"{suite.title}: {len(missing)} cells to run" + (f", {done} already in {store.path}" if done else ""))
    try:
        _run(missing, store, options, console)
    finally:
        results = store.of(cells)
        table = write_table(options.out / "table.md", suite, cells, results, options.command)
        report = html_report.write_bench_report(options.out / "report.html", suite, cells, results, options.command)
    finished = store.finished()
    return BenchOutcome(results, [cell for cell in cells if cell.key not in finished], table, report)


def _run(missing: list[Cell], store: ResultStore, options: BenchOptions, console: Console) -> None:
    """Run the cells that are missing and store each result."""
    if not missing:
        return
    workers = min(options.workers or max(1, (os.cpu_count() or 1) // options.threads), len(missing))
    settings = WorkerSettings(options.threads, options.device, options.command)
    with _Display(console, missing, workers) as display:
        limit = share_out(options.budget, workers)
        for result in run_jobs(missing, limit, workers, settings, display.progress):
            store.append(result)
            display.done(result)


def share_out(
    budget: float | None, workers: int, clock: Callable[[], float] = time.monotonic
) -> Callable[[int], float | None]:
    """A function from the number of cells not started yet to the seconds for the training of the next one."""
    if budget is None:
        return lambda _: None
    end = clock() + budget
    return lambda cells: _TRAINING_SHARE * (end - clock()) / math.ceil(cells / workers)


def parse_duration(text: str) -> float:
    """Seconds from ``"90"``, ``"90s"``, ``"10m"`` or ``"1.5h"``.

    Raises:
        ValueError: anything else, or less than a second.

    Example:
        >>> parse_duration("10m")
        600.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds < 1:
        raise ValueError(f"budget {text!r} is no time of at least a second; write for example 90s, 10m or 1.5h.")
    return seconds


def _describe(result: EvalResult) -> str:
    """One line about a finished cell."""
    scores = result.details["scores"]
    splits = ", ".join(f"{name} {100 * score['value']:.1f} %" for name, score in scores.items())
    steps, seconds = result.details["steps"], result.seconds
    return (
        f"{result.task}, {result.config['mixer']}, seed {result.seed}: {splits} "
        f"({result.details['status']}, {steps} steps, {seconds:.0f} s)"
    )


class _Display:
    """A line per finished cell and, on a terminal, a bar for the whole and one per running cell."""

    def __init__(self, console: Console, cells: list[Cell], workers: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._all = self._bars.add_task(f"cells, {workers} at a time", total=len(cells))
        self._running: dict[str, TaskID] = {}

    def __enter__(self) -> _Display:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def progress(self, cell: Cell, progress: CellProgress) -> None:
        """Show how far a cell is."""
        if cell.key not in self._running:
            self._running[cell.key] = self._bars.add_task("", total=cell.training.steps)
        text = f"{cell.task.name}, {cell.mixer}, seed {cell.seed}: {100 * progress.score:.1f} %"
        self._bars.update(self._running[cell.key], description=text, completed=progress.step)

    def done(self, result: EvalResult) -> None:
        """Show a finished cell."""
        bar = self._running.pop(result.details["key"], None)
        if bar is not None:
            self._bars.remove_task(bar)
        self._bars.advance(self._all)
        self._bars.console.print(_describe(result), markup=False, highlight=False, soft_wrap=True)
