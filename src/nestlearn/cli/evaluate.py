"""`nestlearn eval`: options, tasks by name, and results as tables."""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nestlearn.cli.common import (
    Device,
    Dtype,
    ModelName,
    Progress,
    Seed,
    SessionFile,
    Verbose,
    command_line,
    hide_progress_bars,
    plain_console,
    print_error,
    require_file,
    split_words,
    tune,
)

if TYPE_CHECKING:  # the import takes seconds, and --help does not need it
    from nestlearn.evals.result import EvalResult

TEXT_TASKS = ("bits_per_byte", "loss_by_position")
NIAH, BABILONG = "local_niah_", "local_babilong_"
MODEL_OPTIONS = ("session", "dtype", "device")
COMMON_OPTIONS = ("batch_size", "seed", *MODEL_OPTIONS)
HARNESS_OPTIONS = ("limit", "num_fewshot", "include_path", "metadata", "max_length", *COMMON_OPTIONS)
LOCAL_OPTIONS = ("lengths", "samples", "book", "babi", "depth", *COMMON_OPTIONS)
PUBLISHED_MODELS = ("Transformer", "Titans", "Hope")
CURVES = {"on": "writes on", "off": "writes off", "shuffled": "memories exchanged"}

HELP = """Measure any causal language model; results are printed and saved as JSON.

With --session a stacked model is measured with what it has learned.

--tasks names any of nestlearn's own tasks, or of the thousands of the lm-evaluation-harness (the extra `eval`):

  bits_per_byte      of held-out documents of --corpus

  loss_by_position   in the context, with inner learning on, off, and with memories exchanged between documents

  all                both

  local_niah_...     RULER's needles in a haystack, made here: single_1, single_2, single_3, multikey_1, multikey_2,
                     multikey_3, multivalue, multiquery; all but single_1, multikey_2 and multikey_3 need a --book

  local_babilong_... qa1 to qa5 from --babi files and a --book

  any other          lambada_openai, piqa, hellaswag, "arc_*", niah_single_1, a task of your own in --include-path, ...

[bold]Examples[/bold]

  nestlearn eval runs/docs --corpus python-docs

  nestlearn eval runs/stacked --session runs/learned/session.safetensors --corpus "text:notes/"

  nestlearn eval runs/docs --corpus "text:book.txt" --tasks loss_by_position --length 4096

  nestlearn eval runs/docs --tasks "local_niah_*" --book book.txt --lengths 1024,4096 --samples 50

  nestlearn eval runs/docs --tasks local_babilong_qa1 --babi tasks_1-20_v1-2/en --book book.txt --lengths 0,1024

  nestlearn eval runs/docs --tasks lambada_openai,piqa --limit 100

  nestlearn eval runs/docs --tasks niah_single_1 --metadata '{"max_seq_lengths": [1024, 2048]}' --limit 20
"""


