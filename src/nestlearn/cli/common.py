"""Options, consoles and messages that the commands share."""

from __future__ import annotations

import json
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nestlearn.fields import MAX_SEED

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show more, and the traceback of an error.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of every random choice.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
ModelName = Annotated[
    str,
    typer.Argument(help="A folder, a GGUF file, smollm2-135m, or a name on the Hugging Face Hub."),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Weights in fp32 or bf16; default: as they are saved.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps, or auto for all devices together.")
]
SessionFile = Annotated[Path | None, typer.Option("--session", help="Use what this session file has learned.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability.")]

ANY_FIELD = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context of a command that accepts the fields of a configuration as options."""


def plain_console(stderr: bool = False) -> Console:
    """A console that prints text as it is: no markup, no colours, no line breaks of its own."""
    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def print_error(message: str, title: str = "Error") -> None:
    """Print a message for the user on standard error."""
    plain_console(stderr=True).print(f"{title}: {message}")


def print_json(content: dict[str, Any]) -> None:
    """Print a mapping as indented JSON."""
    typer.echo(json.dumps(content, indent=1))


def read_fields(arguments: Sequence[str]) -> dict[str, str]:
    """``--name value`` and ``--name=value`` as a mapping. A name without a value means true.

    Raises:
        ValueError: an argument that belongs to no name.

    Example:
        >>> read_fields(["--hidden-size", "64", "--mixer=attention", "--tie-word-embeddings"])
        {'hidden-size': '64', 'mixer': 'attention', 'tie-word-embeddings': 'true'}
    """
    fields: dict[str, str] = {}
    remaining = list(arguments)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"Unexpected argument {word!r}. Fields are given as --name value.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = remaining.pop(0) if remaining and not remaining[0].startswith("--") else "true"
        fields[name] = value
    return fields


def split_words(text: str) -> list[str]:
    """The words of a list that is separated by commas.

    Example:
        >>> split_words("hope, attention,")
        ['hope', 'attention']
    """
    return [word.strip() for word in text.split(",") if word.strip()]


def command_line(*words: object, **options: object) -> str:
    """The shell command with these words and with the options that are not None.

    Example:
        >>> command_line("eval", "my runs/a", max_bytes=100, book=None)
        "nestlearn eval 'my runs/a' --max-bytes 100"
    """
    given = [(f"--{name.replace('_', '-')}", value) for name, value in options.items() if value is not None]
    return shlex.join(["nestlearn", *map(str, words), *(str(word) for pair in given for word in pair)])


def tune(verbose: bool = False) -> str | None:
    """Tune the memory allocator for training and inference on a CPU; returns what was done, as a sentence."""
    from nestlearn.allocator import tune_allocator

    note = tune_allocator()
    if verbose and note:
        print_error(note, title="Allocator")
    return note


def hide_progress_bars() -> None:
    """Switch off the progress bars of transformers, which it shows even for a small file."""
    from transformers.utils import logging

    logging.disable_progress_bar()


class Progress:
    """What a long command is doing. A terminal shows it in one line that changes; elsewhere standard error gets a line
    every few seconds, as long as the command runs.

    Example:
        >>> with Progress() as progress:
        ...     progress("reading")
    """

    seconds = 5.0
    """Between two lines where there is no terminal."""

    def __init__(self) -> None:
        self._text, self._began = "", time.monotonic()
        console = Console(soft_wrap=True, highlight=False, markup=False)
        self._status = console.status("") if console.is_terminal else None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._print_lines, daemon=True)

    def __call__(self, text: str) -> None:
        self._text = text
        if self._status is not None:
            self._status.update(text)

    def __enter__(self) -> Progress:
        if self._status is not None:
            self._status.start()
        else:
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        if self._status is not None:
            self._status.stop()
        else:
            self._thread.join()

    def _print_lines(self) -> None:
        while not self._done.wait(self.seconds):
            if self._text:
                print(f"{time.monotonic() - self._began:.0f} s: {self._text}", file=sys.stderr, flush=True)  # noqa: T201


def require_file(session: Path | None) -> None:
    """Refuse a session file that does not exist.

    Raises:
        ValueError: there is no such file.
    """
    if session is not None and not session.is_file():
        raise ValueError(f"--session {session} does not exist. Give a file that learn or /save has written.")
