"""`nestlearn info`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nestlearn.cli.common import Verbose, print_json, read_fields

HELP = """Show parameters, FLOPs per token, state size and memory of a model, without building its weights.

[bold]Examples[/bold]

  nestlearn info hope-340m --context-length 8192

  nestlearn info hope-tiny --hidden-size 64 --mixer.chunk-size 32
"""


def run(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A preset, or a folder with a saved model.")],
    context_length: Annotated[int, typer.Option(min=1, help="Tokens of context for FLOPs and state.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows for the memory estimate.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Print the facts as a table or as JSON."""
    from nestlearn.train import TrainConfig, build_config
    from nestlearn.train.inspection import model_facts
    from nestlearn.train.load import model_fields, resolve_model_config

    settings = build_config({"preset": model, **read_fields(context.args)}, model_fields(), TrainConfig())
    facts = model_facts(resolve_model_config(settings), context_length, batch_size)
    if as_json:
        print_json(facts.as_dict())
        return
    table = Table(title=model, show_header=False)
    for label, value in facts.rows():
        table.add_row(label, value)
    Console().print(table)