def run(
    call: typer.Context,
    model: ModelName,
    tasks: Annotated[str, typer.Option("--tasks", "--task", help="Names, separated by commas.")] = "all",
    corpus: Annotated[str, typer.Option(help="What to read; its held-out part is used.")] = "python-docs",
    context: Annotated[int, typer.Option(min=2, help="Tokens per piece for bits per byte.")] = 256,
    length: Annotated[int, typer.Option(min=16, help="Positions for the loss by position.")] = 1024,
    documents: Annotated[int, typer.Option(min=2, help="Documents for the loss by position.")] = 64,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Stop bits per byte after this much text.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of context of local tasks, joined by commas.")] = "1024,2048",
    samples: Annotated[int, typer.Option(min=1, help="Samples per length of local tasks.")] = 50,
    book: Annotated[str | None, typer.Option(help="Haystack of local tasks: a text file, folder or pattern.")] = None,
    babi: Annotated[Path | None, typer.Option(help="Folder with bAbI files, such as qa1_test.txt.")] = None,
    depth: Annotated[float | None, typer.Option(help="Place of the needle, 0 to 1; default: anywhere.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per harness task; default: all.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples shown first; default: the task's.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task YAML files of your own.")] = None,
    metadata: Annotated[str | None, typer.Option(help="JSON for harness tasks that generate their data.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests per forward pass of local and harness tasks.")] = 8,
    max_length: Annotated[int | None, typer.Option(min=2, help="Cut harness requests to this many tokens.")] = None,
    seed: Seed = 0,
    session: SessionFile = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON results; default: MODEL/evals.")] = None,
    verbose: Verbose = False,
) -> None:
    """Measure every task, print and save each result, and fail at the end if one of them is no good."""
    from nestlearn.evals.harness import evaluate_harness, harness_tasks

    require_file(session)
    text, local, others = _split(tasks)
    harness = {"include_path": include_path, "metadata": _metadata(metadata, model)}
    # Unknown names and wrong options are refused before anything is loaded.
    found = harness_tasks(others, **harness) if others else None
    numbers = _numbers(lengths)
    tune(verbose)
    hide_progress_bars()
    results, given = _Results(out or _results_folder(model, session)), _given(call, MODEL_OPTIONS)
    with Progress() as progress, _loaded(model, session, dtype, device, progress) as loaded:
        if text:
            bits = {"context": context, "max_bytes": max_bytes} if "bits_per_byte" in text else None
            positions = {"length": length, "documents": documents} if "loss_by_position" in text else None
            required = "loss_by_position" in tasks
            _text_tasks(*loaded, model, corpus, bits, positions, results, required, given, progress)
        for name in local:
            progress(name)
            options = {"lengths": numbers, "n": samples, "book": book, "seed": seed, "batch_size": batch_size}
            options["command"] = _repeat(call, model, name, LOCAL_OPTIONS)
            _local_task(*loaded, name, babi, depth, options, results)
        if found:
            progress(", ".join(others))
            options = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size, "max_length": max_length}
            command = _repeat(call, model, ",".join(others), HARNESS_OPTIONS)
            _print_harness(evaluate_harness(*loaded, found, **options, **harness, seed=seed, command=command), results)
    if results.failed:
        raise typer.Exit(1)


@contextmanager
def _loaded(
    model: str, session: Path | None, dtype: str | None, device: str | None, progress: Callable[[str], None]
) -> Iterator[tuple[Any, Any]]:
    """Model and tokenizer. Inside the context the model uses what the session has learned, and its logits are
    checked."""
    from nestlearn.continual.pretrained import pretrained
    from nestlearn.continual.session import open_session
    from nestlearn.train.finite import refuse_non_finite_logits

    progress(f"loading {model}")
    with ExitStack() as stack:
        if session is None:
            loaded = pretrained(model, dtype=dtype, device=device)
        else:
            memory = open_session(model, session, dtype=dtype, device=device)
            stack.enter_context(memory.active())
            loaded = memory.model, memory.tokenizer
        refuse_non_finite_logits(loaded[0], model)
        yield loaded


def _results_folder(model: str, session: Path | None) -> Path:
    """Beside the session or in the folder of the model; for a model that has no folder of its own, in ``evals``."""
    if session is not None:
        return session.parent / "evals"
    return Path(model) / "evals" if Path(model).is_dir() else Path("evals") / Path(model).name


class _Results:
    """Saves results. One that cannot be saved, or is no finite number, makes the command fail at its end.

    Attributes:
        folder: where each result is saved as ``TASK.json``.
        failed: whether a result was not finite or could not be saved.
    """

    def __init__(self, folder: Path):
        self.folder, self.failed = folder, False

    def save(self, result: EvalResult) -> None:
        """Save a result that has been printed, and print the path."""
        path = self.folder / f"{result.task}.json"
        if not math.isfinite(result.value):
            self._fail(f"{result.task}: {result.metric} is {result.value}, not a finite number.")
        try:
            result.save(path)
            plain_console().print(f"Saved in {path}")
        except OSError as error:
            self._fail(
                f"The result of {result.task} is printed, but cannot be saved as {path}: {error.strerror or error}. "
                "Give a folder that can be written with --out."
            )

    def _fail(self, message: str) -> None:
        self.failed = True
        print_error(message)


