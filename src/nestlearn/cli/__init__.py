"""The `nestlearn` command. Each module reads the arguments of one command and prints its result.

The work is done by the other packages. They take seconds to import, so a command imports them when it runs, and
``--help`` does not.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from typing import Annotated

import typer

from nestlearn import __version__
from nestlearn.cli import (
    bench,
    chat,
    demo,
    edit,
    evaluate,
    generate,
    info,
    learn,
    levels,
    plan,
    practice,
    publish,
    serve,
    stack,
    train,
)
from nestlearn.cli.common import ANY_FIELD, print_error
from nestlearn.plugins import load_plugins

app = typer.Typer(
    name="nestlearn",
    help="Train, evaluate and run models that keep learning from what they read.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nestlearn {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of the program itself; `app` has its help."""


app.command("train", help=train.HELP, context_settings=ANY_FIELD)(train.run)
app.command("generate", help=generate.HELP)(generate.run)
app.command("eval", help=evaluate.HELP)(evaluate.run)
app.command("info", help=info.HELP, context_settings=ANY_FIELD)(info.run)
app.command("plan", help=plan.HELP, context_settings=ANY_FIELD)(plan.run)
app.command("levels", help=levels.HELP)(levels.run)
app.command("bench", help=bench.HELP)(bench.run)
app.command("stack", help=stack.HELP)(stack.run)
app.command("learn", help=learn.HELP, context_settings={"allow_extra_args": True})(learn.run)
app.command("practice", help=practice.HELP)(practice.run)
app.command("edit", help=edit.HELP)(edit.run)
app.command("chat", help=chat.HELP)(chat.run)
app.command("publish", help=publish.HELP)(publish.run)
app.command("serve", help=serve.HELP)(serve.run)
app.command("demo", help=demo.HELP)(demo.run)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. An error is one readable message on standard error and a non-zero exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    verbose = "--verbose" in words or "-v" in words
    if not verbose:
        warnings.filterwarnings("ignore")
        logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        if not {"--help", "--version"} & set(words):
            load_plugins()
        app(words, standalone_mode=True)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # A run that a signal stopped has not failed. Its error carries the exit status that a shell expects.
        status = getattr(error, "exit_code", None)
        if verbose and status is None:
            traceback.print_exc()
        print_error(str(error) or type(error).__name__, "Error" if status is None else "Stopped")
        raise SystemExit(1 if status is None else status) from None
    except KeyboardInterrupt:
        print_error("Stopped at once; nothing since the last checkpoint is saved.", "Stopped")
        raise SystemExit(130) from None
