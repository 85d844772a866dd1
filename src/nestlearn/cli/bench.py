"""`nestlearn bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nestlearn.cli.common import Verbose, command_line, plain_console, print_error, split_words
from nestlearn.fields import MAX_SEED

HELP = """Train mixers side by side on synthetic tasks and write results.jsonl, table.md and report.html.

All models of a task have the same number of parameters (by the width of their feed-forward network), the same seeds,
batches and evaluation sequences. The same command continues an interrupted run; finished cells are not repeated.

Suites: formal, recall, recall-24, recall-rewritten, mad, tracking, niah, babilong, clevr, babi
(with --data, the folder of its files), quick. Mixers: hope, hope-static,
hope-normalized, hope-static-normalized, attention, sliding_attention, transformer (attention without convolution),
deltanet-negative, gated_deltanet-negative and every memory of the catalog; fields can be changed:
hope:adaptive=k+v:chunk_size=8.

[bold]Examples[/bold]

  nestlearn bench quick --out runs/quick

  nestlearn bench formal --mixers hope-normalized,deltanet,attention --seeds 3 --budget 10m --out runs/formal

  nestlearn bench recall --steps 500 --seeds 3 --out runs/recall
"""


def run(
    suite: Annotated[str, typer.Argument(help="One of the suites above.")],
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, table.md and report.html.")],
    mixers: Annotated[str | None, typer.Option(help="Mixers, joined by commas; default: the suite's own.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=MAX_SEED, help="Seeds per mixer and task.")] = 1,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks of the suite, joined by commas.")] = None,
    first_seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="The first seed; search settings on other seeds than you report.")
    ] = 0,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the files that a suite reads: for babi, qa1_train.txt and so on.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Wall-clock time for the whole run: 90s, 10m, 1h.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates per model; repeatable, unlike a budget.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate of every model, to search for the best; default: the suite's.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core if not given.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads per process.")] = 1,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.")] = "cpu",
    retry_unconverged: Annotated[
        bool, typer.Option("--retry-unconverged", help="Repeat cells that an earlier budget stopped.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Run the cells of the suite that are missing, then print the table."""
    from nestlearn.evals.bench import BenchOptions, find_suite, parse_duration, run_bench

    command = command_line(
        "bench", suite, mixers=mixers, seeds=seeds, first_seed=first_seed or None, tasks=tasks, data=data,
        budget=budget, steps=steps, learning_rate=learning_rate, workers=workers,
        threads=threads if threads > 1 else None, device=device if device != "cpu" else None, out=out,
    )  # fmt: skip
    chosen = find_suite(suite)
    options = BenchOptions(
        out=out,
        mixers=None if mixers is None else split_words(mixers),
        seeds=seeds,
        tasks=None if tasks is None else split_words(tasks),
        steps=steps,
        learning_rate=learning_rate,
        first_seed=first_seed,
        data=None if data is None else str(data),
        budget=None if budget is None else parse_duration(budget),
        workers=workers,
        threads=threads,
        device=device,
        retry_unconverged=retry_unconverged,
        command=command,
    )
    console = plain_console()
    try:
        outcome = run_bench(chosen, options, Console())
    except KeyboardInterrupt:
        print_error(f"finished cells are in {out}. Continue with: {command}", title="Stopped")
        raise typer.Exit(130) from None
    console.print(outcome.table.read_text(encoding="utf-8"))
    if outcome.left_out:
        console.print(f"The budget left out {len(outcome.left_out)} cells; the same command runs them.")
    console.print(f"Report: {outcome.report}")
