"""`nestlearn learn`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from nestlearn.cli.common import (
    Device,
    Dtype,
    ModelName,
    Progress,
    Seed,
    Verbose,
    command_line,
    hide_progress_bars,
    plain_console,
    print_error,
    require_file,
    tune,
)

SESSION = "session.safetensors"
HELP = """Let a model learn from text files, and report what it gained and what it forgot.

A stacked model, or one trained here, learns with its memory (--method cms), which is saved as one file. The other
methods train weights, for comparison: finetune, ewc, replay, lora.

[bold]Examples[/bold]

  nestlearn learn runs/smollm2 --stream notes/*.md --out runs/learned

  nestlearn learn runs/smollm2 --stream book.txt --out runs/book --resume

  nestlearn learn smollm2-135m --stream book.txt --method finetune --learning-rate 1e-5 --out runs/plain
"""


def run(
    context: typer.Context,
    model: ModelName,
    stream: Annotated[list[str], typer.Option(help="Text file, folder or pattern; may be repeated. Read in order.")],
    out: Annotated[Path, typer.Option(help="Folder for what was learned, results.json and report.html.")],
    method: Annotated[str, typer.Option(help="cms, finetune, ewc, replay or lora.")] = "cms",
    session: Annotated[Path | None, typer.Option(help="Go on from this session file (cms).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the stopped run in --out (cms).")] = False,
    save_every: Annotated[float, typer.Option(min=0.0, help="Seconds between saves inside a document (cms).")] = 60.0,
    known: Annotated[str, typer.Option(help="Corpus the model knew before, to measure forgetting.")] = "python-docs",
    known_bytes: Annotated[int, typer.Option(min=100, help="Bytes of it that are scored after each document.")] = 8192,
    passes: Annotated[int, typer.Option(min=1, help="Times each document is read.")] = 1,
    context_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of context; by default the model's, at most 1,024.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the methods that train weights.")] = None,
    strength: Annotated[float, typer.Option(min=0.0, help="Of EWC's penalty.")] = 1.0,
    capacity: Annotated[int, typer.Option(min=1, help="Sequences that replay keeps.")] = 256,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA's adapters.")] = 8,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Learn the documents in order and write the report."""
    stream = _all_files(stream, context.args)
    _refuse_options_of_others(context, method)
    require_file(session)
    tune(verbose)
    hide_progress_bars()
    from nestlearn.evals.learning_setup import DEFAULT_RATES, known_text, make_method, stream_documents
    from nestlearn.evals.report.learning import write_learning_report
    from nestlearn.evals.stream_record import StreamRecord, stream_digests

    options: dict[str, Any] = {"session": session, "known": known, "passes": passes, "context_length": context_length,
        "learning_rate": learning_rate, "strength": strength, "capacity": capacity, "rank": rank, "seed": seed,
        "dtype": dtype, "device": device}  # fmt: skip
    command = command_line(
        "learn", model, "--stream", *stream, method=method, **_given(context, options), known_bytes=known_bytes, out=out
    )
    documents, probe = stream_documents(stream), known_text(known, known_bytes)
    rate = DEFAULT_RATES.get(method) if learning_rate is None else learning_rate
    settings = {"passes": passes, "context length": context_length, "learning rate": rate, "known text": known,
                "known bytes": len(probe.encode()), "seed": seed}  # fmt: skip
    about = StreamRecord(model, method, settings, known, math.nan, (), command, stream_digests(documents))
    earlier = _earlier(out / "results.json", about, resume)
    if earlier is not None and (out / SESSION).is_file():
        options = {**options, "session": out / SESSION, "context_length": None}
    with _stoppable(command, method), Progress() as progress:
        progress(f"loading {model}")
        learner = make_method(method, model, **{**options, "learning_rate": rate})
        if earlier is None:
            progress(f"scoring {known}")
            about = replace(about, known_before=learner.score(probe))
        result, saved = _read_stream(learner, documents, probe, earlier or about, out, save_every, progress)
        report = write_learning_report(result, out / "report.html")
    plain_console().print(f"Learned: {saved}\nReport: {report}")
    if method == "cms":
        plain_console().print(f"Talk to it: {command_line('chat', model, session=saved)}")


@contextmanager
def _stoppable(command: str, method: str) -> Iterator[None]:
    """Ctrl-C ends the command with the way to go on."""
    try:
        yield
    except KeyboardInterrupt:
        way = f"continue with: {command} --resume" if method == "cms" else "what was not saved is lost."
        print_error(way, "Stopped")
        raise typer.Exit(130) from None


def _earlier(file: Path, about: Any, resume: bool) -> Any:
    """The record of the run to go on with; None to begin a new one.

    Raises:
        ValueError: there is none, it is finished, or it had other settings; or a new run would overwrite it.
    """
    from nestlearn.evals.stream_record import StreamRecord

    if not resume:
        if about.method == "cms" and file.is_file() and not StreamRecord.load(file).finished:
            raise ValueError(
                f"{file.parent} holds a run that was stopped. Add --resume to go on with it, or choose another --out."
            )
        return None
    earlier = StreamRecord.load(file)
    if earlier.finished:
        raise ValueError(f"{file.parent} holds a finished run: nothing is left to resume. Its report is report.html.")
    for name in ("model", "method", "stream", "settings"):
        if (now := getattr(about, name)) != (before := getattr(earlier, name)):
            shown = "other documents" if name == "stream" else f"{before}, now {now}"
            raise ValueError(
                f"the run in {file.parent} was begun with another {name} ({shown}). Repeat its command and add "
                f"--resume: {earlier.command}"
            )
    return earlier


_METHODS_OF = {
    "session": ("cms",),
    "resume": ("cms",),
    "save_every": ("cms",),
    "learning_rate": ("finetune", "ewc", "replay", "lora"),
    "strength": ("ewc",),
    "capacity": ("replay",),
    "rank": ("lora",),
}
"""Methods that use an option; the others refuse it."""
_FIXES = {
    "session": "leave it out; the method trains the model's weights.",
    "learning_rate": "leave it out; each level has its own. In Python: MemorySession(model, tokenizer, lr=0.5).",
}


def _refuse_options_of_others(context: typer.Context, method: str) -> None:
    """Raise ValueError for an option that the method would ignore."""
    for name in _given(context, _METHODS_OF):
        users, option = _METHODS_OF[name], f"--{name.replace('_', '-')}"
        if method not in users and method in {user for them in _METHODS_OF.values() for user in them}:
            fix = _FIXES.get(name, "leave it out.")
            raise ValueError(f"{option} is for --method {' or '.join(users)}, and {method} does not use it: {fix}")


def _given(context: typer.Context, names: Iterable[str]) -> dict[str, Any]:
    """The options among these that were given on the command line."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _all_files(stream: list[str], more: list[str]) -> list[str]:
    """All files of the stream. A shell turns ``--stream *.md`` into one option and further arguments.

    Raises:
        ValueError: several ``--stream`` and further arguments, so that the order is unknown.
    """
    if len(stream) > 1 and more:
        raise ValueError(
            f"The arguments {' '.join(more)} belong to none of the {len(stream)} --stream options, so the order of "
            "reading is unknown. Give --stream once, followed by all files in the order to read them."
        )
    return [*stream, *more]


def _read_stream(
    learner: Any, documents: Any, probe: str, about: Any, out: Path, save_every: float, progress: Progress
) -> tuple[Any, Path]:
    """Learn the documents. What was learned and the record so far are saved after each, and now and then inside."""
    from nestlearn.evals.learning import learn_stream

    out.mkdir(parents=True, exist_ok=True)
    console, saved, file = plain_console(), out, out / "results.json"
    due = time.monotonic() + save_every
    if about.documents or about.reading is not None:
        console.print(f"Going on after {len(about.documents)} of {len(documents)} documents.")
    else:
        console.print(f"Known before ({about.known_name}): {about.known_before:.3f} bits per byte.")

    def save(reading: Callable[[], Any]) -> None:
        """Before the first document the session, so that none of an older run stays beside the record. Later the record
        first: it may know of more segments than the session, never of fewer."""
        nonlocal about, due
        began, inside = time.monotonic(), about.reading is not None
        if inside and began < due:
            return
        about = replace(about, reading=reading())
        if not inside and not about.documents:
            learner.save(out)
        about.save(file)
        if inside:
            learner.save(out)
        # A save may be slow: large sessions. It takes at most a twentieth of the time.
        due = time.monotonic() + max(save_every, 20 * (time.monotonic() - began))

    learned = len(about.documents)
    for record in learn_stream(
        learner, documents, probe, progress=progress, learned=learned, reading=about.reading, save=save
    ):
        saved = learner.save(out)
        about = replace(about, documents=(*about.documents, record), reading=None)
        about.save(file)
        console.print(_summary(record, about.known_before))
    return about, saved


def _summary(record: Any, known_before: float) -> str:
    """One line of bits per byte: the text while it was unseen, where it was scored, then the same text again."""
    online, unseen = record.online, ""
    if online is not None:
        off = "" if online.off is None else f" (writes off {online.off:.3f})"
        unseen = f"unseen {online.bits_per_byte:.3f}{off}; "
    return (
        f"{record.name}: {unseen}read again {record.before:.3f} -> {record.after:.3f} bits per byte; known text "
        f"{record.known:.3f} ({100 * (record.known / known_before - 1):+.1f} %); {record.seconds:.1f} s"
    )
