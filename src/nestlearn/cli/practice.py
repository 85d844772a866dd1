"""`nestlearn practice`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    tune,
)

HELP = """Let a stacked model learn text files by heart: read them many times, and answer questions made from them.

Nothing but a session file changes. It is created if it does not exist, and saved every minute.

[bold]Examples[/bold]

  nestlearn practice runs/smollm2 --session mine.safetensors --stream handbook.md

  nestlearn practice runs/smollm2 --session mine.safetensors --stream notes/ --passes 60 --minutes 30
"""

_SAVE_SECONDS = 60.0
"""Between two saves."""


def run(
    model: ModelName,
    session: Annotated[Path, typer.Option(help="File of the memory. The first save creates it.")],
    stream: Annotated[list[str], typer.Option(help="Text file, folder or pattern; may be repeated.")],
    passes: Annotated[int, typer.Option(min=1, help="Times each document is read.")] = 30,
    questions: Annotated[int, typer.Option(min=0, help="Questions in each step; 0 reads the text only.")] = 8,
    lr: Annotated[float, typer.Option(help="Factor of the steps of all levels.")] = 1.0,
    minutes: Annotated[float | None, typer.Option(help="Stop after this time.")] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Practise the documents and save the session."""
    tune(verbose)
    hide_progress_bars()
    from nestlearn.continual.session import PracticeReport, at_most_every, open_session
    from nestlearn.evals.learning_setup import stream_documents

    texts = [document.text for document in stream_documents(stream)]
    with Progress() as progress:
        progress(f"loading {model}")
        memory = open_session(model, session, dtype=dtype, device=device)

        save = at_most_every(_SAVE_SECONDS, lambda _: memory.save(session))

        def show(report: PracticeReport) -> None:
            progress(str(report))
            save(report)

        try:
            report = memory.practice(
                *texts, passes=passes, questions=questions, lr=lr, minutes=minutes, seed=seed, progress=show
            )
        finally:
            if memory.nbytes:
                memory.save(session)
    answers = f", answers {report.answers[0]:.2f} -> {report.answers[-1]:.2f}" if report.answers else ""
    plain_console().print(
        f"Practised {len(texts)} documents in {report.steps} steps ({report.questions} questions, "
        f"{report.seconds:.0f} s): text {report.text[0]:.2f} -> {report.text[-1]:.2f}{answers} nats per token.\n"
        f"Saved {session}. Talk to it: {command_line('chat', model, session=session)}"
    )