def _split(tasks: str) -> tuple[list[str], list[str], list[str]]:
    """Names of the text tasks, of the local tasks and of the harness's tasks.

    Raises:
        ValueError: no names, or a name that is almost one of nestlearn's own.
    """
    local_names = _local_names()
    own = [*TEXT_TASKS, *local_names]
    wanted: list[str] = []
    for name in split_words(tasks):
        matches = list(TEXT_TASKS) if name == "all" else fnmatch.filter(own, name)
        # The harness has a niah_single_1 too: it is no misspelling of local_niah_single_1.
        near = own if name.startswith("local_") else TEXT_TASKS
        close = [] if matches else difflib.get_close_matches(name, near, n=3, cutoff=0.8)
        if close or (near is own and not matches):
            hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(local_names)}."
            raise ValueError(f"Unknown task {name!r}. {hint}")
        wanted += [match for match in (matches or [name]) if match not in wanted]
    if not wanted:
        raise ValueError(f"--tasks {tasks!r} names no task. Give {', '.join(TEXT_TASKS)}, or tasks of the harness.")
    return (
        [name for name in wanted if name in TEXT_TASKS],
        [name for name in wanted if name.startswith("local_")],
        [name for name in wanted if name not in own],
    )


def _local_names() -> list[str]:
    from nestlearn.evals.long_context import LABELS, VARIANTS

    return [*(f"local_{name}" for name in VARIANTS), *(f"{BABILONG}{name}" for name in LABELS)]


def _numbers(text: str) -> list[int]:
    """The lengths of context.

    Raises:
        ValueError: not whole numbers joined by commas.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--lengths {text!r} are no whole numbers joined by commas, such as 1024,2048.") from error


def _metadata(text: str | None, model: str) -> dict[str, Any]:
    """``--metadata`` as a mapping, with the tokenizer for tasks that count tokens.

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
    return {"tokenizer": _tokenizer_place(model), **given}


def _tokenizer_place(model: str) -> str:
    """Where other libraries find the tokenizer of a model."""
    from nestlearn.continual.gguf import PACKAGED, is_gguf
    from nestlearn.continual.pretrained import model_source

    return model_source(model)[0] if model in PACKAGED or is_gguf(Path(model)) else model


def _repeat(call: typer.Context, model: str, tasks: str, names: Sequence[str]) -> str:
    """The command that repeats a result. Of the named options it has those that were given."""
    return command_line("eval", model, tasks=tasks, **_given(call, names))


