"""`nestlearn edit`."""

from __future__ import annotations

import json
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
    split_words,
    tune,
)

HELP = """Write facts into a session over a stacked model, or take edits back.

Nothing but a session file changes. Without facts and --undo, the edits in it are listed, oldest first.

[bold]Examples[/bold]

  nestlearn edit runs/smollm2 --session mine.safetensors --fact "The capital of France is -> Rome"

  nestlearn edit runs/smollm2 --session mine.safetensors --facts facts.jsonl --method alphaedit

  nestlearn edit runs/smollm2 --session mine.safetensors --undo 2
"""


def run(
    model: ModelName,
    session: Annotated[Path, typer.Option(help="File of the memory. The first save creates it.")],
    fact: Annotated[list[str] | None, typer.Option(help='"PROMPT -> TARGET"; may be repeated.')] = None,
    facts: Annotated[
        Path | None, typer.Option(help='Lines of JSON: {"prompt": ..., "target": ..., "subject": ...}.')
    ] = None,
    subject: Annotated[str | None, typer.Option(help="What a single --fact is about, words of its prompt.")] = None,
    method: Annotated[str, typer.Option(help="intattn, memit, alphaedit or rome.")] = "intattn",
    alpha: Annotated[float | None, typer.Option(help="Share of attention in intattn; by default measured.")] = None,
    layers: Annotated[str | None, typer.Option(help="Numbers of the layers to edit, such as 5,6,7.")] = None,
    general: Annotated[
        Path | None, typer.Option(help="Text that is answered as before; by default the model's.")
    ] = None,
    undo: Annotated[int, typer.Option(min=0, help="Take back so many edits, the last first.")] = 0,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Edit, and save the session."""
    tune(verbose)
    hide_progress_bars()
    wanted = _facts(fact or [], facts, subject)
    if wanted and undo:
        raise ValueError("give either facts or --undo, so that it is clear what is taken back.")
    chosen = None if layers is None else _numbers(layers)
    text = None if general is None else _text(general)
    from nestlearn.continual.session import open_session

    console = plain_console()
    with Progress() as progress:
        progress(f"loading {model}")
        memory = open_session(model, session, dtype=dtype, device=device)
        lines = [_line(memory.undo_edit(), "Taken back: ") for _ in range(undo)]
        if wanted:
            options: dict[str, Any] = {"method": method, "alpha": alpha, "layers": chosen, "general": text}
            report = memory.edit(wanted, **options, seed=seed, progress=progress)
            pairs = zip(wanted, report.before, report.after, strict=True)
            lines = [f"{one.prompt} -> {one.target}: {a:.2f} -> {b:.2f} nats per token" for one, a, b in pairs]
            lines.append(f"Edited {report}, {report.seconds:.0f} s.")
        if wanted or undo:
            memory.save(session)
    if not wanted and not undo:
        lines = [_line(edit) for edit in memory.edits] or ["There are no edits."]
    console.print("\n".join(lines))
    if wanted or undo:
        console.print(f"Saved {session}. Talk to it: {command_line('chat', model, session=session)}")


def _facts(words: list[str], file: Path | None, subject: str | None) -> list[Any]:
    """The facts of the command line, then those of the file.

    Raises:
        ValueError: one cannot be read or edited.
    """
    from nestlearn.continual.editing import Fact

    if subject is not None and (len(words) != 1 or file is not None):
        raise ValueError("--subject belongs to one --fact. Name the subjects of several facts in a file: --facts FILE.")
    found = []
    for text in words:
        prompt, arrow, target = text.rpartition("->")
        if not arrow:
            raise ValueError(f'--fact {text!r} has no arrow. Write it as "The capital of France is -> Rome".')
        found.append(Fact(prompt.strip(), target.strip(), subject))
    for number, line in enumerate([] if file is None else _text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(Fact(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    return found


def _text(file: Path) -> str:
    from nestlearn.data.text_files import read_text

    return read_text(file)


def _numbers(layers: str) -> list[int]:
    words = split_words(layers)
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f"--layers {layers!r} must be numbers with commas between them, such as 5,6,7.")
    return [int(word) for word in words]


def _line(edit: Any, before: str = "") -> str:
    (prompt, _, target), count = edit.facts[0], len(edit.facts)
    more = f" and {count - 1} more" if count > 1 else ""
    return f"{before}{prompt} -> {target}{more} ({edit.method})"
