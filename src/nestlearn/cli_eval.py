"""`nestlearn eval`: its options, and its results as tables."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nestlearn.evals.result import EvalResult

OWN_TASKS = ("bits_per_byte", "loss_by_position")

HELP = """Measure a saved model; results are printed and saved as JSON.

--tasks names any of nestlearn's own tasks, or of the thousands of the lm-evaluation-harness (the extra `eval`):

  bits_per_byte      of held-out documents of --corpus
  loss_by_position   in the context, with inner learning on, off, and with memories exchanged between documents
  all                both
  any other          lambada_openai, piqa, hellaswag, "arc_*", niah_single_1, a task of your own in --include-path, ...

[bold]Examples[/bold]

  nestlearn eval runs/docs --corpus python-docs

  nestlearn eval runs/docs --corpus "text:book.txt" --tasks loss_by_position --length 4096

  nestlearn eval runs/docs --tasks lambada_openai,piqa --limit 100

  nestlearn eval runs/docs --tasks niah_single_1 --metadata '{"max_seq_lengths": [1024, 2048]}' --limit 20
"""


def evaluate(
    call: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder with a saved model.")],
    tasks: Annotated[str, typer.Option("--tasks", "--task", help="Names, separated by commas.")] = "all",
    corpus: Annotated[str, typer.Option(help="What to read; its held-out part is used.")] = "python-docs",
    context: Annotated[int, typer.Option(min=2, help="Tokens per piece for bits per byte.")] = 256,
    length: Annotated[int, typer.Option(min=16, help="Positions for the loss by position.")] = 1024,
    documents: Annotated[int, typer.Option(min=2, help="Documents for the loss by position.")] = 64,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Stop bits per byte after this much text.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per harness task; default: all.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples shown first; default: the task's.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task YAML files of your own.")] = None,
    metadata: Annotated[str | None, typer.Option(help="JSON handed to harness tasks that make their data.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests per forward pass of harness tasks.")] = 8,
    max_length: Annotated[int | None, typer.Option(min=2, help="Cut harness requests to this many tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of examples that are made or shown.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON results; default: MODEL/evals.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more, and show tracebacks of errors.")] = False,
) -> None:
    from nestlearn.evals.harness import evaluate_harness, harness_tasks
    from nestlearn.train import load_model, load_tokenizer
    from nestlearn.train.allocator import tune_allocator

    own, others = _split(tasks)
    given = _given(call)
    harness = {"include_path": include_path, "metadata": _metadata(metadata, model)}
    # Unknown names are refused before anything is loaded.
    found = harness_tasks(others, **harness) if others else None
    note = tune_allocator()
    if verbose and note:
        Console(stderr=True).print(f"Allocator: {note}")
    loaded, tokenizer, folder = load_model(model), load_tokenizer(model), out or Path(model) / "evals"
    if own:
        settings = {"context": context, "max_bytes": max_bytes, "length": length, "documents": documents}
        _language(loaded, tokenizer, own, corpus, settings, f"nestlearn eval {model} --corpus {corpus} --task", folder)
    if found:
        options = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size, "max_length": max_length}
        command = shlex.join(["nestlearn", "eval", model, "--tasks", ",".join(others), *given])
        results = evaluate_harness(loaded, tokenizer, found, **options, **harness, seed=seed, command=command)
        _print_harness(results, folder)


def _split(tasks: str) -> tuple[list[str], list[str]]:
    """Names of our own tasks and of the harness's.

    Raises:
        ValueError: no names, or one that is almost one of ours.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--tasks {tasks!r} names no task. Give {', '.join(OWN_TASKS)}, or tasks of the harness.")
    wanted = [own for name in names for own in (OWN_TASKS if name == "all" else [name])]
    for name in wanted:
        close = [] if name in OWN_TASKS else difflib.get_close_matches(name, OWN_TASKS, n=1, cutoff=0.8)
        if close:
            raise ValueError(f"Unknown task {name!r}. Did you mean {close[0]}?")
    return [name for name in wanted if name in OWN_TASKS], [name for name in wanted if name not in OWN_TASKS]