def _given(call: typer.Context, names: Sequence[str]) -> dict[str, Any]:
    """The named options that were given on the command line."""
    sources = {name: call.get_parameter_source(name) for name in names}
    return {name: call.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _text_tasks(
    model: Any,
    tokenizer: Any,
    name: str,
    corpus: str,
    bits: dict[str, Any] | None,
    positions: dict[str, Any] | None,
    results: _Results,
    required: bool,
    given: dict[str, Any],
    progress: Callable[[str], None],
) -> None:
    """Bits per byte and loss by position on the held-out part of a corpus, each with its settings; None leaves it out.

    The loss by position of documents that are too short is an error if ``required``, and otherwise a note.
    """
    from nestlearn.data import load_corpus
    from nestlearn.evals import bits_per_byte, loss_by_position
    from nestlearn.evals.language import TooFewDocumentsError

    held_out = load_corpus(corpus, "validation")
    if bits is not None:
        command = command_line("eval", name, corpus=corpus, task="bits_per_byte", **bits, **given)
        result = bits_per_byte(model, tokenizer, held_out, **bits, command=command, progress=progress)
        _print_value(result, results)
    if positions is not None:
        command = command_line("eval", name, corpus=corpus, task="loss_by_position", **positions, **given)
        try:
            result = loss_by_position(model, tokenizer, held_out, **positions, command=command, progress=progress)
        except TooFewDocumentsError as error:
            if required:
                raise
            plain_console().print(f"loss_by_position is left out. {error}")
            return
        _print_value(result, results)
        _print_curve(result.details)


def _print_value(result: EvalResult, results: _Results) -> None:
    error = f" ± {result.stderr:.3f}" if result.stderr is not None else ""
    plain_console().print(f"{result.metric}: {result.value:.3f}{error} ({result.n} documents)")
    results.save(result)


def _print_curve(details: dict[str, Any]) -> None:
    table = Table(title="Bits per byte by position")
    curves, edges = details["bits_per_byte"], details["edges"]
    headings = [CURVES[name] for name in curves] if len(curves) > 1 else ["bits per byte"]
    for name in ("positions", *headings):
        table.add_column(name, justify="right")
    for row, (low, high) in enumerate(pairwise(edges)):
        cells = ["" if curve[row] is None else f"{curve[row]:.3f}" for curve in curves.values()]
        table.add_row(f"{low}-{high}", *cells)
    Console().print(table)


def _local_task(
    model: Any,
    tokenizer: Any,
    name: str,
    babi: Path | None,
    depth: float | None,
    options: dict[str, Any],
    results: _Results,
) -> None:
    """Measure a task of needles or facts that is generated here; print accuracy by length, and save it."""
    from nestlearn.evals.long_context import evaluate_babilong, evaluate_ruler

    if name.startswith(NIAH):
        result = evaluate_ruler(model, tokenizer, name.removeprefix("local_"), depth=depth, **options)
    else:
        if babi is None or options["book"] is None:
            missing = "--babi, a folder with bAbI files" if babi is None else "--book, a text file or a folder"
            raise ValueError(f"{name} needs {missing}.")
        result = evaluate_babilong(model, tokenizer, name.removeprefix(BABILONG), babi=babi, **options)
    _print_by_length(result, results)


def _print_by_length(result: EvalResult, results: _Results) -> None:
    """Accuracy by length of context, with published numbers in columns of their own."""
    from nestlearn.evals.tasks.published import PUBLISHED

    entries = PUBLISHED.get(result.task.removeprefix("local_"), ())
    papers = PUBLISHED_MODELS if entries else ()
    table = Table(title=f"{result.task}, %")
    for name in ("tokens", "accuracy", "±", "samples"):
        table.add_column(name, justify="right")
    for paper in papers:
        table.add_column(f"{paper} (published)", justify="right", style="dim")
    ours, theirs = result.details["by_length"], {(entry.model, entry.split): entry.value for entry in entries}
    for length in sorted({*ours, *(entry.split for entry in entries)}, key=int):
        measured = ours.get(length)
        cells = ["", "", ""]
        if measured:
            error = "" if measured["stderr"] is None else f"{100 * measured['stderr']:.1f}"
            cells = [f"{100 * measured['value']:.1f}", error, str(measured["n"])]
        values = (theirs.get((paper, length)) for paper in papers)
        table.add_row(length, *cells, *("" if value is None else f"{value:.1f}" for value in values))
    Console().print(table)
    if entries:
        plain_console().print(f"Published: {entries[0].source}. Models and data differ: do not compare row by row.")
    results.save(result)


def _print_harness(measured: Sequence[EvalResult], results: _Results) -> None:
    """One line per metric, with the paper's number in a column of its own."""
    from nestlearn.evals.tasks.published import PUBLISHED

    table, sources = Table(title="lm-evaluation-harness"), set()
    for name in ("task", "metric", "value", "±", "examples", "Hope 1.3 B (published)"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for result in measured:
        name, metrics = result.task.removeprefix("lm_eval_"), result.details["metrics"]
        for metric, value in metrics.items():
            if "_stderr" in metric:
                continue
            error = metrics.get(f"{metric}_stderr")
            shown = "" if error is None or error != error else f"{error:.4f}"
            published = [entry for entry in PUBLISHED.get(f"{name}/{metric}", ()) if entry.model == "Hope"]
            sources |= {entry.source for entry in published}
            # Our accuracies are shares, the paper's are percentages; perplexities are the same.
            unit = "" if "perplexity" in metric else " %"
            paper = f"{published[0].value:g}{unit}" if published else ""
            table.add_row(name, metric, f"{value:.4f}", shown, str(result.n), paper)
    Console().print(table)
    console = plain_console()
    for source in sources:
        console.print(f"Published: {source}. Sizes and data differ: do not compare row by row.")
    cut = max((result.config["cut_requests"] for result in measured), default=0)
    if cut:
        console.print(f"{cut} requests were cut from the left to {measured[0].config['max_length']} tokens.")
    for result in measured:
        results.save(result)
