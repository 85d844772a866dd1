"""`nestlearn chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nestlearn.cli.common import (
    Device,
    Dtype,
    MaxNewTokens,
    ModelName,
    Progress,
    Seed,
    Temperature,
    TopP,
    Verbose,
    hide_progress_bars,
    plain_console,
    tune,
)

HELP = """Talk to a model, and let it learn: /read FILE, /learn on, /edit, /what, /undo, /save, /forget, /help.

[bold]Example[/bold]

  nestlearn chat runs/qwen --session runs/qwen/mine.safetensors
"""


def run(
    model: ModelName,
    session: Annotated[Path, typer.Option(help="File of the memory. The first save creates it.")],
    learn_conversation: Annotated[
        bool, typer.Option("--learn/--no-learn", help="Also learn from the conversation.")
    ] = False,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Read lines from the terminal or a pipe until the conversation ends."""
    tune(verbose)
    hide_progress_bars()
    from nestlearn.continual.chat import Chat, Sampling
    from nestlearn.continual.session import at_most_every, open_session

    memory = open_session(model, session, dtype=dtype, device=device)
    console = plain_console()
    seldom = at_most_every(Progress.seconds, lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201

    def report(text: str) -> None:
        """Progress: on a terminal each text replaces the one before; elsewhere standard error gets a line now and
        then."""
        if console.is_terminal:
            console.print(text[: console.width - 1].ljust(console.width - 1), end="\r")
        else:
            seldom(text)

    def say(text: str) -> None:
        """A piece of an answer, at once."""
        console.print(text, end="")
        sys.stdout.flush()

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    conversation = Chat(memory, session, sampling, learn_conversation, report=report, say=say)
    state = f"{session} ({memory.nbytes:,} bytes)" if session.exists() else f"a new memory, to be saved as {session}"
    console.print(f"{model} with {state}. /help lists the commands.")
    if sys.stdin.isatty():
        # The import gives `input` line editing and a history.
        import readline  # noqa: F401
    while not conversation.done:
        _answer_one_line(conversation, console)


def _answer_one_line(conversation: Any, console: Console) -> None:
    """Read a line, handle it and print the answer. The end of the input saves and leaves.

    Raises:
        SystemExit: the input has ended and the memory could not be saved.
    """
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        console.print(conversation.handle("/quit"))
        if not conversation.done:
            # No further input can name another file.
            raise SystemExit(1) from None
        return
    except KeyboardInterrupt:
        console.print("\n(/quit saves and leaves)")
        return
    try:
        answer = conversation.handle(line)
    except KeyboardInterrupt:
        answer = "Stopped."
    if answer:
        console.print(answer)