def _metadata(text: str | None, model: str) -> dict[str, Any]:
    """``--metadata`` as a mapping; tasks that count tokens are told where the tokenizer is.

    Raises:
        ValueError: not the JSON of an object.
    """
    example = """for example '{"max_seq_lengths": [1024]}'"""
    try:
        given = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"--metadata {text!r} is not JSON ({error}); {example}.") from error
    if not isinstance(given, dict):
        raise ValueError(f"--metadata {text!r} is no JSON object; {example}.")
    return {"tokenizer": model, **given}


HARNESS_OPTIONS = ("limit", "num_fewshot", "include_path", "metadata", "batch_size", "max_length", "seed")


def _given(call: typer.Context) -> list[str]:
    """The harness's options as they were given, for the command that repeats a result."""
    words: list[str] = []
    for name in HARNESS_OPTIONS:
        source = call.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            words += [f"--{name.replace('_', '-')}", str(call.params[name])]
    return words


def _language(
    model: Any, tokenizer: Any, names: Sequence[str], corpus: str, settings: dict[str, Any], command: str, folder: Path
) -> None:
    """Bits per byte and loss by position on the held-out part of a corpus."""
    from nestlearn.data import load_corpus
    from nestlearn.evals import bits_per_byte, loss_by_position

    held_out = load_corpus(corpus, "validation")
    if "bits_per_byte" in names:
        context, max_bytes = settings["context"], settings["max_bytes"]
        words = f"{command} bits_per_byte --context {context}" + (f" --max-bytes {max_bytes}" if max_bytes else "")
        _report(bits_per_byte(model, tokenizer, held_out, context=context, max_bytes=max_bytes, command=words), folder)
    if "loss_by_position" in names:
        length, documents = settings["length"], settings["documents"]
        words = f"{command} loss_by_position --length {length} --documents {documents}"
        result = loss_by_position(model, tokenizer, held_out, length=length, documents=documents, command=words)
        _report(result, folder)
        _print_curve(result.details)


def _report(result: EvalResult, folder: Path) -> None:
    path = folder / f"{result.task}.json"
    result.save(path)
    error = f" ± {result.stderr:.3f}" if result.stderr is not None else ""
    Console().print(f"{result.metric}: {result.value:.3f}{error} ({result.n} documents, {path})")


def _print_curve(details: dict[str, Any]) -> None:
    table = Table(title="Bits per byte by position")
    table.add_column("positions", justify="right")
    curves = details["bits_per_byte"]
    for name in curves:
        table.add_column(
            {"on": "writes on", "off": "writes off", "shuffled": "memories exchanged"}[name], justify="right"
        )
    for row, (low, high) in enumerate(zip(details["edges"][:-1], details["edges"][1:], strict=True)):
        cells = ["" if curve[row] is None else f"{curve[row]:.3f}" for curve in curves.values()]
        table.add_row(f"{low}-{high}", *cells)
    Console().print(table)


def _print_harness(results: Sequence[EvalResult], folder: Path) -> None:
    """A line per metric; what is saved beside it."""
    table = Table(title="lm-evaluation-harness")
    for name in ("task", "metric", "value", "±", "examples"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for result in results:
        result.save(folder / f"{result.task}.json")
        metrics = result.details["metrics"]
        for metric, value in metrics.items():
            if "_stderr" in metric:
                continue
            error = metrics.get(f"{metric}_stderr")
            shown = "" if error is None or error != error else f"{error:.4f}"
            table.add_row(result.task.removeprefix("lm_eval_"), metric, f"{value:.4f}", shown, str(result.n))
    console = Console()
    console.print(table)
    cut = max((result.config["cut_requests"] for result in results), default=0)
    if cut:
        console.print(
            f"{cut} requests were cut from the left to --max-length {results[0].config['max_length']} tokens."
        )
    console.print(f"Saved in {folder}")
